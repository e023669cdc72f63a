"""Training a router: the experts stay frozen to the bit, only the router's own parameters move.

Two objectives over routing labels (which expert holds the true class how far):

`dual-rs` (arXiv 2512.01782, section 4): soft labels proportional to exp(radius), with class balance and the
consistency regulariser.

`utility` (ours): for each radius r the user cares about, the experts that hold the true class to r are the
good ones, and the loss is -log of the probability that the vote names a good one. Experts that agree are
never told apart, as the tree certificate does not need them to be; images on which all or no experts hold
carry no loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rsrouter.core.errors import InputError, ResultsError
from rsrouter.experts.base import ExpertPool
from rsrouter.inputs import check_images, check_labels
from rsrouter.router.base import Router
from rsrouter.router.cascade import CascadeRouter
from rsrouter.router.flat import FlatRouter
from rsrouter.router.labels import Labels, label_images
from rsrouter.router.trunk import Trunk
from rsrouter.smooth import RoutedSmooth
from rsrouter.training.tune import tune_cascade


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of router training.

    Attributes:
        objective: `"utility"` or `"dual-rs"`.
        epochs, batch, lr, weight_decay: of AdamW, with a one-cycle schedule.
        copies: noisy copies of each image per step (frozen trunks: cached once per epoch group).
        consistency: weight of KL(mean prediction || each copy), Dual RS's lambda.
        entropy: weight of the entropy of the mean prediction, Dual RS's eta.
        redraw: epochs after which cached noisy features are drawn anew.
    """

    objective: str = "utility"
    epochs: int = 60
    batch: int = 256
    lr: float = 0.01
    weight_decay: float = 0.01
    copies: int = 2
    consistency: float = 2.0
    entropy: float = 0.5
    redraw: int = 6


#: The paper's hyper-parameters on CIFAR-10 (section 5) under its own name, and ours.
RECIPES: dict[str, Recipe] = {
    "utility": Recipe(),
    "dual-rs": Recipe("dual-rs", epochs=90, lr=0.01, weight_decay=0.01, consistency=40.0, entropy=0.5),
}


def good_sets(radius: NDArray[np.float64], radii: Sequence[float]) -> Tensor:
    """`(N, len(radii), K)` floats: 1 where expert k holds the true class of image n to radius r (r = 0: at all)."""
    edges = np.maximum(np.asarray(sorted(radii), dtype=np.float64), np.nextafter(0.0, 1.0))
    return torch.from_numpy((radius[:, None, :] >= edges[None, :, None]).astype(np.float32))


def utility_loss(logits: Tensor, good: Tensor) -> Tensor:
    """Per row, the mean over radii of -log P(vote names a good expert); `(B, K)` and `(B, R, K)` to `(B,)`."""
    log_p = F.log_softmax(logits, 1)[:, None, :]
    decided = good.sum(2)
    matters = (decided > 0) & (decided < good.shape[2])
    inside = torch.logsumexp(log_p.masked_fill(good == 0, -30.0), 2).clamp(max=0.0)
    return -(inside * matters).sum(1) / good.shape[1]


def dual_rs_loss(logits: Tensor, radius: Tensor) -> Tensor:
    """Per row, cross-entropy with soft labels proportional to exp(radius); `(B, K)` and `(B, K)` to `(B,)`."""
    return -(F.softmax(radius, 1) * F.log_softmax(logits, 1)).sum(1)


def consistency_loss(copies: Sequence[Tensor], weight: float, entropy: float) -> Tensor:
    """Per row, weight * KL(mean || copy) + entropy * H(mean) over noisy copies' logits (Jeong and Shin 2020)."""
    mean = torch.stack([F.softmax(c, 1) for c in copies]).mean(0).clamp(min=1e-20)
    kl = torch.stack([(mean * (mean.log() - F.log_softmax(c, 1))).sum(1) for c in copies]).mean(0)
    return weight * kl - entropy * (mean * mean.log()).sum(1)


class _Inputs:
    """Noisy inputs of the trained module: images with noise, or a frozen trunk's features of them (cached)."""

    def __init__(self, router: FlatRouter, pool: ExpertPool, images: Tensor, generator: torch.Generator, recipe: Recipe) -> None:
        self.images, self.sigma, self.generator, self.recipe = images, router.sigma, generator, recipe
        self.trunk = None if router.trunk is None else Trunk(pool[router.trunk]).eval()
        self._cache: list[Tensor] = []

    def _noisy(self, rows: Tensor) -> Tensor:
        x = self.images[rows]
        return x + self.sigma * torch.randn(x.shape, generator=self.generator)

    def start_epoch(self, epoch: int) -> None:
        """Draws the cached features anew now and then."""
        if self.trunk is None or (self._cache and epoch % self.recipe.redraw):
            return
        self._cache = []
        with torch.no_grad():
            for _ in range(self.recipe.copies):
                parts = [torch.cat(self.trunk(self._noisy(rows)), 1) for rows in torch.arange(len(self.images)).split(500)]
                self._cache.append(torch.cat(parts))

    def copies(self, rows: Tensor) -> list[Tensor]:
        """One input batch per noisy copy."""
        if self.trunk is not None:
            return [c[rows] for c in self._cache]
        return [self._noisy(rows) for _ in range(self.recipe.copies)]


