"""Titles of a tree's stages, for people."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Protocol


class NamedStage(Protocol):
    """What a title is made of: a `Stage`, or its record in a table."""

    @property
    def name(self) -> str: ...
    @property
    def network(self) -> str: ...
    @property
    def expert(self) -> str | None: ...
    @property
    def sigma(self) -> float: ...
    @property
    def kind(self) -> str: ...
    @property
    def leads_to(self) -> tuple[object, ...]: ...


def stage_titles(stages: Iterable[NamedStage], experts: Collection[str]) -> dict[str, str]:
    """Names of stages to titles for people: an expert keeps its name, a head says what it reads and at which noise.

    Args:
        stages: in the order in which heads are to be numbered.
        experts: names of the pool's experts.

    >>> from rsrouter.core.tree import expert_stage
    >>> asked = [expert_stage("own from a@0.65", 0.65, 10, expert="a"), expert_stage("a+b", 0.5, 10, expert="a"),
    ...          expert_stage("a itself@0.3", 0.3, 10, expert="a"), expert_stage("a", 0.5, 10, expert="a"),
    ...          expert_stage("a:2", 0.5, 10, network="a", expert="a")]
    >>> for title in stage_titles(asked, ["a", "b"]).values():
    ...     print(title)
    a network of its own at noise 0.65
    head on a and b at noise 0.5
    a at noise 0.3
    a
    a again
    """
    known, titles = list(stages), {}
    own = [s.name for s in known if _owner(s, experts)]
    networks = list(dict.fromkeys(_bare(s.network) for s in known if s.name in own))
    bare = [s.name for s in known if f"{s.expert} itself" in (_bare(s.network), _bare(_unnumbered(s.name)))]
    again = [s.name for s in known if s.network == s.expert and _visit(s) and not _routes(s)]
    heads = [s.name for s in known if s.name not in (*own, *bare, *again) and not is_expert(s) and not _routes(s)]
    for stage in known:
        at = f" at noise {stage.sigma:.3g}"
        if stage.name in own:
            which = networks.index(_bare(stage.network)) + 1
            who = f"network {which} of its own" if len(networks) > 1 else "a network of its own"
            titles[stage.name] = f"{who}{at}{_visit(stage)}"
        elif stage.name in bare:
            titles[stage.name] = f"{stage.expert}{at}{_visit(stage)}"
        elif stage.name in again:
            titles[stage.name] = f"{stage.expert}{_visit(stage)}"
        elif stage.name in heads:
            number = f" {heads.index(stage.name) + 1}" if len(heads) > 1 else ""
            titles[stage.name] = f"head{number} on {' and '.join(_read(stage, experts))}{at}"
        else:
            titles[stage.name] = stage.name if is_expert(stage) else f"{stage.name}{at}"
    return titles


def is_expert(stage: NamedStage) -> bool:
    """Whether the stage is an expert as it is.

    >>> from rsrouter.core.tree import expert_stage
    >>> is_expert(expert_stage("a", 0.5, 10, expert="a"))
    True
    """
    return stage.name == stage.expert == stage.network


def _visit(stage: NamedStage) -> str:
    """Which time in a chain the network is asked: nothing, " again", " again (3)"."""
    first = _unnumbered(stage.name) if _bare(_unnumbered(stage.name)) == f"{stage.expert} itself" else stage.network
    visit = stage.name.removeprefix(f"{first}:")
    return "" if visit == stage.name else " again" if visit == "2" else f" again ({visit})"


def _unnumbered(name: str) -> str:
    """A stage's name without the number of its visit."""
    return re.sub(r":\d+$", "", name)


def _routes(stage: NamedStage) -> bool:
    return stage.kind == "plurality" and any(isinstance(t, str) for t in stage.leads_to)


def _bare(network: str) -> str:
    """A network's name without its grid and noise."""
    return re.sub(r"(/\d+x\d+)?(@[\d.e+-]+)?$", "", network)


def _owner(stage: NamedStage, experts: Collection[str]) -> bool:
    read = _bare(stage.network)
    return read not in experts and read.endswith(f" from {stage.expert}")


def _read(stage: NamedStage, experts: Collection[str]) -> list[str]:
    """The experts whose features a head reads."""
    read = _bare(stage.network)
    names = [read] if read in experts else read.split("+")
    return names if all(n in experts for n in names) else [stage.expert or stage.network]


__all__ = ["NamedStage", "is_expert", "stage_titles"]
