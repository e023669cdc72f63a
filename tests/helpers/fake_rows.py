"""Rows as a run writes them, without networks: each image's votes depend on its id alone, and its row follows from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rsrouter.core import AdaptivePlan, CertifyPolicy, FixedPlan, Plan, Stage, Terms, Tree, cascade_tree, expert_stage, flat_tree
from rsrouter.results import ExpertRecord, ResultsWriter, Row, TableMetadata, TreeRecord, pack_ids

EXPERTS = [expert_stage(f"sigma-{k}", sigma, 3) for k, sigma in enumerate((0.25, 0.5, 1.0))]
TREES: dict[str, Tree] = {
    "flat": flat_tree("router", 1.0, EXPERTS),
    "single": Tree.of([EXPERTS[1]]),
    "cascade": cascade_tree(EXPERTS[::-1], (0.6, 0.55)),
    "shared": flat_tree("router", 1.0, [EXPERTS[0], replace(EXPERTS[2], network="router")]),
    "routers": Tree.of(
        [
            Stage("top", 1.0, leads_to=("left", "sigma-1", -1)),
            Stage("left", 0.5, leads_to=("sigma-0", 2, -1)),
            *EXPERTS[:2],
        ]
    ),
}
FIXED = FixedPlan(10, 100)
FINE = AdaptivePlan(3000, tuple(np.arange(0.05, 1.5, 0.05)), 20, growth=1.3, last_share=0.5)
SEED = 2**62 + 1


def described(
    tree: str = "flat",
    plan: Plan = FIXED,
    *,
    ids: Iterable[int] = range(30),
    rule: str = "tree",
    sides: str = "two",
    **changed: Any,
) -> dict[str, Any]:
    """Metadata of such a run, JSON-ready; `changed` replaces keys."""
    order = list(ids)
    metadata = TableMetadata(
        name="routed" if tree != "single" else "sigma-1",
        role="expert" if tree == "single" else "routed",
        digest="d" * 64,
        router=None if tree == "single" else tree,
        experts=tuple(ExpertRecord(name=e.name, sigma=e.sigma, digest=e.name) for e in EXPERTS),
        tree=TreeRecord.of(TREES[tree]),
        terms=Terms(plan, 0.001, rule, sides, SEED),
        seed_derived=True,
        noise="gaussian",
        stream={"chunk": 100},
        execution={"batch": 250, "dtype": "float32"},
        data={"name": "test", "images": max(order, default=-1) + 1},
        indices=pack_ids(order),
        num_images=len(order),
        device="cpu",
        versions={"torch": "9.9"},
        info={"threads": 2},
    )
    return {**metadata.to_dict(), **changed}


METADATA: dict[str, Any] = described()


def make_rows(
    ids: Iterable[int], tree: str = "flat", plan: Plan = FIXED, *, rule: str = "tree", sides: str = "two", seconds: float = 0.25
) -> list[Row]:
    """Rows of some images: confident ones, close ones, abstentions, unknown labels and infinite r_router occur."""
    structure, order = TREES[tree], list(ids)
    about = TableMetadata.read(described(tree, plan, rule=rule, sides=sides), "made")
    odds, rngs = [], []
    for idx in order:
        rng = np.random.default_rng([3, idx])
        odds.append(
            {s: rng.dirichlet(np.full(structure.stages[s].num_outcomes, rng.choice([0.05, 0.3]))) for s in structure.order}
        )
        rngs.append(rng)
    policy = CertifyPolicy(structure, plan, about.split, len(order), rule=rule, sides=sides)
    while live := [i for i in range(len(order)) if not policy.done[i]]:
        requests = policy.next_requests(live)
        votes = [
            {
                s: rngs[r.image].multinomial(r.count, odds[r.image][s])
                for s in structure.order
                if structure.stages[s].network == r.network
            }
            for r in requests
        ]
        policy.update(requests, votes)
    written = about.rule if about.role == "routed" else ""
    return [
        Row.from_certificate(
            policy.certificate(k), idx=idx, label=int(idx * 7 % 4) - 1, seconds=seconds, rule=written, seed=about.seed
        )
        for k, idx in enumerate(order)
    ]


@cache
def _row(idx: int) -> Row:
    return make_rows([idx])[0]


def make_row(idx: int, *, seconds: float = 0.25) -> Row:
    """One row of the routed run."""
    return replace(_row(idx), time=seconds)


def run_job(path: Path, ids: Iterable[int], metadata: dict[str, Any] = METADATA, **options: Any) -> None:
    """What a certify command does with its results: skip what is done, append the rest."""
    with ResultsWriter(path, metadata, **options) as writer:
        done = writer.done()
        for idx in ids:
            if idx not in done:
                writer.append(make_row(idx))