def train_router(
    pool: ExpertPool, router: Router | str, images: Tensor, labels: Tensor, *, radii: Sequence[float], seed: int = 0,
    out: str | Path | None = None, recipe: Recipe | str = "utility", routing_labels: Labels | None = None, label_n: int = 100,
    validation: tuple[Tensor, Tensor] | None = None, device: str | None = None,
    progress: Callable[[int, int, float], None] | None = None, votes: Callable[[int], None] | None = None,
) -> RoutedSmooth:
    """Trains the router's own parameters on routing labels and returns the routed classifier.

    Args:
        pool: frozen experts; unchanged to the bit.
        router: what to train, changed in place, or a kind: `"cascade"` is tuned on the validation images (a
            `CascadeRouter` passed here keeps its thresholds).
        images: `(N, C, H, W)` pixels in [0,1], best ones that no expert was trained on.
        labels: `(N,)` class indices.
        radii: radii the user cares about.
        seed: of noise, order and nothing else.
        out: folder to save to (`config.json`, `router.safetensors`, `training.jsonl`); must not hold another router.
        recipe: a `Recipe`, or the name of one in `RECIPES`.
        routing_labels: labels made before; None: made here with `label_n` votes per expert and image.
        validation: images and labels that choices are made on; None: those the router is trained on.
        device: where experts vote.
        progress: called with (epoch, epochs, loss).
        votes: called with the number of votes drawn since the last call.

    Raises:
        InputError: images, labels, radii or recipe that do not fit.
        ResultsError: `out` already holds a router.
    """
    x = check_images(images, pool.input_shape)
    target = check_labels(labels, len(x), pool.num_classes)
    grid = sorted({float(r) for r in radii})
    if not grid or not all(0.0 <= r < float("inf") for r in grid):
        raise InputError("Training needs the radii you care about", expected="finite radii >= 0", received=repr(list(radii)),
                         remedy="0, 0.25, 0.5, ...")
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise InputError("Unknown recipe", expected=f"one of {sorted(RECIPES)}", received=repr(recipe), remedy="or pass a Recipe")
        recipe = RECIPES[recipe]
    folder = None if out is None else Path(out)
    if folder is not None and (folder / "config.json").exists():
        raise ResultsError("The folder already holds a router", expected="a new folder", received=str(folder),
                           remedy="choose another --out; nothing was overwritten")
    history: list[dict[str, Any]] = []
    if router == CascadeRouter.kind:
        xv, yv = (x, target) if validation is None else validation
        router = tune_cascade(pool, xv, yv, grid, seed=seed, device=device, progress=votes, log=history.append)
    if not isinstance(router, Router):
        raise InputError("Unknown kind of router", expected=f"a Router, or {CascadeRouter.kind!r}", received=repr(router),
                         remedy="FlatRouter(...), or router='cascade'")
    routed = RoutedSmooth(pool, router)
    if isinstance(router, FlatRouter):
        if routing_labels is None:
            routing_labels = label_images(pool, x, target, n=label_n, seed=seed, device=device, progress=votes)
        history = _train_flat(pool, router, x, routing_labels, grid, seed, recipe, progress)
        routed = RoutedSmooth(pool, router)
    if folder is not None:
        routed.save_pretrained(folder)
        lines = [json.dumps({"recipe": asdict(recipe), "radii": grid, "seed": seed, "images": len(x)}), *map(json.dumps, history)]
        (folder / "training.jsonl").write_text("\n".join(lines) + "\n")
    return routed


def _train_flat(
    pool: ExpertPool, router: FlatRouter, x: Tensor, labels: Labels, radii: list[float], seed: int, recipe: Recipe,
    progress: Callable[[int, int, float], None] | None,
) -> list[dict[str, Any]]:
    columns = [pool.names.index(name) for name in router.order(pool)]
    radius = labels.radius[:, columns]
    good = good_sets(radius, radii)
    if recipe.objective == "dual-rs":
        kept = np.flatnonzero(radius.max(1) > 0)
    else:
        decided = good.sum(2)
        kept = np.flatnonzero(((decided > 0) & (decided < good.shape[2])).any(1).numpy())
    if len(kept) == 0:
        raise InputError("No training image tells the experts apart", expected="images that some experts hold and others do not",
                         received=f"{len(x)} images without", remedy="use more images, or other radii")
    x, good, soft = x[kept], good[kept], torch.from_numpy(radius[kept].astype(np.float32))
    best = np.bincount(radius[kept].argmax(1), minlength=len(columns))
    balance = torch.from_numpy((len(kept) / len(columns) / np.maximum(best, 1)).astype(np.float32))[soft.argmax(1)]
    module: nn.Module = router.module
    generator = torch.Generator().manual_seed(seed)
    inputs = _Inputs(router, pool, x, generator, recipe)
    module.train()
    optimiser = torch.optim.AdamW(module.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = -(-len(x) // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=steps * recipe.epochs)
    history = []
    for epoch in range(recipe.epochs):
        inputs.start_epoch(epoch)
        total = 0.0
        for rows in torch.randperm(len(x), generator=generator).split(recipe.batch):
            logits = [module(c) for c in inputs.copies(rows)]
            if recipe.objective == "dual-rs":
                task = torch.stack([dual_rs_loss(each, soft[rows]) for each in logits]).mean(0)
                weight = balance[rows]
            else:
                task = torch.stack([utility_loss(each, good[rows]) for each in logits]).mean(0)
                weight = torch.ones(len(rows))
            loss = (weight * (task + consistency_loss(logits, recipe.consistency, recipe.entropy))).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        history.append({"epoch": epoch + 1, "loss": total / len(x)})
        if progress is not None:
            progress(epoch + 1, recipe.epochs, total / len(x))
    module.eval()
    return history
