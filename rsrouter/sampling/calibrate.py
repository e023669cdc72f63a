"""Measures the fastest batch, dtype and way of running of this machine, once, and records them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rsrouter.core.errors import InputError
from rsrouter.process import PRECISIONS
from rsrouter.sampling.check import check_network
from rsrouter.sampling.engine import VoteModel
from rsrouter.sampling.execution import (
    Execution,
    Prepared,
    default_batch,
    keep_freed_memory,
    largest_input,
    prepare,
    resolve_device,
)
from rsrouter.sampling.graphs import replayed
from rsrouter.sampling.int8 import Ranges, fingerprint, watched_ranges
from rsrouter.sampling.threads import lane_pool

#: What `dtypes="fastest"` chooses from.
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Timing:
    """Forward passes of all networks, one after the other.

    Attributes:
        execution: how they ran.
        rows_per_second: rows that went through every network in a second.
    """

    execution: Execution
    rows_per_second: float


def calibrate(
    models: Sequence[VoteModel],
    shape: Sequence[int],
    *,
    device: str | torch.device | None = None,
    base: Execution | None = None,
    dtypes: Sequence[str] | None = None,
    ways_too: bool = False,
    batches: Sequence[int] | None = None,
    repeats: int = 3,
) -> tuple[Execution, tuple[Timing, ...]]:
    """The fastest execution out of a few, by some seconds of forward passes, and everything that was measured.

    The result decides bits, so it belongs into an `Execution` that is stored (`Execution.save`, or the router's
    configuration), and must not be found anew, by another timing, in every run.

    Args:
        models: the networks; their times are added up.
        shape: `(C, H, W)` of one image.
        device: where; None is the CPU.
        base: what does not change between the candidates.
        dtypes: to choose from; None: the dtype of `base`.
        ways_too: whether precision of float32 and graphs (CUDA), or threads of a pass (CPU), are chosen as well.
        batches: rows per forward pass to choose from; None: a quarter to four times the default.
        repeats: timed rounds; their median counts.

    Raises:
        InputError: no batch that fits, an unknown dtype. NetworkError: a network that cannot be certified.
    """
    where, base = resolve_device(device), base or Execution()
    base.on(where)
    shape, default = tuple(shape), default_batch(largest_input(shape, (m.module for m in models)), resolve_device(device))
    sizes = sorted(set(batches or (max(1, int(default * factor)) for factor in (0.25, 0.5, 1, 2, 4))))
    if where.type == "cpu":
        keep_freed_memory()
    times: dict[Execution, list[float]] = {}
    ways = [way for dtype in dtypes or (base.dtype,) for way in _ways(base, dtype, where, ways_too)]
    prepared = {way: [prepare(m.module, way.on(where), where, shape, m.name) for m in models] for way in ways}
    runs: dict[Execution, list[Prepared]] = {}
    # one candidate after the other, round after round: what else the machine does meanwhile slows all of them
    for attempt in range(repeats):
        for way, modules in prepared.items():
            for batch in sizes:
                candidate = replace(way, batch=batch)
                if attempt and candidate not in times:
                    continue
                try:
                    if not attempt:
                        runs[candidate] = _runs(modules, models, shape, candidate, where)
                    times.setdefault(candidate, []).append(
                        _seconds_per_row(runs[candidate], candidate, shape, where, 2 * default)
                    )
                except torch.OutOfMemoryError:
                    break
    found = tuple(Timing(candidate, 1.0 / statistics.median(seconds)) for candidate, seconds in times.items())
    if not found:
        raise InputError(
            "No batch fits into memory",
            expected=f"room for {sizes[0]} rows",
            received="out of memory",
            remedy="pass smaller batches, or free memory",
        )
    return max(found, key=lambda t: t.rows_per_second).execution, found


def _ways(base: Execution, dtype: str, device: torch.device, more: bool) -> list[Execution]:
    """`base` in that dtype; with `more` also in the other float32 precision and without graphs, or one thread a pass."""
    base = replace(base, dtype=dtype)
    if not more:
        return [base]
    if device.type == "cuda":
        precisions = PRECISIONS if dtype == "float32" else (base.precision,)
        return [replace(base, precision=p, graphs=g) for p in precisions for g in (True, False)]
    return [base] if torch.get_num_threads() == 1 else [replace(base, threads=t) for t in (0, 1)]


def _runs(
    modules: Sequence[Prepared], models: Sequence[VoteModel], shape: tuple[int, ...], candidate: Execution, device: torch.device
) -> list[Prepared]:
    """The networks as the candidate runs them, checked."""
    found, candidate = [], candidate.on(device)
    with candidate.kernels(device):
        for module, m in zip(modules, models, strict=True):
            checked = check_network(module, m.name, m.widths, shape, candidate.batch, device)
            found.append(replayed(module, checked.rows, checked.logits, device, m.name) if candidate.graphs else module)
    return found


def _seconds_per_row(
    modules: Sequence[Prepared], execution: Execution, shape: tuple[int, ...], device: torch.device, rows: int
) -> float:
    """Of one row through every network, over `rows` rows at least, after one pass that does not count; on a CPU with so many
    passes side by side as the engine would run."""
    lanes = torch.get_num_threads() // execution.threads if execution.threads else 1

    def passes(part: int) -> float:
        with torch.inference_mode(), execution.kernels(device):
            x = torch.rand((execution.batch, *shape), generator=torch.Generator().manual_seed(0)).to(device)
            inputs, done, start = [prepared.input(x) for prepared in modules], -execution.batch, 0.0
            while done < part:
                outputs = [prepared.module(x) for prepared, x in zip(modules, inputs, strict=True)]
                done += execution.batch
                if done == 0 or done >= part:  # reading a value waits for the device
                    _ = [float((o[0] if isinstance(o, tuple | list) else o).sum()) for o in outputs]
                    start = start if done else time.perf_counter()
            return (time.perf_counter() - start) / done

    if lanes < 2:
        return passes(rows)
    each = list(lane_pool(lanes, execution.threads).map(passes, [rows] * lanes))
    return statistics.mean(each) / lanes


@torch.inference_mode()
def measure_ranges(
    models: Sequence[VoteModel], images: Tensor, *, base: Execution | None = None, copies: int = 8, seed: int = 0
) -> Execution:
    """`base` in int8, with ranges measured in float32 on noisy copies of calibration images, at each network's own noise level.

    The images may be any that are not certified with it: where votes are quantised is part of the certified function, and is
    fixed beforehand. A network at several noise levels gets the widest range.

    Args:
        models: the networks, those that do not vote left out.
        images: `(N, C, H, W)` pixels in [0,1].
        base: what does not change.
        copies: noisy copies of each image.
        seed: of the noise, which certifies nothing.

    Raises:
        InputError: no image, or a network without a layer that int8 is for. NetworkError: a network that cannot be certified.
    """
    base, cpu = base or Execution(), torch.device("cpu")
    if not len(images):
        raise InputError(
            "int8 needs images to measure ranges on", expected="an image or more", received="none", remedy="give some"
        )
    found: dict[str, dict[str, tuple[float, float]]] = {}
    generator = torch.Generator().manual_seed(seed)
    exact = replace(base, dtype="float32", compile=False)
    for model in [m for m in models if m.sigma > 0]:
        run = prepare(model.module, exact.on(cpu), cpu, images.shape[1:], model.name)
        ranges = found.setdefault(fingerprint(model.module), {})
        with exact.kernels(cpu), watched_ranges(run.module, ranges):
            for image in images:
                noisy = image + model.sigma * torch.randn((copies, *image.shape), generator=generator)
                run(noisy)
        # a layer that only ever saw zeros stays float32
        for layer in [name for name, (low, high) in ranges.items() if not (low < high and math.isfinite(high - low))]:
            del ranges[layer]
        if not ranges:
            raise InputError(
                f"Network {model.name!r} has nothing that runs in int8",
                expected="a Conv2d with zero padding, or a Linear, that its forward pass calls",
                received="none",
                remedy="run it in float32",
            )
    return replace(base, dtype="int8", compile=False, ranges=Ranges.of(found))


__all__ = ["DTYPES", "Timing", "calibrate", "measure_ranges"]
