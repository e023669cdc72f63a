"""Vote requests in, vote counts out: the one vote loop of the project.

The engine knows no statistics. It packs the requests of many images into full batches per network, makes
noise on the device, counts votes on the device, and reads the host once per call of `run`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsrouter.core.certify import VoteRequest
from rsrouter.core.errors import InputError
from rsrouter.core.requests import PASS
from rsrouter.experts.expert import check_values
from rsrouter.experts.identity import ModuleWatch, module_digest
from rsrouter.process import KERNELS, check_settings, fixed_kernels
from rsrouter.sampling.check import Checked, check_again, check_compiled, check_network, check_votes, smaller_batches
from rsrouter.sampling.execution import (
    Execution,
    Prepared,
    default_batch,
    keep_freed_memory,
    largest_input,
    prepare,
    resolve_device,
)
from rsrouter.sampling.logits import Outputs, forward, heads, out_of_memory, votes_of
from rsrouter.sampling.noise import SHARED, NoiseStream, check_eight_bit, make_noise, stream_key
from rsrouter.sampling.passes import Passes

#: After so many batches a network is asked again whether it still gives the bits it gave before the first vote, and whether
#: the last batch's logits are those of its rows alone.
CHECK_EVERY = 128
#: After no more than so many batches since then, a call may end with the finding that the network's state is what it was then.
CHECK_STATE = 16


@dataclass(frozen=True)
class VoteModel:
    """A base model that casts votes.

    Attributes:
        name: network name in the tree.
        module: pixels in [0,1] plus noise to logits `(B, width)`, or to a tuple of logits, one per stage.
        sigma: standard deviation of its noise; 0 for a network that does not vote.
        stages: names of the stages that vote in each forward pass, in the order of the module's outputs.
        widths: number of logits of each stage.
        digest: sha256 of everything that decides a vote; part of the noise stream's key.
    """

    name: str
    module: nn.Module
    sigma: float
    stages: tuple[str, ...]
    widths: tuple[int, ...]
    digest: str


def _function(module: nn.Module) -> tuple[object, ...]:
    """What two modules must share to be run as one: their digest, and, as a digest does not see everything that a class may
    keep (a count of steps, a function), every object in them but our own modules and plain containers."""
    plain = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    parts = [m for m in module.modules() if type(m) not in plain and type(m).__module__.split(".")[0] != "rsrouter"]
    return module_digest(module), *map(id, parts)


@dataclass(frozen=True, slots=True)
class _Segment:
    """Rows of one batch that belong to one request."""

    request: int
    start: int
    count: int


class _Runner:
    """One network on one device."""

    def __init__(
        self, model: VoteModel, shape: tuple[int, ...], execution: Execution, device: torch.device, run: Prepared, batch: int
    ) -> None:
        self.model, self.shape, self.device, self.prepared = model, shape, device, run
        self._may_halve = execution.batch == 0
        self._since_check, self._witnesses = 0, 0
        self._proven: ModuleWatch | None = None  # the state in which it last gave the bits of the check
        self._unproven = 0  # votes since the last look at bits or state, in batches
        self._last: tuple[Tensor, Outputs] | None = None  # the last batch and its logits
        self.execution = replace(run.execution, batch=batch)
        while True:
            try:
                self._checked = self._check(run, self.batch)
                break
            except torch.OutOfMemoryError as error:
                self.halve(error)
        if execution.compile:
            with fixed_kernels():
                check_compiled(self._checked, run, model.name, model.widths)
        self.packs = self._checked.packs
        self._smaller: tuple[int, ...] = ()
        if self.packs and device.type == "cpu" and not execution.compile:
            with fixed_kernels():
                self._smaller = smaller_batches(self._checked, run, model.name, model.widths)
        if not self.packs and execution.dtype != "float32":
            # rounding of few bits hides a small dependence on the batch; float32 does not
            exact = replace(self.execution, dtype="float32", batch=min(self.batch, 64), compile=False)
            self._check(prepare(model.module, exact, device, shape, model.name), exact.batch)

    def _check(self, prepared: Prepared, batch: int) -> Checked:
        with fixed_kernels():
            return check_network(prepared, self.model.name, self.model.widths, self.shape, batch, self.device)

    @property
    def batch(self) -> int:
        return self.execution.batch

    def rows(self, votes: int) -> int:
        """Rows of the batch that holds so many votes: the smallest in which a row has the bits that it has in a whole one."""
        return next((size for size in self._smaller if votes <= size < self.batch), self.batch)

    def halve(self, error: torch.OutOfMemoryError) -> None:
        """Halves the execution batch, which the caller has found too large for the memory.

        Raises:
            NetworkError: the batch was asked for, votes were drawn with it already, or it is 1.
        """
        if self.batch == 1 or not self._may_halve:
            raise out_of_memory(self.model.name, self.batch, error) from error
        self.execution = replace(self.execution, batch=self.batch // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"network {self.model.name!r} ran out of memory; its execution batch is now {self.batch} rows",
            RuntimeWarning,
            stacklevel=2,
        )

    def draw(
        self, images: Tensor, position: dict[int, int], requests: Sequence[VoteRequest], keys: Sequence[bytes], noise: NoiseStream
    ) -> NDArray[np.int64]:
        """`enqueue`, under `fixed_kernels`, read to the host; counts are handed out only while the network is what it was."""
        while True:
            try:
                counts = self.enqueue(images, position, requests, keys, noise).cpu().numpy()
                check_settings(self.model.name)
                break
            except torch.OutOfMemoryError as error:
                self.halve(error)
        self._may_halve = False
        drawn = len(self.batches(requests))
        self._since_check, self._unproven = self._since_check + drawn, self._unproven + drawn
        if self._last is not None and (not self._witnesses or self._since_check >= CHECK_EVERY):
            check_votes(self.prepared, self.model.name, self.model.widths, *self._last, self._witnesses)
            self._witnesses += 1
        self._last = None
        if self._since_check >= CHECK_EVERY:
            self.check_again()
        return counts

    def check_again(self) -> None:
        """If votes were drawn since: whether the network still is what it was. After a few batches that is seen by its state, in
        which it gave the check's bits; otherwise, and where it cannot be read, the check's batch is run once more.

        NetworkError: other bits than the first time.
        """
        if not self._unproven:
            return
        self._unproven = 0
        readable = self.device.type == "cpu" and not self.execution.compile
        if self._proven is not None and self._since_check <= CHECK_STATE and self._proven.unchanged():
            return
        self._since_check = 0
        with fixed_kernels():
            check_again(self._checked, self.prepared, self.model.name, self.model.widths)
        watch = ModuleWatch(self.prepared.module) if readable else None
        self._proven = None if watch is None or watch.state.opaque else watch

    def batches(self, requests: Sequence[VoteRequest]) -> list[list[_Segment]]:
        """Segments of each batch. Rows are packed freely, or, where bits depend on the position in the batch,
        in blocks of one request that start at multiples of the batch (a few rows run for nothing)."""
        packed: list[list[_Segment]] = []
        room = 0
        for index, request in enumerate(requests):
            at, end = request.start, request.start + request.count
            while at < end:
                if not self.packs:
                    block = at - at % self.batch
                    packed.append([_Segment(index, block, self.batch)])
                    at = block + self.batch
                    continue
                if room == 0:
                    packed.append([])
                    room = self.batch
                take = min(room, end - at)
                packed[-1].append(_Segment(index, at, take))
                at, room = at + take, room - take
        return packed

    @torch.inference_mode()
    def enqueue(
        self, images: Tensor, position: dict[int, int], requests: Sequence[VoteRequest], keys: Sequence[bytes], noise: NoiseStream
    ) -> Tensor:
        """Counts `(len(requests), sum(widths) + len(widths))` on the device; reads nothing back to the host."""
        widths = self.model.widths
        columns = sum(widths) + len(widths)
        counts = torch.zeros((len(requests) + 1) * columns, dtype=torch.int64, device=self.device)
        ones = torch.ones(self.batch, dtype=torch.int64, device=self.device)
        x = torch.zeros((self.batch, *self.shape), device=self.device)
        last = None
        for segments in self.batches(requests):
            slots = np.full(self.batch, len(requests), dtype=np.int64)
            row, bad = 0, []
            for s in segments:
                request = requests[s.request]
                stop = row + s.count
                marked = noise.add(images[position[request.image]], self.model.sigma, keys[s.request], s.start, x[row:stop])
                if marked is not None:
                    bad.append((row, stop, marked))
                votes = np.arange(s.start, s.start + s.count)
                wanted = (votes >= request.start) & (votes < request.start + request.count)
                slots[row:stop] = np.where(wanted, s.request, len(requests))
                row = stop
            x[row:] = 0.0
            rows = self.rows(row)
            slot = torch.from_numpy(slots[:rows]).to(self.device, non_blocking=True) * columns
            output = forward(self.prepared.module, self.prepared.input(x[:rows]), self.model.name)
            outputs = heads(output, widths, self.model.name, rows)
            offset = 0
            for logits, width in zip(outputs, widths, strict=True):
                # the first of tied logits, which bfloat16 often has, on every device
                vote = votes_of(logits.float())
                for begin, stop, marked in bad:
                    vote[begin:stop] = torch.where(marked, width, vote[begin:stop])
                counts.scatter_add_(0, slot + vote + offset, ones[:rows])
                offset += width + 1
            last = x[:rows], outputs
        self._last = last
        return counts.view(-1, columns)[: len(requests)]


class Engine:
    """Draws votes for a set of networks.

    Args:
        models: the networks, names unique.
        shape: `(C, H, W)` of one image.
        seed: part of every stream's key.
        device: where networks run; None is the CPU.
        execution: how they run.
        noise: `"gaussian"` or `"sound"`, with `-shared` where all images read one stream (`noise.SHARED`).

    Raises:
        NetworkError: a network that cannot be certified (see `check_network`), or out of memory at a batch that was asked for.
        InputError: an unusable device or noise.
    """

    def __init__(
        self,
        models: Sequence[VoteModel],
        shape: Sequence[int],
        *,
        seed: int,
        device: str | torch.device | None = None,
        execution: Execution | None = None,
        noise: str = "gaussian",
    ) -> None:
        self.device = resolve_device(device)
        self.shape, self.seed, self.noise = tuple(shape), int(seed), noise
        self._stream = make_noise(noise, self.shape, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.execution = execution or Execution()
        self.models = {m.name: m for m in models}
        if len(self.models) != len(models):
            raise InputError(
                "Networks must have different names",
                expected="unique names",
                received=str([m.name for m in models]),
                remedy="rename the stages",
            )
        # a network's stream is named by its digest, and by its number among equal ones; names take no part
        digests = [m.digest for m in models]
        self.streams = {m.name: (m.digest, digests[:i].count(m.digest)) for i, m in enumerate(models)}
        self._runners: dict[str, _Runner] = {}
        self._passes: dict[str, Passes] = {}
        # one model at several sigmas is on the device once
        self._prepared: dict[tuple[object, ...], Prepared] = {}

    def with_seed(self, seed: int) -> Engine:
        """The same prepared networks under another seed; the two may draw at the same time."""
        other = copy.copy(self)
        other.seed, other._stream = int(seed), make_noise(self.noise, self.shape, self.device)
        return other

    def runner(self, name: str) -> _Runner:
        """The prepared network; weights move to the device when it is first asked for, equal networks once."""
        if name not in self._runners:
            model = self.models[name]
            check_values(model.module, name)
            function = _function(model.module)
            if function not in self._prepared:
                self._prepared[function] = prepare(model.module, self.execution, self.device, self.shape, name)
            self._runners[name] = _Runner(
                model, self.shape, self.execution, self.device, self._prepared[function], self.forward_batch
            )
        return self._runners[name]

    def passes(self, name: str) -> Passes:
        """A network that does not vote, ready to run without noise."""
        if name not in self._passes:
            model = self.models[name]
            check_values(model.module, name)
            self._passes[name] = Passes(model.module, name, model.widths, self.shape, self.device)
        return self._passes[name]

    @property
    def forward_batch(self) -> int:
        """Rows per forward pass: as many for every network as the one with the largest input takes by default."""
        if self.execution.batch:
            return self.execution.batch
        return default_batch(largest_input(self.shape, (m.module for m in self.models.values())), self.device)

    def describe(self) -> dict[str, Any]:
        """What decides bits: device, versions, threads, and each network's execution as it runs."""
        return {
            "device": str(self.device) if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "threads": torch.get_num_threads(),
            "noise": self.noise,
            "kernels": dict(KERNELS),
            "execution": {name: {**r.execution.to_dict(), "packs": r.packs} for name, r in sorted(self._runners.items())},
        }

    @fixed_kernels()
    def run(self, images: Tensor, identity: Sequence[bytes], requests: Sequence[VoteRequest]) -> list[dict[str, NDArray[Any]]]:
        """Draws the requested votes, and runs the requested passes.

        Args:
            images: `(N, C, H, W)` pixels in [0,1], on any device.
            identity: per image the bytes that name it in its noise streams (`image_identity`).
            requests: what to draw; `image` indexes `images`.

        Returns:
            Per request a mapping of every stage of its network to `(width + 1,)` counts, invalid votes last; of a pass to
            `(width,)` float64 logits.
        """
        if self.noise.startswith("sound"):
            check_eight_bit(images)
        wanted = sorted({r.image for r in requests})
        position = {image: at for at, image in enumerate(wanted)}
        on_device = images[torch.tensor(wanted, dtype=torch.int64)].to(self.device, torch.float32)
        results: list[dict[str, NDArray[Any]] | None] = [None] * len(requests)
        for name in dict.fromkeys(r.network for r in requests if r.purpose == PASS):
            members = [i for i, r in enumerate(requests) if r.network == name]
            rows = on_device[[position[requests[i].image] for i in members]]
            found = self.passes(name).logits(rows)
            for at, i in enumerate(members):
                results[i] = {s: logits[at].copy() for s, logits in zip(self.models[name].stages, found, strict=True)}
        for name in dict.fromkeys(r.network for r in requests if r.purpose != PASS):
            members = [i for i, r in enumerate(requests) if r.network == name]
            model = self.models[name]
            if not model.sigma > 0:
                raise InputError(
                    f"Network {name!r} casts no votes",
                    expected="a network with a noise level",
                    received="one with a Lipschitz constant, certified by one forward pass",
                    remedy="label, train and time voting experts alone, and add the deterministic one afterwards",
                )
            runner = self.runner(name)
            chosen = [requests[i] for i in members]
            owner = [b"" if self.noise.endswith(SHARED) else identity[r.image] for r in chosen]
            keys = [stream_key(r.purpose, self.seed, who, *self.streams[name]) for r, who in zip(chosen, owner, strict=True)]
            counts = runner.draw(on_device, position, chosen, keys, self._stream)
            for i, row in zip(members, counts, strict=True):
                offset, votes = 0, {}
                for stage, width in zip(model.stages, model.widths, strict=True):
                    votes[stage] = row[offset : offset + width + 1].copy()
                    offset += width + 1
                results[i] = votes
        return [r for r in results if r is not None]

    def check_again(self) -> None:
        """Asks every network that voted since whether it still is what it was; for the end of a job.

        Raises:
            NetworkError: its logits changed.
        """
        for runner in self._runners.values():
            runner.check_again()
        for passes in self._passes.values():
            passes.check_again()


def image_identity(image: Tensor, name: object = None) -> bytes:
    """Names an image in its noise streams: its content, and the id the user gave it, if any."""
    value = image.detach().to("cpu", torch.float32).contiguous()
    return stream_key(value.numpy().tobytes(), tuple(value.shape), "" if name is None else name)
