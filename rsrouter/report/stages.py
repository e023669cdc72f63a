"""Stages as people call them, and which of them named each image's class."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.titles import stage_titles as titles_of
from rsrouter.results import Table, printable
from rsrouter.results.about import TableMetadata

#: Whether experts or stages are told apart, and which of them named each image's class.
Answering = tuple[str, NDArray[np.object_]]


def stage_titles(about: TableMetadata | None) -> dict[str, str]:
    """Stage names to titles such as "head 1 on sigma_1 and sigma_0.5 at noise 0.757, answers from 56%"; {} without metadata."""
    if about is None:
        return {}
    answers = {s.name: f", answers from {100 * s.tau:.3g}%" for s in about.tree.stages if s.tau is not None}
    return {name: title + answers.get(name, "") for name, title in _titles(about).items()}


def _titles(about: TableMetadata) -> dict[str, str]:
    found = titles_of(about.tree.stages, [e.name for e in about.experts])
    return {name: printable(title) for name, title in found.items()}


def answering_stages(table: Table) -> NDArray[np.object_] | None:
    """`(N,)` name of the stage whose selection votes named each image's class; None where votes do not tell.

    Only a table whose rows were computed again from their votes tells it (`Table.answered_by`), and only a classifier of
    several stages that answer has more than one.
    """
    return table.answered_by if table.answered_by is not None and len(table.described().tree.stages) > 1 else None


def answering(table: Table) -> Answering:
    """`("expert" or "stage", which one named each image's class)`.

    The stage wherever the experts' names would not tell: heads and networks of the router's own answer, or all stages of a chain
    read one expert.
    """
    stages, experts = answering_stages(table), set(table.expert.tolist()) - {""}
    if stages is None or (len(experts) != 1 and set(stages.tolist()) <= {*experts, ""}):
        return "expert", table.expert
    return "stage", stages


def answered_in_words(table: Table) -> list[str]:
    """Who named each image's class, for people."""
    kind, column = answering(table)
    titles = _titles(table.about) if kind == "stage" and table.about is not None else {}
    return [titles.get(str(name), str(name)) for name in column]


__all__ = ["Answering", "answered_in_words", "answering", "answering_stages", "stage_titles"]
