"""Votes a second: the engine against pure forward passes and against the papers' loop; what noise costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from rsrouter.bench.timing import Figure, figure, in_turn, ratios
from rsrouter.clock import seconds
from rsrouter.core.certify import VoteRequest
from rsrouter.experts import Expert
from rsrouter.router.base import vote_model
from rsrouter.sampling.engine import Engine, image_identity
from rsrouter.sampling.execution import Execution, Prepared, prepare
from rsrouter.sampling.graphs import replayed
from rsrouter.sampling.logits import outputs
from rsrouter.sampling.noise import CHUNK, CounterNoise, flat, make_noise
from rsrouter.sampling.philox import stream_words
from rsrouter.sampling.threads import lane_pool

BATCHES = (50, 100, 250, 500, 1000)
#: Rows of the reference loop where they fit, as the papers run it.
REFERENCE_BATCH = 1000


def reference_loop(module: nn.Module, image: Tensor, sigma: float, n: int, classes: int, batch: int = 1000) -> np.ndarray:
    """Vote counts `(classes,)` as the papers' core draws them (Cohen et al. 2019, `core.py`): one image, a fixed n, the
    batch repeated and noised, predictions read to the host after every batch and counted in Python."""
    counts = np.zeros(classes, dtype=int)
    with torch.no_grad():
        left = n
        while left > 0:
            size = min(batch, left)
            left -= size
            copies = image.repeat((size, 1, 1, 1))
            predictions = module(copies + torch.randn_like(copies) * sigma).argmax(1).cpu().numpy()
            for p in predictions:
                counts[p] += 1
    return counts


@dataclass
class Drawing:
    """Pieces of work that draw `n` votes of one expert on one image."""

    expert: Expert
    image: Tensor
    n: int
    device: torch.device
    _prepared: dict[str, Prepared] = field(default_factory=dict)

    @property
    def on_device(self) -> Tensor:
        """The image where networks run."""
        return self.image.to(self.device)

    def _module(self, execution: Execution) -> Prepared:
        """The network as the engine runs it."""
        way = f"{execution.rounding} {execution.precision}"
        if way not in self._prepared:
            self._prepared[way] = prepare(self.expert.network(), execution, self.device, self.expert.input_shape)
        found = self._prepared[way]
        if not execution.graphs:
            return found
        rows = torch.rand((execution.batch, *self.expert.input_shape), device=self.device)
        with execution.kernels(self.device), torch.inference_mode():
            return replayed(found, rows, outputs(found(rows)), self.device, self.expert.name)

    def forward(self, execution: Execution, noise: bool = False) -> Callable[[], None]:
        """Pure forward passes of the prepared network on a batch that exists already; or with noise made for each."""
        execution = execution.on(self.device)
        module = self._module(execution)
        shape, batch = self.expert.input_shape, execution.batch
        image, sigma = self.on_device, self.expert.sigma
        noisy = module.input(image + sigma * torch.randn((batch, *shape), device=self.device))
        make = batch_of_noise("gaussian", shape, self.device, batch, execution.stream)

        @torch.inference_mode()
        def work() -> None:
            with execution.kernels(self.device):
                for i in range(-(-self.n // batch)):
                    if noise:
                        module(make(image, sigma, i * batch))
                    else:
                        module.module(noisy)

        return work

    def engine(self, execution: Execution, noise: str = "gaussian") -> Callable[[], object]:
        """The votes of the engine."""
        engine = Engine(
            [vote_model(self.expert)],
            self.expert.input_shape,
            seed=0,
            device=str(self.device),
            execution=execution,
            noise=noise,
        )
        requests, identity = [VoteRequest(0, self.expert.name, "bench", 0, self.n)], [image_identity(self.image)]
        return lambda: engine.run(self.image[None], identity, requests)

    def side_by_side(self, execution: Execution, lanes: int) -> Callable[[], object]:
        """The same number of votes by `lanes` engines at once, a CPU thread each: what `--workers` does in processes."""
        part = replace(self, n=-(-self.n // lanes))
        engines = [part.engine(execution) for _ in range(lanes)]

        pool = lane_pool(lanes, 1)

        def work() -> None:
            for done in [pool.submit(draw) for draw in engines]:
                done.result()

        return work

    def reference(self) -> Callable[[], object]:
        """The papers' loop: float32, the module as its authors wrote it."""
        plain = self.expert.network().eval().to(self.device)
        image, sigma, classes = self.on_device, self.expert.sigma, self.expert.num_classes
        batch = REFERENCE_BATCH
        while batch > 1:
            try:
                reference_loop(plain, image, sigma, min(batch, self.n), classes, batch)
                break
            except torch.OutOfMemoryError:
                batch //= 2
        return lambda: reference_loop(plain, image, sigma, self.n, classes, batch)

    def best(self, numbers: str) -> Execution:
        """The batch with most pure forward passes a second, of those that fit."""
        times: dict[int, float] = {}
        for batch in [b for b in BATCHES if b <= self.n] or [self.n]:
            try:
                work = self.forward(Execution(batch).with_numbers(numbers))
                times[batch] = min(seconds(work, self.device) for _ in range(4))
            except torch.OutOfMemoryError:
                break
        return Execution(min(times, key=lambda b: times[b])).with_numbers(numbers)


