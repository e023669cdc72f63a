"""Cost against work: time is linear in votes, and memory does not grow with n or the number of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rsrouter.bench.timing import peak_growth
from rsrouter.clock import seconds
from rsrouter.core.plans import FixedPlan
from rsrouter.experts import Expert
from rsrouter.smooth import Smooth

#: (n, images) that are measured where they fit into `most` votes.
SIZES = ((1_000, 1), (10_000, 1), (100_000, 1), (1_000_000, 1), (1_000, 10), (1_000, 100), (1_000, 1_000), (10_000, 10))


def tiny_expert(shape: tuple[int, ...]) -> Expert:
    """One linear layer: what is left is the cost of the engine and its noise."""
    torch.manual_seed(0)
    numel = int(torch.Size(shape).numel())
    module = nn.Sequential(nn.Flatten(), nn.Linear(numel, 10))
    return Expert(module, sigma=0.5, num_classes=10, input_shape=shape, name="linear")


def scaling(
    expert: Expert, images: Tensor, most: int, device: torch.device, sizes: Sequence[tuple[int, int]] = SIZES
) -> list[dict[str, Any]]:
    """Seconds and peak memory of fixed plans, up to `most` votes in all; images are repeated as often as need be."""
    smooth = Smooth(expert)
    smooth.certify(images[:1], FixedPlan(100, 1000), device=str(device))
    rows = []
    for n, count in sizes:
        if n * count > most:
            continue
        x = images[torch.arange(count) % len(images)]
        took: list[float] = []

        def work(n: int = n, count: int = count, x: Tensor = x, took: list[float] = took) -> None:
            certify = partial(smooth.certify, x, FixedPlan(100, n), ids=range(count), device=str(device))
            took.append(seconds(certify, device))

        grown = peak_growth(work, device)
        rows.append(
            {
                "network": expert.name,
                "n": n,
                "images": count,
                "seconds": took[0],
                "microseconds_per_vote": 1e6 * took[0] / (count * (n + 100)),
                "memory_growth_mb": grown,
            }
        )
    return rows
