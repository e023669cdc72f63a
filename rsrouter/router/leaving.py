"""A chain whose last stage leaves an input to the pool's core where no class has enough of its votes."""

from __future__ import annotations

from rsrouter.core.errors import InputError
from rsrouter.experts.pool import ExpertPool
from rsrouter.router.base import Router
from rsrouter.router.cascade import CascadeRouter
from rsrouter.router.chain import check_thresholds
from rsrouter.router.deferral import DeferralRouter


def check_leaving(pool: ExpertPool, router: Router | str, tau: float) -> None:
    """Refuses what cannot leave inputs to a core.

    Args:
        pool: with a core.
        router: itself, or the kind that is to be trained.
        tau: share of the last stage's votes from which it answers.

    Raises:
        InputError: a pool without a core, a flat router, a threshold outside (1/2, 1).
    """
    check_thresholds([tau])
    flat = router == "flat" if isinstance(router, str) else not isinstance(router, CascadeRouter | DeferralRouter)
    if pool.core is None or flat:
        raise InputError(
            "This router cannot leave inputs to a core",
            expected="a chain of stages (cascade or deferral) over a pool with a core",
            received="a pool without a core" if pool.core is None else f"{router if isinstance(router, str) else router.kind}",
            remedy="rsrouter wrap ... --core REF; of a flat router, name 'core' among its experts" if pool.core is None
            else "train kind deferral or cascade; of a flat router, name 'core' among its experts",
        )  # fmt: skip


def leave_to_core(router: Router, pool: ExpertPool, tau: float) -> Router:
    """`router`, whose last stage answers only where one class has at least `tau` of its votes.

    Raises:
        InputError: as `check_leaving`.
    """
    check_leaving(pool, router, tau)
    if isinstance(router, DeferralRouter):
        return DeferralRouter(router.voters, (*router.thresholds[: len(router.voters) - 1], tau), router.heads)
    assert isinstance(router, CascadeRouter)
    names = router.order(pool)
    return CascadeRouter((*router.thresholds[: len(names) - 1], tau), names)


__all__ = ["check_leaving", "leave_to_core"]
