"""Rows as a run would write them, without a run: each depends on its image id alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rsrouter.core import Certificate
from rsrouter.results import ResultsWriter, Row

METADATA: dict[str, Any] = {"role": "routed", "alpha": 1e-3, "plan": {"kind": "fixed", "n0": 10, "n": 100}, "seed": 7}


def make_row(idx: int, *, seconds: float = 0.25) -> Row:
    """Every kind of value occurs: abstentions, unknown labels, infinite r_router, seeds beyond 64 bits."""
    rng = np.random.default_rng([3, idx])
    certified = rng.uniform() > 0.2
    votes = tuple(int(v) for v in rng.multinomial(100, [0.7, 0.2, 0.1]))
    certificate = Certificate(
        predict=int(rng.integers(0, 3)) if certified else -1,
        radius=float(rng.uniform(0, 2)) if certified else 0.0,
        expert=f"sigma-{rng.integers(0, 3)}",
        n_drawn=int(rng.integers(100, 5000)),
        counts={"router": votes, "sigma-0": votes[::-1]},
        bound_by="router",
        selection={"router": (10, 0, 0)},
        r_router=float("inf") if rng.uniform() > 0.5 else 0.5,
        r_expert=0.25,
    )
    label = int(rng.integers(-1, 3))
    return Row.from_certificate(certificate, idx=idx, label=label, seconds=seconds, rule="tree", seed=2**70 + 1)


def run_job(path: Path, ids: Iterable[int], metadata: dict[str, Any] = METADATA, **options: Any) -> None:
    """What a certify command does with its results: skip what is done, append the rest."""
    with ResultsWriter(path, metadata, **options) as writer:
        done = writer.done()
        for idx in ids:
            if idx not in done:
                writer.append(make_row(idx))
