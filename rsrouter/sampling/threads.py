"""Threads that work side by side, each with a number of torch's own threads."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

_starting = threading.Lock()


@cache
def lane_pool(lanes: int, threads: int) -> ThreadPoolExecutor:
    """`lanes` threads whose torch uses `threads` threads each; the process keeps its own number.

    >>> list(lane_pool(2, 1).map(abs, [-1, 2]))
    [1, 2]
    """
    before, started = torch.get_num_threads(), threading.Barrier(lanes + 1)

    def start() -> None:
        torch.get_num_threads()  # at the first look a thread takes the process's number, whatever was set before
        torch.set_num_threads(threads)  # of this thread, and what threads to come start with
        started.wait()

    with _starting:
        pool = ThreadPoolExecutor(lanes, "rsrouter lane", start)
        for _ in range(lanes):
            pool.submit(int)
        started.wait()
        torch.set_num_threads(before)
    return pool


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=lane_pool.cache_clear)
