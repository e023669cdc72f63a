"""Seconds and votes per certificate: adaptive and fixed, routed and single, float32 and bfloat16, and the papers' loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rsrouter.bench.timing import Figure, figure
from rsrouter.bench.votes import reference_loop
from rsrouter.clock import seconds
from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.plans import AdaptivePlan, FixedPlan
from rsrouter.core.terms import Terms
from rsrouter.core.types import Certificate
from rsrouter.experts import ExpertPool
from rsrouter.router import Router
from rsrouter.sampling.execution import Execution
from rsrouter.smooth import RoutedSmooth, Smooth

ALPHA = 1e-3


def certificate_costs(
    pool: ExpertPool,
    router: Router,
    images: Tensor,
    n_max: int,
    radii: Sequence[float],
    repeats: int,
    device: torch.device,
    fixed_images: int,
) -> list[Figure]:
    """Certificates of `images` under an adaptive plan, and what fixed plans of `n_max` votes cost instead.

    Adaptive votes are a prefix of the fixed run's, so a fixed run gains nothing but time; it is timed on `fixed_images` of
    the images, and its rows say so.
    """
    expert, where, count = pool[len(pool) // 2], str(device), len(images)
    plan, fixed = AdaptivePlan(n_max, radii), FixedPlan(100, n_max)
    drawn = n_max + fixed.n0

    def timed(smoothed: Smooth | RoutedSmooth, sides: str) -> tuple[float, list[Certificate]]:
        within = plan.within(plan.reach(smoothed.tree, AlphaSplit.even(ALPHA, smoothed.tree.paths), sides))
        smoothed.certify(images[:1], FixedPlan(10, 100), device=where)  # what a first call costs is not counted
        found: list[Certificate] = []
        took = seconds(lambda: found.extend(smoothed.certify(images, Terms(within, ALPHA), device=where)), device)
        return took / count, found

    plain = expert.network().eval().to(device)
    loops, fixed_times = [], []
    for k in range(repeats):
        image = images[k % count]
        on_device = image.to(device)
        loops.append(
            seconds(lambda x=on_device: reference_loop(plain, x, expert.sigma, drawn, expert.num_classes), device)  # type: ignore[misc]
        )
    single = Smooth(expert)
    sample = images[:fixed_images]
    fixed_certificates: list[Certificate] = []
    fixed_times.append(
        seconds(lambda: fixed_certificates.extend(single.certify(sample, Terms(fixed, ALPHA), device=where)), device)
        / len(sample)
    )
    found = [
        figure(f"seconds per certificate, reference loop, fixed n = {n_max:,}", loops, "s"),
        figure(f"seconds per certificate, engine, fixed n = {n_max:,} (measured on {len(sample)} images)", fixed_times, "s"),
    ]
    one: dict[str, list[Certificate]] = {}
    for dtype in ("float32", "bfloat16"):
        took, one[dtype] = timed(Smooth(expert, execution=Execution(dtype=dtype)), "one")
        tree_took, tree = timed(RoutedSmooth(pool, router, execution=Execution(dtype=dtype)), "two")
        votes, tree_votes = ([c.n_drawn for c in rows] for rows in (one[dtype], tree))
        share, label = [float(np.mean(votes)) / drawn], f"{dtype}, {count} images"
        found += [
            figure(f"votes per certificate, adaptive, share of the fixed plan's {drawn:,} ({label})", share, most=0.2),
            figure(f"votes per routed certificate, adaptive ({label})", [float(np.mean(tree_votes))], "votes"),
            figure(f"seconds per certificate, adaptive ({label})", [took], "s"),
            figure(f"seconds per routed certificate, adaptive ({label})", [tree_took], "s"),
            figure(f"reference loop fixed / adaptive, seconds ({label})", [t / took for t in loops], least=15.0),
            figure(
                f"adaptive routed tree / fixed single expert, seconds ({label})", [tree_took / t for t in fixed_times], most=1.0
            ),
            figure(f"reference loop fixed / adaptive routed tree, seconds ({label})", [t / tree_took for t in loops]),
        ]
    a, b = (np.array([c.radius for c in one[dtype]]) for dtype in one)
    found.append(figure("mean certified radius, bfloat16 / float32", [float(b.mean() / a.mean()) if a.any() else float("nan")]))
    found.append(_lost(fixed_certificates, one["float32"][: len(sample)], radii))
    return found


def _lost(fixed: Sequence[Certificate], adaptive: Sequence[Certificate], radii: Sequence[float]) -> Figure:
    """The most images, in %, that only the fixed plan certifies at one of the radii."""
    edges = np.maximum(np.asarray(sorted(radii)), np.nextafter(0.0, 1.0))
    reached = [(np.array([c.radius for c in rows])[:, None] >= edges).mean(0) for rows in (fixed, adaptive)]
    lost = 100.0 * (reached[0] - reached[1])
    return Figure(
        f"images certified by the fixed plan alone, at any of {len(edges)} radii ({len(fixed)} images)",
        float(lost.max()),
        float(lost.min()),
        float(lost.max()),
        "%",
    )
