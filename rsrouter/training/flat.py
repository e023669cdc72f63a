"""The flat router of Dual RS (arXiv 2512.01782): its network, its training, and what it would certify on validation images.

Two objectives over routing labels (which expert holds the true class how far):

`dual-rs` (section 4 of the paper): soft labels proportional to exp(radius), with class balance and the consistency
regulariser, which counts as much as the radius it protects.

`utility` (ours): for each radius r the user cares about, the experts that hold the true class to r are the
good ones, and the loss is -log of the probability that the vote names a good one. Experts that agree are
never told apart, as the tree certificate does not need them to be; images on which all or no experts hold
carry no loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsrouter.core.errors import InputError
from rsrouter.core.tree import expert_stage, flat_tree
from rsrouter.experts.identity import unique_digest
from rsrouter.experts.pool import ExpertPool
from rsrouter.process import usual_settings
from rsrouter.router.flat import STAGE, FlatRouter
from rsrouter.router.trunk import Trunk
from rsrouter.training.chains import Goal, accuracy, goal_of, replay, standing
from rsrouter.training.doubts import doubts, wrong_labels
from rsrouter.training.flat_network import adapt_flat, default_flat, trainable
from rsrouter.training.labels import Labels
from rsrouter.training.losses import consistency_loss, dual_rs_loss, envelope_weights, good_sets, named_radius, utility_loss
from rsrouter.training.record import LABEL, SELECTION_VOTES, TUNE, Training, named_recipe
from rsrouter.training.resume import unit_key
from rsrouter.training.simulated import SimulatedVotes, simulate_pool

#: Validation images of the curve of a flat router with a backbone of its own.
CURVE_IMAGES = 200


@dataclass(frozen=True)
class Recipe:
    """How a flat router is trained.

    Attributes:
        objective: `"utility"` or `"dual-rs"`.
        epochs, batch, lr, weight_decay: of AdamW.
        milestones, gamma: epochs after which the learning rate is multiplied by `gamma`; without, a one-cycle schedule.
        copies: noisy copies of each image per step (frozen trunks: cached once per epoch group).
        consistency: weight of KL(mean prediction || each copy), Dual RS's lambda.
        entropy: weight of the entropy of the mean prediction, Dual RS's eta.
        radius_weight: what multiplies the regulariser of an image: `"none"`, or Dual RS's w_r, the radius at the largest
            (`"strong"`) or smallest (`"weak"`) sigma that the router names on one of the noisy copies.
        redraw: epochs after which cached noisy features are drawn anew.
        weighting: how much each radius counts for `utility`: `"even"`, or `"envelope"`, inversely to the share of images that the
            best expert holds there, as coverage counts them.
        check, patience: epochs between looks at the validation images (0: none, the last weights are kept), and looks without a
            better one before training stops.
        network: of a router asked for by name: `"head"`, some kilobytes on a frozen expert, or `"whole"`, a network of its own
            with an expert's architecture.
        sigma: noise level of that router; None: the largest of the experts it can read.
        carried: whether labels are carried over to the certification's votes (`target_radii`) or are the radii that the drawn
            votes certify, as in Dual RS.
    """

    objective: str = "utility"
    epochs: int = 60
    batch: int = 256
    lr: float = 0.01
    weight_decay: float = 0.01
    copies: int = 2
    consistency: float = 2.0
    entropy: float = 0.5
    radius_weight: str = "none"
    redraw: int = 6
    weighting: str = "even"
    check: int = 5
    patience: int = 6
    milestones: tuple[int, ...] = ()
    gamma: float = 0.5
    network: str = "head"
    sigma: float | None = None
    carried: bool = True

    def __post_init__(self) -> None:
        for name, allowed in {
            "objective": ("utility", "dual-rs"),
            "radius_weight": ("none", "strong", "weak"),
            "weighting": ("even", "envelope"),
            "network": ("head", "whole"),
        }.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"Unknown {name} of a recipe",
                    expected=f"one of {allowed}",
                    received=repr(getattr(self, name)),
                    remedy="see rsrouter.Recipe",
                )


_PAPER = Recipe(
    "dual-rs",
    epochs=90,
    consistency=40.0,
    radius_weight="strong",
    check=0,
    milestones=(30, 60),
    network="whole",
    sigma=1.0,
    carried=False,
)
#: `utility` and `coverage`: ours, every radius alike, or as coverage counts. `dual-rs` and `dual-rs-weak`: as the paper's authors
#: run it on CIFAR-10 (section 5: a whole network at sigma 1.0, 90 epochs, labels of 100 votes), with either radius weight.
#: `dual-rs-head`: their objective for a head of some kilobytes, in seconds.
RECIPES: dict[str, Recipe] = {
    "utility": Recipe(),
    "coverage": Recipe(weighting="envelope", consistency=20.0),
    "dual-rs": _PAPER,
    "dual-rs-weak": replace(_PAPER, radius_weight="weak"),
    "dual-rs-head": Recipe("dual-rs", epochs=90, consistency=40.0, radius_weight="strong"),
}


class FlatCurve:
    """Simulated certified accuracy of a flat router on validation images, for the log and for choosing between kinds.

    Args:
        training: pool, radii, plan, wishes, and where and how the router's trunk runs.
        router: the router that is being trained.
        images, labels: `(N, C, H, W)` validation images and `(N,)` classes.
        votes: `(N, K, classes + 1)` few votes of every expert on them (`label_votes`).
        copies: noisy copies of each image for the router's votes.
    """

    def __init__(
        self, training: Training, router: FlatRouter, images: Tensor, labels: Tensor, votes: NDArray[np.int64], copies: int = 50
    ) -> None:
        self.training, self.router, self.images, self.labels, self.copies = training, router, images, labels.numpy(), copies
        pool, rng = training.pool, np.random.default_rng(training.seed)
        self.experts = simulate_pool(pool, votes, plan_n=training.plan_n, rng=rng)
        self.goal: Goal = goal_of(self.experts, self.labels, training.radii, training.alpha, **training.wishes)
        if training.kind == "flat":  # as one of several candidates it has been told
            training.doubt(doubts(self.goal, self.experts, self.labels, pool.num_classes))
        names = router.order(pool)
        self.tree = flat_tree(STAGE, router.sigma, [expert_stage(n, pool[n].sigma, pool.num_classes) for n in names])
        self.width = len(names)
        self.features: Tensor | None = None
        if router.trunk is not None:
            self.features = training.features([pool[router.trunk]], router.sigma, images, copies, TUNE, quiet=True)

    @torch.inference_mode()
    def router_votes(self, module: nn.Module) -> NDArray[np.int64]:
        """`(N, K)` votes of the router on the noisy copies, the same noise at every call."""
        generator = torch.Generator().manual_seed(self.training.seed)
        rows = []
        for i, image in enumerate(self.images):
            if self.features is not None:
                x = self.features[i].float()
            else:
                x = image + self.router.sigma * torch.randn((self.copies, *image.shape), generator=generator)
            rows.append(np.bincount(module(x).argmax(1).numpy(), minlength=self.width))
        return np.stack(rows)

    def look(self, module: nn.Module) -> dict[str, Any]:
        """`validation` (accuracy at every radius), `coverage`, `least` ratio and `score` of the router as it stands."""
        mode = module.training
        module.eval()
        rng = np.random.default_rng(self.training.seed + 1)
        drawn = SimulatedVotes.draw(self.router_votes(module), self.router.sigma, self.training.plan_n, SELECTION_VOTES, rng)
        module.train(mode)
        certified = replay(self.tree, {STAGE: drawn, **self.experts}, self.training.alpha)
        return standing(self.goal, accuracy(*certified, self.labels, self.goal.radii))


class _Inputs:
    """Noisy inputs of the trained module: images with noise, or a frozen trunk's features of them (cached)."""

    def __init__(self, router: FlatRouter, pool: ExpertPool, images: Tensor, generator: torch.Generator, recipe: Recipe) -> None:
        self.images, self.sigma, self.generator, self.recipe = images, router.sigma, generator, recipe
        self.trunk = None if router.trunk is None else copy.deepcopy(Trunk(pool[router.trunk])).float().eval()
        self._cache: list[Tensor] = []
        self.drawn: Tensor | None = None  # the generator's state before the cached features were drawn

    def _noisy(self, rows: Tensor) -> Tensor:
        x = self.images[rows]
        return x + self.sigma * torch.randn(x.shape, generator=self.generator)

    def start_epoch(self, epoch: int) -> None:
        """Draws the cached features anew now and then."""
        if self.trunk is None or (self._cache and epoch % self.recipe.redraw):
            return
        self._cache = []
        self.drawn = self.generator.get_state()
        with torch.no_grad():
            for _ in range(self.recipe.copies):
                parts = [torch.cat(self.trunk(self._noisy(rows)), 1) for rows in torch.split(torch.arange(len(self.images)), 500)]
                self._cache.append(torch.cat(parts))

    def redraw(self, drawn: Tensor | None) -> None:
        """The cached features that were drawn from generator state `drawn`."""
        if drawn is not None:
            self.generator.set_state(drawn)
            self.start_epoch(0)

    def copies(self, rows: Tensor) -> list[Tensor]:
        """One input batch per noisy copy."""
        if self.trunk is not None:
            return [c[rows] for c in self._cache]
        return [self._noisy(rows) for _ in range(self.recipe.copies)]


