"""The inner loop: batches of noisy copies, forward passes, and votes that are counted where they are cast.

Nothing here reads a value to the host. On CUDA the noise of a batch is made in a stream of its own while the forward pass of
the batch before it runs; a batch costs one launch for its noise, the network's, and one for each head's votes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsrouter.core.requests import VoteRequest
from rsrouter.sampling import kernels
from rsrouter.sampling.execution import Prepared
from rsrouter.sampling.logits import Outputs, forward, heads, votes_of
from rsrouter.sampling.noise import CounterNoise, NoiseStream, flat
from rsrouter.sampling.philox import check_votes_fit, stream_words

#: Rows whose places go to an accelerator in one transfer (24 bytes each).
TABLE_ROWS = 2**18


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of one batch that belong to one request: votes `start` to `start + count - 1`."""

    request: int
    start: int
    count: int


def rows_for(votes: int, batch: int, smaller: Sequence[int]) -> int:
    """Rows of the pass that holds so many votes: the smallest of `smaller`, ascending, or the whole batch.

    >>> rows_for(30, 200, (50, 100)), rows_for(150, 200, (50, 100))
    (50, 200)
    """
    return next((size for size in smaller if votes <= size < batch), batch)


@dataclass(frozen=True)
class Round:
    """What one network is asked for.

    Attributes:
        images: `(N, C, H, W)` float32, where the network runs.
        whose: per request the row of its image.
        requests, keys: what to draw, and from which streams.
        sigma: standard deviation of the noise.
        widths: number of logits of each head.
        name: of the network, for errors.
        batch: rows per forward pass.
        smaller: numbers of rows below it, ascending, in which a row has the bits that it has in a whole batch.
    """

    images: Tensor
    whose: Sequence[int]
    requests: Sequence[VoteRequest]
    keys: Sequence[bytes]
    sigma: float
    widths: tuple[int, ...]
    name: str
    batch: int
    smaller: tuple[int, ...] = ()

    def rows(self, segments: Sequence[Segment]) -> int:
        """Rows of the forward pass that holds these segments."""
        return rows_for(sum(s.count for s in segments), self.batch, self.smaller)

    def counts(self) -> Tensor:
        """Zeros `(requests + 1, columns)` for votes and, in the last line, for rows that nobody asked for."""
        columns = sum(self.widths) + len(self.widths)
        return torch.zeros((len(self.requests) + 1, columns), dtype=torch.int64, device=self.images.device)

    def slots(self, segments: Sequence[Segment], rows: int) -> NDArray[np.int64]:
        """Per row the line of `counts` that its vote goes to."""
        slots = np.full(rows, len(self.requests), dtype=np.int64)
        row = 0
        for s in segments:
            request = self.requests[s.request]
            votes = np.arange(s.start, s.start + s.count)
            wanted = (votes >= request.start) & (votes < request.start + request.count)
            slots[row : row + s.count] = np.where(wanted, s.request, len(self.requests))
            row += s.count
        return slots

    def table(self, batches: Sequence[Sequence[Segment]]) -> NDArray[np.int64]:
        """`(batches * batch, 3)`: request, vote and line of `counts` of every row; an empty row has a request that is none."""
        table = np.zeros((len(batches), self.batch, 3), dtype=np.int64)
        table[..., 0] = len(self.requests)
        for rows, segments in zip(table, batches, strict=True):
            at = 0
            for s in segments:
                rows[at : at + s.count, 0] = s.request
                rows[at : at + s.count, 1] = np.arange(s.start, s.start + s.count)
                at += s.count
            rows[:, 2] = self.slots(segments, self.batch)
        return table.reshape(-1, 3)


#: A batch as the network takes it, per row the line of `counts`, and which rows are not votes.
Batch = tuple[Tensor, Tensor, Tensor | None]


def lay_out(requests: Sequence[VoteRequest], batch: int, packs: bool) -> list[list[Segment]]:
    """Segments of each batch. Rows are packed freely, or, where bits depend on the position in the batch,
    in blocks of one request that start at multiples of the batch (a few rows run for nothing).

    >>> lay_out([VoteRequest(0, "net", "estimate", 0, 3), VoteRequest(1, "net", "estimate", 0, 2)], 4, packs=True)[0][1]
    Segment(request=1, start=0, count=1)
    """
    packed: list[list[Segment]] = []
    room = 0
    for index, request in enumerate(requests):
        at, end = request.start, request.start + request.count
        while at < end:
            if not packs:
                block = at - at % batch
                packed.append([Segment(index, block, batch)])
                at = block + batch
                continue
            if room == 0:
                packed.append([])
                room = batch
            take = min(room, end - at)
            packed[-1].append(Segment(index, at, take))
            at, room = at + take, room - take
    return packed


def _from_chunks(asked: Round, batches: Sequence[Sequence[Segment]], noise: NoiseStream, prepared: Prepared) -> Iterator[Batch]:
    device = asked.images.device
    x = torch.zeros((asked.batch, *asked.images.shape[1:]), device=device)
    for segments in batches:
        row, marks = 0, []
        for s in segments:
            stop = row + s.count
            image = asked.images[asked.whose[s.request]]
            marked = noise.add(image, asked.sigma, asked.keys[s.request], s.start, x[row:stop])
            if marked is not None:
                marks.append((row, stop, marked))
            row = stop
        x[row:] = 0.0
        bad = None
        if marks:
            bad = torch.zeros(len(x), dtype=torch.bool, device=device)
            for row, stop, marked in marks:
                bad[row:stop] = marked
        rows = asked.rows(segments)
        yield prepared.input(x[:rows]), _sent(asked.slots(segments, rows), device), None if bad is None else bad[:rows]


