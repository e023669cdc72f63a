"""Small tables with known answers for the tests of curves and pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rsrouter.core import FixedPlan, Plan, Stage, Terms, Tree, expert_stage
from rsrouter.results import ExpertRecord, Table, TableMetadata, TreeRecord


def described(
    role: str = "routed", *, plan: Plan | None = None, alpha: float = 0.001, noise: str = "gaussian",
    stages: Sequence[Stage] = (), experts: Sequence[tuple[str, float]] = (), **changed: Any,
) -> dict[str, Any]:  # fmt: skip
    """What `certify` writes beside a table; its rows are taken for checked (`make_table`)."""
    tree = Tree.of(stages or [expert_stage("e", 0.5, 2)])
    metadata = TableMetadata(
        name="run", role=role, digest="d" * 64, experts=tuple(ExpertRecord(name=n, sigma=s, digest=n) for n, s in experts),
        tree=TreeRecord.of(tree), terms=Terms(plan or FixedPlan(10, 100), alpha, sides="two", seed=1), seed_derived=True,
        noise=noise, stream={"chunk": 100}, execution={}, data={"name": "test images"}, indices=((0, 1, 1),), num_images=1,
        device="cpu", versions={"torch": "9.9"},
    )  # fmt: skip
    return {**metadata.to_dict(), **changed}


def make_table(
    name: str, radius: Sequence[float], correct: Sequence[int], *, idx: Sequence[int] | None = None,
    abstain: Sequence[bool] | None = None,
    expert: Sequence[str] | None = None, bound_by: Sequence[str] | None = None, n_drawn: Sequence[int] | None = None,
    counts: str | Sequence[str] = "", metadata: dict[str, Any] | None = None, rule: str = "",
    answered_by: Sequence[str] | None = None, fixed_votes: Sequence[int] | None = None,
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
        core=np.full(n, -1),
        counts_text=words([counts] * n if isinstance(counts, str) else counts), checked=bool(metadata),
        answered_by=None if answered_by is None else words(answered_by),
        fixed_votes=None if fixed_votes is None else np.array(fixed_votes),
    )  # fmt: skip