def batch_of_noise(
    kind: str, shape: tuple[int, ...], device: torch.device, batch: int, stream: str
) -> Callable[[Tensor, float, int], Tensor]:
    """A function from an image, sigma and a first vote to a batch of noisy copies `(batch, C, H, W)`, as the engine makes it."""
    noise, out = make_noise(kind, shape, device, stream), torch.empty((batch, *shape), device=device)
    if not isinstance(noise, CounterNoise):
        chunks = noise

        def add(image: Tensor, sigma: float, start: int) -> Tensor:
            chunks.add(image, sigma, b"bench", start, out)
            return out

        return add
    counters, whose = noise, torch.zeros(1, dtype=torch.int64, device=device)
    names = torch.from_numpy(stream_words(b"bench"))[None].to(device)
    rows = torch.zeros((batch, 3), dtype=torch.int64, device=device)
    places = torch.arange(batch, device=device)

    def fill(image: Tensor, sigma: float, start: int) -> Tensor:
        rows[:, 1] = places + start
        counters.fill(flat(image[None]), names, whose, rows, sigma, out)
        return out

    return fill


def throughput(
    expert: Expert, image: Tensor, n: int, repeats: int, device: torch.device, label: str, dtypes: Sequence[str], bars: bool
) -> list[Figure]:
    """Engine, pure forward passes and the reference loop at `n` votes of one network, per dtype.

    `bars`: whether the demo's bars apply.
    """
    drawing = Drawing(expert, image, n, device)
    best = {dtype: drawing.best(dtype) for dtype in dtypes}
    works: dict[str, Callable[[], object]] = {"reference": drawing.reference()}
    for dtype, execution in best.items():
        works[f"forward {dtype}"] = drawing.forward(execution)
        works[f"both {dtype}"] = drawing.forward(execution, noise=True)
        works[f"engine {dtype}"] = drawing.engine(execution)
    lanes = torch.get_num_threads() if device.type == "cpu" else 1
    for dtype, execution in best.items():
        if lanes > 1 and n >= lanes * execution.batch:  # fewer votes would be padding
            works[f"lanes {dtype}"] = drawing.side_by_side(execution, lanes)
            works[f"passes {dtype}"] = drawing.engine(replace(execution, threads=1))
    works["engine default"] = drawing.engine(Execution())
    numbers = Execution().on(device).rounding
    times = in_turn(works, repeats, device)

    def rate(name: str) -> list[float]:
        return [n / t for t in times[name]]

    found = [figure(f"{label}: votes a second, reference loop (float32, as the papers write it)", rate("reference"), "votes/s")]
    for dtype, execution in best.items():
        name = f"{label}, {dtype}"
        found += [
            figure(
                f"{name}: votes a second, pure forward passes (folded, batch {execution.batch})",
                rate(f"forward {dtype}"),
                "votes/s",
            ),
            figure(f"{name}: votes a second, engine (batch {execution.batch})", rate(f"engine {dtype}"), "votes/s"),
            figure(
                f"{name}: engine / pure forward",
                ratios(times, f"forward {dtype}", f"engine {dtype}"),
                least=0.9 if bars else None,
            ),
            figure(
                f"{name}: engine / (forward and noise)",
                ratios(times, f"both {dtype}", f"engine {dtype}"),
                least=None if bars else 0.9,
            ),
            figure(
                f"{name}: engine / reference loop", ratios(times, "reference", f"engine {dtype}"), least=3.0 if bars else None
            ),
        ]
        if f"lanes {dtype}" in works:
            name = f"{name}: {lanes} engines side by side, a thread each (as with --workers {lanes})"
            found.append(figure(f"{name} / reference loop", ratios(times, "reference", f"lanes {dtype}")))
            name = f"{label}, {dtype}: one engine, {lanes} passes side by side (threads=1)"
            found.append(figure(f"{name} / reference loop", ratios(times, "reference", f"passes {dtype}")))
    found.append(
        figure(
            f"{label}: engine as installed ({numbers}, default batch) / reference loop",
            ratios(times, "reference", "engine default"),
        )
    )
    return found


