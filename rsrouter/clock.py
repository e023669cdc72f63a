"""Seconds of a piece of work, the accelerator waited for: the one stopwatch of benchmarks, `doctor` and estimates."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    """How long one call of `work` takes, on a clock that only goes forward.

    >>> seconds(lambda: None) >= 0.0
    True
    """
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def processor_seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds of this process's processor time in one call of `work`: what other programs do meanwhile does not count.

    >>> processor_seconds(lambda: None) >= 0.0
    True
    """
    start = time.process_time()
    work()
    return time.process_time() - start
