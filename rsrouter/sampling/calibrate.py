"""Measures the fastest batch and dtype of this machine, once, and records them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rsrouter.core.errors import InputError
from rsrouter.process import fixed_kernels
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
        batches: rows per forward pass to choose from; None: a quarter to four times the default.
        repeats: timed rounds; their median counts.

    Raises:
        InputError: no batch that fits, an unknown dtype. NetworkError: a network that cannot be certified.
    """
    where, base = resolve_device(device), base or Execution()
    shape, default = tuple(shape), default_batch(largest_input(shape, (m.module for m in models)), resolve_device(device))
    sizes = sorted(set(batches or (max(1, int(default * factor)) for factor in (0.25, 0.5, 1, 2, 4))))
    if where.type == "cpu":
        keep_freed_memory()
    times: dict[Execution, list[float]] = {}
    prepared = {
        dtype: [prepare(m.module, replace(base, dtype=dtype), where, shape, m.name) for m in models]
        for dtype in dtypes or (base.dtype,)
    }
    # one candidate after the other, round after round: what else the machine does meanwhile slows all of them
    for attempt in range(repeats):
        for dtype, modules in prepared.items():
            for batch in sizes:
                candidate = replace(base, dtype=dtype, batch=batch)
                if attempt and candidate not in times:
                    continue
                try:
                    if not attempt:
                        with fixed_kernels():
                            for module, m in zip(modules, models, strict=True):
                                check_network(module, m.name, m.widths, shape, batch, where)
                    times.setdefault(candidate, []).append(_seconds_per_row(modules, batch, shape, where, 2 * default))
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


@torch.inference_mode()
def _seconds_per_row(modules: Sequence[Prepared], batch: int, shape: tuple[int, ...], device: torch.device, rows: int) -> float:
    """Of one row through every network, over `rows` rows at least, after one pass that does not count."""
    x = torch.rand((batch, *shape), generator=torch.Generator().manual_seed(0)).to(device)
    inputs, done = [prepared.input(x) for prepared in modules], -batch
    start = 0.0
    with fixed_kernels():
        while done < rows:
            outputs = [prepared.module(x) for prepared, x in zip(modules, inputs, strict=True)]
            done += batch
            if done == 0 or done >= rows:  # reading a value waits for the device
                _ = [float((o[0] if isinstance(o, tuple | list) else o).sum()) for o in outputs]
                start = start if done else time.perf_counter()
    return (time.perf_counter() - start) / done


__all__ = ["DTYPES", "Timing", "calibrate"]
