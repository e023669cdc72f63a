"""Labelling a data set: every expert's votes on every image, on one worker or many, gone on with after a crash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsrouter.core.errors import InputError
from rsrouter.core.plans import check_whole
from rsrouter.experts.pool import ExpertPool
from rsrouter.inputs import check_images, check_seed
from rsrouter.jobs.certify import check_order, describe_data, take_shard
from rsrouter.jobs.driver import Images, Running, load_task, make_executor, run_job, stored_threads
from rsrouter.jobs.work import LabelWork
from rsrouter.results import pack_ids
from rsrouter.results.metadata import metadata_path, normalise
from rsrouter.sampling.execution import Execution, default_batch
from rsrouter.training.label_files import has_votes, save_votes
from rsrouter.training.labels import LABEL


class _Labelled:
    """Images that must have a class, as they are read."""

    def __init__(self, images: Images, classes: int) -> None:
        self._images, self._classes = images, classes

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._images[index]
        if not 0 <= int(label) < self._classes:
            raise InputError(
                "Labelling needs the true classes",
                expected=f"a class from 0 to {self._classes - 1} for every image",
                received=f"{label} at image {index}",
                remedy="use a labelled data set in the experts' label order",
            )
        return image, label


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
    """Draws every expert's votes on every image into the npz file `out`; started again, it goes on where it stopped.

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
    check_images(load_task(images, (mine[0],))[0].images, pool.input_shape)
    path = Path(out)
    part = path.with_name(f"{path.name}.part.tsv")
    chosen = execution or Execution()
    batch = chosen.batch or default_batch(int(np.prod(pool.input_shape)), torch.device(device or "cpu"))
    chosen = replace(chosen, batch=batch)
    with make_executor(workers, ray, device, stored_threads(part, device, threads)) as executor:
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
                "data": describe_data(images, None, order),
                "device": facts["device"],
                "versions": facts["versions"],
                **({} if shard is None else {"shard": {"index": shard[0], "count": shard[1], "images": len(order)}}),
            }
        )
        if has_votes(path, metadata):
            _tidy(part)
            return metadata
        work = LabelWork(pool, n, seed, chosen)
        info = {"info": {"threads": executor.threads or torch.get_num_threads(), "instructions": facts["instructions"]}}
        table = run_job(
            executor,
            work,
            _Labelled(images, pool.num_classes),
            mine,
            part,
            {**metadata, **info},
            facts=facts,
            block=block,
            progress=progress,
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
