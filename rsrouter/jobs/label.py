"""Labelling a data set: every expert's votes on every image, on one worker or many; resumed after a crash, merged from shards."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rsrouter.core.bounds import check_whole
from rsrouter.core.errors import ResultsError
from rsrouter.core.types import ABSTAIN, Certificate
from rsrouter.experts.pool import ExpertPool
from rsrouter.inputs import check_seed
from rsrouter.jobs.certify import check_order, describe_data, take_shard
from rsrouter.jobs.devices import first_device, job_threads
from rsrouter.jobs.driver import Images, Reader, Running, make_executor, run_job
from rsrouter.jobs.workers import Done, Emit, Step, Task
from rsrouter.results import pack_ids
from rsrouter.results.metadata import describe, differences, metadata_path, normalise
from rsrouter.sampling.engine import Engine
from rsrouter.sampling.execution import Execution, default_batch, largest_input, named_device
from rsrouter.training.label_files import has_votes, save_votes
from rsrouter.training.labels import LABEL, label_engine, label_votes

#: Images that are labelled between two steps.
LABEL_BLOCK = 64


@dataclass
class LabelWorker:
    """Every expert's votes, as certificates that answer nothing: votes stand under the experts' names."""

    pool: ExpertPool
    n: int
    seed: int
    execution: Execution
    engine: Engine | None = field(default=None, init=False, repr=False)

    def open(self, device: str | None) -> None:
        self.engine = label_engine(self.pool, seed=self.seed, device=device, execution=self.execution)

    def run(self, task: Task, emit: Emit) -> None:
        for start in range(0, len(task.ids), LABEL_BLOCK):
            part = task.ids[start : start + LABEL_BLOCK]
            images = task.images[start : start + len(part)]
            votes = label_votes(self.pool, images, n=self.n, seed=self.seed, engine=self.engine)
            done = []
            for idx, drawn in zip(part, votes.tolist(), strict=True):
                counts = dict(zip(self.pool.names, map(tuple, drawn), strict=True))
                done.append(Done(idx, Certificate(ABSTAIN, 0.0, None, self.n * len(self.pool), counts, "", {})))
            emit(Step(int(votes.sum()), tuple(done)))


def label_table(
    pool: ExpertPool,
    images: Images,
    out: str | Path,
    *,
    n: int = 100,
    seed: int = 0,
    unseen: bool | None = None,
    source: str = "",
    device: str | None = None,
    execution: Execution | None = None,
    indices: Sequence[int] | None = None,
    shard: tuple[int, int] | None = None,
    progress: Callable[[Running], None] | None = None,
    block: int = 256,
    workers: int | str | None = None,
    ray: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Draws every expert's votes on every image into the npz file `out`, and resumes an unfinished one.

    Until all are drawn, they stand in a table `OUT.part.tsv` beside it, which a crash cannot damage.

    Args:
        pool: the experts.
        images: data set; read `block` images at a time. Votes do not depend on labels, which only the file gets.
        out: the file: `votes (N, K, classes + 1)`, `labels (N,)` and `metadata` (JSON text).
        n, seed: votes per expert and image, and the key of their noise.
        unseen: whether no expert was trained on these images; None: not known. Kept in the file, because experts
            look better than they are on their own training images.
        source: where the images are from, for the metadata.
        device: where experts vote.
        execution: how their networks run.
        indices: which images, in which order; None: all.
        shard: `(i, N)`, i from 0: only every N-th of `indices`, from the i-th on; `merge_labels` puts shards together.
        progress: called after every word from a worker.
        block: images in memory at once, for each worker.
        workers, ray, threads: as in `certify_table`.

    Returns:
        The metadata.

    Raises:
        ResultsError: the file holds labels of something else, and is not touched; or the disk refuses.
        InputError: images without labels, arguments that do not fit.
        WorkerError: workers that die again and again.
    """
    n, seed = check_whole("n", n, 1), check_seed(seed)
    for expert in pool:
        expert.check_unchanged()
    order = check_order(images, indices, block)
    mine = take_shard(order, shard)
    reader = Reader(images, pool.input_shape, pool.num_classes, labelled=True)
    reader.look(mine[0])
    path = Path(out)
    part = path.with_name(f"{path.name}.part.tsv")
    chosen = execution or Execution()
    where = named_device(first_device(device))
    batch = chosen.batch or default_batch(largest_input(pool.input_shape, (e.module for e in pool)), where)
    chosen = replace(chosen, batch=batch).on(where)
    with make_executor(workers, ray, device, job_threads(part, device, threads, chosen)) as executor:
        facts = executor.facts()
        metadata = normalise(
            {
                "kind": "routing-labels",
                "experts": list(pool.names),
                "sigmas": list(pool.sigmas),
                "digests": [e.digest for e in pool],
                "n": n,
                "seed": seed,
                "purpose": LABEL,
                "execution": chosen.to_dict(),
                "unseen": unseen,
                "source": source,
                "images": len(mine),
                "indices": pack_ids(order),
                "data": describe_data(reader, None, order),
                "device": facts["device"],
                "versions": facts["versions"],
                **({} if shard is None else {"shard": {"index": shard[0], "count": shard[1], "images": len(order)}}),
            }
        )
        if has_votes(path, metadata):
            _tidy(part)
            return metadata
        info = {
            "info": {
                "threads": chosen.threads or executor.threads or torch.get_num_threads(),
                "instructions": facts["instructions"],
            }
        }
        table = run_job(
            executor,
            LabelWorker(pool, n, seed, chosen),
            reader,
            mine,
            part,
            {**metadata, **info},
            facts=facts,
            block=block,
            seed=seed,
            progress=progress,
            most=n * len(pool),
        )
    votes = np.zeros((len(mine), len(pool), pool.num_classes + 1), dtype=np.int64)
    for i in range(len(table)):
        counts = table.counts(i)["estimate"]
        votes[i] = [counts[name] for name in pool.names]
    save_votes(path, votes, table.label, metadata)
    _tidy(part)
    return metadata