def moved_votes(expert: Expert, images: Tensor, n: int, device: torch.device) -> Figure:
    """Share of votes that bfloat16 casts for another class than float32 does, of the same noise (at least)."""
    requests = [VoteRequest(i, expert.name, "bench", 0, n) for i in range(len(images))]
    identity = [image_identity(image) for image in images]
    counts = []
    for dtype in ("float32", "bfloat16"):
        engine = Engine([vote_model(expert)], expert.input_shape, seed=0, device=str(device), execution=Execution(dtype=dtype))
        counts.append([drawn[expert.name] for drawn in engine.run(images, identity, requests)])
    shares = [float(np.abs(a - b).sum()) / 2 / n * 100 for a, b in zip(*counts, strict=True)]
    return Figure(
        f"votes that bfloat16 moves, mean over {len(images)} images", float(np.mean(shares)), min(shares), max(shares), "%"
    )


def noise_costs(expert: Expert, images: Tensor, n: int, repeats: int, device: torch.device) -> list[Figure]:
    """What exact arithmetic costs, and what a stream shared by all images saves: the noise alone, and whole votes."""
    images = torch.round(images * 255.0) / 255.0
    on_device = images[0].to(device)
    stream = Execution().on(device).stream
    streams = {name: batch_of_noise(name, expert.input_shape, device, CHUNK, stream) for name in ("gaussian", "sound")}
    rounds = -(-min(n, 2000) // CHUNK)

    def noise(name: str) -> Callable[[], object]:
        return lambda: [streams[name](on_device, expert.sigma, i * CHUNK) for i in range(rounds)]

    each = max(CHUNK, n // len(images))
    requests = [VoteRequest(i, expert.name, "bench", 0, each) for i in range(len(images))]
    identity = [image_identity(image) for image in images]

    def votes(name: str) -> Callable[[], object]:
        engine = Engine([vote_model(expert)], expert.input_shape, seed=0, device=str(device), noise=name)
        return lambda: engine.run(images, identity, requests)

    works = {
        **{name: noise(name) for name in streams},
        **{f"{k} votes": votes(k) for k in ("gaussian", "sound", "gaussian-shared")},
    }
    times = in_turn(works, repeats, device)
    each_us = [1e6 * t / (rounds * CHUNK) for t in times["gaussian"]]
    return [
        figure("Gaussian noise of one vote", each_us, "us"),
        figure("sound noise / Gaussian noise, time of the noise alone", ratios(times, "sound", "gaussian")),
        figure("sound noise / Gaussian noise, time of whole votes", ratios(times, "sound votes", "gaussian votes")),
        figure(
            f"one stream shared by {len(images)} images / a stream each, time of whole votes",
            ratios(times, "gaussian-shared votes", "gaussian votes"),
        ),
    ]
