"""Work that takes no network: rows from the pixels, and workers that die where a file says so. Importable by workers."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rsrouter.core.errors import NetworkError
from rsrouter.core.types import Certificate
from rsrouter.jobs.devices import Resources
from rsrouter.jobs.driver import Reader, Running, run_job
from rsrouter.jobs.workers import Done, Emit, Executor, Inline, Processes, Step, Task, machine_facts
from rsrouter.results import Table

METADATA = {"kind": "fake", "num_images": 24}
COUNT = 24


class Images:
    """`COUNT` images of two pixels."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 1, 2), index / 100), index % 3


@dataclass
class FakeWorker:
    """One row per image, one step per row.

    Attributes:
        marks: folder; a worker that finds the file `die-<idx>` there takes one character off it and kills itself in the
            middle of that image, for as long as there are characters.
        seconds: that an image takes.
        fails: an image that no worker can do.
        dead: workers die before they are ready.
    """

    marks: str = ""
    seconds: float = 0.0
    fails: int = -1
    dead: bool = False

    def open(self, device: str | None) -> None:
        if self.dead:
            os.kill(os.getpid(), signal.SIGKILL)

    def run(self, task: Task, emit: Emit) -> None:
        for at, idx in enumerate(task.ids):
            emit(Step(5))
            time.sleep(self.seconds)
            if idx == self.fails:
                raise NetworkError("This network is odd", expected="an even one", received="odd", remedy="none")
            mark = Path(self.marks) / f"die-{idx}"
            if self.marks and mark.exists() and (left := mark.read_text()):
                mark.write_text(left[1:])
                os.kill(os.getpid(), signal.SIGKILL)
            content = int(hashlib.sha256(task.images[at].numpy().tobytes()).hexdigest()[:6], 16)
            votes = (content % 50, 50 - content % 50, 0)
            emit(Step(5, (Done(idx, Certificate(content % 3, 0.25, None, 10, {"net": votes}, "", {}), 0.1),)))


def pool(workers: int = 2, method: str = "spawn") -> Processes:
    return Processes(Resources((None,) * workers, 1), method=method)


def run(out: Path, executor: Executor | None = None, work: FakeWorker | None = None, **options: object) -> Table:
    """The fake job into `out`; in this process where no executor is given."""
    executor = executor or Inline(None, None)
    with executor:
        return run_job(
            executor,
            work or FakeWorker(),
            Reader(Images(), (1, 1, 2), 3),
            range(COUNT),
            out,
            METADATA,
            facts=machine_facts(None),
            **{"block": 5, **options},  # type: ignore[arg-type]
        )


def untimed(path: Path) -> list[list[str]]:
    """The table without its time column, and the metadata."""
    lines = path.read_text().splitlines()
    at = lines[0].split("\t").index("time")
    return [line.split("\t")[:at] + line.split("\t")[at + 1 :] for line in lines] + [[path.with_suffix(".json").read_text()]]


__all__ = ["COUNT", "METADATA", "FakeWorker", "Images", "Running", "pool", "run", "untimed"]
