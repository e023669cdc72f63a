"""What a worker does: pixels in, rows of the table out. Labels never come here; the driver adds them.

A `Work` is pickled to every worker, `open`ed there once, and then given task after task. What runs where is decided by
an executor (`rsrouter.jobs.executor`), what runs next by the scheduler (`rsrouter.jobs.scheduler`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import scipy
import torch
from torch import Tensor

from rsrouter._version import __version__
from rsrouter.core.errors import RSRouterError
from rsrouter.core.terms import Terms
from rsrouter.core.types import Certificate
from rsrouter.experts.pool import ExpertPool
from rsrouter.results import Row
from rsrouter.sampling.engine import Engine
from rsrouter.sampling.execution import Execution, instructions, resolve_device
from rsrouter.smooth import Drawn, RoutedSmooth, Smooth
from rsrouter.training.labels import label_engine, label_votes


@dataclass(frozen=True, slots=True)
class Task:
    """A small shard of a job: done twice, it gives the same rows.

    Attributes:
        ids: the images' indices in their data set.
        images: `(len(ids), C, H, W)` pixels in [0,1].
    """

    ids: tuple[int, ...]
    images: Tensor


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker can take tasks; `facts` say what decides its votes' bits (`machine_facts`)."""

    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """Votes drawn since the last step, and rows finished meanwhile (without labels)."""

    votes: int
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The task is done."""


@dataclass(frozen=True, slots=True)
class Failed:
    """An error that another worker would meet as well: the job ends with it."""

    error: RSRouterError


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker is gone, or no longer to be trusted; its task can be given to another."""

    reason: str


#: Images that are labelled between two steps.
LABEL_BLOCK = 64

Event = Ready | Step | Finished | Failed | Lost
Emit = Callable[[Event], None]


class Work(Protocol):
    """What is to be done with images."""

    def open(self, device: str | None) -> None:
        """Prepares the networks on `device`."""

    def run(self, images: Tensor, ids: Sequence[int], emit: Emit) -> None:
        """Emits one row per image, in `Step`s, in any order."""


def machine_facts(device: str | None) -> dict[str, Any]:
    """What else decides a vote's bits: the device's name and the libraries' versions."""
    where = resolve_device(device)
    return {
        "device": "cpu" if where.type == "cpu" else torch.cuda.get_device_name(where),
        # kernels differ with the vector instructions; on an accelerator they do not
        "instructions": instructions(where),
        "versions": {"rsrouter": __version__, "torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__},
    }


def with_batch(smoothed: Smooth | RoutedSmooth, batch: int) -> Smooth | RoutedSmooth:
    """`smoothed` with an execution batch that is settled; the caller's own, which may go on to another device, keeps its own."""
    return smoothed.with_execution(replace(smoothed.execution, batch=batch))


#: Seconds that finished rows wait for the next check of their networks.
ROWS_WAIT = 2.0


@dataclass
class CertifyWork:
    """Certificates of a smoothed classifier. Arguments as `RoutedSmooth.certify`, all of them resolved.

    `execution_batch` is the one that the job's metadata record.
    """

    smoothed: Smooth | RoutedSmooth
    terms: Terms
    batch_size: int | None
    execution_batch: int
    device: str | None = None
    _engine: Engine | None = field(default=None, init=False, repr=False)

    def open(self, device: str | None) -> None:
        self.device = device
        self.smoothed = with_batch(self.smoothed, self.execution_batch)
        self._engine = self.smoothed.engine(int(self.terms.seed or 0), device)

    def run(self, images: Tensor, ids: Sequence[int], emit: Emit) -> None:
        """Rows wait until every network that voted for them has given the bits it was checked with once more: those of a
        network that changed on the way belong to no fixed classifier, and no table gets them."""
        rule = self.terms.rule if isinstance(self.smoothed, RoutedSmooth) else ""
        seed, rows = int(self.terms.seed or 0), list[Row]()
        votes, flushed, cost = 0, time.monotonic(), 0.0

        def keep(position: int, certificate: Certificate, seconds: float) -> None:
            rows.append(Row.from_certificate(certificate, idx=ids[position], seconds=seconds, rule=rule, seed=seed))

        def flush() -> None:
            nonlocal flushed, cost
            start = time.monotonic()
            assert self._engine is not None
            self._engine.check_again()
            flushed = time.monotonic()
            cost = flushed - start
            emit(Step(0, tuple(rows)))
            rows.clear()

        def step(progress: Drawn) -> None:
            nonlocal votes
            emit(Step(progress.votes - votes, ()))
            votes = progress.votes
            # a crash loses these seconds; checks take a fiftieth of the time at most
            if rows and time.monotonic() - flushed >= max(ROWS_WAIT, 50.0 * cost):
                flush()

        self.smoothed.certify(
            images,
            self.terms,
            ids=ids,
            batch_size=self.batch_size,
            device=self.device,
            on_certificate=keep,
            progress=step,
            engine=self._engine,
        )
        flush()


@dataclass
class LabelWork:
    """Every expert's votes, as rows that answer nothing: votes stand under the experts' names."""

    pool: ExpertPool
    n: int
    seed: int
    execution: Execution
    device: str | None = None
    _engine: Engine | None = field(default=None, init=False, repr=False)

    def open(self, device: str | None) -> None:
        self.device = device
        self._engine = label_engine(self.pool, seed=self.seed, device=device, execution=self.execution)

    def run(self, images: Tensor, ids: Sequence[int], emit: Emit) -> None:
        for start in range(0, len(ids), LABEL_BLOCK):
            part = ids[start : start + LABEL_BLOCK]
            votes = label_votes(self.pool, images[start : start + len(part)], n=self.n, seed=self.seed, engine=self._engine)
            rows = []
            for idx, drawn in zip(part, votes.tolist(), strict=True):
                counts = {"estimate": dict(zip(self.pool.names, drawn, strict=True))}
                rows.append(Row(idx, -1, -1, 0.0, 0.0, n_drawn=self.n * len(self.pool), seed=self.seed, counts=counts))
            emit(Step(int(votes.sum()), tuple(rows)))


def serve(work: Callable[[], Work], device: str | None, threads: int | None, receive: Callable[[], Task], emit: Emit) -> None:
    """The life of a worker: open, then task after task, until `receive` raises EOFError.

    Args:
        work: gives the work (unpickles it), so that its errors are told too.
        device: where its networks run.
        threads: of torch; None leaves them.
        receive: waits for the next task.
        emit: tells the driver.
    """
    try:
        if threads is not None:
            torch.set_num_threads(threads)  # counts for the thread that calls it, so not before
        mine = work()
        mine.open(device)
        emit(Ready(machine_facts(device)))
        while True:
            try:
                task = receive()
            except EOFError:
                return
            mine.run(task.images, task.ids, emit)
            emit(Finished())
    except BrokenPipeError:
        return  # the driver is gone, and nobody reads on
    except RSRouterError as error:
        emit(Failed(error))
    except Exception as error:
        emit(Lost(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
