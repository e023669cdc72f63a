"""Small tables with known answers for the tests of curves and pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rsrouter.results import Table


def make_table(
    name: str, radius: Sequence[float], correct: Sequence[int], *, idx: Sequence[int] | None = None,
    abstain: Sequence[bool] | None = None,
    expert: Sequence[str] | None = None, bound_by: Sequence[str] | None = None, n_drawn: Sequence[int] | None = None,
    counts: str | Sequence[str] = "", metadata: dict[str, Any] | None = None, rule: str = "",
) -> Table:  # fmt: skip
    """A table over classes 0 and 1: the label is always 1; `correct` -1 hides it."""
    n = len(radius)
    gone = np.zeros(n, bool) if abstain is None else np.array(abstain)
    held = np.where(gone & (np.array(correct) == 1), 0, np.array(correct))

    def words(values: Sequence[str] | None) -> np.ndarray[Any, Any]:
        array = np.empty(n, dtype=object)
        array[:] = "" if values is None else list(values)
        return array

    return Table(
        name=name, metadata=metadata or {}, idx=np.arange(n) if idx is None else np.array(idx), label=np.where(held < 0, -1, 1),
        predict=np.where(gone, -1, (held != 0).astype(np.int64)), radius=np.where(gone, 0.0, np.array(radius, dtype=np.float64)),
        correct=held, time=np.ones(n), expert=words(expert), rule=words([rule] * n), r_router=np.full(n, np.inf),
        r_expert=np.zeros(n),
        n_drawn=np.full(n, -1) if n_drawn is None else np.array(n_drawn), seed=np.full(n, None), bound_by=words(bound_by),
        counts_text=words([counts] * n if isinstance(counts, str) else counts),
    )  # fmt: skip
