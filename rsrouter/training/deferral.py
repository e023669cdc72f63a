"""The deferral router: heads on frozen trunks at the noise levels that reach the user's radii, then the chain."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import nn

from rsrouter.core.bounds import binom_lower, check_whole
from rsrouter.core.errors import CheckpointError, InputError
from rsrouter.experts.describe import describe_module
from rsrouter.experts.pool import ExpertPool
from rsrouter.process import usual_settings
from rsrouter.router.cascade import CascadeRouter
from rsrouter.router.chain import Voter
from rsrouter.router.deferral import DeferralRouter
from rsrouter.router.flat import FlatRouter
from rsrouter.router.trunk import has_grid
from rsrouter.sampling.execution import Execution
from rsrouter.training.cascade import check_two
from rsrouter.training.chains import Frontier, Goal, accuracy, chosen_line, expert_radius, goal_of, search_chain
from rsrouter.training.doubts import doubts
from rsrouter.training.features import with_features, without_features
from rsrouter.training.heads import HeadGoal, HeadRecipe, as_stored, train_head
from rsrouter.training.labels import target_radii
from rsrouter.training.looks import FEATURE_BLOCK, Look, expert_look, head_look, network_look, with_further
from rsrouter.training.record import LABEL, SELECTION_VOTES, TRAIN, TUNE, Training, named_recipe
from rsrouter.training.simulated import SimulatedVotes, shared_levels, simulate_pool
from rsrouter.training.whole import WholeRecipe, train_whole, whole_votes


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
        trunks: experts that a head reads: 2, that of the largest sigma and its neighbour, or 1, the former alone, for half the
            votes' cost.
        confidences: heads and the router's own networks are also offered in this way: a vote counts for a class only where its
            softmax probability reaches this, and asks the next voter elsewhere (`Voter.confidence`). .3 to .5 keep more of
            radius 0. The log names such a candidate after it: `own@0.6~0.4`.
        sure_copies: further noisy copies of the validation images on which nearly all votes of a network agree. At a large
            radius a few votes in ten thousand decide, which `tune_copies` cannot tell: the choice then rests on a prior, and
            promises too much there. Ten times `tune_copies` is a reasonable number; 0: none. The flat candidate of kind `auto`
            goes without.
        whole: networks of the router's own to train beside the heads, one of each at every noise level; an expert's size each,
            and minutes of training for one of 160,000 weights. Their labels must differ.
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
    trunks: int = 2
    confidences: tuple[float, ...] = ()
    sure_copies: int = 0
    whole: tuple[WholeRecipe, ...] = ()

    def __post_init__(self) -> None:
        check_whole("sure_copies", self.sure_copies, 0, remedy="0 for none, or ten times tune_copies")
        labels = [*(head.label for head in self.heads), *(how.label for how in self.whole)]
        if len(set(labels)) != len(labels):
            raise InputError(
                "Two heads or networks of a recipe have one label",
                expected="different objectives, cross_entropy, tilt, consistency, tau or start",
                received=str(labels),
                remedy="drop one of them",
            )
        given = list(self.confidences) if isinstance(self.confidences, Iterable) else [None]
        if not all(isinstance(c, Real) and 0.0 < c < 1.0 for c in given):
            raise InputError(
                "A recipe's confidences are out of range",
                expected="several numbers above 0 and below 1",
                received=repr(self.confidences),
                remedy="(0.3, 0.4, 0.5) is a reasonable choice; 0 is always among them",
            )
        object.__setattr__(self, "confidences", tuple(float(c) for c in given))
        if self.trunks not in (1, 2):
            raise InputError(
                "A head reads one expert or two", expected="trunks 1 or 2", received=repr(self.trunks), remedy="leave it out"
            )


#: Votes on each training image for the radius of the expert behind a network of its own.
BEHIND_VOTES = 24
#: By name: `deferral` (some ten minutes for 6,000 and 1,000 small images on one core), `deferral-confidence` (heads are also
#: offered so that only votes of some confidence count for a class; the search is longer), `deferral-grid` (heads see where in the
#: image something is; for tens of thousands of images), `deferral-whole` (at each noise level also a network of its own; for tens
#: of thousands of images), `deferral-sure` (many more votes of the images that decide at the largest radii; for `plan_n` of tens
#: of thousands) and `quick` (about a minute for 6,000 and 400).
DEFERRAL_RECIPES: dict[str, DeferralRecipe] = {
    "deferral": DeferralRecipe(),
    "deferral-grid": DeferralRecipe(grid=2, heads=tuple(replace(h, hidden=56, steps=3000) for h in DeferralRecipe().heads)),
    "deferral-confidence": DeferralRecipe(confidences=(0.3, 0.4, 0.5)),
    "deferral-sure": DeferralRecipe(tune_copies=400, sure_copies=4000),
    "deferral-whole": DeferralRecipe(whole=(WholeRecipe(),)),
    "quick": DeferralRecipe(
        copies=8,
        tune_copies=150,
        levels=(1.2,),
        heads=(HeadRecipe(cross_entropy=0.03), HeadRecipe(cross_entropy=0.1, tilt=3.0)),
        stages=2,
    ),
}


def deferral_recipe(training: Training) -> DeferralRecipe:
    """The recipe that a training asks for."""
    return named_recipe(training.recipe, "deferral", DEFERRAL_RECIPES, DeferralRecipe)


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
    readable = with_features(pool)
    if not readable or not max(radii) > 0:
        return []
    main, others = readable[-1], tuple(e.name for e in readable[-recipe.trunks : -1])
    least = smallest_sigma(max(radii), plan_n, alpha, recipe.stages)
    grid = recipe.grid if recipe.grid > 1 and all(has_grid(pool[name], recipe.grid) for name in (main.name, *others)) else 1
    sigmas = sorted({round(min(main.sigma, max(level * least, readable[0].sigma)), 4) for level in recipe.levels})
    return [
        (Voter(main.name, sigma, f"level{i}_{head.label}", others, grid), head)
        for i, sigma in enumerate(sigmas)
        for head in recipe.heads
    ]


def own_sigmas(pool: ExpertPool, radii: Sequence[float], recipe: DeferralRecipe, plan_n: int, alpha: float) -> list[float]:
    """The noise levels of the networks of the router's own."""
    if not recipe.whole or not max(radii) > 0:
        return []
    least = smallest_sigma(max(radii), plan_n, alpha, recipe.stages)
    return sorted({round(min(pool[-1].sigma, max(level * least, pool[0].sigma)), 4) for level in recipe.levels})


