"""The whole path in one call: wrap, label, train, certify, report, all through the public API.

The router that counts is the bundled one, trained offline; a small one is trained beside it to show how.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rsrouter.core.errors import ResultsError
from rsrouter.core.plans import AdaptivePlan
from rsrouter.core.terms import Terms
from rsrouter.demo.bundled import CLASSES, load_pool, load_router, load_slice
from rsrouter.experts import ExpertPool
from rsrouter.jobs import Running, certify_table
from rsrouter.report import write_report
from rsrouter.results import Table
from rsrouter.sampling import Execution, native_dtype
from rsrouter.smooth import RoutedSmooth, Smooth
from rsrouter.training import Labels, label_votes, train_router
from rsrouter.training.deferral import DEFERRAL_RECIPES
from rsrouter.training.labels import target_radii

T = TypeVar("T")
#: Radii of the running estimate.
SHOWN = (0.0, 0.5, 1.0)
RADII = tuple(float(r) for r in np.arange(0.0, 2.01, 0.25))


@dataclass(frozen=True)
class Settings:
    """What one demo run does; written to `demo.json`, and a folder of other settings is refused.

    Attributes:
        head_images, head_steps: images the heads of the router that is trained here see, and steps of their training.
        validation_images: images its thresholds are chosen on.
        flat_images, label_votes: images the flat router (Dual RS, to compare with) is trained on, and votes per expert and image
            for their labels.
        test_images, n_max: images certified, and the most votes a stage may draw.
        alpha: failure probability of each certificate.
        seed: of the labels' noise and of training. Certification's own seed derives from digests.
        device: where networks run.
        dtype: how they run; a run takes what the processor is fast at (`native_dtype`), and the router records it.
    """

    head_images: int = 4000
    head_steps: int = 600
    validation_images: int = 500
    flat_images: int = 800
    label_votes: int = 50
    test_images: int = 100
    n_max: int = 20_000
    alpha: float = 0.001
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


QUICK = {"head_images": 1000, "head_steps": 200, "validation_images": 100, "flat_images": 250, "test_images": 20}

#: What the report calls the runs.
ROUTED, TRAINED, PAPER = "routed", "router trained here", "Dual RS (flat router, min rule)"


@dataclass(frozen=True)
class Outcome:
    """What a demo run left behind.

    Attributes:
        out: the folder.
        report: the page.
        routed: the bundled router's table.
        trained: the table of the router that was trained here.
        paper: a flat router under the min rule, as in Dual RS.
        experts: each expert's own table.
        seconds: per step.
    """

    out: Path
    report: Path
    routed: Table
    trained: Table
    paper: Table
    experts: tuple[Table, ...]
    seconds: dict[str, float]


def _prepare(out: Path, settings: Settings) -> None:
    """Makes the folder, or accepts one of an earlier run with the same settings; refuses anything else."""
    marker = out / "demo.json"
    wanted = json.loads(json.dumps(asdict(settings)))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        try:
            found = json.loads(marker.read_text())
        except (OSError, ValueError):
            found = None
        if found != wanted:
            raise ResultsError(
                "The output folder is not empty and was not written by this command",
                expected="a new folder, or a demo run with the same settings",
                received=f"{out}" + (f" with settings {found}" if found else ""),
                remedy="choose another --out; nothing was overwritten",
            )
    out.mkdir(parents=True, exist_ok=True)
    part = out / ".demo.json"
    part.write_text(json.dumps(wanted, indent=2) + "\n")
    part.replace(marker)


class _Bars:
    """Progress bars on a terminal, a line for each step in a log, or silence."""

    def __init__(self, show: bool) -> None:
        self.show, self._live = show, sys.stderr.isatty()

    def say(self, text: str) -> None:
        if self.show:
            tqdm.write(text, file=sys.stderr)

    def votes(self, title: str, total: int | None = None) -> tqdm:
        if not self._live:
            self.say(title)
        return tqdm(
            total=total, desc=title, unit="vote", unit_scale=True, disable=not (self.show and self._live), file=sys.stderr
        )


def estimates(bar: tqdm) -> Callable[[Running], None]:
    """Progress of a certification on a bar over votes, whose total is what the finished images' mean predicts."""

    def step(r: Running) -> None:
        if r.finished:
            bar.total = max(r.votes, int(r.votes * r.total / r.finished))
        accuracy = " ".join(f"{radius:g}:{100 * a:.0f}%" for radius, a in zip(SHOWN, r.accuracy, strict=True) if a == a)
        bar.set_postfix_str(f"{r.finished}/{r.total} images, certified {accuracy}", refresh=False)
        bar.update(r.votes - bar.n)

    return step


