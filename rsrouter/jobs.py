"""Certifying a data set into a results table: resumable, in order, with running estimates."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import scipy
import torch
from torch import Tensor

from rsrouter._version import __version__
from rsrouter.core.errors import InputError
from rsrouter.core.plans import Plan
from rsrouter.core.types import Certificate
from rsrouter.results import ResultsWriter, Row, Table, read_table
from rsrouter.sampling.execution import default_batch, resolve_device
from rsrouter.sampling.noise import CHUNK, SHARED
from rsrouter.smooth import Progress, RoutedSmooth, Smooth


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
    """

    votes: int
    finished: int
    total: int
    accuracy: tuple[float, ...]


def describe_indices(order: Sequence[int]) -> dict[str, Any]:
    """The images of a job, short enough for metadata: start, stop and step where they are evenly spaced, else a digest."""
    steps = {b - a for a, b in pairwise(order)}
    if len(steps) <= 1:
        step = steps.pop() if steps else 1
        return {"start": order[0], "stop": order[-1] + step, "step": step} if order else {"start": 0, "stop": 0, "step": 1}
    return {"sha256": hashlib.sha256(repr(list(order)).encode()).hexdigest()}


def job_metadata(
    smoothed: Smooth | RoutedSmooth,
    *,
    plan: Plan,
    alpha: float,
    seed: int,
    rule: str,
    sides: str,
    device: str | None,
    name: str,
    data: dict[str, Any],
    order: Sequence[int],
) -> dict[str, Any]:
    """What makes a table reproducible; rows are only ever added under the same metadata (but for `info`)."""
    where = resolve_device(device)
    shape = smoothed.pool.input_shape if isinstance(smoothed, RoutedSmooth) else smoothed.expert.input_shape
    execution = smoothed.execution.to_dict()
    execution["batch"] = execution["batch"] or default_batch(int(np.prod(shape)), where)
    experts = smoothed.pool if isinstance(smoothed, RoutedSmooth) else [smoothed.expert]
    return {
        "kind": "rsrouter-certificates",
        "schema_version": 1,
        "name": name,
        "role": "routed" if isinstance(smoothed, RoutedSmooth) else "expert",
        "plan": plan.to_dict(),
        "alpha": alpha,
        "rule": rule,
        "sides": sides,
        "seed": seed,
        "seed_derived": seed == smoothed.default_seed(plan, alpha, rule, sides),
        "digest": smoothed.digest,
        "router_digest": smoothed.router.digest if isinstance(smoothed, RoutedSmooth) else None,
        "router": smoothed.router.kind if isinstance(smoothed, RoutedSmooth) else None,
        "experts": [{"name": e.name, "sigma": e.sigma, "digest": e.digest} for e in experts],
        "stages": [
            {"name": s.name, "sigma": s.sigma, "kind": s.kind, "tau": s.tau, "network": s.network}
            for s in smoothed.tree.stages.values()
        ],
        "noise": smoothed.noise,
        "independent_noise": not smoothed.noise.endswith(SHARED),
        "stream": {"chunk": CHUNK},
        "execution": execution,
        "data": data,
        "indices": describe_indices(order),
        "num_images": len(order),
        "device": "cpu" if where.type == "cpu" else torch.cuda.get_device_name(where),
        "versions": {"rsrouter": __version__, "torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__},
        "info": {"threads": torch.get_num_threads(), "platform": platform.platform(), "python": platform.python_version()},
    }


def certify_table(
    smoothed: Smooth | RoutedSmooth,
    images: Images,
    out: str | Path,
    *,
    plan: Plan,
    alpha: float = 1e-3,
    seed: int | None = None,
    rule: str = "tree",
    sides: str | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    indices: Sequence[int] | None = None,
    shard: tuple[int, int] | None = None,
    name: str | None = None,
    data: dict[str, Any] | None = None,
    radii: Sequence[float] = (0.0, 0.5, 1.0),
    progress: Callable[[Running], None] | None = None,
    block: int = 256,
) -> Table:
    """Certifies images into `out` (a TSV with its JSON beside it); goes on where an earlier run stopped.

    Rows are written in the order of `indices`, and hold the same bytes (the time column apart) whatever was
    interrupted, because an image's votes depend on nothing but the image, the networks, the plan and the seed.

    Args:
        smoothed: what to certify.
        images: data set; only `block` images are held at a time.
        out: the table.
        plan, alpha, seed, rule, sides, device, batch_size: as in `RoutedSmooth.certify`; `sides=None` is "two" for
            a routed classifier and "one" for a single expert.
        indices: which images, in which order; None: all. An image's id is its index.
        shard: `(i, N)`, i from 0: only every N-th of `indices`, from the i-th on; `merge_tables` puts shards together.
        name: of the run, for the report.
        data: description of the data set for the metadata.
        radii: for the running estimate.
        progress: called after every round.
        block: images in memory at once.

    Returns:
        The finished table.

    Raises:
        ResultsError: the table belongs to another run, or cannot be written.
        InputError, PlanError, NetworkError: as in `certify`.
    """
    routed = isinstance(smoothed, RoutedSmooth)
    sides = ("two" if routed else "one") if sides is None else sides
    rule = rule if routed else "tree"
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
    tally = _Tally(radii)
    arguments: dict[str, Any] = {"rule": rule} if routed else {}
    # certifying no image checks every argument before anything is written
    shape = smoothed.pool.input_shape if isinstance(smoothed, RoutedSmooth) else smoothed.expert.input_shape
    smoothed.certify(
        torch.zeros((0, *shape)),
        plan=plan,
        alpha=alpha,
        seed=seed,
        sides=sides,
        batch_size=batch_size,
        device=device,
        **arguments,
    )
    seed = smoothed.default_seed(plan, alpha, rule, sides) if seed is None else int(seed)
    described = {**(data or {}), "images": len(images)}
    if "fingerprint" not in described and getattr(images, "fingerprint", None):
        described["fingerprint"] = images.fingerprint  # type: ignore[attr-defined]
    metadata = job_metadata(
        smoothed,
        plan=plan,
        alpha=alpha,
        seed=seed,
        rule=rule,
        sides=sides,
        device=device,
        name=name or (smoothed.expert.name if isinstance(smoothed, Smooth) else "routed"),
        data=described,
        order=order,
    )
    if shard is not None:
        index, count = shard
        if not 0 <= index < count:
            raise InputError(
                "The shard does not exist", expected="(i, N) with 0 <= i < N", received=repr(shard), remedy="count from 0"
            )
        metadata["shard"] = {"index": index, "count": count}
        order = order[index::count]
    path = Path(out)
    with ResultsWriter(path, metadata) as writer:
        done = writer.done()
        if done:
            tally.add_table(read_table(path))
        todo = [i for i in order if i not in done]
        for start in range(0, len(todo), block):
            part = _Block(todo[start : start + block], images, writer, tally, rule if routed else "", seed)
            before = tally.votes

            def tell(p: Progress, before: int = before) -> None:
                tally.votes = before + p.votes
                if progress is not None:
                    progress(Running(tally.votes, tally.rows, len(order), tally.accuracy()))

            smoothed.certify(
                part.tensor(),
                plan=plan,
                alpha=alpha,
                seed=seed,
                ids=part.ids,
                sides=sides,
                batch_size=batch_size,
                device=device,
                on_certificate=part.keep,
                progress=tell,
                **arguments,
            )
    return read_table(path)


class _Tally:
    """Running certified accuracy, over rows of earlier runs and of this one."""

    def __init__(self, radii: Sequence[float]) -> None:
        self.edges = np.maximum(np.asarray(radii, dtype=np.float64), np.nextafter(0.0, 1.0))
        self.hits, self.labelled, self.rows, self.votes = np.zeros(len(self.edges)), 0, 0, 0

    def add(self, predict: int, label: int, radius: float) -> None:
        self.rows += 1
        if label >= 0:
            self.labelled += 1
            self.hits += (predict == label) & (radius >= self.edges)

    def add_table(self, table: Table) -> None:
        for predict, label, radius in zip(table.predict, table.label, table.radius, strict=True):
            self.add(int(predict), int(label), float(radius))

    def accuracy(self) -> tuple[float, ...]:
        shares = self.hits / self.labelled if self.labelled else np.full(len(self.edges), np.nan)
        return tuple(float(s) for s in shares)


class _Block:
    """Images of one call of `certify`; writes their rows in order, whatever order they finish in."""

    def __init__(self, ids: list[int], images: Images, writer: ResultsWriter, tally: _Tally, rule: str, seed: int) -> None:
        self.ids, self.writer, self.tally, self.rule, self.seed = ids, writer, tally, rule, seed
        self.loaded = [images[i] for i in ids]
        if wrong := [
            i for i, (_, label) in zip(ids, self.loaded, strict=True) if not hasattr(label, "__index__") or int(label) < -1
        ]:
            raise InputError(
                "A label is not a class index",
                expected="whole numbers, -1 where unknown",
                received=f"another label at image {wrong[0]}",
                remedy="check the data set",
            )
        self.waiting: dict[int, Row] = {}
        self.following = 0

    def tensor(self) -> Tensor:
        kinds = {f"{tuple(i.shape)} {i.dtype}" if isinstance(i, Tensor) else type(i).__name__ for i, _ in self.loaded}
        if len(kinds) > 1 or not isinstance(self.loaded[0][0], Tensor):
            raise InputError(
                "The images of a data set do not stack",
                expected="float tensors (C, H, W) of one shape",
                received=", ".join(sorted(kinds)),
                remedy="convert them, or crop them to one size",
            )
        return torch.stack([image for image, _ in self.loaded])

    def keep(self, position: int, certificate: Certificate, seconds: float) -> None:
        label = int(self.loaded[position][1])
        self.waiting[position] = Row.from_certificate(
            certificate, idx=self.ids[position], label=label, seconds=seconds, rule=self.rule, seed=self.seed
        )
        self.tally.add(certificate.predict, label, certificate.radius)
        while self.following in self.waiting:
            self.writer.append(self.waiting.pop(self.following))
            self.following += 1