def _own_networks(training: Training, recipe: DeferralRecipe, goal: Goal) -> Iterator[tuple[Voter, nn.Module]]:
    """Trains them; an expert that cannot be written down starts none, and the log says so."""
    pool = training.pool
    for i, sigma in enumerate(own_sigmas(pool, training.radii, recipe, training.plan_n, training.alpha)):
        for how in recipe.whole:
            start = pool[how.start] if how.start else next((e for e in pool if e.sigma >= sigma), pool[-1])
            behind = pool[how.behind or pool[0].name]
            try:
                describe_module(start.module)
            except CheckpointError as error:
                training.say({"no_network": error.message})
                continue
            drawn: dict[str, Any] = {"seed": training.seed, "purpose": LABEL, "store": training.store}
            drawn["dtype"] = (training.execution or Execution()).dtype
            votes = whole_votes(behind, behind.module, behind.sigma, training.images, BEHIND_VOTES, **drawn)[0]
            found = target_radii(
                np.pad(votes, ((0, 0), (0, 1)))[:, None],
                training.labels.numpy(),
                (behind.sigma,),
                plan_n=training.plan_n,
                alpha=training.alpha,
            )
            name = f"own{i}_{how.label}"
            module = train_whole(
                start,
                training.images,
                training.labels,
                torch.from_numpy(found.radius[:, 0]).float(),
                recipe=how,
                goal=HeadGoal(sigma, tuple(training.radii), tuple(goal.envelope.tolist())),
                seed=training.seed,
                log=partial(_named, training, name),
                store=training.store,
            )
            if training.votes is not None:
                training.votes(len(training.images) * BEHIND_VOTES + how.steps * how.batch * how.group)
            yield Voter(start.name, sigma, name, whole=True), module


def deferral_passes(training: Training) -> int:
    """Forward passes of single experts that `train_deferral` makes: what its `votes` add up to."""
    pool, recipe, validation = training.pool, deferral_recipe(training), len(training.held_out[0])
    wanted = head_voters(pool, training.radii, recipe, training.plan_n, training.alpha)
    readers = {voter.sigma: 1 + len(voter.others) for voter, _ in wanted}
    tuned = validation * (recipe.tune_copies + recipe.sure_copies)
    each = len(training.images) * recipe.copies + tuned
    levels = len(own_sigmas(pool, training.radii, recipe, training.plan_n, training.alpha))
    asked = len(pool) + len(training.networks) + levels * len(recipe.whole)
    own = sum(len(training.images) * BEHIND_VOTES + how.steps * how.batch * how.group for how in recipe.whole)
    return tuned * asked + each * sum(readers.values()) + levels * own


