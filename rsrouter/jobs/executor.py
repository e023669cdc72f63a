"""Where tasks run: an interface with three backends (this process, processes of this machine, actors of a Ray cluster).

A backend starts workers, passes tasks to them, and says what they say. It knows nothing of tables, retries or order:
that is the scheduler's, once for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from rsrouter.core.errors import InputError
from rsrouter.jobs.work import Event, Finished, Ready, Task, Work, machine_facts
from rsrouter.sampling.execution import resolve_device

#: Called with the slot and what its worker said.
Sink = Callable[[int, Event], None]


class Executor(Protocol):
    """Workers in `slots` places, each with at most one task at a time."""

    slots: int
    #: torch threads of each worker; None: torch's own
    threads: int | None

    def facts(self) -> dict[str, Any]:
        """`machine_facts` of the machines that do the work; asked for before any worker starts."""

    def open(self, work: Work) -> Self:
        """Takes the work that every worker is to do."""

    def start(self, slot: int) -> None:
        """Starts the slot's worker, in place of one that is lost; its `Ready` follows."""

    def submit(self, slot: int, task: Task) -> None:
        """Gives a ready, idle worker its next task."""

    def wait(self, sink: Sink, seconds: float) -> None:
        """Passes on what workers say, waiting for the first word at most so long."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Ends every worker at once."""


class Inline:
    """One worker, which is this process. Errors rise where they happen, and nothing is tried twice."""

    slots = 1

    def __init__(self, device: str | None, threads: int | None) -> None:
        self.device, self.threads = device, threads
        self._tasks: list[Task | None] = []
        self._before = torch.get_num_threads()

    def facts(self) -> dict[str, Any]:
        return machine_facts(self.device)

    def open(self, work: Work) -> Inline:
        self._work = work
        return self

    def start(self, slot: int) -> None:
        self._tasks.append(None)

    def submit(self, slot: int, task: Task) -> None:
        self._tasks.append(task)

    def wait(self, sink: Sink, seconds: float) -> None:
        while self._tasks:
            task = self._tasks.pop(0)
            if task is None:
                self._work.open(self.device)
                sink(0, Ready(self.facts()))
                continue
            self._work.run(task.images, task.ids, lambda event: sink(0, event))
            sink(0, Finished())

    def __enter__(self) -> Inline:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.threads is not None:
            torch.set_num_threads(self._before)


@dataclass(frozen=True)
class Resources:
    """How many workers, and what each has.

    Attributes:
        devices: one per worker.
        threads: torch threads of each; None leaves torch's own.
    """

    devices: tuple[str | None, ...]
    threads: int | None


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(workers: object) -> int | None:
    """A number of workers; None for "auto".

    Raises:
        InputError: anything else.
    """
    if workers == "auto":
        return None
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise InputError(
            "The number of workers cannot be read",
            expected='a whole number of at least 1, or "auto"',
            received=repr(workers),
            remedy="auto takes one per GPU, or one per core",
        )
    return workers


def check_threads(threads: object) -> int | None:
    """A number of torch threads, or None; InputError for anything else."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InputError("threads must be a whole number", expected="threads >= 1", received=repr(threads), remedy="leave it out")
    return threads


def local_resources(workers: int | str, device: str | None, threads: int | None) -> Resources:
    """Workers of this machine: one per GPU, or `workers` on the CPU that share its cores.

    Args:
        workers: how many, or "auto": as many as there are GPUs, or cores.
        device: `cuda` spreads workers over the GPUs; `cuda:1` is one GPU and one worker.
        threads: of each CPU worker; None divides the cores.

    Raises:
        InputError: more workers than GPUs, or a device that cannot be used.
    """
    number, where = check_workers(workers), resolve_device(device)
    if where.type == "cpu":
        number = number or usable_cores()
        return Resources((device,) * number, threads or max(1, usable_cores() // number))
    there = 1 if where.index is not None else torch.cuda.device_count() if where.type == "cuda" else 1
    if number is not None and number > there:
        raise InputError(
            "There are fewer GPUs than workers",
            expected=f"at most {there} for device {device!r}",
            received=str(number),
            remedy="one worker fills a GPU; --device cuda counts all GPUs of this machine",
        )
    if where.index is not None or where.type != "cuda":
        return Resources((device,), threads)
    return Resources(tuple(f"cuda:{i}" for i in range(number or there)), threads)
