"""Training a flat router: cross-entropy against the experts' radii on noisy inputs, or on a frozen trunk's features.

Two objectives over routing labels (which expert holds the true class how far):

`dual-rs` (arXiv 2512.01782, section 4): soft labels proportional to exp(radius), with class balance and the
consistency regulariser, which counts as much as the radius it protects.

`utility` (ours): for each radius r the user cares about, the experts that hold the true class to r are the
good ones, and the loss is -log of the probability that the vote names a good one. Experts that agree are
never told apart, as the tree certificate does not need them to be; images on which all or no experts hold
carry no loss.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsrouter.core.errors import InputError
from rsrouter.experts.identity import module_digest
from rsrouter.experts.pool import ExpertPool
from rsrouter.router.flat import FlatRouter
from rsrouter.router.trunk import Trunk
from rsrouter.training.labels import Labels
from rsrouter.training.losses import consistency_loss, dual_rs_loss, envelope_weights, good_sets, named_radius, utility_loss
from rsrouter.training.resume import current, unit_key


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of router training.

    Attributes:
        objective: `"utility"` or `"dual-rs"`.
        epochs, batch, lr, weight_decay: of AdamW, with a one-cycle schedule.
        copies: noisy copies of each image per step (frozen trunks: cached once per epoch group).
        consistency: weight of KL(mean prediction || each copy), Dual RS's lambda.
        entropy: weight of the entropy of the mean prediction, Dual RS's eta.
        radius_weight: what multiplies the regulariser of an image: `"none"`, or Dual RS's w_r, the radius at the largest
            (`"strong"`) or smallest (`"weak"`) sigma that the router names on one of the noisy copies.
        redraw: epochs after which cached noisy features are drawn anew.
        weighting: how much each radius counts for `utility`: `"even"`, or `"envelope"`, inversely to the share of images that the
            best expert holds there, as coverage counts them.
        check, patience: epochs between looks at the validation images, and looks without a better one before training
            stops.
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


#: The paper's hyper-parameters on CIFAR-10 (section 5) under its own name, and ours: every radius alike, or as coverage counts.
RECIPES: dict[str, Recipe] = {
    "utility": Recipe(),
    "coverage": Recipe(weighting="envelope", consistency=20.0),
    "dual-rs": Recipe("dual-rs", epochs=90, lr=0.01, weight_decay=0.01, consistency=40.0, entropy=0.5, radius_weight="strong"),
}


class _Inputs:
    """Noisy inputs of the trained module: images with noise, or a frozen trunk's features of them (cached)."""

    def __init__(self, router: FlatRouter, pool: ExpertPool, images: Tensor, generator: torch.Generator, recipe: Recipe) -> None:
        self.images, self.sigma, self.generator, self.recipe = images, router.sigma, generator, recipe
        self.trunk = None if router.trunk is None else Trunk(pool[router.trunk]).eval()
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


class _Watch:
    """The objective on validation images, and the best weights so far."""

    def __init__(
        self,
        router: FlatRouter,
        pool: ExpertPool,
        validation: tuple[Tensor, Labels],
        columns: list[int],
        radii: list[float],
        generator: torch.Generator,
        recipe: Recipe,
        weights: Tensor | None,
        order: Tensor | None,
    ) -> None:
        images, labels = validation
        self.weights, self.order = weights, order
        radius = labels.radius[:, columns]
        self.good, self.soft, self.recipe = good_sets(radius, radii), torch.from_numpy(radius.astype(np.float32)), recipe
        source = _Inputs(router, pool, images, generator, recipe)
        source.start_epoch(0)
        self.copies = source.copies(torch.arange(len(images)))
        self.least, self.stale = float("inf"), 0
        self.best: dict[str, Tensor] | None = None

    @torch.no_grad()
    def look(self, module: nn.Module) -> float:
        module.eval()
        logits = [torch.cat([module(part) for part in torch.split(copy, 500)]) for copy in self.copies]
        module.train()
        task = [
            dual_rs_loss(each, self.soft) if self.recipe.objective == "dual-rs" else utility_loss(each, self.good, self.weights)
            for each in logits
        ]
        steady = consistency_loss(logits, self.recipe.consistency, self.recipe.entropy)
        if self.order is not None:
            steady = steady * named_radius(logits, self.soft, self.order, self.recipe.radius_weight)
        value = float((torch.stack(task).mean(0) + steady).mean())
        if value < self.least:
            self.least, self.stale, self.best = value, 0, deepcopy(module.state_dict())
        else:
            self.stale += 1
        return value


