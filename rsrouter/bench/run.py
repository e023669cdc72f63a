"""`run_bench`: every figure of `rsrouter bench`."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rsrouter.bench.calls import VOTES, call_costs
from rsrouter.bench.certificates import certificate_costs
from rsrouter.bench.scaling import scaling, tiny_expert
from rsrouter.bench.timing import Figure
from rsrouter.bench.votes import moved_votes, noise_costs, throughput
from rsrouter.experts import Expert, ExpertPool, build_architecture
from rsrouter.router import CascadeRouter, Router
from rsrouter.sampling.execution import KERNELS, instructions, resolve_device

#: What `--quick` changes: a minute, for tests and a first look.
QUICK: dict[str, Any] = {
    "repeats": 1,
    "n": 200,
    "n_max": 1_000,
    "certificates": 2,
    "fixed_images": 1,
    "most": 1_000,
    "calls": (100, 1_000),
}
DTYPES = ("float32", "bfloat16")
#: On CUDA float32 is TF32 by default, as it is for every peer; both are measured.
CUDA_DTYPES = ("tf32", "ieee", "bfloat16")
#: What the field certifies, with random weights: name, architecture, classes, shape, and the part of n that is drawn.
FIELD = (
    ("CIFAR ResNet-110 (random weights)", "cifar_resnet110", 10, (3, 32, 32), 1),
    ("ResNet-50 at 224 (random weights)", "resnet50", 1000, (3, 224, 224), 10),
)


def field_expert(name: str) -> Expert:
    """A network of `FIELD` at sigma .5."""
    architecture, classes, shape = next(entry[1:4] for entry in FIELD if entry[0] == name)
    torch.manual_seed(0)
    return Expert(build_architecture(architecture, classes), sigma=0.5, num_classes=classes, input_shape=shape, name="field")


def field_throughput(name: str, n: int, repeats: int, where: torch.device) -> list[Figure]:
    """`throughput` of a network of `FIELD`."""
    part = next(entry[4] for entry in FIELD if entry[0] == name)
    dtypes = CUDA_DTYPES if where.type == "cuda" else DTYPES
    expert = field_expert(name)
    return throughput(expert, torch.rand(expert.input_shape), max(1, n // part), repeats, where, name, dtypes, bars=False)


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
    fixed_images: int = 10,
    most: int = 1_000_000,
    calls: Sequence[int] = VOTES,
    radii: Sequence[float] = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2),
    say: Callable[[str], None] | None = None,
    field: bool | None = None,
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
        fixed_images: images on which the fixed plan is timed.
        most: the largest n times images of the scaling tables.
        calls: the n of `call_costs`.
        radii: the adaptive plan's grid.
        say: called with what is being measured.
        field: whether the networks of `FIELD` are measured as well; None: on CUDA.
    """
    where, say = resolve_device(device), say or (lambda text: print(text, file=sys.stderr))
    start, expert = time.perf_counter(), pool[len(pool) // 2]
    say(f"throughput of {expert.name}, {n:,} votes, {repeats} rounds")
    dtypes = CUDA_DTYPES if where.type == "cuda" else DTYPES
    figures: list[Figure] = throughput(expert, images[0], n, repeats, where, expert.name, dtypes, bars=True)
    figures.append(moved_votes(expert, images[:10], n // 10, where))
    torch.manual_seed(0)
    larger = Expert(
        build_architecture("small_resnet", 10, {"in_channels": 3}),
        sigma=0.5,
        num_classes=10,
        input_shape=(3, 32, 32),
        name="rgb32",
    )
    say("throughput at 3 x 32 x 32 (random weights)")
    figures += throughput(larger, torch.rand(3, 32, 32), n, repeats, where, "3 x 32 x 32", dtypes, bars=False)
    for name, *_ in FIELD if (where.type == "cuda" if field is None else field) else ():
        say(f"throughput of {name}")
        figures += field_throughput(name, n, repeats, where)
    say("noise: sound, and shared by images")
    figures += noise_costs(expert, images[: max(2, min(20, n // 100))], n, repeats, where)
    say(f"certificates of {certificates} images, n_max = {n_max:,}")
    routed = router or CascadeRouter((0.55,) * (len(pool) - 1))
    figures += certificate_costs(pool, routed, images[:certificates], n_max, radii, min(repeats, 3), where, fixed_images)
    say("what a call costs")
    called = call_costs(expert, images, where, votes=calls, repeats=repeats)
    say("cost against work")
    rows = scaling(tiny_expert(expert.input_shape), images, most, where)
    rows += scaling(expert, images, most // 10, where)
    return {
        "device": "cpu" if where.type == "cpu" else torch.cuda.get_device_name(where),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instructions": instructions(where),
        "platform": platform.platform(),
        "kernels": dict(KERNELS),
        "settings": {"repeats": repeats, "n": n, "n_max": n_max, "certificates": len(images[:certificates]), "most": most},
        "seconds": time.perf_counter() - start,
        "figures": [{**asdict(f), "met": f.met} for f in figures],
        "calls": called,
        "scaling": rows,
    }
