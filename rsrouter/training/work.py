"""One training run behind `train_router`: every kind's own steps, over inputs that were checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsrouter.core.errors import InputError
from rsrouter.experts.pool import ExpertPool
from rsrouter.experts.registry import build_architecture
from rsrouter.router.base import Router
from rsrouter.router.cascade import CascadeRouter
from rsrouter.router.flat import FlatRouter
from rsrouter.router.trunk import Trunk, has_trunk
from rsrouter.sampling.execution import Execution
from rsrouter.smooth import RoutedSmooth
from rsrouter.training.deferral import DeferralRecipe, chain_votes, train_deferral
from rsrouter.training.flat import RECIPES, Recipe, train_flat
from rsrouter.training.labels import LABEL, Labels, label_votes, target_radii
from rsrouter.training.parent import adapt_flat, descend, parent_chain
from rsrouter.training.replay import FlatCurve
from rsrouter.training.simulate import accuracy, chain_radius
from rsrouter.training.tune import TUNE, Goal, goal_of, simulate_pool, tune_cascade

#: Votes per expert and validation image that a cascade is tuned on.
TUNE_VOTES = 400
#: Training images that `auto`'s flat candidate is labelled and trained on, unless labels are given.
FLAT_IMAGES = 2000
#: At most so many votes per expert for each of their labels.
FLAT_LABEL_VOTES = 50
#: Validation images of the curve of a flat router with a backbone of its own.
CURVE_IMAGES = 200


def default_flat(pool: ExpertPool, seed: int) -> FlatRouter:
    """A head of some kilobytes on the frozen expert of the largest sigma whose features can be read.

    Raises:
        InputError: no expert exposes its features.
    """
    readable = [e for e in pool if has_trunk(e.module)]
    if not readable:
        raise InputError(
            "No expert exposes its features",
            expected="an expert with timm's forward_features and forward_head",
            received=str(pool.names),
            remedy="pass a FlatRouter with a backbone of its own, or kind 'cascade'",
        )
    trunk = readable[-1]
    with torch.no_grad():
        width = sum(part.shape[1] for part in copy.deepcopy(Trunk(trunk)).eval()(torch.zeros(1, *pool.input_shape)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build_architecture("mlp_head", len(pool), {"in_features": width})
    return FlatRouter(head, sigma=trunk.sigma, trunk=trunk.name)


def expected_votes(
    pool: ExpertPool,
    kind: str,
    recipe: DeferralRecipe | None,
    images: int,
    validation: int,
    radii: Sequence[float],
    *,
    label_n: int = 100,
    plan_n: int = 10_000,
    alpha: float = 1e-3,
    labelled: bool = False,
) -> int:
    """Forward passes of single experts that a training makes, for a progress bar that knows its end; what a killed run
    has done already is counted as well.

    Args:
        pool, kind, recipe, radii, label_n, plan_n, alpha: as in `train_router`.
        images, validation: how many train, and how many choose.
        labelled: whether a flat router's labels are given.
    """
    if kind == "cascade":
        return validation * TUNE_VOTES * len(pool)
    if kind == "flat":
        return (validation + (0 if labelled else images)) * label_n * len(pool)
    votes = chain_votes(pool, recipe or DeferralRecipe(), images, validation, radii, plan_n, alpha)
    if kind == "auto" and not labelled and any(has_trunk(e.module) for e in pool):
        votes += min(images, FLAT_IMAGES) * min(label_n, FLAT_LABEL_VOTES) * len(pool)
    return votes


@dataclass
class Work:
    """One training run: what `train_router` was given, after its checks."""

    pool: ExpertPool
    x: Tensor
    target: Tensor
    validation: tuple[Tensor, Tensor] | None
    radii: list[float]
    seed: int
    label_n: int
    plan_n: int
    alpha: float
    device: str | None
    execution: Execution
    votes: Callable[[int], None] | None
    progress: Callable[[int, int, float], None] | None
    log: Callable[[dict[str, Any]], None]
    parent: RoutedSmooth | None

    def draw(self, part: Tensor, n: int, purpose: str) -> NDArray[np.int64]:
        """`(N, K, classes + 1)` votes of every expert on `part (N, C, H, W)`."""
        how: dict[str, Any] = {"device": self.device, "execution": self.execution, "progress": self.votes}
        return label_votes(self.pool, part, n=n, seed=self.seed, purpose=purpose, **how)

    def choose(self, kind: str, recipe: DeferralRecipe | None, routing_labels: Labels | None) -> Router:
        """The cascade, deferral or `auto` router that is best on the validation images."""
        if self.validation is None:
            raise InputError("No validation images", expected="images to choose on", received="none", remedy="pass validation=")
        if kind == "cascade":
            return self.cascade(*self.validation)
        recipe = recipe or DeferralRecipe()
        last: dict[str, Any] = {}

        def log(line: dict[str, Any]) -> None:
            last.update(line)
            self.log(line)

        best: Router = train_deferral(
            self.pool,
            self.x,
            self.target,
            self.validation,
            self.radii,
            recipe=recipe,
            plan_n=self.plan_n,
            alpha=self.alpha,
            seed=self.seed,
            device=self.device,
            execution=self.execution,
            progress=self.votes,
            log=log,
        )
        if kind != "auto" or not any(has_trunk(e.module) for e in self.pool):
            return best
        flat, score, coverage = self.flat_candidate(recipe, routing_labels)
        chosen = flat if score > float(last["score"]) else best
        self.log(
            {
                "chosen": chosen.kind,
                "candidates": {best.kind: float(last["score"]), flat.kind: score},
                "coverages": {best.kind: float(last["coverage"]), flat.kind: coverage},
                "floor": recipe.floor,
                "strictness": recipe.strictness,
                "on": f"{len(self.validation[0])} validation images, simulated",
            }
        )
        # the chain's summary stays the last word of the log where the chain was chosen
        if chosen is best:
            self.log({key: last[key] for key in ("chain", "score", "coverage", "validation", "envelope", "radii", "images")})
        return chosen

    def cascade(self, xv: Tensor, yv: Tensor) -> CascadeRouter:
        """A tuned cascade; with a parent's chain, that one's thresholds searched further where this is better."""
        votes = self.draw(xv, TUNE_VOTES, TUNE)
        found: dict[str, Any] = {}
        options: dict[str, Any] = {"plan_n": self.plan_n, "alpha": self.alpha, "seed": self.seed}
        router = tune_cascade(self.pool, xv, yv, self.radii, votes=votes, log=found.update, **options)
        chain = None if self.parent is None else parent_chain(self.parent.router, self.parent.pool, self.pool)
        if chain is not None:
            voters = simulate_pool(self.pool, votes, plan_n=self.plan_n, n0=100, seed=self.seed)
            goal = goal_of(voters, yv.numpy(), self.radii, self.alpha)
            chain, score = descend(voters, yv.numpy(), goal, self.alpha, chain)
            self.log({"kind": "cascade", "chain": [list(stage) for stage in chain], "score": score, "start": "parent"})
            if score > float(found["score"]):
                reached = accuracy(*chain_radius(voters, chain, self.alpha), yv.numpy(), goal.radii)
                found.update(chain=[list(stage) for stage in chain], score=score, coverage=goal.coverage(reached))
                found["accuracy"] = reached.tolist()
                router = CascadeRouter([tau for _, tau in chain if tau is not None], [name for name, _ in chain])
        self.log(found)
        return router

    def flat_candidate(self, recipe: DeferralRecipe, routing_labels: Labels | None) -> tuple[FlatRouter, float, float]:
        """A flat router for `auto`, its score on the validation images by the same goal as the chain's, and its coverage."""
        adapted = None
        if self.parent is not None and isinstance(self.parent.router, FlatRouter):
            adapted = adapt_flat(self.parent.router, self.parent.pool, self.pool, self.seed)
        router = adapted or default_flat(self.pool, self.seed)
        few = slice(None) if routing_labels is not None else slice(0, FLAT_IMAGES)
        curve = self.flat(
            router,
            RECIPES["coverage"],
            self.x[few],
            self.target[few],
            routing_labels,
            label_n=min(self.label_n, FLAT_LABEL_VOTES),
            copies=recipe.tune_copies,
            tune_n=recipe.tune_copies,
            goal=(recipe.floor, recipe.strictness),
        )
        if curve is None:
            return router, float("-inf"), 0.0
        found = curve.look(router.module)
        self.log({"kind": "flat", **found})
        return router, float(found["score"]), float(found["coverage"])

    def flat(
        self,
        router: FlatRouter,
        recipe: Recipe,
        x: Tensor,
        target: Tensor,
        routing_labels: Labels | None,
        *,
        label_n: int | None = None,
        copies: int = 50,
        tune_n: int | None = None,
        goal: tuple[float, float] | None = None,
    ) -> FlatCurve | None:
        """Trains `router` in place; its curve on the validation images, None without them."""
        label_n = self.label_n if label_n is None else label_n

        def labels(votes: NDArray[np.int64], classes: Tensor) -> Labels:
            return target_radii(votes, classes.numpy(), self.pool.sigmas, plan_n=self.plan_n, alpha=self.alpha)

        training = labels(self.draw(x, label_n, LABEL), target) if routing_labels is None else routing_labels
        if training.radius.shape != (len(x), len(self.pool)):
            raise InputError(
                "Routing labels do not fit",
                expected=f"({len(x)}, {len(self.pool)})",
                received=str(training.radius.shape),
                remedy="label the images that are trained on",
            )
        curve, watched = None, None
        if self.validation is not None:
            xv, yv = self.validation
            votes = self.draw(xv, label_n, LABEL) if tune_n is None else self.draw(xv, tune_n, TUNE)
            watched = (xv, labels(votes, yv))
            shown = len(xv) if router.trunk is not None else min(len(xv), CURVE_IMAGES)
            curve = FlatCurve(
                self.pool,
                router,
                xv[:shown],
                yv[:shown],
                votes[:shown],
                self.radii,
                copies=copies,
                plan_n=self.plan_n,
                alpha=self.alpha,
                seed=self.seed,
                device=self.device,
                execution=self.execution,
            )
            if goal is not None:
                curve.goal = Goal(curve.goal.radii, curve.goal.envelope, *goal)
        try:
            train_flat(
                self.pool,
                router,
                x,
                training,
                self.radii,
                self.seed,
                recipe,
                self.progress,
                watched,
                curve=None if curve is None else curve.look,
                log=self.log,
            )
        except InputError:
            if goal is None:  # asked for; as one candidate of several it is only left out
                raise
            return None
        return curve
