"""Certifying a data set into a results table: resumable, on one worker or many, with running estimates."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rsrouter.core.errors import InputError
from rsrouter.core.plans import Plan
from rsrouter.core.terms import Terms
from rsrouter.inputs import check_images
from rsrouter.jobs.driver import Images, Running, load_task, make_executor, run_job, stored_threads
from rsrouter.jobs.work import CertifyWork
from rsrouter.results import ExpertRecord, Table, TableMetadata, TreeRecord, pack_ids
from rsrouter.sampling.execution import KERNELS, default_batch
from rsrouter.sampling.noise import CHUNK
from rsrouter.smooth import RoutedSmooth, Smooth

#: Images that stand for a data set that knows no fingerprint.
SAMPLED = 8


def describe_data(images: Images, data: dict[str, Any] | None, order: Sequence[int]) -> dict[str, Any]:
    """The data set for the metadata: what the caller says, its size, fingerprint and preprocessing where it knows them.

    A plain list or a torch data set knows no fingerprint; a few of the job's images, spread over it, stand for all, so that
    a table is not continued over others.
    """
    described: dict[str, Any] = {**(data or {}), "images": len(images)}
    if not getattr(images, "fingerprint", None):
        few = tuple(dict.fromkeys(order[at] for at in np.linspace(0, len(order) - 1, SAMPLED).round().astype(int)))
        digest = hashlib.sha256(repr(few).encode())
        for i in few:
            task, labels = load_task(images, (i,))
            digest.update(repr((i, labels, str(task.images.dtype), tuple(task.images.shape))).encode())
            digest.update(task.images.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        described["sample"] = digest.hexdigest()
    for key in ("fingerprint", "preprocessing"):
        if key not in described and getattr(images, key, None):
            described[key] = getattr(images, key)
    return described


def check_order(images: Images, indices: Sequence[int] | None, block: int) -> list[int]:
    """The images of a job; InputError for indices out of range, doubled or none, and for blocks that cannot be."""
    order = list(range(len(images))) if indices is None else [int(i) for i in indices]
    if bad := [i for i in order if not 0 <= i < len(images)]:
        raise InputError(
            "An image index is out of range",
            expected=f"0 to {len(images) - 1}",
            received=str(bad[:5]),
            remedy="check --start and --count",
        )
    if len(set(order)) < len(order) or not order:
        raise InputError(
            "A table holds each image once, and one at least",
            expected="different indices",
            received=f"{len(order)} indices, {len(set(order))} of them different",
            remedy="check indices, --start and --count",
        )
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise InputError("block must be a whole number", expected="block >= 1", received=repr(block), remedy="leave it out")
    return order


def take_shard(order: list[int], shard: tuple[int, int] | None) -> list[int]:
    """The images of shard `(i, N)`: every N-th, from the i-th on; all of them where it is None.

    Raises:
        InputError: not 0 <= i < N, or a shard without an image.
    """
    if shard is None:
        return order
    index, count = shard
    if not 0 <= index < count:
        raise InputError(
            "The shard does not exist", expected="(i, N) with 0 <= i < N", received=repr(shard), remedy="count from 0"
        )
    if index >= len(order):
        raise InputError(
            "The shard holds no image",
            expected=f"a shard from 0 to {len(order) - 1}, as the job has {len(order)} images",
            received=f"shard {index} of {count}",
            remedy="cut the job into fewer shards; merging does not ask for empty ones",
        )
    return order[index::count]


def settled_batch(smoothed: Smooth | RoutedSmooth, device: str | None) -> int:
    """Rows per forward pass: a function of input size and the device's type, so that it is known before a worker starts.

    A job never halves it where memory is short, as a single `certify` may: its rows would not be of one function.
    """
    return smoothed.execution.batch or default_batch(int(np.prod(smoothed.shape)), torch.device(device or "cpu"))


def job_metadata(
    smoothed: Smooth | RoutedSmooth,
    terms: Terms,
    *,
    seed_from: str,
    device: str | None,
    name: str,
    data: dict[str, Any],
    order: Sequence[int],
    facts: dict[str, Any],
    threads: int | None = None,
) -> dict[str, Any]:
    """What makes a table reproducible; rows are only ever added under the same metadata (but for `info`)."""
    execution = {**smoothed.execution.to_dict(), "batch": settled_batch(smoothed, device)}
    experts = smoothed.pool if isinstance(smoothed, RoutedSmooth) else [smoothed.expert]
    return TableMetadata(
        name=name,
        role="routed" if isinstance(smoothed, RoutedSmooth) else "expert",
        digest=smoothed.digest,
        router=smoothed.router.kind if isinstance(smoothed, RoutedSmooth) else None,
        experts=tuple(ExpertRecord(name=e.name, sigma=float(e.sigma), digest=e.digest) for e in experts),
        tree=TreeRecord.of(smoothed.tree),
        terms=terms,
        seed_from=seed_from,
        seed_derived=terms.seed == smoothed.routed.default_seed(seed_from),
        noise=smoothed.noise,
        stream={"chunk": CHUNK},
        execution=execution,
        kernels=dict(KERNELS),
        data=data,
        indices=pack_ids(order),
        num_images=len(order),
        device=facts["device"],
        versions=facts["versions"],
        info={
            "threads": threads or torch.get_num_threads(),
            "instructions": facts["instructions"],
            "platform": platform.platform(),
            "python": platform.python_version(),
        },
    ).to_dict()


def certify_table(
    smoothed: Smooth | RoutedSmooth,
    images: Images,
    out: str | Path,
    terms: Terms | Plan,
    *,
    seed_from: str = "",
    device: str | None = None,
    batch_size: int | None = None,
    indices: Sequence[int] | None = None,
    shard: tuple[int, int] | None = None,
    name: str | None = None,
    data: dict[str, Any] | None = None,
    radii: Sequence[float] = (0.0, 0.5, 1.0),
    progress: Callable[[Running], None] | None = None,
    block: int = 256,
    workers: int | str | None = None,
    ray: str | None = None,
    threads: int | None = None,
) -> Table:
    """Certifies images into `out` (a TSV with its JSON beside it); goes on where an earlier run stopped.

    The finished table stands in the order of `indices`, and holds the same bytes (the time column apart) whatever was
    interrupted and however many workers there were, because an image's votes depend on nothing but the image, the
    networks, the plan, the seed, and how the networks run, which is the same in every worker.

    Args:
        smoothed: what to certify.
        images: data set; read in this process, `block` images at a time. Workers get pixels, and no labels.
        out: the table.
        terms, device, batch_size: as in `RoutedSmooth.certify`.
        seed_from: a public text that the derived seed depends on as well, such as a date or a commit after the router's.
        indices: which images, in which order; None: all. An image's id is its index.
        shard: `(i, N)`, i from 0: only every N-th of `indices`, from the i-th on; `merge_tables` puts shards together.
        name: of the run, for the report.
        data: description of the data set for the metadata.
        radii: for the running estimate.
        progress: called after every round.
        block: images in memory at once, for each worker.
        workers: None certifies in this process; a number, or "auto" (one per GPU, or per core), in as many processes.
            A worker that dies is replaced, and another does its images.
        ray: address of a Ray cluster ("auto": the one of this machine, else a new one) whose actors are the workers,
            one per GPU, or per `threads` cores. Needs `pip install rsrouter[ray]`.
        threads: torch threads of each worker. On a CPU they decide how sums are rounded, so a table keeps those it was
            begun with. None: torch's own for one process; workers divide the cores.

    Returns:
        The finished table.

    Raises:
        ResultsError: the table belongs to another run, or cannot be written.
        WorkerError: workers that die again and again.
        InputError, PlanError, NetworkError: as in `certify`; workers or threads that cannot be.
    """
    asked = smoothed.routed.resolve(terms, seed_from)
    order = check_order(images, indices, block)
    # certifying no image checks every argument before anything is written; a cluster's devices are not this machine's
    smoothed.certify(torch.zeros((0, *smoothed.shape)), asked, batch_size=batch_size, device=device if ray is None else None)
    mine = take_shard(order, shard)
    check_images(load_task(images, (mine[0],))[0].images, smoothed.shape)  # of another size: no table is begun
    path = Path(out)
    with make_executor(workers, ray, device, stored_threads(path, device, threads)) as executor:
        facts = executor.facts()
        metadata = job_metadata(
            smoothed,
            asked,
            seed_from=seed_from,
            device=device,
            name=name or (smoothed.expert.name if isinstance(smoothed, Smooth) else "routed"),
            data=describe_data(images, data, order),
            order=order,
            facts=facts,
            threads=executor.threads,
        )
        if shard is not None:
            metadata["shard"] = {"index": shard[0], "count": shard[1]}
        work = CertifyWork(smoothed, asked, batch_size, metadata["execution"]["batch"])
        return run_job(executor, work, images, mine, path, metadata, facts=facts, block=block, radii=radii, progress=progress)
