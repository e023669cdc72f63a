"""`train_router`: any kind of router, one call."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rsrouter.core.errors import InputError, ResultsError
from rsrouter.experts.pool import ExpertPool
from rsrouter.files import write_atomically
from rsrouter.process import usual_settings
from rsrouter.router.base import Router
from rsrouter.router.flat import FlatRouter
from rsrouter.router.leaving import check_leaving, leave_to_core
from rsrouter.serialise import check_savable
from rsrouter.smooth import RoutedSmooth
from rsrouter.stored import read_json
from rsrouter.training.cascade import TUNE_VOTES, tune_cascade
from rsrouter.training.deferral import DeferralRecipe, deferral_passes, deferral_recipe, train_deferral
from rsrouter.training.doubts import overlap
from rsrouter.training.features import with_features
from rsrouter.training.flat import RECIPES, Recipe, flat_router
from rsrouter.training.labels import Labels
from rsrouter.training.record import Training, named_recipe
from rsrouter.training.resume import ResumeStore, unit_key, writing

#: Where an unfinished training keeps its state, inside its folder, and how many seconds may be lost.
STATE, SAVE_EVERY = ".state", 10.0
#: Seconds between two lines of progress where stderr is not a terminal.
LINE_EVERY = 30.0
#: Training images that `auto`'s flat candidate is labelled and trained on, unless labels are given.
FLAT_IMAGES = 2000
#: At most so many votes per expert for each of their labels.
FLAT_LABEL_VOTES = 50


def train_router(training: Training | ExpertPool, /, *given: Any, **settings: Any) -> RoutedSmooth:
    """Trains the router's own parameters, makes its choices on validation images, and returns the routed classifier.

    `train_router(pool, router, images, labels, radii=..., ...)`, or a `Training`; every further keyword is a field of `Training`,
    which says what each means. Whatever dtype, gradient mode or autocast the process has set does not matter.

    Args:
        training: a `Training`, or the pool of frozen experts, which stays unchanged to the bit.
        given: `router`, `images`, `labels`.
        settings: the other fields.

    Raises:
        InputError: images, labels, radii, kind, recipe or wishes that do not fit.
        NetworkError: an expert that was changed after it was wrapped.
        CheckpointError: with `out`, an expert or network that cannot be written down.
        ResultsError: `out` already holds a router, or an unfinished training of something else; or the disk refuses.
    """
    told = replace(training, **settings) if isinstance(training, Training) else Training(training, *given, **settings)
    caller = sys._getframe(1)
    where = caller.f_code.co_filename, caller.f_lineno
    del caller
    with usual_settings():
        checked = told.checked()
        if checked.core_at is not None:
            check_leaving(checked.pool, "deferral" if checked.router == "auto" else checked.router, checked.core_at)
        recipe = _recipe(checked)
        folder = None if checked.out is None else Path(checked.out)
        if folder is not None and (folder / "config.json").exists():
            raise ResultsError(
                "The folder already holds a router",
                expected="a new folder",
                received=str(folder),
                remedy="choose another --out; nothing was overwritten",
            )
        if folder is not None:
            given_router = checked.router if isinstance(checked.router, Router) else None
            check_savable(checked.pool, given_router, [module for _, module in checked.networks])
        with _watched(checked, folder, where) as (run, lines):
            if (
                _learns(run, recipe)
                and run.validation is not None
                and (both := overlap(run.images, run.validation[0])) is not None
            ):
                run.doubt([both])
            router = _trained(run)
            if run.core_at is not None:
                router = leave_to_core(router, run.pool, run.core_at)
            routed = RoutedSmooth(run.pool, router, execution=run.execution)
            if folder is not None:
                own = told.validation is None and run.validation is not None
                head = {
                    **(run.notes or {}),
                    "kind": router.kind,
                    "recipe": None if recipe is None else asdict(recipe),
                    "radii": list(run.radii),
                    "seed": run.seed,
                    **({} if run.core_at is None else {"core_at": run.core_at}),
                    "images": len(run.images),
                    "validation": "the last fifth of the images" if own else "given" if told.validation else "none",
                    "validation_images": 0 if run.validation is None else len(run.validation[0]),
                }
                with writing(folder):
                    _write_lines(folder, [head, *lines])
                    routed.save_pretrained(folder)
    return routed


def _recipe(training: Training) -> Any:
    """The recipe that fits the kind of router; None where nothing is trained by one."""
    if isinstance(training.router, FlatRouter) or training.router == "flat":
        return named_recipe(training.recipe, "utility", RECIPES, Recipe)
    if training.router in ("auto", "deferral"):
        return deferral_recipe(training)
    if training.recipe is not None:
        raise InputError(
            f"A router of kind {training.kind!r} has no recipe",
            expected="no recipe: its thresholds are chosen on the validation images",
            received=repr(training.recipe),
            remedy="leave the recipe out, or ask for the kind 'auto', 'deferral' or 'flat'",
        )
    return None


def _learns(training: Training, recipe: Any) -> bool:
    """Whether weights are trained on the images, or only thresholds are chosen on the validation images."""
    if isinstance(recipe, DeferralRecipe):
        return training.router == "auto" or bool(recipe.heads or recipe.whole)
    return isinstance(recipe, Recipe)


def _trained(run: Training) -> Router:
    if isinstance(run.router, FlatRouter) or run.router == "flat":
        return flat_router(run)[0]
    if isinstance(run.router, Router):
        return run.router
    if run.router == "cascade":
        return tune_cascade(run)
    last: dict[str, Any] = {}

    def keep(line: dict[str, Any]) -> None:
        last.clear()
        last.update(line)
        run.say(line)

    best: Router = train_deferral(replace(run, log=keep))
    if run.router != "auto" or run.core_at is not None or not with_features(run.pool):
        return best
    few = slice(None) if run.routing_labels is not None else slice(0, FLAT_IMAGES)
    part = replace(run, images=run.images[few], labels=run.labels[few])
    copies = deferral_recipe(run).tune_copies
    try:
        n = min(run.label_n, FLAT_LABEL_VOTES)
        flat, found = flat_router(part, RECIPES["coverage"], label_n=n, copies=copies, tune_n=copies)
    except InputError as error:  # one candidate of several is only left out
        run.say({"no_flat_router": error.message})
        return best
    assert found is not None  # there are validation images
    chosen = flat if found["score"] > last["score"] else best
    each = {best.kind: last, flat.kind: found}
    run.say(
        {
            "chosen": chosen.kind,
            "candidates": {kind: line["score"] for kind, line in each.items()},
            "coverages": {kind: line["coverage"] for kind, line in each.items()},
            "leasts": {kind: line["least"] for kind, line in each.items()},
            "on": f"{len(run.held_out[0])} validation images, simulated",
        }
    )
    run.say(last if chosen is best else found)  # what was chosen stays the last word of the log
    return chosen


def expert_passes(training: Training) -> int:
    """Forward passes of single experts that a checked training makes: the end of its progress bar; what a killed one has done
    already is counted as well."""
    pool, images = training.pool, len(training.images)
    validation = 0 if training.validation is None else len(training.validation[0])
    labelled = training.routing_labels is not None
    if training.router == "cascade":
        return validation * TUNE_VOTES * len(pool)
    if isinstance(training.router, Router) or training.router == "flat":
        flat = isinstance(training.router, FlatRouter | str)
        return (validation + (0 if labelled else images)) * training.label_n * len(pool) if flat else 0
    votes = deferral_passes(training)
    if training.router == "auto" and not labelled and with_features(pool):
        votes += min(images, FLAT_IMAGES) * min(training.label_n, FLAT_LABEL_VOTES) * len(pool)
    return votes


@contextmanager
def _watched(training: Training, folder: Path | None, asked: tuple[str, int]) -> Iterator[tuple[Training, list[dict[str, Any]]]]:
    """The training with a log, a store and a progress bar, and the log's lines; the state goes when it has succeeded. It warns in
    the file and line that `asked` for it."""
    lines: list[dict[str, Any]] = []
    store = training.store if folder is None else ResumeStore(folder / STATE, every=SAVE_EVERY)
    if folder is not None:
        _claim(folder, _job(training))
    live = sys.stderr.isatty()
    called_back = training.votes is not None or training.progress is not None
    show = training.show if training.show is not None else live and not called_back
    total, drawn, where, told = expert_passes(training) if show else 0, 0, "", time.monotonic()
    with tqdm(desc="train", total=total, unit="vote", unit_scale=True, file=sys.stderr, disable=not (show and live)) as bar:

        def tell() -> None:
            nonlocal told
            if show and time.monotonic() - told >= (0.1 if live else LINE_EVERY):
                told = time.monotonic()
                bar.set_postfix_str(where)
                if not live:
                    print(f"train: {drawn:,} of {total:,} votes, {where}".rstrip(", "), file=sys.stderr, flush=True)

        def votes(count: int) -> None:
            nonlocal drawn
            drawn += count
            bar.update(count)
            tell()
            if training.votes is not None:
                training.votes(count)

        def log(line: dict[str, Any]) -> None:
            nonlocal where
            lines.append(line)
            if folder is not None:
                with writing(folder), (folder / "training.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
            if "loss" in line:
                step = f"{line['head']}, step {line['step']}" if "head" in line else f"epoch {line['epoch']}"
                where = f"{step}, loss {line['loss']:.3f}"
                tell()
            for sentence in (line.get("no_head"), line.get("doubt")):
                if sentence is not None:
                    warnings.warn_explicit(sentence, UserWarning, *asked)  # without a registry: each training is told anew
            training.say(line)

        yield replace(training, store=store, votes=votes, log=log), lines
    if folder is not None:
        store.clear()


def _claim(folder: Path, job: dict[str, Any]) -> None:
    """Makes the folder this training's; ResultsError where it holds the unfinished training of something else."""
    told = folder / STATE / "job.json"
    if told.exists():
        before = read_json(told, "job.json", error=ResultsError, remedy=f"remove {folder} and train again")
        if before != job:
            other = [k for k in {**before, **job} if before.get(k) != job.get(k)] if isinstance(before, dict) else ["everything"]
            raise ResultsError(
                "The folder holds the unfinished training of something else",
                expected="the same pool, data, recipe and settings, or a new folder",
                received=f"{folder}: other {', '.join(other)}",
                remedy="give the same command again, choose another --out, or remove the folder",
            )
    with writing(folder):
        told.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(told, json.dumps(job).encode())
        _write_lines(folder, [])


