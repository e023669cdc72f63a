"""Vote requests in, vote counts out: the one vote loop of the project.

The engine knows no statistics. It packs the requests of many images into full batches per network, makes
noise on the device, counts votes on the device, and reads the host once per call of `run`.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
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
from rsrouter.process import check_settings, fixed_kernels, kernels
from rsrouter.sampling.check import Checked, check_again, check_compiled, check_network, check_votes, smaller_batches
from rsrouter.sampling.execution import (
    Execution,
    Prepared,
    default_batch,
    device_name,
    keep_freed_memory,
    largest_input,
    prepare,
    resolve_device,
)
from rsrouter.sampling.graphs import replayed
from rsrouter.sampling.kernels import usable
from rsrouter.sampling.lanes import Lanes
from rsrouter.sampling.logits import Outputs, lost_device, out_of_memory
from rsrouter.sampling.noise import SHARED, STREAMS, CounterNoise, NoiseStream, check_eight_bit, make_noise, stream_key
from rsrouter.sampling.passes import Passes
from rsrouter.sampling.rounds import Round, Segment, draw, lay_out, rows_for

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
        self._settings = self.execution.settings(device)
        while True:
            try:
                self._checked = self._check(run, self.batch)
                with fixed_kernels(*self._settings):
                    if execution.graphs:
                        self.prepared = replayed(run, self._checked.rows, self._checked.logits, device, model.name)
                    if execution.compile:
                        check_compiled(self._checked, run, model.name, model.widths)
                break
            except torch.OutOfMemoryError as error:
                self.prepared = run
                self.halve(error)
        self.execution = replace(self.execution, graphs=self.prepared.execution.graphs)
        self.packs = self._checked.packs
        self._smaller: tuple[int, ...] = ()
        if self.packs and device.type == "cpu" and not execution.compile:
            # without the memory to try them there are none
            with suppress(torch.OutOfMemoryError), fixed_kernels(*self._settings):
                self._smaller = smaller_batches(self._checked, run, model.name, model.widths)
        if not self.packs and self.execution.rounding != "float32":
            # rounding of few bits hides a small dependence on the batch; float32 does not
            exact = replace(
                self.execution, batch=min(self.batch, 64), dtype="float32", precision="ieee", compile=False, graphs=False
            )
            self._check(prepare(model.module, exact, device, shape, model.name), exact.batch)
        # a captured pass has one input and one output, which engines under other seeds share
        self._alone = threading.RLock() if self.execution.graphs else nullcontext()
        self.lanes: Lanes | None = None
        if self.execution.threads and device.type == "cpu":
            self.lanes = Lanes.of(self.prepared, self._checked, model.name, model.widths)

    def _check(self, prepared: Prepared, batch: int) -> Checked:
        with prepared.execution.kernels(self.device):
            return check_network(prepared, self.model.name, self.model.widths, self.shape, batch, self.device)

    @property
    def batch(self) -> int:
        return self.execution.batch

    def rows(self, votes: int) -> int:
        """Rows of the batch that holds so many votes: the smallest in which a row has the bits that it has in a whole one."""
        return rows_for(votes, self.batch, self._smaller)

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

    def batches(self, requests: Sequence[VoteRequest]) -> list[list[Segment]]:
        """Segments of each batch (`lay_out`)."""
        return lay_out(requests, self.batch, self.packs)

    def draw(
        self,
        images: Tensor,
        position: dict[int, int],
        requests: Sequence[VoteRequest],
        keys: Sequence[bytes],
        noise: NoiseStream | CounterNoise,
    ) -> NDArray[np.int64]:
        """`enqueue` under the execution's settings, read to the host; counts are handed out only while the network is what it
        was."""
        with self._alone, fixed_kernels(*self._settings):
            again = self.device.type == "cuda"
            while True:
                try:
                    counts = self.enqueue(images, position, requests, keys, noise).cpu().numpy()
                    check_settings(self.model.name)
                    break
                except torch.OutOfMemoryError as error:
                    if again and not self._may_halve:  # drawn again, they are the same votes; other tensors may be gone by then
                        again = False
                        torch.cuda.empty_cache()
                    else:
                        self.halve(error)
                except RuntimeError as error:
                    if self.device.type != "cpu" and (gone := lost_device(error, self.device)) is not None:
                        raise gone from error
                    raise
            self._may_halve = False
            self.ran(len(self.batches(requests)))
            if self._last is not None and (not self._witnesses or self._since_check >= CHECK_EVERY):
                check_votes(self.prepared, self.model.name, self.model.widths, *self._last, self._witnesses)
                self._witnesses += 1
            self._last = None
            if self._since_check >= CHECK_EVERY:
                self.check_again()
            return counts

    def ran(self, batches: int) -> None:
        """Counts batches that were run since the last check."""
        self._since_check, self._unproven = self._since_check + batches, self._unproven + batches

    def check_again(self) -> None:
        """If votes were drawn since: whether the network still is what it was. After a few batches that is seen by its state, in
        which it gave the check's bits; otherwise, and where it cannot be read, the check's batch is run once more.

        NetworkError: other bits than the first time.
        """
        if not self._unproven:
            return
        self._unproven = 0
        readable = self.device.type == "cpu" and not self.execution.compile and self.lanes is None
        if self._proven is not None and self._since_check <= CHECK_STATE and self._proven.unchanged():
            return
        self._since_check = 0
        with self._alone, fixed_kernels(*self._settings):
            check_again(self._checked, self.prepared, self.model.name, self.model.widths)
            if self.lanes is not None:
                self.lanes.check_again(self._checked, self.model.name, self.model.widths)
        watch = ModuleWatch(self.prepared.module) if readable else None
        self._proven = None if watch is None or watch.state.opaque else watch

    def enqueue(
        self,
        images: Tensor,
        position: dict[int, int],
        requests: Sequence[VoteRequest],
        keys: Sequence[bytes],
        noise: NoiseStream | CounterNoise,
    ) -> Tensor:
        """Counts `(len(requests), sum(widths) + len(widths))` on the device; reads nothing back to the host."""
        whose = [position[r.image] for r in requests]
        model = self.model
        asked = Round(images, whose, requests, keys, model.sigma, model.widths, model.name, self.batch, self._smaller)
        batches = self.batches(requests)
        if self.lanes is not None and len(batches) > 1:
            counts, self._last = self.lanes.draw(asked, batches, noise)
        else:
            counts, self._last = draw(asked, batches, noise, self.prepared)
        return counts[: len(requests)]


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
        self.execution = (execution or Execution()).on(self.device)
        self._stream = make_noise(noise, self.shape, self.device, self.execution.stream)
        if self.device.type == "cpu":
            keep_freed_memory()
        usable(self.device)  # kernels compile before the first vote
        self.models = {m.name: m for m in models}
        if len(self.models) != len(models):
            raise InputError(
                "Networks must have different names",
                expected="unique names",
                received=str([m.name for m in models]),
                remedy="rename the stages",
            )
        # as many rows per forward pass for every network as the one with the largest input takes by default
        largest = largest_input(self.shape, (m.module for m in models))
        self.forward_batch = self.execution.batch or default_batch(largest, self.device)
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
        other.seed, other._stream = int(seed), self._stream.fresh()
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

    def describe(self) -> dict[str, Any]:
        """What decides bits: device, versions, threads, and each network's execution as it runs."""
        return {
            "device": device_name(self.device),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "threads": self.execution.threads_of(self.device),
            "noise": self.noise,
            "stream": dict(STREAMS[self.execution.stream]),
            "kernels": kernels(self.execution.precision),
            "execution": {name: {**r.execution.to_dict(), "packs": r.packs} for name, r in sorted(self._runners.items())},
        }

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
        with fixed_kernels():
            on_device = images[torch.tensor(wanted, dtype=torch.int64)].to(self.device, torch.float32)
        results: list[dict[str, NDArray[Any]] | None] = [None] * len(requests)
        for name in dict.fromkeys(r.network for r in requests if r.purpose == PASS):
            members = [i for i, r in enumerate(requests) if r.network == name]
            rows = on_device[[position[requests[i].image] for i in members]]
            with fixed_kernels():
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
