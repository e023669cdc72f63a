"""Speed as ratios measured in one run: the engine against the hardware's limit and against the field's own loop.

Every pair is timed in turn (A, B, A, B, ...) and reported as the median of the ratios, so that a machine that
slows down slows both.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsrouter.core.plans import AdaptivePlan, FixedPlan
from rsrouter.core.policy import VoteRequest
from rsrouter.experts import Expert, ExpertPool, build_architecture
from rsrouter.router import CascadeRouter, Router
from rsrouter.router.base import vote_model
from rsrouter.sampling.engine import Engine, image_identity
from rsrouter.sampling.execution import Execution, as_input, prepare, resolve_device
from rsrouter.sampling.noise import CHUNK, make_noise
from rsrouter.smooth import RoutedSmooth, Smooth

BATCHES = (50, 100, 250, 500, 1000)


@dataclass(frozen=True)
class Figure:
    """One printed figure.

    Attributes:
        name: what it is.
        value: the median over the runs.
        low, high: smallest and largest over the runs.
        unit: of all three; empty for a ratio.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str = ""


def _figure(name: str, values: Sequence[float], unit: str = "") -> Figure:
    return Figure(name, statistics.median(values), min(values), max(values), unit)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _in_turn(works: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each piece of work, timed in turn, after one round that does not count."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(_seconds(work, device))
    return times


def reference_loop(module: nn.Module, image: Tensor, sigma: float, n: int, classes: int, batch: int = 1000) -> np.ndarray:
    """Vote counts `(classes,)` as the papers' core draws them (Cohen et al. 2019, `core.py`): one image, a fixed n, the
    batch repeated and noised, predictions read to the host after every batch and counted in Python."""
    counts = np.zeros(classes, dtype=int)
    with torch.no_grad():
        left = n
        while left > 0:
            size = min(batch, left)
            left -= size
            copies = image.repeat((size, 1, 1, 1))
            predictions = module(copies + torch.randn_like(copies) * sigma).argmax(1).cpu().numpy()
            for p in predictions:
                counts[p] += 1
    return counts


def _resident() -> float:
    """Resident memory of this process in MB (Linux), NaN elsewhere."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return float(next(line.split()[1] for line in file if line.startswith("VmRSS"))) / 1024
    except (OSError, StopIteration):
        return float("nan")


def _network(expert: Expert, image: Tensor, n: int, repeats: int, device: torch.device, label: str) -> list[Figure]:
    """Engine, pure forward passes and the reference loop at `n` votes of one network."""
    execution = Execution()
    engine = Engine([vote_model(expert)], expert.input_shape, seed=0, device=str(device), execution=execution)
    requests = [VoteRequest(0, expert.name, "bench", 0, n)]
    x, identity = image[None], [image_identity(image)]
    module = prepare(expert.network(), execution, device)
    plain = expert.network().eval().to(device)
    on_device = image.to(device)

    def forward(batch: int) -> Callable[[], None]:
        noisy = as_input(on_device + expert.sigma * torch.randn((batch, *expert.input_shape), device=device), execution)

        @torch.inference_mode()
        def work() -> None:
            for _ in range(-(-n // batch)):
                module(noisy)

        return work

    def with_noise(batch: int) -> Callable[[], None]:
        noise = make_noise("gaussian", expert.input_shape, device)
        out = torch.empty((batch, *expert.input_shape), device=device)

        @torch.inference_mode()
        def work() -> None:
            for i in range(-(-n // batch)):
                noise.add(on_device, expert.sigma, b"bench", i * batch - i * batch % CHUNK, out)
                module(as_input(out, execution))

        return work

    best = min(BATCHES, key=lambda b: min(_seconds(forward(b), device) for _ in range(3)))
    times = _in_turn(
        {
            "forward": forward(best),
            "forward and noise": with_noise(best),
            "engine": lambda: engine.run(x, identity, requests),
            "reference": lambda: reference_loop(plain, on_device, expert.sigma, n, expert.num_classes),
        },
        repeats,
        device,
    )

    def ratio(a: str, b: str) -> list[float]:
        return [s / t for s, t in zip(times[a], times[b], strict=True)]

    return [
        _figure(f"{label}: votes a second, engine", [n / t for t in times["engine"]], "votes/s"),
        _figure(
            f"{label}: votes a second, pure forward passes (folded, batch {best})", [n / t for t in times["forward"]], "votes/s"
        ),
        _figure(f"{label}: votes a second, reference loop", [n / t for t in times["reference"]], "votes/s"),
        _figure(f"{label}: engine / pure forward", ratio("forward", "engine")),
        _figure(f"{label}: engine / (forward and noise)", ratio("forward and noise", "engine")),
        _figure(f"{label}: engine / reference loop", ratio("reference", "engine")),
    ]


def _sound(expert: Expert, image: Tensor, n: int, repeats: int, device: torch.device) -> list[Figure]:
    """What exact arithmetic costs: the noise alone, and whole votes."""
    image = torch.round(image * 255.0) / 255.0
    out = torch.empty((CHUNK, *expert.input_shape), device=device)
    on_device = image.to(device)
    streams = {name: make_noise(name, expert.input_shape, device) for name in ("gaussian", "sound")}
    rounds = -(-min(n, 2000) // CHUNK)

    def noise(name: str) -> Callable[[], object]:
        return lambda: [streams[name].add(on_device, expert.sigma, b"bench", i * CHUNK, out) for i in range(rounds)]

    def drawing(engine: Engine) -> Callable[[], object]:
        return lambda: engine.run(x, identity, requests)

    requests, x, identity = [VoteRequest(0, expert.name, "bench", 0, n)], image[None], [image_identity(image)]
    engines = {name: Engine([vote_model(expert)], expert.input_shape, seed=0, device=str(device), noise=name) for name in streams}
    times = _in_turn(
        {**{name: noise(name) for name in streams}, **{f"{name} votes": drawing(engine) for name, engine in engines.items()}},
        repeats,
        device,
    )
    return [
        _figure(
            "sound noise / Gaussian noise, time of the noise alone",
            [s / g for s, g in zip(times["sound"], times["gaussian"], strict=True)],
        ),
        _figure(
            "sound noise / Gaussian noise, time of whole votes",
            [s / g for s, g in zip(times["sound votes"], times["gaussian votes"], strict=True)],
        ),
    ]


def _certificates(
    pool: ExpertPool, router: Router, images: Tensor, n_max: int, radii: Sequence[float], repeats: int, device: torch.device
) -> list[Figure]:
    """Seconds and votes per certificate: adaptive and fixed, routed and single."""
    expert = pool[len(pool) // 2]
    single, routed = Smooth(expert), RoutedSmooth(pool, router)
    plan = AdaptivePlan(n_max, radii)
    fixed = FixedPlan(100, n_max)
    where = str(device)

    def reach(smoothed: Smooth | RoutedSmooth, sides: str) -> AdaptivePlan:
        from rsrouter.core.bounds import AlphaSplit

        return plan.within(plan.reach(smoothed.tree, AlphaSplit.even(1e-3, smoothed.tree.paths), sides))

    start = time.perf_counter()
    adaptive = single.certify(images, plan=reach(single, "one"), device=where)
    adaptive_seconds = (time.perf_counter() - start) / len(images)
    start = time.perf_counter()
    tree = routed.certify(images, plan=reach(routed, "two"), device=where)
    tree_seconds = (time.perf_counter() - start) / len(images)
    plain, one = expert.network().eval().to(device), images[0].to(device)
    fixed_times = [_seconds(lambda: single.certify(images[:1], plan=fixed, device=where), device) for _ in range(repeats)]
    loop_times = [
        _seconds(lambda: reference_loop(plain, one, expert.sigma, n_max + 100, expert.num_classes), device)
        for _ in range(repeats)
    ]
    share = np.mean([c.n_drawn for c in adaptive]) / (n_max + 100)
    return [
        _figure(
            f"votes per certificate, adaptive, share of the fixed plan's {n_max + 100:,} ({len(images)} images)", [float(share)]
        ),
        _figure("votes per certificate, adaptive", [float(np.mean([c.n_drawn for c in adaptive]))], "votes"),
        _figure("votes per routed certificate, adaptive", [float(np.mean([c.n_drawn for c in tree]))], "votes"),
        _figure("seconds per certificate, adaptive", [adaptive_seconds], "s"),
        _figure("seconds per routed certificate, adaptive", [tree_seconds], "s"),
        _figure("seconds per certificate, fixed", fixed_times, "s"),
        _figure("seconds per certificate, reference loop", loop_times, "s"),
        _figure("reference loop / adaptive, seconds", [t / adaptive_seconds for t in loop_times]),
        _figure("fixed single expert / adaptive routed tree, seconds", [t / tree_seconds for t in fixed_times]),
    ]


def _scaling(
    expert: Expert, images: Tensor, votes: Sequence[int], counts: Sequence[int], most: int, device: torch.device
) -> list[dict[str, Any]]:
    """Seconds and memory of fixed plans over n and the number of images, up to `most` votes in all."""
    rows = []
    smooth = Smooth(expert)
    for n in votes:
        for count in counts:
            if n * count > most:
                continue
            x = images[torch.arange(count) % len(images)]
            before = _resident()
            work = partial(smooth.certify, x, plan=FixedPlan(100, n), ids=range(count), device=str(device))
            seconds = _seconds(work, device)
            rows.append(
                {
                    "n": n,
                    "images": count,
                    "seconds": seconds,
                    "microseconds_per_vote": 1e6 * seconds / (count * (n + 100)),
                    "memory_growth_mb": _resident() - before,
                }
            )
    return rows


def run_bench(
    pool: ExpertPool,
    images: Tensor,
    *,
    router: Router | None = None,
    device: str | None = None,
    repeats: int = 5,
    n: int = 10_000,
    n_max: int = 100_000,
    certificates: int = 50,
    most: int = 1_000_000,
    radii: Sequence[float] = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2),
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Every figure of `rsrouter bench`, JSON-ready.

    Args:
        pool: experts; the middle one is the single network.
        images: `(N, C, H, W)` pixels in [0,1].
        router: for the routed tree; None: a cascade with thresholds .55.
        device: where to run.
        repeats: timed rounds of each pair.
        n: votes of the throughput figures.
        n_max: of the fixed and adaptive plans.
        certificates: images certified adaptively.
        most: the largest n times images of the scaling table.
        radii: the adaptive plan's grid.
        say: called with what is being measured.
    """
    where, say = resolve_device(device), say or (lambda text: print(text, file=sys.stderr))
    expert = pool[len(pool) // 2]
    say(f"throughput of {expert.name}, {n:,} votes, {repeats} rounds")
    figures = _network(expert, images[0], n, repeats, where, expert.name)
    torch.manual_seed(0)
    larger = Expert(
        build_architecture("small_resnet", 10, {"in_channels": 3}),
        sigma=0.5,
        num_classes=10,
        input_shape=(3, 32, 32),
        name="rgb32",
    )
    say("throughput at 3 x 32 x 32 (random weights)")
    figures += _network(larger, torch.rand(3, 32, 32), n, repeats, where, "3 x 32 x 32")
    say("sound noise")
    figures += _sound(expert, images[0], n, repeats, where)
    say(f"certificates of {certificates} images, n_max = {n_max:,}")
    figures += _certificates(
        pool, router or CascadeRouter((0.55,) * (len(pool) - 1)), images[:certificates], n_max, radii, min(repeats, 3), where
    )
    say("cost against work")
    scaling = _scaling(expert, images, (1_000, 10_000, 100_000, 1_000_000), (1, 10, 100, 1_000), most, where)
    return {
        "device": str(where),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "figures": [vars(f) for f in figures],
        "scaling": scaling,
    }