def _write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    write_atomically(folder / "training.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def _job(training: Training) -> dict[str, Any]:
    """Everything that decides what a training ends with, as digests."""

    def of(*tensors: Tensor) -> str:
        return unit_key(*(t.detach().cpu().contiguous().numpy().tobytes() for t in tensors))

    routing: Labels | None = training.routing_labels
    recipe, execution, parent = _recipe(training), training.execution, training.parent
    job = {
        "experts": [e.digest for e in training.pool],
        "router": training.router if isinstance(training.router, str) else training.router.digest,
        "images": of(training.images, training.labels),
        "validation": None if training.validation is None else of(*training.validation),
        "labels": None if routing is None else unit_key(routing.radius.tobytes()),
        "recipe": None if recipe is None else asdict(recipe),
        "radii": list(training.radii),
        "seed": training.seed,
        "votes": [training.label_n, training.plan_n],
        "alpha": training.alpha,
        "wishes": repr(training.wishes),
        "core_at": training.core_at,
        "execution": None if execution is None else execution.to_dict(),
        "networks": [(repr(v), of(*m.state_dict().values())) for v, m in training.networks],
        "parent": None if parent is None else parent.router.digest,
        "torch": [torch.__version__, torch.get_num_threads()],
    }
    found: dict[str, Any] = json.loads(json.dumps(job))
    return found
