"""How a router decides, in words for cards and terminals."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rsrouter.core.titles import is_expert, stage_titles
from rsrouter.core.tree import Stage
from rsrouter.core.types import ABSTAIN
from rsrouter.experts.expert import Expert
from rsrouter.experts.parts import composed
from rsrouter.router.base import Routed
from rsrouter.router.chain import least_confidence


def decides(routed: Routed, experts: Collection[str]) -> list[str]:
    """One sentence for each stage, in the order in which they are asked.

    Args:
        experts: names of the pool's experts.

    >>> from rsrouter.demo import load_pool
    >>> from rsrouter import CascadeRouter
    >>> cascade, pool = CascadeRouter((0.6,), ["sigma_0.5", "sigma_0.25"]), load_pool()
    >>> print(*decides(cascade.bind(pool), pool.names), sep=chr(10))
    sigma_0.5 at noise 0.5: answers where one class has at least 60% of the votes, else asks sigma_0.25
    sigma_0.25 at noise 0.25: answers
    """
    stages = [routed.tree.stages[name] for name in reversed(routed.tree.order)]
    titles = stage_titles(stages, experts)
    sure = {name: least_confidence(m.module, k) for m in routed.models for k, name in enumerate(m.stages)}
    return [_sentence(stage, titles, sure[stage.name]) for stage in stages]


def _sentence(stage: Stage, titles: Mapping[str, str], confidence: float = 0.0) -> str:
    onward = [titles[t] for t in dict.fromkeys(t for t in stage.leads_to if isinstance(t, str))]
    other = f"asks {', '.join(onward)}" if onward else "certifies nothing"
    who = titles[stage.name]
    if not stage.votes:
        who += ", one pass without noise"
    elif is_expert(stage):
        who += f" at noise {stage.sigma:g}"
    elif who != f"{stage.name} at noise {stage.sigma:.3g}":
        who += f" ({stage.name!r} in tables)"
    if stage.tau is not None and not stage.votes:
        return f"{who}: answers where one logit leads by at least {stage.tau:g}, else {other}"
    if stage.tau is not None:
        sure = f" (counting those whose softmax is at least {confidence:g})" if confidence else ""
        return f"{who}: answers where one class has at least {100 * stage.tau:g}% of the votes{sure}, else {other}"
    if onward and ABSTAIN in stage.leads_to[:-1]:
        onward.append("nobody (nothing is certified)")
    most = "the outcome with most votes" if stage.votes else "the largest logit"
    return f"{who}: {most} names who answers: {' or '.join(onward)}" if onward else f"{who}: answers"


def in_lines(routed: Routed, experts: Sequence[Expert], shape: Sequence[int]) -> list[str]:
    """Who decides what: stages in the order in which they are asked, how networks run, and what composite experts are made of."""
    names = [e.name for e in experts]
    stages = decides(routed, names)
    count = "1 stage" if len(stages) == 1 else f"{len(stages)} stages"
    lines = [f"{count} over {', '.join(names)}, images of shape {tuple(shape)}, {routed.noise} noise, {routed.execution.dtype}"]
    lines += [f"  {i}. {line}" for i, line in enumerate(stages, 1)]
    return [*lines, *(f"  {line}" for line in composed(experts))]


def in_one_line(routed: Routed, experts: Sequence[str]) -> str:
    """What `print` shows of a classifier: number of stages, experts, and which it is."""
    stages = len(routed.tree.stages)
    return f"{stages} stage{'s' if stages > 1 else ''} over {', '.join(experts)}; digest {routed.digest[:12]}"


__all__ = ["decides", "in_lines", "in_one_line"]
