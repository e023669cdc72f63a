"""`train_router`: any kind of router, one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from rsrouter.core.errors import InputError, ResultsError
from rsrouter.experts.pool import ExpertPool
from rsrouter.inputs import check_images, check_labels
from rsrouter.router.base import Router
from rsrouter.router.flat import FlatRouter
from rsrouter.sampling.execution import Execution
from rsrouter.smooth import RoutedSmooth
from rsrouter.training.deferral import DEFERRAL_RECIPES, DeferralRecipe
from rsrouter.training.flat import RECIPES, Recipe
from rsrouter.training.heads import starting_from
from rsrouter.training.labels import Labels
from rsrouter.training.parent import adapt_flat, parent_heads
from rsrouter.training.resume import resuming
from rsrouter.training.runlog import RunLog, describe_job
from rsrouter.training.work import Work, default_flat

#: Kinds that can be asked for by name. `auto` lets the validation images choose between trained heads, plain experts in a row,
#: and a flat router.
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
    execution: Execution | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    votes: Callable[[int], None] | None = None,
    notes: dict[str, Any] | None = None,
    parent: RoutedSmooth | None = None,
) -> RoutedSmooth:
    """Trains the router's own parameters, makes its choices on validation images, and returns the routed classifier.

    Args:
        pool: frozen experts; unchanged to the bit.
        router: a kind out of `KINDS`, or a router: a `FlatRouter` is trained in place (on from where its weights
            are), any other keeps what it has. `auto` trains heads and a flat router, and takes what reaches more of the experts'
            envelope on the validation images (simulated votes).
        images: `(N, C, H, W)` pixels in [0,1], best ones that no expert was trained on: experts look better than
            they are on their own training images, and the router would learn to trust them.
        labels: `(N,)` class indices.
        radii: radii the user cares about.
        seed: of noise, initialisation and order.
        out: folder to save to (`config.json`, `router.safetensors`, `training.jsonl`); must not hold another router. A run
            that was killed leaves its log and a state there; the same call goes on from it and ends at the same bits.
        recipe: of a flat router a `Recipe` or a name in `RECIPES` (default `"utility"`), else a
            `DeferralRecipe` or a name in `DEFERRAL_RECIPES` (`"deferral"`, `"deferral-grid"`, `"quick"`).
        routing_labels: of a flat router: labels made before; None: made here with `label_n` votes per expert and image.
        validation: images and labels that choices are made on; None: the last fifth of `images`, which then train
            nothing.
        plan_n, alpha: the certification that thresholds are chosen for.
        device: where experts vote.
        execution: how experts vote, and how the routed classifier is to run, which records it (a dtype moves votes, and
            thresholds are chosen for these). None: the parent's, or the default.
        progress: called with (epoch, epochs, loss) of a flat router.
        votes: called with the number of forward passes of experts since the last call.
        notes: written into the first line of `training.jsonl` (a parent and its revision, the data's name).
        parent: a router to go on from where the kind is given by name: heads of the same shape start from its weights, a flat
            router keeps its weights and the logits of the experts that are still there, a cascade's thresholds are searched
            further. Its pool may hold other experts.

    Raises:
        InputError: images, labels, radii, kind or recipe that do not fit.
        NetworkError: an expert that was changed after it was wrapped.
        ResultsError: `out` already holds a router, or an unfinished training of something else.
    """
    for expert in pool:
        expert.check_unchanged()
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
        if routing_labels is not None:
            routing_labels = Labels(routing_labels.radius[:cut], routing_labels.predict[:cut])
        validation, x, target, held_out = (x[cut:], target[cut:]), x[:cut], target[:cut], "the last fifth of the images"
    if validation is not None:
        xv = check_images(validation[0], pool.input_shape)
        validation = (xv, check_labels(validation[1], len(xv), pool.num_classes))
    if execution is None:
        execution = Execution() if parent is None else parent.execution
    job = describe_job(
        pool, router, x, target, validation, routing_labels, recipe, grid, seed, label_n, plan_n, alpha, parent, execution
    )
    with (
        RunLog(folder, job) as log,
        resuming(log.checkpoint),
        starting_from({} if parent is None else parent_heads(parent.router)),
    ):
        work = Work(
            pool, x, target, validation, grid, seed, label_n, plan_n, alpha, device, execution, votes, progress, log.add, parent
        )
        if isinstance(router, str) and router != "flat":
            router = work.choose(router, recipe if isinstance(recipe, DeferralRecipe) else None, routing_labels)
        else:
            if isinstance(router, str):
                adapted = None
                if parent is not None and isinstance(parent.router, FlatRouter):
                    adapted = adapt_flat(parent.router, parent.pool, pool, seed)
                router = adapted or default_flat(pool, seed)
            if isinstance(router, FlatRouter) and isinstance(recipe, Recipe):
                router.bind(pool)
                work.flat(router, recipe, x, target, routing_labels)
        routed = RoutedSmooth(pool, router, execution=execution)
        if folder is not None:
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
            log.write([head, *log.lines])
            routed.save_pretrained(folder)
    return routed


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
