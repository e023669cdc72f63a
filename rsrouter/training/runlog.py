"""The log of a training run, and what tells one run from another."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsrouter.core.errors import ResultsError
from rsrouter.experts.pool import ExpertPool
from rsrouter.files import write_atomically
from rsrouter.router.base import Router
from rsrouter.sampling.execution import Execution
from rsrouter.smooth import RoutedSmooth
from rsrouter.training.deferral import DeferralRecipe
from rsrouter.training.flat import Recipe
from rsrouter.training.labels import Labels
from rsrouter.training.resume import Checkpoint, unit_key

#: Where an unfinished run keeps its state, inside its folder, and how many seconds may be lost.
STATE, SAVE_EVERY = ".state", 10.0


class RunLog:
    """`training.jsonl`, written line by line, and the checkpoint beside it until the run is finished.

    Raises:
        ResultsError: the folder holds the unfinished training of something else.
    """

    def __init__(self, folder: Path | None, job: dict[str, Any]) -> None:
        self.lines: list[dict[str, Any]] = []
        self.path = None if folder is None else folder / "training.jsonl"
        self.checkpoint = Checkpoint(None if folder is None else folder / STATE, every=SAVE_EVERY)
        if folder is None or self.path is None:
            return
        told = folder / STATE / "job.json"
        if told.exists():
            before = json.loads(told.read_text())
            if before != job:
                raise ResultsError(
                    "The folder holds the unfinished training of something else",
                    expected="the same pool, data, recipe and settings, or a new folder",
                    received=f"{folder}: other {', '.join(k for k in {**before, **job} if before.get(k) != job.get(k))}",
                    remedy="give the same command again, choose another --out, or remove the folder",
                )
        told.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(told, json.dumps(job).encode())
        self.path.write_text("")

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def write(self, lines: list[dict[str, Any]]) -> None:
        """The whole log at once."""
        if self.path is not None:
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.checkpoint.clear()


def describe_job(
    pool: ExpertPool,
    router: Router | str,
    x: Tensor,
    target: Tensor,
    validation: tuple[Tensor, Tensor] | None,
    routing: Labels | None,
    recipe: Recipe | DeferralRecipe | None,
    radii: list[float],
    seed: int,
    label_n: int,
    plan_n: int,
    alpha: float,
    parent: RoutedSmooth | None,
    execution: Execution,
) -> dict[str, Any]:
    """Everything that decides what a training ends with, as digests."""

    def of(*tensors: Tensor) -> str:
        return unit_key(*(t.detach().cpu().contiguous().numpy().tobytes() for t in tensors))

    return {
        "experts": [e.digest for e in pool],
        "router": router if isinstance(router, str) else router.digest,
        "images": of(x, target),
        "validation": None if validation is None else of(*validation),
        "labels": None if routing is None else unit_key(routing.radius.tobytes()),
        "recipe": None if recipe is None else json.loads(json.dumps(asdict(recipe))),
        "radii": radii,
        "seed": seed,
        "votes": [label_n, plan_n],
        "alpha": alpha,
        "execution": execution.to_dict(),
        "parent": None if parent is None else parent.router.digest,
        "torch": [torch.__version__, torch.get_num_threads()],
    }