class _Objective:
    """Loss of every image under a recipe, before class balance."""

    def __init__(
        self, recipe: Recipe, sigmas: Sequence[float], radius: NDArray[np.float64], good: Tensor, weights: Tensor | None
    ):
        self.recipe, self.good, self.weights = recipe, good, weights
        self.radius = torch.from_numpy(radius.astype(np.float32))
        self.order = torch.from_numpy(np.argsort(np.argsort(sigmas)))

    def __call__(self, logits: list[Tensor], rows: Tensor | slice = slice(None)) -> Tensor:
        recipe, radius = self.recipe, self.radius[rows]
        if recipe.objective == "dual-rs":
            task = [dual_rs_loss(each, radius) for each in logits]
        else:
            task = [utility_loss(each, self.good[rows], self.weights) for each in logits]
        steady = consistency_loss(logits, recipe.consistency, recipe.entropy)
        if recipe.radius_weight != "none":
            steady = steady * named_radius(logits, radius, self.order, recipe.radius_weight)
        return torch.stack(task).mean(0) + steady


class _Watch:
    """The objective on validation images, and the best weights so far."""

    def __init__(self, objective: _Objective, source: _Inputs) -> None:
        self.objective = objective
        source.start_epoch(0)
        self.copies = source.copies(torch.arange(len(source.images)))
        self.least, self.stale = float("inf"), 0
        self.best: dict[str, Tensor] | None = None

    @torch.no_grad()
    def look(self, module: nn.Module) -> float:
        module.eval()
        logits = [torch.cat([module(part) for part in torch.split(each, 500)]) for each in self.copies]
        module.train()
        value = float(self.objective(logits).mean())
        if value < self.least:
            self.least, self.stale, self.best = value, 0, copy.deepcopy(module.state_dict())
        else:
            self.stale += 1
        return value


