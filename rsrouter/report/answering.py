"""Which stage of a chain named each image's class: where one expert carries several stages, its name says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsrouter.results import Table


def answering_stages(table: Table) -> NDArray[np.object_] | None:
    """`(N,)` name of the stage whose selection votes named the class: the first threshold stage where one outcome reached its
    tau, else the last stage (`rsrouter.core.requests.descend`). "" for a row without votes.

    None where the metadata name no chain of stages (thresholds, then one plurality), or no row has votes.
    """
    stages = table.metadata.get("stages")
    if not isinstance(stages, list) or len(stages) < 2 or not all(isinstance(s, Mapping) for s in stages):
        return None
    if [s.get("kind") for s in stages] != ["threshold"] * (len(stages) - 1) + ["plurality"]:
        return None
    found = np.array([_answering(stages, table.counts(i)["select"]) for i in range(len(table))], dtype=object)
    return found if any(found) else None


def _answering(stages: list[Mapping[str, Any]], votes: Mapping[str, tuple[int, ...]]) -> str:
    for stage in stages:
        name, tau, counts = str(stage.get("name")), stage.get("tau"), votes.get(str(stage.get("name")))
        if not counts:
            return ""
        if tau is None or max(counts) >= float(tau) * sum(counts):
            return name
    return ""
