"""The cost of one call of `certify` for one image, the first and later ones, beside the papers' CERTIFY."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from rsrouter.bench.votes import reference_loop
from rsrouter.clock import processor_seconds, seconds
from rsrouter.core.bounds import binom_lower
from rsrouter.core.plans import FixedPlan
from rsrouter.core.terms import Terms
from rsrouter.experts import Expert, build_architecture
from rsrouter.smooth import Smooth

#: Estimation votes of the calls, after `n0` selection votes.
VOTES = (100, 200, 300, 500, 1_000, 10_000)


def random_expert(architecture: str, size: int = 224) -> Expert:
    """A registered or timm architecture with random weights, for RGB images of `size` x `size`."""
    torch.manual_seed(0)
    network = build_architecture(architecture, 10).eval()
    return Expert(network, sigma=0.5, num_classes=10, input_shape=(3, size, size), name=architecture.rpartition("/")[2])


def call_costs(
    expert: Expert, images: Tensor, device: torch.device, *, votes: Sequence[int] = VOTES, n0: int = 100, repeats: int = 5
) -> list[dict[str, Any]]:
    """Seconds of `Smooth.certify` and of the papers' CERTIFY for one image at a time, in turn.

    Both draw `n0` votes to choose the class and n to estimate its probability. The loop runs the module as it is, in
    batches of 1,000 (the papers' default), or of as many images as are 64 MB.

    Args:
        expert: the network.
        images: `(N, C, H, W)`; every call takes the next one.
        device: where.
        votes: the numbers n.
        n0: selection votes.
        repeats: timed calls of each n.

    Returns:
        Per n: seconds of the first call of a new classifier, medians of later ones and of the loop, and the median of their
        ratios (above 1: the loop takes longer). On a CPU seconds of the processor, which other programs do not lengthen.
    """
    time = processor_seconds if device.type == "cpu" else seconds
    smooth, plain = Smooth(expert), expert.network().eval().to(device)
    turn = cycle(images)
    batch = min(1000, max(1, 2**24 // images[0].numel()))
    rows = []
    for n in votes:
        terms = Terms(FixedPlan(n0, n))
        first = time(partial(Smooth(expert).certify, next(turn)[None], terms, device=str(device)), device)
        smooth.certify(next(turn)[None], terms, device=str(device))

        def loop(image: Tensor, n: int = n) -> object:
            draw = [reference_loop(plain, image, expert.sigma, count, expert.num_classes, batch) for count in (n0, n)]
            return binom_lower(draw[1][draw[0].argmax()], n, 1e-3)

        loop(next(turn).to(device))
        took: dict[str, list[float]] = {"certify": [], "loop": []}
        for _ in range(repeats):
            image = next(turn)
            took["certify"].append(time(partial(smooth.certify, image[None], terms, device=str(device)), device))
            took["loop"].append(time(partial(loop, image.to(device)), device))
        ratio = [b / a for a, b in zip(took["certify"], took["loop"], strict=True)]
        medians = {name: sorted(values)[len(values) // 2] for name, values in {**took, "ratio": ratio}.items()}
        rows.append({"network": expert.name, "n": n, "first": first, **medians})
    return rows


def break_even(rows: Sequence[dict[str, Any]]) -> int | None:
    """The fewest votes n from which on the loop was never faster; None where it was at the most.

    >>> break_even([{"n": 100, "ratio": 0.8}, {"n": 300, "ratio": 1.1}, {"n": 1000, "ratio": 1.3}])
    300
    """
    found = None
    for row in reversed(rows):
        if row["ratio"] < 1.0:
            break
        found = row["n"]
    return found
