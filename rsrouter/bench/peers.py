"""Certificates beside the field's own programs: the papers' loop, and ART's `PyTorchRandomizedSmoothing`, in one run.

Every way certifies the same image in each round, one after the other, on one thread, in processor time: what else the machine
does slows all of them alike, or none. Peers run in the batches that their authors set, and in those that suit them best here.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsrouter.bench.calls import random_expert
from rsrouter.bench.votes import reference_loop
from rsrouter.clock import processor_seconds, seconds
from rsrouter.core.bounds import binom_lower
from rsrouter.core.certificates import vote_radius
from rsrouter.core.plans import AdaptivePlan, FixedPlan
from rsrouter.core.terms import Terms
from rsrouter.core.types import ABSTAIN
from rsrouter.experts import Expert
from rsrouter.smooth import Smooth

#: What installs the peer that is a package, with what it imports and does not ask for.
ART = "pip install adversarial-robustness-toolbox scikit-learn statsmodels"
#: Rows of a peer's forward pass, as its authors set them.
USUAL = {"papers' loop": 1000, "ART": 32}
#: What is tried for those that suit it best.
BATCHES = (32, 100, 400, 1000)
#: Images of noise for networks of random weights.
DRAWN = torch.rand((4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
#: Failure probability, as everywhere in the field.
ALPHA = 1e-3

#: One certificate: an image to its class (ABSTAIN where there is none) and radius.
Way = Callable[[Tensor], tuple[int, float]]


@dataclass(frozen=True)
class PeerCost:
    """What one certificate costs.

    Attributes:
        network: which.
        way: who certifies.
        batch: rows of its forward passes; 0: its own choice.
        seconds: median over the rounds.
        ratio: median over the rounds of its seconds over those of the engine under the same fixed plan.
        low, high: of the ratio.
        radius: mean certified radius; what it is worth.
    """

    network: str
    way: str
    batch: int
    seconds: float
    ratio: float
    low: float
    high: float
    radius: float


def papers_certify(module: nn.Module, expert: Expert, n: int, n0: int, batch: int) -> Way:
    """CERTIFY of Cohen et al. 2019: votes choose a class, others bound its probability from below."""

    def certify(image: Tensor) -> tuple[int, float]:
        chosen, votes = (reference_loop(module, image, expert.sigma, m, expert.num_classes, batch) for m in (n0, n))
        top = int(chosen.argmax())
        radius = float(vote_radius(expert.sigma, binom_lower(votes[top], n, ALPHA)))
        return (top, radius) if radius > 0 else (ABSTAIN, 0.0)

    return certify


def art_smoothed(module: nn.Module, expert: Expert, n0: int, device: torch.device) -> Any:
    """ART's smoothed classifier of a copy of the module; None where ART is not installed."""
    try:
        from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
    except ImportError:
        return None
    return PyTorchRandomizedSmoothing(
        model=copy.deepcopy(module),
        loss=nn.CrossEntropyLoss(),
        input_shape=expert.input_shape,
        nb_classes=expert.num_classes,
        device_type="cpu" if device.type == "cpu" else "gpu",
        sample_size=n0,
        scale=expert.sigma,
        alpha=ALPHA,
    )


def art_certify(smoothed: Any, n: int, batch: int) -> Way:
    """ART's own `certify`, of one image."""

    def certify(image: Tensor) -> tuple[int, float]:
        classes, radii = smoothed.certify(image[None].cpu().numpy(), n=n, batch_size=batch)
        return int(np.asarray(classes)[0]), float(np.asarray(radii)[0])

    return certify


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch's operations, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best(make: Callable[[int, int], Way], image: Tensor, n: int, clock: Callable[..., float], device: torch.device) -> int:
    """The batch in which a certificate of `n` votes takes least time, each tried once after one that does not count."""
    times = {}
    for batch in [b for b in BATCHES if b <= n] or [n]:
        way = make(n, batch)
        way(image)
        times[batch] = clock(partial(way, image), device)
    return min(times, key=lambda b: times[b])