@usual_settings()
def train_deferral(training: Training) -> DeferralRouter | CascadeRouter:
    """Trains heads on the images, then chooses voters, order and thresholds on the validation images.

    Where no head is worth asking, or none could be trained (the log says why), the result is a cascade of plain experts. Heads
    start from the parent's of the same shape.

    Raises:
        InputError: no validation images, or a pool of one expert.
    """
    training = training.checked()
    pool, recipe, alpha, (xv, yv) = training.pool, deferral_recipe(training), training.alpha, training.held_out
    grid, target, plan_n = tuple(training.radii), yv.numpy(), training.plan_n
    check_two(pool)
    wanted = head_voters(pool, grid, recipe, plan_n, alpha)
    blind = without_features(pool)
    if not wanted and recipe.heads:
        why = "the only radius asked for is 0, which plain experts answer best" if not max(grid) > 0 else blind
        training.say({"no_head": f"no head could be trained: {why}"})
    elif blind:
        training.say({"fewer_heads": blind})
    parents: dict[str, nn.Module] = {}
    if training.parent is not None and not isinstance(training.parent.router, FlatRouter):
        parents = dict(training.parent.router.modules.items())
    rng = np.random.default_rng(training.seed)
    sure = shared_levels(len(xv), pool.num_classes, rng)
    drawn, looks = training.expert_votes(xv, recipe.tune_copies, TUNE), (recipe.tune_copies, recipe.sure_copies)
    for k, expert in enumerate(pool):
        with_further(training, looks, [drawn[None, :, k]], partial(expert_look, training, ExpertPool([expert])))
    simulated = simulate_pool(pool, drawn, plan_n=plan_n, rng=rng, levels=sure)
    goal = goal_of(simulated, target, grid, alpha, **training.wishes)
    training.doubt(doubts(goal, simulated, target, pool.num_classes))
    candidates, heads = {e.name: Voter(e.name) for e in pool}, dict[str, nn.Module]()
    levels = dict.fromkeys((0.0, *recipe.confidences))

    def offer(name: str, voter: Voter, sigma: float, counts: NDArray[np.int64], totals: NDArray[np.int64]) -> NDArray[np.float64]:
        """One more candidate, at each confidence, by its counts `(M, N, C)` of `totals (N,)` votes; what it certifies alone
        where every vote counts."""
        for confidence, counted in zip(levels, counts, strict=True):
            title = f"{name}~{confidence:g}" if confidence else name
            unsure = [totals - counted.sum(1)] if confidence else []
            votes = np.column_stack([counted, *unsure])
            candidates[title] = replace(voter, confidence=confidence)
            simulated[title] = SimulatedVotes.draw(votes, sigma, plan_n, SELECTION_VOTES, rng, pool.num_classes, sure)
        return accuracy(*expert_radius(simulated[name], alpha), target, grid)

    for sigma in dict.fromkeys(float(v.sigma or 0.0) for v, _ in wanted):
        members = [(v, how) for v, how in wanted if v.sigma == sigma]
        readers, cells = [pool[name] for name in (members[0][0].expert, *members[0][0].others)], members[0][0].grid
        features = training.features(readers, sigma, training.images, recipe.copies, TRAIN, cells)
        trained: dict[str, nn.Module] = {}
        for voter, how in members:
            name = str(voter.head)
            head = train_head(
                features,
                training.labels,
                pool.num_classes,
                recipe=how,
                goal=HeadGoal(sigma, grid, tuple(goal.envelope.tolist())),
                seed=training.seed,
                log=partial(_named, training, name),
                store=training.store,
                parents=parents,
            )
            trained[name] = as_stored(head)
        del features
        look: Look = partial(head_look, training, readers, sigma, cells, trained, list(levels))
        voted = dict(zip(trained, look(xv, recipe.tune_copies, TUNE), strict=True))
        totals = with_further(training, looks, list(voted.values()), look, len(readers), FEATURE_BLOCK)
        named = {str(voter.head): voter for voter, _ in members}
        for name, counts in voted.items():
            reached = offer(name, named[name], sigma, counts, totals)
            training.say({"head": name, "sigma": sigma, "validation": reached.tolist()})
        heads.update(trained)
    for voter, module in (*training.networks, *_own_networks(training, recipe, goal)):
        expert = pool[voter.expert]
        own, sigma = str(voter.head), expert.sigma if voter.sigma is None else voter.sigma
        name = f"{own}@{sigma:g}"
        if own not in heads:
            heads[own] = as_stored(copy.deepcopy(module).eval().requires_grad_(False))
        look = partial(network_look, training, expert, heads[own], sigma, list(levels))
        (counts,) = look(xv, recipe.tune_copies, TUNE)
        totals = with_further(training, looks, [counts], look)
        reached = offer(name, voter, sigma, counts, totals)
        training.say({"network": own, "sigma": sigma, "validation": reached.tolist()})
    frontier = Frontier(goal)
    last = [name for name, voter in candidates.items() if not voter.confidence]
    chain, _ = search_chain(simulated, target, goal, alpha, max_stages=recipe.stages, last=last, frontier=frontier)
    training.say(chosen_line(goal, simulated, target, alpha, chain, frontier))
    thresholds = [tau for _, tau in chain if tau is not None]
    voters = [candidates[name] for name, _ in chain]
    if all(v.head is None for v in voters) and len(voters) > 1:
        return CascadeRouter(thresholds, [v.expert for v in voters])
    used = {v.head for v in voters if v.head is not None}
    return DeferralRouter(voters, thresholds, {name: heads[name] for name in heads if name in used})


def _named(training: Training, name: str, line: dict[str, Any]) -> None:
    training.say({"head": name, **line})
