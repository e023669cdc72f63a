"""`train_router`: any kind of router, one call."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsrouter.core.errors import InputError, ResultsError
from rsrouter.experts.base import ExpertPool
from rsrouter.experts.registry import build_architecture
from rsrouter.inputs import check_images, check_labels
from rsrouter.router.base import Router
from rsrouter.router.flat import FlatRouter
from rsrouter.router.labels import Labels, label_votes, target_radii
from rsrouter.router.trunk import Trunk, has_trunk
from rsrouter.smooth import RoutedSmooth
from rsrouter.training.deferral import DEFERRAL_RECIPES, DeferralRecipe, train_deferral
from rsrouter.training.flat import RECIPES, Recipe, train_flat
from rsrouter.training.tune import tune_cascade

#: Kinds that can be asked for by name. `auto` lets the validation images choose between trained heads and plain experts.
KINDS = ("auto", "deferral", "cascade", "flat")


def train_router(
    pool: ExpertPool,
    router: Router | str,
    images: Tensor,
    labels: Tensor,
    *,
    radii: Sequence[float],
    seed: int = 0,
    out: str | Path | None = None,
    recipe: Recipe | DeferralRecipe | str | None = None,
    routing_labels: Labels | None = None,
    label_n: int = 100,
    validation: tuple[Tensor, Tensor] | None = None,
    plan_n: int = 10_000,
    alpha: float = 1e-3,
    device: str | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    votes: Callable[[int], None] | None = None,
    notes: dict[str, Any] | None = None,
) -> RoutedSmooth:
    """Trains the router's own parameters, makes its choices on validation images, and returns the routed classifier.

    Args:
        pool: frozen experts; unchanged to the bit.
        router: a kind out of `KINDS`, or a router: a `FlatRouter` is trained in place (on from where its weights
            are), any other keeps what it has.
        images: `(N, C, H, W)` pixels in [0,1], best ones that no expert was trained on: experts look better than
            they are on their own training images, and the router would learn to trust them.
        labels: `(N,)` class indices.
        radii: radii the user cares about.
        seed: of noise, initialisation and order.
        out: folder to save to (`config.json`, `router.safetensors`, `training.jsonl`); must not hold another router.
        recipe: of a flat router a `Recipe` or a name in `RECIPES` (default `"utility"`), else a
            `DeferralRecipe` or a name in `DEFERRAL_RECIPES` (`"deferral"`, `"quick"`).
        routing_labels: of a flat router: labels made before; None: made here with `label_n` votes per expert and image.
        validation: images and labels that choices are made on; None: the last fifth of `images`, which then train
            nothing.
        plan_n, alpha: the certification that thresholds are chosen for.
        device: where experts vote.
        progress: called with (epoch, epochs, loss) of a flat router.
        votes: called with the number of forward passes of experts since the last call.
        notes: written into the first line of `training.jsonl` (a parent and its revision, the data's name).

    Raises:
        InputError: images, labels, radii, kind or recipe that do not fit.
        ResultsError: `out` already holds a router.
    """
    x = check_images(images, pool.input_shape)
    target = check_labels(labels, len(x), pool.num_classes)
    grid = _check_grid(radii)
    recipe = _check_recipe(router, recipe)
    folder = None if out is None else Path(out)
    if folder is not None and (folder / "config.json").exists():
        raise ResultsError(
            "The folder already holds a router",
            expected="a new folder",
            received=str(folder),
            remedy="choose another --out; nothing was overwritten",
        )
    held_out = "given" if validation is not None else "none"
    if validation is None and isinstance(router, str) and router != "flat":
        if len(x) < 10:
            raise InputError(
                "Too few images to choose on",
                expected="validation images, or ten images or more",
                received=f"{len(x)}",
                remedy="pass validation=(images, labels)",
            )
        cut = len(x) - len(x) // 5
        validation, x, target, held_out = (x[cut:], target[cut:]), x[:cut], target[:cut], "the last fifth of the images"
    if validation is not None:
        xv = check_images(validation[0], pool.input_shape)
        validation = (xv, check_labels(validation[1], len(xv), pool.num_classes))
    history: list[dict[str, Any]] = []
    if isinstance(router, str) and router != "flat":
        if validation is None:
            raise InputError("No validation images", expected="images to choose on", received="none", remedy="pass validation=")
        if router == "cascade":
            router = tune_cascade(
                pool, *validation, grid, plan_n=plan_n, alpha=alpha, seed=seed, device=device, progress=votes, log=history.append
            )
        else:
            settings = recipe if isinstance(recipe, DeferralRecipe) else None
            router = train_deferral(
                pool,
                x,
                target,
                validation,
                grid,
                recipe=settings,
                plan_n=plan_n,
                alpha=alpha,
                seed=seed,
                device=device,
                progress=votes,
                log=history.append,
            )
    elif isinstance(router, str):
        router = default_flat(pool, seed)
    if isinstance(router, FlatRouter) and isinstance(recipe, Recipe):
        router.bind(pool)

        def labelled(part: Tensor, classes: Tensor) -> Labels:
            drawn = label_votes(pool, part, n=label_n, seed=seed, device=device, progress=votes)
            return target_radii(drawn, classes.numpy(), pool.sigmas, plan_n=plan_n, alpha=alpha)

        training_labels = labelled(x, target) if routing_labels is None else routing_labels
        if training_labels.radius.shape != (len(x), len(pool)):
            raise InputError(
                "Routing labels do not fit",
                expected=f"({len(x)}, {len(pool)})",
                received=str(training_labels.radius.shape),
                remedy="label the images that are trained on",
            )
        watched = None if validation is None else (validation[0], labelled(*validation))
        history = train_flat(pool, router, x, training_labels, grid, seed, recipe, progress, watched)
    routed = RoutedSmooth(pool, router)
    if folder is not None:
        routed.save_pretrained(folder)
        head = {
            **(notes or {}),
            "kind": router.kind,
            "recipe": None if recipe is None else asdict(recipe),
            "radii": grid,
            "seed": seed,
            "images": len(x),
            "validation": held_out,
            "validation_images": 0 if validation is None else len(validation[0]),
        }
        (folder / "training.jsonl").write_text("\n".join(json.dumps(line) for line in [head, *history]) + "\n")
    return routed


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
        width = sum(part.shape[1] for part in Trunk(trunk).eval()(torch.zeros(1, *pool.input_shape)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build_architecture("mlp_head", len(pool), {"in_features": width})
    return FlatRouter(head, sigma=trunk.sigma, trunk=trunk.name)


def _check_grid(radii: Sequence[float]) -> list[float]:
    grid = sorted({float(r) for r in radii})
    if not grid or not all(0.0 <= r < float("inf") for r in grid):
        raise InputError(
            "Training needs the radii you care about",
            expected="finite radii >= 0",
            received=repr(list(radii)),
            remedy="0, 0.25, 0.5, ...",
        )
    return grid


def _check_recipe(router: Router | str, recipe: Recipe | DeferralRecipe | str | None) -> Recipe | DeferralRecipe | None:
    """The recipe that fits the kind of router."""
    if (isinstance(router, str) and router not in KINDS) or not isinstance(router, str | Router):
        raise InputError(
            "Unknown kind of router", expected=f"a Router, or one of {KINDS}", received=repr(router), remedy="router='auto'"
        )
    if isinstance(router, FlatRouter) or router == "flat":
        name = "utility" if recipe is None else recipe
        if isinstance(name, str):
            if name not in RECIPES:
                raise InputError(
                    "Unknown recipe", expected=f"one of {sorted(RECIPES)}", received=repr(name), remedy="or pass a Recipe"
                )
            return RECIPES[name]
        if not isinstance(name, Recipe):
            raise InputError(
                "The recipe is for another kind of router",
                expected="a Recipe",
                received=type(name).__name__,
                remedy="flat routers take Recipe, the others DeferralRecipe",
            )
        return name
    if router in ("auto", "deferral"):
        if isinstance(recipe, str) and recipe in DEFERRAL_RECIPES:
            return DEFERRAL_RECIPES[recipe]
        if recipe is not None and not isinstance(recipe, DeferralRecipe):
            raise InputError(
                "The recipe is for another kind of router",
                expected="a DeferralRecipe",
                received=repr(recipe),
                remedy="flat routers take Recipe, the others DeferralRecipe",
            )
        return recipe or DeferralRecipe()
    return None
