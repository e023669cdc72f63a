"""The driver of a job: images in, a finished table out, whoever does the work in between.

Work is stolen in small shards, and a worker that dies is replaced; the same for every executor. The driver reads each image
once, adds the labels, which no worker sees, and appends rows as they finish, so that a killed driver loses none.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rsrouter.clock import BAR
from rsrouter.core.errors import InputError, WorkerError
from rsrouter.inputs import check_images
from rsrouter.jobs.devices import device_names, local_resources
from rsrouter.jobs.workers import (
    Done,
    Event,
    Executor,
    Failed,
    Finished,
    Inline,
    Lost,
    Processes,
    Ready,
    Step,
    Task,
    Worker,
)
from rsrouter.results import ResultsWriter, Row, Table, read_table

#: Times that an image may end its worker before it is given up, and a slot's workers may end without a row before the slot is.
RETRIES = 2

#: Tasks get smaller towards the end: each worker gets this part of its share of what is left.
_SHARE = 4


class Images(Protocol):
    """A data set: `len`, and `[i]` giving one image `(C, H, W)` in [0,1] and its label (-1 where unknown)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...


class Reader:
    """The images of a job, each decoded once: one that was looked at before is kept for its task.

    Args:
        images: the data set.
        shape: `(C, H, W)` that the networks take.
        classes: labels are whole numbers below it.
        labelled: whether every image must have a label; otherwise -1 stands for an unknown one.
    """

    def __init__(self, images: Images, shape: Sequence[int], classes: int, *, labelled: bool = False) -> None:
        self.images, self._shape, self._classes, self._least = images, tuple(shape), classes, 0 if labelled else -1
        self._kept: dict[int, tuple[Tensor, int]] = {}

    def look(self, idx: int) -> tuple[Tensor, int]:
        """One image and its label, checked.

        Raises:
            InputError: an image of another shape, or a label that is not a class.
        """
        if idx not in self._kept:
            (image,), (label,) = self._read((idx,))
            check_images(image[None], self._shape)
            self._kept[idx] = image, label
        return self._kept[idx]

    def task(self, ids: Sequence[int]) -> tuple[Task, list[int]]:
        """Pixels and labels of some images.

        Raises:
            InputError: labels that are not classes, images that do not stack.
        """
        images, labels = self._read(ids)
        return Task(tuple(ids), torch.stack(images)), labels

    def _read(self, ids: Sequence[int]) -> tuple[list[Tensor], list[int]]:
        loaded = [self._kept.pop(i) if i in self._kept else self.images[i] for i in ids]
        for idx, (_, label) in zip(ids, loaded, strict=True):
            if not hasattr(label, "__index__") or not self._least <= int(label) < self._classes:
                raise InputError(
                    "A label is not a class",
                    expected=f"whole numbers from 0 to {self._classes - 1}" + (", or -1 where unknown" if self._least else ""),
                    received=f"{label!r} at image {idx}",
                    remedy="use a labelled data set in the experts' label order",
                )
        kinds = {f"{tuple(i.shape)} {i.dtype}" if isinstance(i, Tensor) else type(i).__name__ for i, _ in loaded}
        if len(kinds) > 1 or not isinstance(loaded[0][0], Tensor):
            raise InputError(
                "The images of a data set do not stack",
                expected="float tensors (C, H, W) of one shape",
                received=", ".join(sorted(kinds)),
                remedy="convert them, or crop them to one size",
            )
        return [image for image, _ in loaded], [int(label) for _, label in loaded]


@dataclass(frozen=True)
class Running:
    """A running estimate for progress displays.

    Attributes:
        votes: votes drawn so far in this run.
        finished: images finished so far, rows of earlier runs included.
        total: images of the whole job.
        accuracy: certified accuracy so far at each radius the display asked for; NaN without labels.
        seconds: since the first vote of this run, on a clock that only goes forward.
        remaining: seconds still to go at this pace, if the other images need as many votes as the finished ones; NaN
            before anything is known.
        most: seconds still to go if every other image needed all the votes it may take; NaN where that is not known.
    """

    votes: int
    finished: int
    total: int
    accuracy: tuple[float, ...]
    seconds: float = 0.0
    remaining: float = float("nan")
    most: float = float("nan")


