"""Experts: any randomized-smoothing checkpoint as a pinned, verified base classifier."""

from rsrouter.experts.base import Expert, ExpertPool, Normalise, Provenance, module_digest
from rsrouter.experts.registry import architectures, build_architecture, register_architecture

__all__ = [
    "Expert", "ExpertPool", "Normalise", "Provenance", "architectures", "build_architecture", "module_digest",
    "register_architecture",
]
