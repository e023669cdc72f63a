"""Certifying a data set into a results table: resumable, on one worker or many, with running estimates."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rsrouter.clock import Drawn
from rsrouter.core.errors import InputError
from rsrouter.core.plans import Plan
from rsrouter.core.terms import Terms
from rsrouter.core.types import Certificate
from rsrouter.inputs import check_count
from rsrouter.jobs.devices import first_device, job_threads
from rsrouter.jobs.driver import Images, Reader, Running, make_executor, run_job
from rsrouter.jobs.workers import Done, Emit, Step, Task
from rsrouter.process import kernels
from rsrouter.results import ExpertRecord, Table, TableMetadata, TreeRecord, pack_ids
from rsrouter.sampling.engine import Engine
from rsrouter.sampling.execution import default_batch, largest_input, named_device
from rsrouter.sampling.noise import STREAMS
from rsrouter.smooth import RoutedSmooth, Smooth

#: Images that stand for a data set that knows no fingerprint.
SAMPLED = 8


def describe_data(reader: Reader, data: dict[str, Any] | None, order: Sequence[int]) -> dict[str, Any]:
    """The data set for the metadata: what the caller says, its size, fingerprint and preprocessing where it knows them.

    A plain list or a torch data set knows no fingerprint; a few of the job's images, spread over it, stand for all, so that
    a table is not resumed over others.
    """
    images = reader.images
    described: dict[str, Any] = {**(data or {}), "images": len(images)}
    if not getattr(images, "fingerprint", None):
        few = tuple(dict.fromkeys(order[at] for at in np.linspace(0, len(order) - 1, SAMPLED).round().astype(int)))
        digest = hashlib.sha256(repr(few).encode())
        for i in few:
            image, label = reader.look(i)
            digest.update(repr((i, [label], str(image.dtype), (1, *image.shape))).encode())
            digest.update(image.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        described["sample"] = digest.hexdigest()
    for key in ("fingerprint", "preprocessing"):
        if key not in described and getattr(images, key, None):
            described[key] = getattr(images, key)
    return described


def check_order(images: Images, indices: Sequence[int] | None, block: int) -> list[int]:
    """The images of a job.

    Raises:
        InputError: indices out of range, doubled or none; a block that cannot be.
    """
    check_count("block", block)
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
            "A table needs at least one image, and each image only once",
            expected="different indices",
            received=f"{len(order)} indices, {len(set(order))} of them different",
            remedy="check indices, --start and --count",
        )
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


#: Seconds that finished rows wait for the next check of their networks.
ROWS_WAIT = 2.0


@dataclass
class CertifyWorker:
    """Certificates of a smoothed classifier. Arguments as `RoutedSmooth.certify`, all of them resolved.

    `execution_batch` is the one that the job's metadata record.
    """

    smoothed: Smooth | RoutedSmooth
    terms: Terms
    batch_size: int | None
    execution_batch: int
    device: str | None = None
    engine: Engine | None = field(default=None, init=False, repr=False)

    def open(self, device: str | None) -> None:
        self.device = device
        self.smoothed = with_batch(self.smoothed, self.execution_batch)
        self.engine = self.smoothed.engine(int(self.terms.seed or 0), device)

    def run(self, task: Task, emit: Emit) -> None:
        """Certificates wait until every network that voted for them has given the bits it was checked with once more: those
        of a network that changed on the way belong to no fixed classifier, and no table gets them."""
        waiting: list[Done] = []
        votes, flushed, cost = 0, time.monotonic(), 0.0

        def keep(position: int, certificate: Certificate, seconds: float) -> None:
            waiting.append(Done(task.ids[position], certificate, seconds))

        def flush() -> None:
            nonlocal flushed, cost
            start = time.monotonic()
            if self.engine is not None:
                self.engine.check_again()
            flushed = time.monotonic()
            cost = flushed - start
            emit(Step(0, tuple(waiting)))
            waiting.clear()

        def step(progress: Drawn) -> None:
            nonlocal votes
            emit(Step(progress.votes - votes))
            votes = progress.votes
            # a crash loses these seconds; checks take a fiftieth of the time at most
            if waiting and time.monotonic() - flushed >= max(ROWS_WAIT, 50.0 * cost):
                flush()

        self.smoothed.certify(
            task.images,
            self.terms,
            ids=task.ids,
            batch_size=self.batch_size,
            device=self.device,
            on_certificate=keep,
            progress=step,
            engine=self.engine,
        )
        flush()


def with_batch(smoothed: Smooth | RoutedSmooth, batch: int) -> Smooth | RoutedSmooth:
    """`smoothed` with an execution batch that is settled; the caller's own, which may go on to another device, keeps its own."""
    return smoothed.with_execution(replace(smoothed.execution, batch=batch))