class Tally:
    """Running certified accuracy and pace, over rows of earlier runs and of this one.

    Args:
        radii: at which to count.
        total: images of the job.
        earlier: the rows of earlier runs.
        most: votes that an image may take; None: not known.
    """

    def __init__(self, radii: Sequence[float], total: int, earlier: Table | None = None, most: int | None = None) -> None:
        self._most = most
        self._edges = np.maximum(np.asarray(radii, dtype=np.float64), np.nextafter(0.0, 1.0))
        self._hits, self._labelled, self._rows, self._drawn = np.zeros(len(self._edges)), 0, 0, 0
        self._total, self._votes, self._before = total, 0, 0
        self._start: float | None = None
        if earlier is not None:
            known = earlier.label >= 0
            hit = (earlier.correct == 1)[:, None] & (earlier.radius[:, None] >= self._edges)
            self._hits, self._labelled, self._rows = hit.sum(0).astype(float), int(known.sum()), len(earlier)
            self._drawn = self._before = int(np.maximum(earlier.n_drawn, 0).sum())

    def add(self, row: Row) -> None:
        """One row."""
        self._rows += 1
        self._drawn += row.n_drawn
        if row.label >= 0:
            self._labelled += 1
            self._hits += (row.correct == 1) & (row.radius >= self._edges)

    def running(self, votes: int) -> Running:
        """Where the job stands after `votes` more; the first call starts the clock."""
        self._start = time.monotonic() if self._start is None else self._start
        self._votes += votes
        seconds = time.monotonic() - self._start
        shares = self._hits / self._labelled if self._labelled else np.full(len(self._edges), np.nan)
        remaining = most = float("nan")
        if self._votes and self._most is not None:
            most = seconds * max(0.0, self._most * self._total - self._before - self._votes) / self._votes
        if self._rows and self._votes:
            expected = self._drawn / self._rows * self._total - self._before
            begun = self._votes - (self._drawn - self._before)  # on images that are not finished: as many again, at a guess
            left = max(0.0, expected - self._votes, begun) if self._rows < self._total else 0.0
            remaining = seconds * left / self._votes
        return Running(self._votes, self._rows, self._total, tuple(float(s) for s in shares), seconds, remaining, most)


