"""Seconds of a piece of work, and the progress bar of a long one.

`seconds` waits for the accelerator: the one stopwatch of benchmarks, `doctor` and estimates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Drawn:
    """Where a certification stands; passed to the `progress` callback after every round.

    Attributes:
        votes: votes drawn so far.
        finished: images finished so far.
        total: images in this call.
    """

    votes: int
    finished: int
    total: int


#: A bar of images on stderr for work that a Python caller waits for, after two seconds, with tqdm's `desc` and `total`;
#: `disable=None`: where stderr is a terminal, True: never, as somebody else tells of the progress.
BAR = partial(tqdm, unit="image", delay=2.0, leave=False)


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
