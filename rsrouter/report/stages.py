"""Stages as people call them, and which of them named each image's class."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from rsrouter.results import Table, printable
from rsrouter.results.about import StageRecord, TableMetadata


def stage_titles(about: TableMetadata | None) -> dict[str, str]:
    """Stage names to titles such as "head 1 on sigma_1 and sigma_0.5, noise 0.757, answers from 56%"; {} without metadata."""
    if about is None:
        return {}
    experts = {e.name: e.sigma for e in about.experts}
    heads = [s for s in about.tree.stages if not _plain(s, experts) and not _routes(s)]
    titles = {}
    for stage in about.tree.stages:
        number = f" {heads.index(stage) + 1}" if stage in heads and len(heads) > 1 else ""
        titles[stage.name] = _title(stage, experts, number)
    return titles


def _plain(stage: StageRecord, experts: dict[str, float]) -> bool:
    """Whether the stage is an expert as it is."""
    return stage.name == stage.expert == stage.network and experts.get(stage.name) == stage.sigma


def _routes(stage: StageRecord) -> bool:
    return stage.kind == "plurality" and any(isinstance(t, str) for t in stage.leads_to)


def _title(stage: StageRecord, experts: dict[str, float], number: str) -> str:
    parts = [printable(stage.name)]
    if _routes(stage):
        parts = [f"{parts[0]}, noise {stage.sigma:.3g}"]
    elif not _plain(stage, experts):
        read = re.sub(r"(/\d+x\d+)?(@[\d.e+-]+)?$", "", stage.network)
        names = [read] if read in experts else read.split("+")
        known = names if all(n in experts for n in names) else [stage.expert or stage.network]
        own = read not in experts and read.endswith(f" from {stage.expert}")
        who = f"network {printable(read)}" if own else f"head{number} on {' and '.join(map(printable, known))}"
        parts = [f"{who}, noise {stage.sigma:.3g}"]
    if stage.tau is not None:
        parts.append(f"answers from {100 * stage.tau:.3g}%")
    return ", ".join(parts)


def answering_stages(table: Table) -> NDArray[np.object_] | None:
    """`(N,)` name of the stage whose selection votes named each image's class; None where votes do not tell.

    Only a table whose rows were computed again from their votes tells it (`Table.answered_by`), and only a classifier of
    several stages that answer has more than one.
    """
    return table.answered_by if table.answered_by is not None and len(table.described().tree.stages) > 1 else None


__all__ = ["answering_stages", "stage_titles"]
