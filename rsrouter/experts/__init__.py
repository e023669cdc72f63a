"""Experts: any randomized-smoothing checkpoint as a pinned, verified base classifier."""

from rsrouter.experts.base import Expert, ExpertPool, Normalise, Provenance, module_digest
from rsrouter.experts.composite import Denoiser, Diffusion, Ensemble, at_sigmas, denoised, ensemble, load_denoiser
from rsrouter.experts.loaders import LOADERS, NORMALISATIONS, load_expert
from rsrouter.experts.registry import architectures, build_architecture, register_architecture

__all__ = [
    "LOADERS", "NORMALISATIONS", "Denoiser", "Diffusion", "Ensemble", "Expert", "ExpertPool", "Normalise", "Provenance",
    "architectures", "at_sigmas", "build_architecture", "denoised", "ensemble", "load_denoiser", "load_expert", "module_digest",
    "register_architecture",
]