def settled_batch(smoothed: Smooth | RoutedSmooth, device: str | None) -> int:
    """Rows per forward pass: a function of the networks' input size and the device's type, so that it is known before a worker
    starts.

    A job never halves it where memory is short, as a single `certify` may: its rows would not be of one function.
    """
    numel = largest_input(smoothed.shape, (m.module for m in smoothed.routed.models))
    return smoothed.execution.batch or default_batch(numel, named_device(first_device(device)))


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
    execution = replace(smoothed.execution.on(named_device(first_device(device))), batch=settled_batch(smoothed, device))
    experts = smoothed.pool if isinstance(smoothed, RoutedSmooth) else [smoothed.expert]
    core = smoothed.core
    return TableMetadata(
        name=name,
        role="routed" if isinstance(smoothed, RoutedSmooth) else "expert",
        digest=smoothed.digest,
        router=smoothed.router.kind if isinstance(smoothed, RoutedSmooth) else None,
        experts=tuple(ExpertRecord(name=e.name, sigma=float(e.sigma), digest=e.digest) for e in experts),
        core=None if core is None else ExpertRecord(name=core.expert.name, sigma=0.0, digest=core.expert.digest),
        tree=TreeRecord.of(smoothed.tree),
        terms=terms,
        seed_from=seed_from,
        seed_derived=terms.seed == smoothed.routed.default_seed(seed_from),
        noise=smoothed.noise,
        stream=dict(STREAMS[execution.stream]),
        execution=execution.to_dict(),
        kernels=kernels(execution.precision),
        data=data,
        indices=pack_ids(order),
        num_images=len(order),
        device=facts["device"],
        versions=facts["versions"],
        info={
            "threads": execution.threads or threads or torch.get_num_threads(),
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
    """Certifies images into `out` (a TSV with its JSON beside it), and resumes an unfinished table.

    The finished table stands in the order of `indices`, and holds the same bytes (the time column apart) whatever was
    interrupted and however many workers there were, because an image's votes depend on nothing but the image, the
    networks, the plan, the seed, and how the networks run, which is the same in every worker.

    Args:
        smoothed: what to certify.
        images: data set; read in this process, `block` images at a time. Workers get pixels, and no labels. A label is a
            class of the experts, or -1 where it is unknown.
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
            A device of several names, such as `cuda:0,cuda:2`, has a process for each.
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
    device = smoothed.device if device is None else device
    smoothed = with_batch(smoothed, settled_batch(smoothed, device))
    if batch_size is not None:
        check_count("batch_size", batch_size, "it groups work; it never changes a vote")
    if ray is None:  # a cluster's devices are not this machine's
        smoothed.engine(int(asked.seed or 0), first_device(device))
    order = check_order(images, indices, block)
    mine = take_shard(order, shard)
    reader = Reader(images, smoothed.shape, smoothed.experts[0].num_classes)
    reader.look(mine[0])  # of another size: no table is begun
    path = Path(out)
    with make_executor(workers, ray, device, job_threads(path, device, threads, smoothed.execution)) as executor:
        facts = executor.facts()
        metadata = job_metadata(
            smoothed,
            asked,
            seed_from=seed_from,
            device=device,
            name=name or (smoothed.expert.name if isinstance(smoothed, Smooth) else "routed"),
            data=describe_data(reader, data, order),
            order=order,
            facts=facts,
            threads=executor.threads,
        )
        if shard is not None:
            metadata["shard"] = {"index": shard[0], "count": shard[1]}
        return run_job(
            executor,
            CertifyWorker(smoothed, asked, batch_size, metadata["execution"]["batch"]),
            reader,
            mine,
            path,
            metadata,
            facts=facts,
            block=block,
            rule=asked.rule if isinstance(smoothed, RoutedSmooth) else "",
            seed=asked.seed,
            radii=radii,
            progress=progress,
            most=(asked.plan.n0 + asked.plan.n_max) * len(smoothed.tree.stages),
        )