def _sent(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """The array on the device; from pinned memory, which is not waited for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def has_streams(device: torch.device) -> bool:
    """Whether noise can be made beside a forward pass."""
    return device.type == "cuda"


class _Ahead:
    """Two buffers: one is filled in a stream of its own while the network reads the other."""

    def __init__(self, shape: tuple[int, ...], prepared: Prepared, device: torch.device) -> None:
        self.buffers = [prepared.input(torch.zeros(shape, device=device)).clone() for _ in range(2)]
        self.main, self.side = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.ready, self.free = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))  # type: ignore[no-untyped-call]
        self.side.wait_stream(self.main)

    def fill(self, at: int, work: Any) -> Tensor | None:
        """Runs `work(buffer)` once the buffer is free, and lets the network wait for it."""
        self.side.wait_event(self.free[at])  # at once where nothing was recorded
        with torch.cuda.stream(self.side):
            marked: Tensor | None = work(self.buffers[at])
            if marked is not None:
                marked.record_stream(self.main)
            self.ready[at].record(self.side)
        self.main.wait_event(self.ready[at])
        return marked


def _from_counters(
    asked: Round, batches: Sequence[Sequence[Segment]], noise: CounterNoise, prepared: Prepared
) -> Iterator[Batch]:
    device, size = asked.images.device, asked.batch
    for r in asked.requests:
        check_votes_fit(r.start + r.count)
    images = flat(asked.images)
    names = _sent(np.stack([stream_words(key) for key in asked.keys]), device)
    whose = _sent(np.asarray(asked.whose, dtype=np.int64), device)
    shape = (size, *asked.images.shape[1:])
    ahead = _Ahead(shape, prepared, device) if has_streams(device) else None
    buffer = None if ahead is not None else prepared.input(torch.zeros(shape, device=device)).clone()
    group = max(1, TABLE_ROWS // size)
    try:
        for first in range(0, len(batches), group):
            table = _sent(asked.table(batches[first : first + group]), device)
            if ahead is not None:
                ahead.side.wait_stream(ahead.main)  # for the table, and for the images and names before it
                table.record_stream(ahead.side)
            for at in range(len(table) // size):
                rows = table[at * size : at * size + asked.rows(batches[first + at])]

                def make(x: Tensor, rows: Tensor = rows) -> Tensor | None:
                    return noise.fill(images, names, whose, rows, asked.sigma, x[: len(rows)])

                if ahead is None:
                    assert buffer is not None
                    marked = make(buffer)
                    yield buffer[: len(rows)], rows, marked
                    continue
                turn = (first + at) % 2
                marked = ahead.fill(turn, make)
                yield ahead.buffers[turn][: len(rows)], rows, marked
                ahead.free[turn].record(ahead.main)
    finally:
        if ahead is not None:  # nothing is given away that is still written to
            ahead.main.wait_stream(ahead.side)


def count(outputs: Outputs, widths: tuple[int, ...], rows: Tensor, bad: Tensor | None, counts: Tensor) -> None:
    """Adds the votes of every head to `counts (lines, columns)`.

    Args:
        outputs: `(B, width)` logits of each head.
        widths: of the heads.
        rows: `(B,)` lines of `counts`, or `(B, 3)` with them in the last column.
        bad: which rows are not votes.
        counts: int64.
    """
    offset = 0
    fused = rows.dim() == 2 and kernels.usable(counts.device)
    slot = (rows if rows.dim() == 1 else rows[:, 2]) * counts.shape[1]
    for logits, width in zip(outputs, widths, strict=True):
        if fused:
            kernels.count_votes(logits, rows, bad, counts, offset)
        else:
            vote = votes_of(logits.float())  # the first of tied logits, which bfloat16 often has, on every device
            if bad is not None:
                vote = torch.where(bad, width, vote)
            counts.view(-1).scatter_add_(0, slot + vote + offset, torch.ones_like(vote))
        offset += width + 1


def passes(
    asked: Round, batches: Sequence[Sequence[Segment]], noise: NoiseStream | CounterNoise, prepared: Prepared
) -> Iterator[tuple[Batch, Outputs]]:
    """Every batch of noisy copies with the network's outputs, which the next pass may write over."""
    if isinstance(noise, CounterNoise):
        source = _from_counters(asked, batches, noise, prepared)
    else:
        source = _from_chunks(asked, batches, noise, prepared)
    device = asked.images.device
    with torch.cuda.device(device) if has_streams(device) else nullcontext():
        for batch in source:
            x = batch[0]
            yield batch, heads(forward(prepared.module, x, asked.name), asked.widths, asked.name, len(x))


@torch.inference_mode()
def draw(
    asked: Round, batches: Sequence[Sequence[Segment]], noise: NoiseStream | CounterNoise, prepared: Prepared
) -> tuple[Tensor, tuple[Tensor, Outputs] | None]:
    """Counts `(requests + 1, columns)` on the device, and the last batch with its logits."""
    counts, last = asked.counts(), None
    for (x, rows, bad), outputs in passes(asked, batches, noise, prepared):
        count(outputs, asked.widths, rows, bad, counts)
        last = x, outputs
    return counts, last


__all__ = ["Round", "Segment", "count", "draw", "lay_out", "passes"]
