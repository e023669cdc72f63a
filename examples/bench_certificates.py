"""Measures the cost of the statistics, in microseconds an image: counts -> bounds -> radius, in one vectorised batch.

    python examples/bench_certificates.py [--images 10000]

One vote (10 classes), a router over three experts, and a whole policy run (selection, stopping, certificates) on
scripted votes. Medians of five runs, CPU time of this process; nothing here draws a vote from a network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from rsrouter.core import AdaptivePlan, AlphaSplit, CertifyPolicy, FixedPlan, Plan, Tree, expert_stage, flat_tree, tree_radius

N, ALPHA = 100_000, 1e-3


def median_us(call: Callable[[], object], images: int, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return float(np.median(seconds)) / images * 1e6


def shares(rng: np.random.Generator, images: int, outcomes: int) -> np.ndarray:
    p = rng.dirichlet(np.full(outcomes, 0.3), images)
    p[:, 0] += rng.exponential(3.0, images)
    return p / p.sum(1, keepdims=True)


def certificates(tree: Tree, counts: dict[str, np.ndarray], sides: str) -> np.ndarray:
    """Counts to radii for class 0, as the policy does it."""
    plan, split = FixedPlan(100, N), AlphaSplit.even(ALPHA, tree.paths)
    size = len(counts[tree.root])
    zeros = np.zeros(size, dtype=np.int64)
    stages, lower, upper = [], {}, {}
    for name, stage in tree.stages.items():
        bounds = plan.bounds(stage, counts[name], zeros, zeros, zeros, alpha=split.stages[name], sides=sides)
        stages.append(replace(stage, reference=zeros))
        lower[name], upper[name] = bounds.lower, bounds.upper
    return tree_radius(stages, tree.root, lower, upper, zeros)[0]


def run(tree: Tree, plan: Plan, p: dict[str, np.ndarray], images: int) -> tuple[float, float]:
    """Policy microseconds an image (votes excluded) and mean votes an image."""
    rng = np.random.default_rng(1)
    policy = CertifyPolicy(tree, plan, AlphaSplit.even(ALPHA, tree.paths), images)
    spent, live = 0.0, list(range(images))
    while live:
        start = time.process_time()
        requests = policy.next_requests(live)
        spent += time.process_time() - start
        votes = [{r.network: rng.multinomial(r.count, p[r.network][r.image])} for r in requests]
        start = time.process_time()
        policy.update(requests, votes)
        live = [i for i in live if not policy.done[i]]
        spent += time.process_time() - start
    start = time.process_time()
    drawn = [policy.certificate(i).n_drawn for i in range(images)]
    spent += time.process_time() - start
    return spent / images * 1e6, float(np.mean(drawn))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    images = parser.parse_args().images
    rng = np.random.default_rng(0)
    experts = [expert_stage(f"expert-{s}", s, 10) for s in (0.25, 0.5, 1.0)]
    trees = {"one vote": Tree.of(experts[:1]), "router + 3 experts": flat_tree("router", 1.0, experts)}
    print(f"{images} images, n = {N}, alpha = {ALPHA}; microseconds an image")
    for title, tree in trees.items():
        p = {name: shares(rng, images, tree.stages[name].num_outcomes) for name in tree.order}
        counts = {name: np.stack([rng.multinomial(N, row) for row in p[name]]) for name in p}
        for sides in ("one", "two"):
            us = median_us(lambda tree=tree, counts=counts, sides=sides: certificates(tree, counts, sides), images)
            print(f"  certificate, {title:20s} {sides}-sided  {us:8.1f}")
        for plan in (FixedPlan(100, N), AdaptivePlan(N, np.arange(0.0, 0.8, 0.25))):
            us, drawn = run(tree, plan, p, images)
            print(f"  policy run,  {title:20s} {plan.kind:9s}  {us:8.1f}   ({drawn:.0f} votes an image)")


if __name__ == "__main__":
    main()