def peer_costs(
    expert: Expert,
    images: Tensor,
    device: torch.device,
    *,
    n: int = 10_000,
    n0: int = 100,
    repeats: int = 3,
    radii: Sequence[float] = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2),
) -> list[PeerCost]:
    """Seconds of one certificate: by the engine, under a fixed and an adaptive plan, by the papers' loop, by ART if it is there.

    Args:
        expert: the network.
        images: `(N, C, H, W)` pixels in [0,1]; every round takes the next one.
        device: where.
        n, n0: estimation and selection votes; of the adaptive plan the most.
        repeats: rounds.
        radii: grid of the adaptive plan; those within reach are kept.
    """
    clock = processor_seconds if device.type == "cpu" else seconds
    plain = expert.network().eval().to(device)
    smooth = Smooth(expert)
    fixed = Terms(FixedPlan(n0, n), ALPHA)
    reach = fixed.plan.reach(smooth.tree, smooth.routed.split(fixed))
    adaptive = Terms(AdaptivePlan(n, radii, n0).within(reach), ALPHA)
    images = images.to(device)

    def engine(terms: Terms) -> Way:
        def certify(image: Tensor) -> tuple[int, float]:
            (found,) = smooth.certify(image[None], terms, device=str(device), progress=lambda _: None)
            return found.predict, found.radius

        return certify

    makers: dict[str, Callable[[int, int], Way]] = {
        "papers' loop": lambda votes, batch: papers_certify(plain, expert, votes, n0, batch)
    }
    if (smoothed := art_smoothed(plain, expert, n0, device)) is not None:
        makers["ART"] = lambda votes, batch: art_certify(smoothed, votes, batch)
    with one_thread():
        batches = {"engine, fixed": 0, "engine, adaptive": 0}
        ways = {"engine, fixed": engine(fixed), "engine, adaptive": engine(adaptive)}
        for name, make in makers.items():
            best = _best(make, images[0], min(n, 1000), clock, device)
            for batch in dict.fromkeys((USUAL[name], best)):
                way = f"{name}, batches of {batch}"
                batches[way], ways[way] = batch, make(n, batch)
        return _rounds(expert.name, ways, batches, images, repeats, clock, device)


def _rounds(
    network: str,
    ways: Mapping[str, Way],
    batches: Mapping[str, int],
    images: Tensor,
    repeats: int,
    clock: Callable[..., float],
    device: torch.device,
) -> list[PeerCost]:
    for way in ways.values():
        way(images[0])
    took: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for image in islice(cycle(images), repeats):
        for name, way in ways.items():
            took[name].append(clock(lambda: found[name].append(way(image)[1]), device))  # noqa: B023 (called at once)
    base = took["engine, fixed"]
    rows = []
    for name in ways:
        ratios = [a / b for a, b in zip(took[name], base, strict=True)]
        times, radius = statistics.median(took[name]), statistics.mean(found[name])
        rows.append(PeerCost(network, name, batches[name], times, statistics.median(ratios), min(ratios), max(ratios), radius))
    return rows


def compare_peers(expert: Expert, images: Tensor, device: torch.device, *, n: int, repeats: int) -> list[PeerCost]:
    """`peer_costs` of an expert on its images, and of a CIFAR ResNet-20 of random weights on images of noise."""
    rows = peer_costs(expert, images, device, n=n, repeats=repeats)
    return rows + peer_costs(random_expert("cifar_resnet20", 32), DRAWN, device, n=n, repeats=repeats)


def missing(rows: Sequence[PeerCost]) -> str:
    """A sentence for a peer that is not installed, empty where all were measured."""
    return "" if any(row.way.startswith("ART") for row in rows) else f"ART is not installed, so it is missing here: {ART}"


__all__ = ["ART", "PeerCost", "art_certify", "art_smoothed", "compare_peers", "missing", "papers_certify", "peer_costs"]
