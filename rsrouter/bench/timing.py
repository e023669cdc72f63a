"""Timing in turn, and memory.

Every pair is timed in turn (A, B, A, B, ...) and reported as the median of the ratios, so that a machine that
slows down slows both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rsrouter.clock import seconds


@dataclass(frozen=True)
class Figure:
    """One printed figure.

    Attributes:
        name: what it is.
        value: the median over the runs.
        low, high: smallest and largest over the runs.
        unit: of all three; empty for a ratio.
        least, most: where it is meant to be, None where nothing is asked of it.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str = ""
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether it is where it is meant to be; None where nothing is asked of it."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)


def figure(
    name: str, values: Sequence[float], unit: str = "", *, least: float | None = None, most: float | None = None
) -> Figure:
    """The median, smallest and largest of some runs."""
    return Figure(name, statistics.median(values), min(values), max(values), unit, least, most)


def in_turn(works: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each piece of work, timed in turn, after one round that does not count."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return times


def ratios(times: Mapping[str, Sequence[float]], a: str, b: str) -> list[float]:
    """Seconds of `a` over seconds of `b`, round by round."""
    return [s / t for s, t in zip(times[a], times[b], strict=True)]


def _status(field: str) -> float:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return float(next(line.split()[1] for line in file if line.startswith(field))) / 1024
    except (OSError, StopIteration):
        return float("nan")


def peak_growth(work: Callable[[], object], device: torch.device) -> float:
    """MB by which `work` raises memory at its peak: of the device, or of this process (Linux; NaN elsewhere)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # the peak starts again from here
    except OSError:
        work()
        return float("nan")
    start = _status("VmRSS")
    work()
    return _status("VmHWM") - start