def run(out: str | Path, *, quick: bool = False, device: str | None = None, seed: int = 0, show: bool = True) -> Outcome:
    """Runs the demo into `out`.

    Leaves `pool.json`, `router/` (the bundled router) and `certificates.tsv` with its JSON, `trained/` and `trained.tsv` (one
    trained here on a few thousand images, to show how), `dual-rs/` and `dual-rs.tsv` (a flat router as in Dual RS, under its min
    rule, to compare with), `experts/*.tsv` and `report/index.html`. Started again with the same settings it goes on where it
    stopped.

    Both routers are of the deferral kind, a chain whose order and thresholds are chosen on validation images. The bundled one
    asks a network of its own first; the one trained here asks heads of some kilobytes on the frozen experts.

    Args:
        out: a new folder, or one of an earlier run with the same settings.
        quick: fewer images.
        device: where to run; None is the CPU.
        seed: of labelling and training.
        show: progress bars on stderr.

    Raises:
        ResultsError: the folder holds something else. InputError: an unusable device.
    """
    folder, bars, seconds = Path(out), _Bars(show), {}
    execution = Execution(dtype=native_dtype(device))
    chosen = {"seed": int(seed), "device": str(device or "cpu"), "dtype": execution.dtype}
    settings = Settings(**{**(QUICK if quick else {}), **chosen})  # type: ignore[arg-type]
    _prepare(folder, settings)

    def timed(name: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        return result

    def wrap() -> ExpertPool:
        pool = load_pool()
        pool.save(folder / "pool.json")
        return ExpertPool(folder / "pool.json")

    pool = timed("wrap", wrap)
    bars.say(f"wrapped {len(pool)} experts: " + ", ".join(pool.names))
    train, test = load_slice("train"), load_slice("test")

    def slice_of(name: str, count: int) -> tuple[Tensor, Tensor]:
        images, labels = load_slice(name).batch(range(count))
        return images, torch.as_tensor(labels)

    common: dict[str, Any] = {"radii": RADII, "seed": settings.seed, "device": device, "execution": execution}
    common |= {"plan_n": settings.n_max, "alpha": settings.alpha, "show": show}

    def label(x: Tensor, y: Tensor) -> Labels:
        with bars.votes("label", len(x) * len(pool) * settings.label_votes) as bar:
            drawn: dict[str, Any] = {"n": settings.label_votes, "seed": settings.seed, "device": device, "execution": execution}
            votes = label_votes(pool, x, progress=bar.update, **drawn)
        return target_radii(votes, y.numpy(), pool.sigmas, plan_n=settings.n_max, alpha=settings.alpha)

    def fit_flat() -> RoutedSmooth:
        x, y = train.batch(range(settings.flat_images))
        y = torch.as_tensor(y)
        labels = timed("label", lambda: label(x, y))
        best = np.bincount(labels.radius.argmax(1)[labels.radius.max(1) > 0], minlength=len(pool))
        bars.say("best expert for " + ", ".join(f"{n} images: {name}" for n, name in zip(best, pool.names, strict=True)))
        flat: dict[str, Any] = {"recipe": "dual-rs-head", "routing_labels": labels, "out": folder / "dual-rs"}
        return timed("train Dual RS", lambda: train_router(pool, "flat", x, y, **flat, **common))

    def fit() -> RoutedSmooth:
        heads, validation = slice_of("train", settings.head_images), slice_of("validation", settings.validation_images)
        quick = DEFERRAL_RECIPES["quick"]
        recipe = replace(quick, heads=tuple(replace(head, steps=settings.head_steps) for head in quick.heads))
        chain: dict[str, Any] = {"recipe": recipe, "validation": validation, "out": folder / "trained"}
        return timed("train", lambda: train_router(pool, "deferral", heads[0], heads[1], **chain, **common))

    def trained(name: str, fit: Callable[[], RoutedSmooth]) -> RoutedSmooth:
        return RoutedSmooth.from_pretrained(folder / name) if (folder / name / "config.json").exists() else fit()

    def bundled() -> RoutedSmooth:
        routed = load_router(execution)
        routed.save_pretrained(folder / "router")
        return RoutedSmooth.from_pretrained(folder / "router")

    paper, small, routed = trained("dual-rs", fit_flat), trained("trained", fit), trained("router", bundled)
    plan = AdaptivePlan(settings.n_max, RADII)
    data = {"name": "Fashion-MNIST, bundled test slice"}
    rows = range(len(test) - settings.test_images, len(test))  # the first hundred have been looked at before

    def certify(smoothed: Smooth | RoutedSmooth, path: Path, name: str, rule: str = "tree") -> Table:
        with bars.votes(f"certify {name}") as bar:
            return certify_table(
                smoothed,
                test,
                path,
                smoothed.routed.within_reach(Terms(plan, settings.alpha, rule)),
                device=device,
                indices=rows,
                name=name,
                data=data,
                radii=SHOWN,
                progress=estimates(bar),
            )

    table = timed("certify", lambda: certify(routed, folder / "certificates.tsv", ROUTED))
    own = timed("certify trained", lambda: certify(small, folder / "trained.tsv", TRAINED))
    other = timed("certify Dual RS", lambda: certify(paper, folder / "dual-rs.tsv", PAPER, "min"))
    experts = timed(
        "certify experts",
        lambda: tuple(certify(Smooth(e, execution=execution), folder / "experts" / f"{e.name}.tsv", e.name) for e in pool),
    )
    pictures = {i: test.image(i) for i in rows}
    page = timed(
        "report",
        lambda: write_report(
            {t.name: t for t in (table, own, other, *experts)},
            folder / "report",
            routed=[ROUTED, TRAINED, PAPER],
            experts=[t.name for t in experts],
            images=pictures,
            classes=CLASSES,
            radii=RADII,
            title="rsrouter demo: Fashion-MNIST",
        ),
    )
    return Outcome(folder, page, table, own, other, experts, seconds)