def make_executor(workers: int | str | None, ray: str | None, device: str | None, threads: int | None) -> Executor:
    """The executor that arguments ask for.

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
    if workers is None and len(device_names(device)) > 1:
        workers = "auto"
    return Inline(device, threads) if workers is None else Processes(local_resources(workers, device, threads))


def run_job(
    executor: Executor,
    worker: Worker,
    reader: Reader,
    order: Sequence[int],
    out: Path,
    metadata: dict[str, Any],
    *,
    facts: dict[str, Any],
    block: int,
    rule: str = "",
    seed: int | None = None,
    radii: Sequence[float] = (),
    progress: Callable[[Running], None] | None = None,
    most: int | None = None,
    retries: int = RETRIES,
) -> Table:
    """Fills the table `out` with the rows of `order`, resuming what it holds; `executor` has been entered.

    Rows are appended as they finish and put into order at the end: the finished table does not tell how many workers there
    were.

    Args:
        worker: what is done with the images.
        facts: `machine_facts` that the metadata record; workers of other machines are refused.
        block: images of one task at most.
        rule, seed: of the certificates, for their rows.
        radii, progress: `progress` is called after every word from a worker, with the accuracy at `radii`; without it a terminal
            shows a bar.
        most: votes that an image may take, for a first estimate of the time.
        retries: how often an image, or a slot, may lose its worker.

    Returns:
        The finished table.

    Raises:
        ResultsError: another job writes the table, it belongs to another run, or the disk refuses.
        WorkerError: workers that die again and again.
    """
    with ResultsWriter(out, metadata) as writer:
        earlier = read_table(out) if writer.done() else None
        tally, rows = Tally(radii, len(order), earlier, most), list[Row]()
        labels: dict[int, int] = {}

        def load(ids: tuple[int, ...]) -> Task:
            task, found = reader.task(ids)
            labels.update(zip(ids, found, strict=True))
            return task

        def keep(done: Done) -> None:
            row = Row.from_certificate(
                done.certificate, idx=done.idx, label=labels.pop(done.idx), seconds=done.seconds, rule=rule, seed=seed
            )
            writer.append(row)
            tally.add(row)
            rows.append(row)

        def told(votes: int) -> None:
            running = tally.running(votes)
            bar.update(running.finished - bar.n)
            if progress is not None:
                progress(running)

        done = writer.done()
        todo = [i for i in order if i not in done]
        bar = BAR(desc=out.name, total=len(order), disable=None if progress is None else True)
        if todo:
            executor.open(worker)
            Scheduler(executor, load, todo, keep, block=block, facts=facts, told=told, retries=retries).run()
        bar.close()
        writer.arrange(order)
    return Table.of(rows, path=out, metadata=writer.metadata, earlier=earlier, order=order)


class Scheduler:
    """Gives images to an executor's workers until every one is done.

    A task is the idempotent unit, an image the smallest thing that is kept: what a dying worker leaves undone goes to the
    next one that is free, image by image, so that an image that ends its worker is found out. It is tried `retries` times
    more; the others are finished first. A slot whose workers keep ending before anything is done is given up.

    Args:
        executor: where.
        load: image ids to a task, called in this process shortly before the task is due.
        todo: ids, in the order in which they are handed out.
        keep: called with each finished image, once for each id.
        block: images of one task at most.
        facts: what every worker's machine must be.
        retries: see above.
        told: called after every word from a worker, with the votes drawn since the last call.

    Raises (from `run`):
        WorkerError: images or slots were given up.
        RSRouterError: what the work itself raises; another worker would meet it too.
    """

    def __init__(
        self,
        executor: Executor,
        load: Callable[[tuple[int, ...]], Task],
        todo: Sequence[int],
        keep: Callable[[Done], None],
        *,
        block: int,
        facts: dict[str, Any],
        retries: int,
        told: Callable[[int], None],
    ) -> None:
        self._executor, self._load, self._keep, self._block, self._retries = executor, load, keep, block, retries
        self._facts, self._told = facts, told
        self._queue = deque(todo)
        self._again: deque[int] = deque()
        self._left = set(self._queue)
        self._attempts: Counter[int] = Counter()
        self._hopeless: dict[int, str] = {}
        self._running: dict[int, tuple[int, ...]] = {}
        self._idle: list[int] = []
        self._failures: Counter[int] = Counter()
        self._slots = set(range(executor.slots))
        self._restart: list[int] = list(range(executor.slots))
        self._next: Task | None = None
        self._reason = ""

    def run(self) -> None:
        """Returns when every image has a row."""
        while self._left - set(self._hopeless):
            if not self._slots:
                raise WorkerError(
                    "Workers end again and again before they finish anything",
                    expected="a worker that keeps running",
                    received=self._reason,
                    remedy="finished rows are kept; try fewer workers or one process. A script that starts workers needs "
                    'the line `if __name__ == "__main__":`',
                )
            # no more workers than there is work for
            while self._restart and len(self._running) + len(self._idle) < len(self._left):
                slot = self._restart.pop()
                self._running[slot] = ()
                self._executor.start(slot)
            self._hand_out()
            self._executor.wait(self._hear, 1.0)
        if self._hopeless:
            idx, reason = next(iter(self._hopeless.items()))
            raise WorkerError(
                f"Image {idx} ended {self._retries + 1} workers"
                + (f", and so did {len(self._hopeless) - 1} others" if len(self._hopeless) > 1 else ""),
                expected="a worker that finishes it",
                received=reason,
                remedy="all other images have their rows; run again with fewer workers, or in one process, which shows why",
            )

    def _hand_out(self) -> None:
        while self._idle and (task := self._take()) is not None:
            slot = self._idle.pop(0)
            self._running[slot] = task.ids
            self._executor.submit(slot, task)
        # while all are busy, the images of the next task are read
        if self._executor.slots > 1 and self._next is None:
            self._next = self._take()

    def _take(self) -> Task | None:
        if self._next is not None:
            task, self._next = self._next, None
            return task
        if self._again:
            return self._load((self._again.popleft(),))
        if not self._queue:
            return None
        share = -(-len(self._queue) // (_SHARE * self._executor.slots)) if self._executor.slots > 1 else self._block
        return self._load(tuple(self._queue.popleft() for _ in range(min(share, self._block, len(self._queue)))))

    def _hear(self, slot: int, event: Event) -> None:
        if isinstance(event, Ready):
            self._check(event.facts)
            self._running.pop(slot, None)
            self._idle.append(slot)
            self._told(0)
        elif isinstance(event, Step):
            for done in event.done:
                if done.idx in self._left:
                    self._keep(done)
                    self._left.discard(done.idx)
                self._failures[slot] = 0
            self._told(event.votes)
        elif isinstance(event, Finished):
            self._running.pop(slot, None)
            self._idle.append(slot)
        elif isinstance(event, Failed):
            raise event.error
        else:
            self._lose(slot, event)

    def _lose(self, slot: int, event: Lost) -> None:
        self._reason = event.reason
        if slot in self._idle:
            self._idle.remove(slot)
        for idx in self._running.pop(slot, ()):
            if idx in self._left:
                self._attempts[idx] += 1
                if self._attempts[idx] > self._retries:
                    self._hopeless[idx] = event.reason
                else:
                    self._again.append(idx)
        self._failures[slot] += 1
        # one more than an image has: a single hopeless image must not take the slot with it
        if self._failures[slot] > self._retries + 1:
            self._slots.discard(slot)
        else:
            self._restart.append(slot)
        self._told(0)

    def _check(self, facts: dict[str, Any]) -> None:
        different = [key for key in facts if facts[key] != self._facts.get(key)]
        if different:
            raise InputError(
                "The workers' machines differ, and so would the bits of their votes",
                expected=", ".join(f"{key} {self._facts.get(key)}" for key in different),
                received=", ".join(f"{key} {facts[key]}" for key in different),
                remedy="use machines of one kind, or one table per kind with --shard",
            )