def train_flat(
    pool: ExpertPool,
    router: FlatRouter,
    x: Tensor,
    labels: Labels,
    radii: list[float],
    seed: int,
    recipe: Recipe,
    progress: Callable[[int, int, float], None] | None,
    validation: tuple[Tensor, Labels] | None = None,
    *,
    curve: Callable[[nn.Module], dict[str, Any]] | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Trains `router.module` in place and returns one record per epoch.

    Inside a run with a checkpoint (`rsrouter.training.resume`) it saves its state now and then, and goes on from it.

    With `validation` (images and their routing labels) the objective is also measured there every `recipe.check`
    epochs, the best weights are kept, and training stops after `recipe.patience` checks without a better one. `curve` adds
    what it returns (simulated certified accuracy) to those records; `log` is called with every record.

    Raises:
        InputError: no training image tells the experts apart.
    """
    columns = [pool.names.index(name) for name in router.order(pool)]
    radius = labels.radius[:, columns]
    good = good_sets(radius, radii)
    if recipe.weighting not in ("even", "envelope"):
        raise InputError(
            "Unknown weighting of radii",
            expected="'even' or 'envelope'",
            received=repr(recipe.weighting),
            remedy="'envelope' weighs radii as coverage does",
        )
    if recipe.radius_weight not in ("none", "strong", "weak"):
        raise InputError(
            "Unknown weight of the regulariser",
            expected="'none', 'strong' or 'weak'",
            received=repr(recipe.radius_weight),
            remedy="'strong' takes the radius at the largest sigma that is named",
        )
    order = None
    if recipe.radius_weight != "none":
        order = torch.from_numpy(np.argsort(np.argsort([pool[name].sigma for name in router.order(pool)])))
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
    x, good, soft = x[kept], good[kept], torch.from_numpy(radius[kept].astype(np.float32))
    best = np.bincount(radius[kept].argmax(1), minlength=len(columns))
    balance = torch.from_numpy((len(kept) / len(columns) / np.maximum(best, 1)).astype(np.float32))[soft.argmax(1)]
    module: nn.Module = router.module
    generator = torch.Generator().manual_seed(seed)
    inputs = _Inputs(router, pool, x, generator, recipe)
    watch = None if validation is None else _Watch(router, pool, validation, columns, radii, generator, recipe, weights, order)
    module.requires_grad_(True).train()
    optimiser = torch.optim.AdamW(module.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = -(-len(x) // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=steps * recipe.epochs)
    history: list[dict[str, Any]] = []
    store = current()
    name = unit_key("flat", module_digest(module), router.sigma, router.trunk, router.order(pool), recipe, seed, tuple(radii))
    state = store.get(name)
    if state is not None:
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        history = state["history"]
        inputs.redraw(state["drawn"])
        generator.set_state(state["generator"])
        if watch is not None:
            watch.least, watch.stale, watch.best = state["watch"]
        if log is not None:
            for line in history:
                log(line)
    store.due(name)
    for epoch in range(len(history), recipe.epochs):
        if watch is not None and watch.stale >= recipe.patience:
            break
        inputs.start_epoch(epoch)
        total = 0.0
        for rows in torch.split(torch.randperm(len(x), generator=generator), recipe.batch):
            logits = [module(c) for c in inputs.copies(rows)]
            if recipe.objective == "dual-rs":
                task = torch.stack([dual_rs_loss(each, soft[rows]) for each in logits]).mean(0)
                weight = balance[rows]
            else:
                task = torch.stack([utility_loss(each, good[rows], weights) for each in logits]).mean(0)
                weight = torch.ones(len(rows))
            steady = consistency_loss(logits, recipe.consistency, recipe.entropy)
            if order is not None:
                steady = steady * named_radius(logits, soft[rows], order, recipe.radius_weight)
            loss = (weight * (task + steady)).mean()
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        history.append({"epoch": epoch + 1, "loss": total / len(x)})
        if watch is not None and (epoch + 1) % recipe.check == 0:
            history[-1]["validation_loss"] = watch.look(module)
            if curve is not None:
                history[-1].update(curve(module))
        if log is not None:
            log(history[-1])
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
                    "watch": None if watch is None else (watch.least, watch.stale, watch.best),
                },
            )
        if progress is not None:
            progress(epoch + 1, recipe.epochs, total / len(x))
    if watch is not None and watch.best is not None:
        module.load_state_dict(watch.best)
    module.eval().requires_grad_(False)
    return history