def train_flat(
    training: Training,
    router: FlatRouter,
    recipe: Recipe,
    labels: Labels,
    validation: tuple[Tensor, Labels] | None = None,
    curve: Callable[[nn.Module], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Trains `router.module` in place on `training.images` and their routing labels; returns one record per epoch.

    With `validation` (images and their routing labels) the objective is also measured there every `recipe.check`
    epochs, the best weights are kept, and training stops after `recipe.patience` checks without a better one. `curve` adds
    what it returns (simulated certified accuracy) to those records. The state is kept in `training.store` now and then.

    Raises:
        InputError: labels that do not fit, or no training image tells the experts apart.
    """
    pool, x, seed, store = training.pool, training.images, training.seed, training.store
    _check_labels(labels, len(x), len(pool))
    names = router.order(pool)
    columns, sigmas, radii = [pool.names.index(name) for name in names], [pool[name].sigma for name in names], training.radii
    radius = labels.radius[:, columns]
    good = good_sets(radius, radii)
    weights = envelope_weights(good) if recipe.weighting == "envelope" else None
    if recipe.objective == "dual-rs":
        kept = np.flatnonzero(radius.max(1) > 0)
    else:
        decided = good.sum(2)
        kept = np.flatnonzero(((decided > 0) & (decided < good.shape[2])).any(1).numpy())
    if len(kept) == 0:
        raise InputError(
            "No training image tells the experts apart",
            expected="images that some experts hold and others do not",
            received=f"{len(x)} images without",
            remedy="use more images, or other radii",
        )
    x, radius = x[kept], radius[kept]
    objective = _Objective(recipe, sigmas, radius, good[kept], weights)
    best = radius.argmax(1)
    share = np.maximum(np.bincount(best, minlength=len(columns)), 1)
    balance = torch.from_numpy((len(kept) / len(columns) / share).astype(np.float32))[torch.from_numpy(best)]
    module: nn.Module = trainable(router.module)
    generator = torch.Generator().manual_seed(seed)
    inputs = _Inputs(router, pool, x, generator, recipe)
    watch = None
    if validation is not None and recipe.check:
        seen = validation[1].radius[:, columns]
        watch = _Watch(
            _Objective(recipe, sigmas, seen, good_sets(seen, radii), weights),
            _Inputs(router, pool, validation[0], generator, recipe),
        )
    module.requires_grad_(True).train()
    optimiser = torch.optim.AdamW(module.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = -(-len(x) // recipe.batch)
    schedule: torch.optim.lr_scheduler.LRScheduler = (
        torch.optim.lr_scheduler.MultiStepLR(optimiser, [steps * m for m in recipe.milestones], recipe.gamma)
        if recipe.milestones
        else torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=steps * recipe.epochs)
    )
    history: list[dict[str, Any]] = []
    name = unit_key("flat", unique_digest(module), router.sigma, router.trunk, names, recipe, seed, tuple(radii))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # what a module of one's own draws, such as dropout
        state = store.get(name)
        if state is not None:
            for part, what in ((module, "module"), (optimiser, "optimiser"), (schedule, "schedule")):
                part.load_state_dict(state[what])
            history = state["history"]
            inputs.redraw(state["drawn"])
            generator.set_state(state["generator"])
            torch.set_rng_state(state["global"])
            if watch is not None:
                watch.least, watch.stale, watch.best = state["watch"]
            for line in history:
                training.say(line)
        store.due(name)
        for epoch in range(len(history), recipe.epochs):
            if watch is not None and watch.stale >= recipe.patience:
                break
            inputs.start_epoch(epoch)
            total, rate = 0.0, float(optimiser.param_groups[0]["lr"])
            for rows in torch.split(torch.randperm(len(x), generator=generator), recipe.batch):
                each = objective([module(c) for c in inputs.copies(rows)], rows)
                loss = (balance[rows] * each if recipe.objective == "dual-rs" else each).mean()
                optimiser.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimiser.step()
                schedule.step()
                total += float(loss.detach()) * len(rows)
            history.append({"epoch": epoch + 1, "loss": total / len(x), "lr": rate})
            if watch is not None and (epoch + 1) % recipe.check == 0:
                history[-1]["validation_loss"] = watch.look(module)
                if curve is not None:
                    history[-1].update(curve(module))
            training.say(history[-1])
            if store.due(name):
                store.put(
                    name,
                    {
                        "module": module.state_dict(),
                        "optimiser": optimiser.state_dict(),
                        "schedule": schedule.state_dict(),
                        "history": history,
                        "drawn": inputs.drawn,
                        "generator": generator.get_state(),
                        "global": torch.get_rng_state(),
                        "watch": None if watch is None else (watch.least, watch.stale, watch.best),
                    },
                )
            if training.progress is not None:
                training.progress(epoch + 1, recipe.epochs, total / len(x))
    if watch is not None and watch.best is not None:
        module.load_state_dict(watch.best)
    module.eval().requires_grad_(False)
    return history


@usual_settings()
def _check_labels(labels: Labels, images: int, experts: int) -> None:
    shapes = (labels.radius.shape, labels.predict.shape)
    if shapes != ((images, experts),) * 2 or not np.isfinite(labels.radius).all():
        raise InputError(
            "Routing labels do not fit",
            expected=f"finite radii and classes ({images}, {experts})",
            received=f"{shapes[0]} and {shapes[1]}",
            remedy="label the images that are trained on",
        )


def flat_router(
    training: Training, recipe: Recipe | None = None, *, label_n: int | None = None, copies: int = 50, tune_n: int | None = None
) -> tuple[FlatRouter, dict[str, Any] | None]:
    """The flat router that is asked for, trained, and what it reaches on the validation images (None without them).

    Args:
        training: `router` is a `FlatRouter`, or a kind: then the parent's is trained further, or a new one.
        recipe: None: the training's.
        label_n: votes per expert and image for routing labels; None: the training's.
        copies, tune_n: votes of the router, and of each expert, on every validation image; None: `label_n`, with labels' noise.

    Raises:
        InputError: no network can be made or trained.
    """
    training = training.checked()
    pool, router, parent = training.pool, training.router, training.parent
    recipe = recipe or named_recipe(training.recipe, "utility", RECIPES, Recipe)
    if not isinstance(router, FlatRouter):
        older = parent.router if parent is not None else None
        adapted = adapt_flat(older, parent.pool, pool, training.seed) if parent and isinstance(older, FlatRouter) else None
        router = adapted or default_flat(pool, training.seed, recipe.network, recipe.sigma)
    router.bind(pool)
    label_n = training.label_n if label_n is None else label_n
    labels = training.routing_labels
    if labels is None:
        labels = training.targets(training.expert_votes(training.images, label_n, LABEL), training.labels, carried=recipe.carried)
    _check_labels(labels, len(training.images), len(pool))
    if training.validation is None:
        right = dict(zip(pool.names, (labels.predict == training.labels.numpy()[:, None]).mean(0).tolist(), strict=True))
        training.doubt(wrong_labels(right, len(training.labels), pool.num_classes, "training"))
        train_flat(training, router, recipe, labels)
        return router, None
    images, classes = training.validation
    votes = training.expert_votes(images, label_n, LABEL) if tune_n is None else training.expert_votes(images, tune_n, TUNE)
    shown = len(images) if router.trunk is not None else min(len(images), CURVE_IMAGES)
    curve = FlatCurve(training, router, images[:shown], classes[:shown], votes[:shown], copies)
    watched = (images, training.targets(votes, classes, carried=recipe.carried))
    train_flat(training, router, recipe, labels, watched, curve.look)
    found = {"kind": "flat", **curve.look(router.module), "images": shown, "radii": list(curve.goal.radii)}
    training.say(found)
    return router, found
