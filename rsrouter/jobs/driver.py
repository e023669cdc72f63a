"""From arguments to an executor, and from an executor's rows to a finished table: what certify and label share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rsrouter.core.errors import InputError, ResultsError
from rsrouter.jobs.executor import Executor, Inline, check_threads, local_resources
from rsrouter.jobs.scheduler import RETRIES, Scheduler
from rsrouter.jobs.work import Task, Work
from rsrouter.results import ResultsWriter, Row, Table, read_table
from rsrouter.results.metadata import metadata_path, read_metadata


class Images(Protocol):
    """A data set: `len`, and `[i]` giving one image `(C, H, W)` in [0,1] and its label (-1 where unknown)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class Running:
    """A running estimate for progress displays.

    Attributes:
        votes: votes drawn so far in this run.
        finished: images finished, rows of earlier runs included.
        total: images of the whole job.
        accuracy: certified accuracy so far at each radius the display asked for; NaN without labels.
        seconds: since the first vote of this run, on a clock that only goes forward.
        remaining: seconds still to go at this pace, if the other images need as many votes as the finished ones; NaN
            before anything is known.
    """

    votes: int
    finished: int
    total: int
    accuracy: tuple[float, ...]
    seconds: float = 0.0
    remaining: float = float("nan")


class Tally:
    """Running certified accuracy and pace, over rows of earlier runs and of this one."""

    def __init__(self, radii: Sequence[float], total: int) -> None:
        self._edges = np.maximum(np.asarray(radii, dtype=np.float64), np.nextafter(0.0, 1.0))
        self._hits, self._labelled, self._rows, self._drawn = np.zeros(len(self._edges)), 0, 0, 0
        self._total, self._votes, self._before = total, 0, 0
        self._start: float | None = None

    def add(self, predict: int, label: int, radius: float, drawn: int) -> None:
        """One row."""
        self._rows += 1
        self._drawn += drawn
        if label >= 0:
            self._labelled += 1
            self._hits += (predict == label) & (radius >= self._edges)

    def add_table(self, table: Table) -> None:
        """The rows of earlier runs."""
        for cells in zip(table.predict, table.label, table.radius, table.n_drawn, strict=True):
            self.add(int(cells[0]), int(cells[1]), float(cells[2]), max(0, int(cells[3])))
        self._before = self._drawn

    def begin(self) -> None:
        """The first worker is ready."""
        self._start = time.monotonic() if self._start is None else self._start

    def running(self, votes: int) -> Running:
        """Where the job stands after `votes` more."""
        self._votes += votes
        seconds = 0.0 if self._start is None else time.monotonic() - self._start
        shares = self._hits / self._labelled if self._labelled else np.full(len(self._edges), np.nan)
        remaining = float("nan")
        if self._rows and self._votes:
            expected = self._drawn / self._rows * self._total - self._before
            remaining = seconds * max(0.0, expected - self._votes) / self._votes if self._rows < self._total else 0.0
        return Running(self._votes, self._rows, self._total, tuple(float(s) for s in shares), seconds, remaining)


def load_task(images: Images, ids: tuple[int, ...]) -> tuple[Task, list[int]]:
    """Pixels and labels of some images, checked.

    Raises:
        InputError: labels that are no class indices, images that do not stack.
    """
    loaded = [images[i] for i in ids]
    if wrong := [i for i, (_, label) in zip(ids, loaded, strict=True) if not hasattr(label, "__index__") or int(label) < -1]:
        raise InputError(
            "A label is not a class index",
            expected="whole numbers, -1 where unknown",
            received=f"another label at image {wrong[0]}",
            remedy="check the data set",
        )
    kinds = {f"{tuple(i.shape)} {i.dtype}" if isinstance(i, Tensor) else type(i).__name__ for i, _ in loaded}
    if len(kinds) > 1 or not isinstance(loaded[0][0], Tensor):
        raise InputError(
            "The images of a data set do not stack",
            expected="float tensors (C, H, W) of one shape",
            received=", ".join(sorted(kinds)),
            remedy="convert them, or crop them to one size",
        )
    return Task(ids, torch.stack([image for image, _ in loaded])), [int(label) for _, label in loaded]


def on_cpu(device: str | None) -> bool:
    """Whether workers run on a CPU; asks no machine, since the driver's need not have what the workers' have."""
    return device is None or torch.device(device).type == "cpu"


def stored_threads(out: Path, device: str | None, threads: int | None) -> int | None:
    """The thread count that a table was begun with, which it keeps; `threads` where there is no table yet.

    Raises:
        ResultsError: another number was asked for (on a CPU, threads decide how sums are rounded).
    """
    threads = check_threads(threads)
    if not on_cpu(device):
        return threads
    stored = (read_metadata(metadata_path(out)) or {}).get("info", {}).get("threads")
    if not isinstance(stored, int):
        return threads
    if threads is not None and threads != stored:
        raise ResultsError(
            f"{out} was begun with another number of threads",
            expected=f"{stored} threads per worker",
            received=str(threads),
            remedy="leave threads out to go on with it, or give another output",
        )
    return stored


def make_executor(workers: int | str | None, ray: str | None, device: str | None, threads: int | None) -> Executor:
    """The backend that arguments ask for.

    Args:
        workers: None is this process; a number, or "auto", are processes; with `ray`, actors.
        ray: address of a Ray cluster; None: no Ray.
        device, threads: of each worker.

    Raises:
        InputError: numbers that cannot be, or Ray is not installed.
    """
    if ray is not None:
        from rsrouter.jobs.ray_workers import RayActors

        return RayActors(ray, workers, device, threads)
    if workers is None:
        return Inline(device, threads)
    from rsrouter.jobs.processes import ProcessPool

    return ProcessPool(local_resources(workers, device, threads))


def run_job(
    executor: Executor,
    work: Work,
    images: Images,
    order: Sequence[int],
    out: Path,
    metadata: dict[str, Any],
    *,
    facts: dict[str, Any],
    block: int,
    radii: Sequence[float] = (),
    progress: Callable[[Running], None] | None = None,
    retries: int = RETRIES,
) -> Table:
    """Fills the table `out` with the rows of `order`, going on with what it holds; `executor` has been entered.

    Rows are appended as they finish, so that a killed driver loses none, and put into order at the end: the finished
    table does not tell how many workers there were.

    Raises:
        ResultsError: another job writes the table, it belongs to another run, or the disk refuses.
        WorkerError: workers that die again and again.
    """
    tally = Tally(radii, len(order))
    with ResultsWriter(out, metadata) as writer:
        done = writer.done()
        if done:
            tally.add_table(read_table(out))
        labels: dict[int, int] = {}

        def load(ids: tuple[int, ...]) -> Task:
            task, found = load_task(images, ids)
            labels.update(zip(ids, found, strict=True))
            return task

        def keep(row: Row) -> None:
            row = replace(row, label=labels.pop(row.idx))
            writer.append(row)
            tally.add(row.predict, row.label, row.radius, row.n_drawn)

        def told(votes: int) -> None:
            tally.begin()
            running = tally.running(votes)
            if progress is not None:
                progress(running)

        todo = [i for i in order if i not in done]
        if todo:
            executor.open(work)
            Scheduler(executor, load, todo, keep, block=block, facts=facts, told=told, retries=retries).run()
        writer.arrange(order)
    return read_table(out)
