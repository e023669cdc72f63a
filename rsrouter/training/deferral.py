"""Training a deferral router: heads on frozen trunks at the noise levels that reach the user's radii, then the chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor, nn

from rsrouter.core.bounds import binom_lower
from rsrouter.core.errors import InputError
from rsrouter.experts.expert import Expert
from rsrouter.experts.pool import ExpertPool
from rsrouter.router.cascade import CascadeRouter
from rsrouter.router.chain import Voter
from rsrouter.router.deferral import DeferralRouter
from rsrouter.router.trunk import has_grid, has_trunk
from rsrouter.sampling.execution import Execution
from rsrouter.training.features import noisy_features
from rsrouter.training.heads import HeadGoal, HeadRecipe, as_stored, train_head
from rsrouter.training.labels import label_votes
from rsrouter.training.simulate import SimulatedVotes, accuracy, chain_radius
from rsrouter.training.tune import TUNE, Goal, goal_of, search_chain

#: Noise of the features that heads are trained on.
TRAIN = "train"


@dataclass(frozen=True)
class DeferralRecipe:
    """How a deferral router is trained.

    Attributes:
        copies: noisy copies of each training image and noise level.
        tune_copies: noisy copies of each validation image and network.
        levels: noise levels of the heads, as multiples of the smallest sigma whose unanimous vote reaches the
            largest radius.
        heads: how heads are trained, one of each at every noise level; their labels must differ.
        grid: heads read the experts' feature maps pooled to `grid x grid` cells, where they are maps; 1: as their own last
            layers do. 2 answers better for four times the weights.
        stages: the longest chain.
        floor, strictness: see `Goal`.
    """

    copies: int = 8
    tune_copies: int = 200
    levels: tuple[float, ...] = (1.1, 1.2)
    heads: tuple[HeadRecipe, ...] = (
        HeadRecipe(steps=2000, cross_entropy=0.005),
        HeadRecipe(steps=2000, cross_entropy=0.03),
        HeadRecipe(steps=2000, cross_entropy=0.1),
        HeadRecipe(steps=2000, cross_entropy=0.1, tilt=3.0),
    )
    grid: int = 1
    stages: int = 3
    floor: float = 0.915
    strictness: float = 5.0


#: By name: `deferral` (some ten minutes for 6,000 and 1,000 small images on one core), `deferral-grid` (heads see where in the
#: image something is; for tens of thousands of images) and `quick` (about a minute for 6,000 and 400).
DEFERRAL_RECIPES: dict[str, DeferralRecipe] = {
    "deferral": DeferralRecipe(),
    "deferral-grid": DeferralRecipe(grid=2, heads=tuple(replace(h, hidden=56, steps=3000) for h in DeferralRecipe().heads)),
    "quick": DeferralRecipe(
        copies=8,
        tune_copies=150,
        levels=(1.2,),
        heads=(HeadRecipe(cross_entropy=0.03), HeadRecipe(cross_entropy=0.1, tilt=3.0)),
        stages=2,
    ),
}


def smallest_sigma(radius: float, n: int, alpha: float, stages: int) -> float:
    """The smallest sigma at which a unanimous vote of `n` certifies `radius` as one of `stages` on a path."""
    reach = float(ndtri(binom_lower(n, n, alpha / stages)))
    return radius / reach


def head_voters(
    pool: ExpertPool, radii: Sequence[float], recipe: DeferralRecipe, plan_n: int, alpha: float
) -> list[tuple[Voter, HeadRecipe]]:
    """The head voters worth training, each with how it is trained (heads named `level_label`).

    The expert of the largest sigma, read together with its neighbour, is smoothed at no more than the largest radius
    needs: an expert trained at much noise loses nothing at less, and answers better.
    """
    readable = [e for e in pool if has_trunk(e.module)]
    if not readable:
        return []
    main, others = readable[-1], tuple(e.name for e in readable[-2:-1])
    least = smallest_sigma(max(radii), plan_n, alpha, recipe.stages)
    grid = recipe.grid if recipe.grid > 1 and all(has_grid(pool[name], recipe.grid) for name in (main.name, *others)) else 1
    sigmas = sorted({round(min(main.sigma, max(level * least, readable[0].sigma)), 4) for level in recipe.levels})
    return [
        (Voter(main.name, sigma, f"level{i}_{head.label}", others, grid), head)
        for i, sigma in enumerate(sigmas)
        for head in recipe.heads
    ]


def chain_votes(
    pool: ExpertPool,
    recipe: DeferralRecipe,
    images: int,
    validation: int,
    radii: Sequence[float],
    plan_n: int = 10_000,
    alpha: float = 1e-3,
) -> int:
    """Forward passes of single experts that `train_deferral` makes for so many images: what its progress adds up to."""
    wanted = head_voters(pool, radii, recipe, plan_n, alpha) if max(radii) > 0 else []
    readers = {voter.sigma: 1 + len(voter.others) for voter, _ in wanted}
    each = images * recipe.copies + validation * recipe.tune_copies
    return validation * recipe.tune_copies * len(pool) + each * sum(readers.values())


def _named(say: Callable[[dict[str, Any]], None], name: str, line: dict[str, Any]) -> None:
    say({"head": name, **line})


def _head_votes(features: Tensor, heads: dict[str, nn.Module], classes: int) -> dict[str, NDArray[np.int64]]:
    """`(N, classes)` votes of every head on cached features."""
    votes = {name: np.zeros((len(features), classes), dtype=np.int64) for name in heads}
    with torch.inference_mode():
        for i, copies in enumerate(features):
            for name, head in heads.items():
                votes[name][i] = np.bincount(head(copies.float()).argmax(1).numpy(), minlength=classes)
    return votes


def train_deferral(
    pool: ExpertPool,
    images: Tensor,
    labels: Tensor,
    validation: tuple[Tensor, Tensor],
    radii: Sequence[float],
    *,
    recipe: DeferralRecipe | None = None,
    plan_n: int = 10_000,
    n0: int = 100,
    alpha: float = 1e-3,
    seed: int = 0,
    device: str | None = None,
    execution: Execution | None = None,
    progress: Callable[[int], None] | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> DeferralRouter | CascadeRouter:
    """Trains heads on `images`, then chooses voters, order and thresholds on `validation`.

    Where no head is worth asking (or no expert exposes its features) the result is a cascade of plain experts.

    Args:
        pool: the frozen experts.
        images, labels: what the heads are trained on; best images that no expert has seen.
        validation: images and labels of the choice.
        radii: the radii the user cares about.
        recipe: hyper-parameters.
        plan_n, n0, alpha: the certification this is tuned for.
        seed: of noise, initialisation and order.
        device, execution: where and how the experts run.
        progress: called with the number of forward passes since the last call.
        log: called with what happened, JSON-ready.

    Raises:
        InputError: a pool of one expert.
    """
    recipe = recipe or DeferralRecipe()
    if len({head.label for head in recipe.heads}) != len(recipe.heads):
        raise InputError(
            "Two heads of a recipe have one label",
            expected="heads of different objectives, cross_entropy, tilt or consistency",
            received=str([head.label for head in recipe.heads]),
            remedy="drop one of them",
        )
    grid = tuple(sorted({float(r) for r in radii}))
    say = log or (lambda _: None)
    if len(pool) < 2:
        raise InputError(
            "A router needs two experts", expected="a pool of two or more", received=str(len(pool)), remedy="use Smooth(expert)"
        )
    wanted = head_voters(pool, grid, recipe, plan_n, alpha) if grid[-1] > 0 else []
    xv, yv = validation
    target = yv.numpy()
    rng = np.random.default_rng(seed)
    running: dict[str, Any] = {"device": device, "execution": execution, "progress": progress}
    votes = label_votes(pool, xv, n=recipe.tune_copies, seed=seed, purpose=TUNE, **running)
    candidates = {e.name: Voter(e.name) for e in pool}
    simulated = {e.name: SimulatedVotes.draw(votes[:, k], e.sigma, plan_n, n0, rng, pool.num_classes) for k, e in enumerate(pool)}
    goal = goal_of({e.name: simulated[e.name] for e in pool}, target, grid, alpha)
    goal = Goal(goal.radii, goal.envelope, recipe.floor, recipe.strictness)
    heads: dict[str, nn.Module] = {}
    for sigma in dict.fromkeys(v.sigma for v, _ in wanted):
        members = [(v, how) for v, how in wanted if v.sigma == sigma]
        readers: list[Expert] = [pool[name] for name in (members[0][0].expert, *members[0][0].others)]
        level, cells = float(sigma or 0.0), members[0][0].grid
        features = noisy_features(readers, level, images, recipe.copies, seed=seed, purpose=TRAIN, grid=cells, **running)
        trained: dict[str, nn.Module] = {}
        for voter, how in members:
            name = str(voter.head)
            trained[name] = as_stored(
                train_head(
                    features,
                    labels,
                    pool.num_classes,
                    recipe=how,
                    goal=HeadGoal(level, grid, tuple(goal.envelope.tolist())),
                    seed=seed,
                    log=partial(_named, say, name),
                )
            )
        del features
        held_out = noisy_features(readers, level, xv, recipe.tune_copies, seed=seed, purpose=TUNE, grid=cells, **running)
        for voter, _ in members:
            candidates[str(voter.head)] = voter
        for name, counted in _head_votes(held_out, trained, pool.num_classes).items():
            simulated[name] = SimulatedVotes.draw(counted, level, plan_n, n0, rng)
            reached = accuracy(*chain_radius(simulated, ((name, None),), alpha), target, grid)
            say({"head": name, "sigma": level, "validation": reached.tolist()})
        heads.update(trained)
    chain, score = search_chain(simulated, target, goal, alpha, max_stages=recipe.stages)
    reached = accuracy(*chain_radius(simulated, chain, alpha), target, grid)
    say(
        {
            "chain": [list(stage) for stage in chain],
            "score": score,
            "coverage": goal.coverage(reached),
            "validation": reached.tolist(),
            "envelope": goal.envelope.tolist(),
            "radii": list(grid),
            "images": len(xv),
        }
    )
    thresholds = [tau for _, tau in chain if tau is not None]
    voters = [candidates[name] for name, _ in chain]
    if all(v.head is None for v in voters) and len(voters) > 1:
        return CascadeRouter(thresholds, [v.expert for v in voters])
    used = {v.head for v in voters if v.head is not None}
    return DeferralRouter(voters, thresholds, {name: heads[name] for name in heads if name in used})
