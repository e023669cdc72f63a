"""Estimates of a job's time before it starts: a few votes are drawn and timed, the rest is simulated.

Some images of the job get a few votes from every network. From these follow the seconds of a batch, and vote
probabilities; the plan then runs on votes that are drawn from those probabilities, through the code that certifies. What
it asks for is counted in batches, as the engine would pack them. Nothing here is a certificate, and its noise certifies
nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.certify import VoteRequest
from rsrouter.core.errors import PlanError
from rsrouter.core.patience import LEVELS, PatienceCost, patience_costs
from rsrouter.core.plans import AdaptivePlan, FixedPlan, Plan
from rsrouter.core.posterior import posterior_shares
from rsrouter.core.terms import Terms
from rsrouter.core.tree import Tree
from rsrouter.jobs.certify import check_order, settled_batch, take_shard, with_batch
from rsrouter.jobs.devices import check_threads, first_device
from rsrouter.jobs.driver import Images, Reader, make_executor
from rsrouter.sampling.engine import Engine, image_identity
from rsrouter.smooth import RoutedSmooth, Smooth

#: Stream of the votes that are timed; no other purpose reads it.
PILOT = "pilot"


@dataclass(frozen=True)
class PlanCost:
    """What one plan costs.

    Attributes:
        plan: its description.
        votes_per_image: mean over the sampled images, selection votes included.
        standard_error: of that mean; images differ.
        seconds: of the whole job on all workers.
        device_hours: of the whole job, summed over workers.
    """

    plan: dict[str, Any]
    votes_per_image: float
    standard_error: float
    seconds: float
    device_hours: float


@dataclass(frozen=True)
class Estimate:
    """Time for a job.

    Attributes:
        images: of the job (of the shard, where one was named).
        sampled: images that were looked at.
        workers: that share it.
        device: of each.
        votes_per_second: of each network, on one worker.
        setup_seconds: until the first vote: preparing and checking networks. Starting processes is not in it.
        costs: of the job's own plan first, and then of the other kind.
        patience: what other levels of patience save and cost, of an adaptive plan with this grid; empty without one.
        measured_seconds: that this took.
    """

    images: int
    sampled: int
    workers: int
    device: str
    votes_per_second: dict[str, float]
    setup_seconds: float
    costs: tuple[PlanCost, ...]
    patience: tuple[PatienceCost, ...]
    measured_seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Simulated:
    """An engine whose votes are drawn from shares; counts the batches that the real one would run."""

    def __init__(self, engine: Engine, shares: dict[str, NDArray[np.float64]], seed: int) -> None:
        self._engine, self._shares, self._rng = engine, shares, np.random.default_rng(seed)
        self.forward_batch = engine.forward_batch
        self.batches: Counter[str] = Counter()

    def run(
        self, images: Tensor, identity: Sequence[bytes], requests: Sequence[VoteRequest]
    ) -> list[dict[str, NDArray[np.int64]]]:
        for name in {r.network for r in requests}:
            self.batches[name] += len(self._engine.runner(name).batches([r for r in requests if r.network == name]))
        stages = {name: model.stages for name, model in self._engine.models.items()}
        return [
            {stage: self._rng.multinomial(r.count, self._shares[stage][r.image]) for stage in stages[r.network]} for r in requests
        ]

    def check_again(self) -> None:
        """Nothing ran."""

    def describe(self) -> dict[str, Any]:
        return {}


def _measure(
    engine: Engine, images: Tensor, ids: Sequence[int], budget: float
) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
    """Seconds per batch of every network, and a draw from the posterior of each stage's vote shares, `(images, L)`."""
    identity = [image_identity(image, name) for image, name in zip(images, ids, strict=True)]
    rng = np.random.default_rng(0)
    cost: dict[str, float] = {}
    shares: dict[str, NDArray[np.float64]] = {}
    for name, model in engine.models.items():
        batch = engine.runner(name).batch
        engine.run(images, identity, [VoteRequest(0, name, PILOT, 0, batch)])  # the first batch pays for others
        start = time.perf_counter()
        engine.run(images, identity, [VoteRequest(0, name, PILOT, batch, batch)])
        once = time.perf_counter() - start
        share = budget / len(engine.models)
        # whole batches of one image: what is timed is full batches, packed or not
        each = batch * max(1, min(-(-400 // batch), int(share / max(once, 1e-6) / len(images))))
        requests = [VoteRequest(i, name, PILOT, 2 * batch, each) for i in range(len(images))]
        start = time.perf_counter()
        counts = engine.run(images, identity, requests)
        cost[name] = (time.perf_counter() - start) / len(engine.runner(name).batches(requests))
        for stage in model.stages:
            shares[stage] = posterior_shares(np.array([c[stage] for c in counts]), rng)
    return cost, shares


def _other(plan: Plan, grid: Sequence[float], reach: Callable[[Plan], float]) -> Plan | None:
    """The same number of votes, fixed for adaptive and the other way round, on the radii of the grid within reach."""
    if not isinstance(plan, FixedPlan):
        return FixedPlan(plan.n0, plan.n_max)
    adaptive = AdaptivePlan(plan.n, tuple(grid), plan.n0) if any(r > 0 for r in grid) else None
    return None if adaptive is None else adaptive.within(reach(adaptive))


#: Simulated images that the levels of patience are compared on: each sampled one several times.
_REPLAYED = 96


def _patience(
    plan: Plan | None, tree: Tree, split: AlphaSplit, shares: dict[str, NDArray[np.float64]], rule: str, sides: str
) -> tuple[PatienceCost, ...]:
    """The usual levels and the plan's own, on several simulated runs of each sampled image."""
    if not isinstance(plan, AdaptivePlan):
        return ()
    times = -(-_REPLAYED // len(next(iter(shares.values()))))
    levels = sorted({*LEVELS, *([plan.beta] if LEVELS[0] <= plan.beta <= LEVELS[-1] else [])})
    many = {stage: np.tile(p, (times, 1)) for stage, p in shares.items()}
    return patience_costs(tree, plan, split, many, levels=levels, rule=rule, sides=sides)


def estimate_table(
    smoothed: Smooth | RoutedSmooth,
    images: Images,
    terms: Terms | Plan,
    *,
    device: str | None = None,
    batch_size: int | None = None,
    indices: Sequence[int] | None = None,
    shard: tuple[int, int] | None = None,
    workers: int | str | None = None,
    ray: str | None = None,
    threads: int | None = None,
    grid: Sequence[float] = (),
    sample: int = 16,
    seconds: float = 20.0,
) -> Estimate:
    """Time and device hours that `certify_table` would take with these arguments, which are the same there.

    Votes are timed on one worker's share of this machine, whatever the workers are; CPU workers that share memory
    bandwidth are slower than that, and a cluster's machines may be.

    Args:
        grid: radii of the adaptive plan that a fixed one is compared with.
        sample: images to look at, spread evenly over the job.
        seconds: about how long to draw votes; a batch of every image and network is drawn in any case.

    Raises:
        InputError, PlanError, NetworkError: as in `certify_table`.
    """
    begun = time.perf_counter()
    device = smoothed.device if device is None else device
    smoothed = with_batch(smoothed, settled_batch(smoothed, device))
    asked = smoothed.routed.resolve(terms)
    order = take_shard(check_order(images, indices, 1), shard)
    with make_executor(workers, ray, device, check_threads(threads)) as executor:
        slots, share = executor.slots, executor.threads
        facts = executor.facts()
    # one worker's share of the machine, here
    with make_executor(None, None, device if slots == 1 or device is None else device.split(":")[0], share):
        chosen = [order[i] for i in np.unique(np.linspace(0, len(order) - 1, min(sample, len(order))).astype(int))]
        start = time.perf_counter()
        task, _ = Reader(images, smoothed.shape, smoothed.experts[0].num_classes).task(chosen)
        reading = (time.perf_counter() - start) / len(chosen)
        start = time.perf_counter()
        engine = smoothed.engine(0, first_device(device))
        for name in engine.models:
            engine.runner(name)
        setup = time.perf_counter() - start
        cost, shares = _measure(engine, task.images, task.ids, seconds)
        costs: list[PlanCost] = []
        split, sides = smoothed.routed.split(asked), str(asked.sides)
        other = _other(asked.plan, grid, lambda p: p.reach(smoothed.tree, split, sides))
        for candidate in (asked.plan, other):
            if candidate is None:
                continue
            simulated = _Simulated(engine, shares, seed=0)
            start = time.perf_counter()
            try:
                certificates = smoothed.certify(
                    task.images,
                    replace(asked, plan=candidate, seed=0),
                    ids=task.ids,
                    batch_size=batch_size,
                    engine=simulated,  # type: ignore[arg-type]
                )
            except PlanError:
                if candidate is asked.plan:
                    raise
                continue  # the other kind cannot reach its radii
            host = time.perf_counter() - start
            votes = np.array([c.n_drawn for c in certificates], dtype=float)
            drawn = sum(simulated.batches[name] * cost[name] for name in cost)
            work = (drawn + host) / len(chosen) * len(order)
            wall = setup + (work + reading * len(order) if slots == 1 else max(work / slots, reading * len(order)))
            error = float(votes.std(ddof=1) / np.sqrt(len(votes))) if len(votes) > 1 else float("nan")
            costs.append(PlanCost(candidate.to_dict(), float(votes.mean()), error, wall, wall * slots / 3600))
        adaptive = asked.plan if isinstance(asked.plan, AdaptivePlan) else other
        patience = _patience(adaptive, smoothed.tree, split, shares, str(asked.rule), sides)
    speeds = {name: engine.runner(name).batch / cost[name] for name in cost}
    return Estimate(
        images=len(order),
        sampled=len(chosen),
        workers=slots,
        device=str(facts["device"]),
        votes_per_second=speeds,
        setup_seconds=setup,
        costs=tuple(costs),
        patience=patience,
        measured_seconds=time.perf_counter() - begun,
    )
