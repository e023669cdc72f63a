"""How a router decides, in words for cards and terminals."""

from __future__ import annotations

from collections.abc import Sequence

from rsrouter.core.tree import Stage
from rsrouter.router.base import Routed


def decides(routed: Routed) -> list[str]:
    """One sentence for each stage, in the order in which they are asked.

    >>> from rsrouter.demo import load_pool
    >>> from rsrouter import CascadeRouter
    >>> cascade, pool = CascadeRouter((0.6,), ["sigma_0.5", "sigma_0.25"]), load_pool()
    >>> print(*decides(cascade.bind(pool)), sep=chr(10))
    sigma_0.5, noise 0.5: answers where one class has at least 60% of the votes, else asks sigma_0.25
    sigma_0.25, noise 0.25: answers
    """
    return [_sentence(routed.tree.stages[name]) for name in reversed(routed.tree.order)]


def _sentence(stage: Stage) -> str:
    onward = list(dict.fromkeys(t for t in stage.leads_to if isinstance(t, str)))
    head = stage.name if stage.name == stage.network or not stage.network else f"{stage.name} on {stage.network}"
    who = f"{head}, noise {stage.sigma:g}" if stage.votes else f"{head}, one pass without noise"
    if stage.tau is not None and not stage.votes:
        return f"{who}: answers where one logit leads by at least {stage.tau:g}, else asks {', '.join(onward)}"
    if stage.tau is not None:
        return f"{who}: answers where one class has at least {100 * stage.tau:g}% of the votes, else asks {', '.join(onward)}"
    most = "the outcome with most votes" if stage.votes else "the largest logit"
    return f"{who}: {most} names who answers: {' or '.join(onward)}" if onward else f"{who}: answers"


def in_one_line(routed: Routed, experts: Sequence[str]) -> str:
    """What `print` shows of a classifier: number of stages, experts, and which it is."""
    stages = len(routed.tree.stages)
    return f"{stages} stage{'s' if stages > 1 else ''} over {', '.join(experts)}; digest {routed.digest[:12]}"


__all__ = ["decides", "in_one_line"]
