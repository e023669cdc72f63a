"""Routers: flat (Dual RS), cascade, deferral, and how they are labelled."""

from typing import Any

from rsrouter.core.errors import CheckpointError
from rsrouter.experts.registry import register_architecture
from rsrouter.router.base import Routed, Router, single_tree
from rsrouter.router.cascade import CascadeRouter
from rsrouter.router.chain import Voter
from rsrouter.router.deferral import DeferralRouter
from rsrouter.router.flat import FlatRouter
from rsrouter.router.trunk import HeadedTrunk, MLPHead, ResidualHead, Trunk

register_architecture("mlp_head", MLPHead)
register_architecture("residual_head", ResidualHead)

ROUTERS: dict[str, type[FlatRouter] | type[CascadeRouter] | type[DeferralRouter]] = {
    r.kind: r for r in (FlatRouter, CascadeRouter, DeferralRouter)
}


def router_from_config(config: dict[str, Any]) -> Router:
    """The router a configuration describes, with fresh weights where it has any.

    Raises:
        CheckpointError: unknown kind, or a missing field.
    """
    kind = config.get("kind")
    if kind not in ROUTERS:
        raise CheckpointError(
            "Unknown router kind",
            expected=f"one of {sorted(ROUTERS)}",
            received=repr(kind),
            remedy="was it saved by a newer rsrouter?",
        )
    try:
        return ROUTERS[kind].from_config(config)
    except KeyError as error:
        raise CheckpointError(
            f"The {kind} router's configuration is incomplete",
            expected=f"a field {error}",
            received=str(sorted(config)),
            remedy="fetch config.json again",
        ) from error


__all__ = [
    "ROUTERS",
    "CascadeRouter",
    "DeferralRouter",
    "FlatRouter",
    "HeadedTrunk",
    "MLPHead",
    "ResidualHead",
    "Routed",
    "Router",
    "Trunk",
    "Voter",
    "router_from_config",
    "single_tree",
]