def _tidy(part: Path) -> None:
    """Removes the table of an unfinished job whose file is there; a kill in between left it."""
    for leftover in (part, metadata_path(part)):
        leftover.unlink(missing_ok=True)


def merge_labels(paths: Sequence[str | Path], out: str | Path) -> Path:
    """Merges what `label_table` wrote for the shards of one job into the file that it writes for the whole, byte for byte.

    Args:
        paths: the shards' files, in any order; one that is named twice does no harm.
        out: where to write. Refused if it exists, unless it is the same result.

    Raises:
        ResultsError: no shards, files that are none, shards of different jobs (with what differs), shards that disagree,
            a missing shard, or `out` is taken.
    """
    out = Path(out)
    if not paths:
        raise ResultsError(
            "There is nothing to merge",
            expected="at least one shard of labels",
            received="none",
            remedy="name the files that `rsrouter label --shard` wrote",
        )
    parts: dict[int, tuple[Path, NDArray[np.int64], NDArray[np.int64]]] = {}
    job: dict[str, Any] = {}
    for path in map(Path, paths):
        metadata, votes, labels = _read_shard(path)
        index = metadata["shard"].pop("index")
        job = job or metadata
        # the number of its own images follows from the shard's index
        if found := differences(job, {**metadata, "images": job["images"]}):
            raise ResultsError(
                f"{path} belongs to another job than {paths[0]}",
                expected="shards of one job",
                received=describe(found),
                remedy="merge only shards of the same label command",
            )
        if index not in parts:
            parts[index] = path, votes, labels
        elif not (np.array_equal(parts[index][1], votes) and np.array_equal(parts[index][2], labels)):
            raise ResultsError(
                f"Two files hold shard {index} and disagree",
                expected=f"the votes of {parts[index][0]}",
                received=f"others in {path}",
                remedy="label this shard again; one of the files is damaged",
            )
    shard = job.pop("shard")
    missing = sorted(set(range(min(shard["count"], shard["images"]))) - set(parts))
    if missing:
        raise ResultsError(
            "Shards are missing",
            expected=f"all {shard['count']} shards",
            received=f"no shard {', '.join(map(str, missing[:20]))}",
            remedy="label them",
        )
    metadata = {**job, "images": shard["images"]}
    if has_votes(out, metadata):
        return out
    first = parts[0][1]
    votes, labels = np.zeros((shard["images"], *first.shape[1:]), dtype=np.int64), np.zeros(shard["images"], dtype=np.int64)
    for index, (_, drawn, classes) in parts.items():
        votes[index :: shard["count"]], labels[index :: shard["count"]] = drawn, classes
    out.parent.mkdir(parents=True, exist_ok=True)
    save_votes(out, votes, labels, metadata)
    return out


def _read_shard(path: Path) -> tuple[dict[str, Any], NDArray[np.int64], NDArray[np.int64]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            metadata, votes, labels = json.loads(str(file["metadata"])), file["votes"], file["labels"]
        shard = {key: int(metadata["shard"][key]) for key in ("index", "count", "images")}
        size = len(range(shard["index"], shard["images"], shard["count"]))
        if not 0 <= shard["index"] < shard["count"] or len(votes) != size or len(labels) != size:
            raise ValueError(f"{len(votes)} images in shard {shard}")
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ResultsError(
            f"{path} is not a shard of labels",
            expected="an npz that `rsrouter label --shard` wrote",
            received=f"{type(error).__name__}: {error}",
            remedy="label this shard again, into a new file",
        ) from error
    return metadata, votes, labels
