"""The whole path in one call: wrap, label, train, certify, report, all through the public API."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.errors import ResultsError
from rsrouter.core.plans import AdaptivePlan
from rsrouter.demo.bundled import CLASSES, load_pool, load_slice
from rsrouter.experts import ExpertPool
from rsrouter.jobs import Running, certify_table
from rsrouter.report import write_report
from rsrouter.results import Table
from rsrouter.router import Labels, label_votes
from rsrouter.router.labels import target_radii
from rsrouter.sampling import resolve_device
from rsrouter.smooth import RoutedSmooth, Smooth
from rsrouter.training import DeferralRecipe, train_router

#: Radii of the running estimate.
SHOWN = (0.0, 0.5, 1.0)
RADII = tuple(float(r) for r in np.arange(0.0, 2.01, 0.25))


@dataclass(frozen=True)
class Settings:
    """What one demo run does; written to `demo.json`, and a folder of other settings is refused.

    Attributes:
        train_images, copies: images the router's heads are trained on, and noisy copies of each.
        label_images, label_votes: images the flat router is trained on, and votes per expert and image for their labels.
        validation_images, tune_copies: images that choices (kind of router, thresholds) are made on, and votes of each.
        test_images, n_max: images certified, and the most votes a stage may draw.
        beta: level at which the adaptive plan gives up (costs radius, never soundness).
        alpha: failure probability of each certificate.
        seed: of the labels' noise and of training. Certification's own seed derives from digests.
    """

    train_images: int = 3000
    copies: int = 8
    label_images: int = 500
    label_votes: int = 50
    validation_images: int = 250
    tune_copies: int = 200
    test_images: int = 100
    n_max: int = 10_000
    beta: float = 0.05
    alpha: float = 0.001
    seed: int = 0
    device: str = "cpu"


QUICK = {
    "train_images": 600,
    "copies": 6,
    "label_images": 100,
    "validation_images": 60,
    "tune_copies": 100,
    "test_images": 25,
    "n_max": 2_000,
}

#: What the report calls the runs.
ROUTED, PAPER = "routed", "flat router, min rule (Dual RS)"


@dataclass(frozen=True)
class Outcome:
    """What a demo run left behind.

    Attributes:
        out: the folder.
        report: the page.
        routed: the routed table.
        paper: a flat router's under the min rule, as Dual RS does it.
        experts: each expert's own table.
        seconds: per step.
    """

    out: Path
    report: Path
    routed: Table
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
                "The output folder holds something else",
                expected="a new folder, or a demo run with the same settings",
                received=f"{out}" + (f" with settings {found}" if found else ""),
                remedy="choose another --out; nothing was overwritten",
            )
    out.mkdir(parents=True, exist_ok=True)
    part = out / ".demo.json"
    part.write_text(json.dumps(wanted, indent=2) + "\n")
    part.replace(marker)


class _Bars:
    """Progress bars on the terminal, or silence."""

    def __init__(self, show: bool) -> None:
        self.show = show

    def say(self, text: str) -> None:
        if self.show:
            tqdm.write(text, file=sys.stderr)

    def votes(self, title: str, total: int | None = None) -> tqdm:
        return tqdm(total=total, desc=title, unit="vote", unit_scale=True, disable=not self.show, file=sys.stderr)


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

    Leaves `pool.json`, `router/` (the kind that validation images chose), `dual-rs/` (the paper's kind, for
    comparison), `certificates.tsv` with its JSON, `dual-rs.tsv`, `experts/*.tsv` and `report/index.html`. Started again with
    the same settings it goes on where it stopped.

    Args:
        out: a new folder, or one of an earlier run with the same settings.
        quick: fewer images and votes.
        device: where to run; None is the CPU.
        seed: of labelling and training.
        show: progress bars on stderr.

    Raises:
        ResultsError: the folder holds something else. InputError: an unusable device.
    """
    folder, bars, seconds = Path(out), _Bars(show), {}
    resolve_device(device)
    settings = Settings(**{**(QUICK if quick else {}), "seed": int(seed), "device": str(device or "cpu")})  # type: ignore[arg-type]
    _prepare(folder, settings)

    def timed(name: str, work: Callable[[], Any]) -> Any:
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
    train, validation, test = (load_slice(name) for name in ("train", "validation", "test"))
    x, y = train.batch(range(settings.train_images))
    held_out = validation.batch(range(settings.validation_images))

    def label() -> Labels:
        with bars.votes("label", settings.label_images * len(pool) * settings.label_votes) as bar:
            votes = label_votes(
                pool, x[: settings.label_images], n=settings.label_votes, seed=settings.seed, device=device, progress=bar.update
            )
        return target_radii(votes, y[: settings.label_images].numpy(), pool.sigmas, plan_n=settings.n_max, alpha=settings.alpha)

    def fit(kind: str, target: Path, count: int, **more: Any) -> RoutedSmooth:
        if (target / "config.json").exists():
            return RoutedSmooth.from_pretrained(target)
        with bars.votes(f"train {kind}") as bar:
            return train_router(
                pool,
                kind,
                x[:count],
                y[:count],
                radii=RADII,
                seed=settings.seed,
                out=target,
                device=device,
                plan_n=settings.n_max,
                alpha=settings.alpha,
                votes=bar.update,
                **more,
            )

    recipe = DeferralRecipe(copies=settings.copies, tune_copies=settings.tune_copies)
    labels = timed("label", label)
    best = np.bincount(labels.radius.argmax(1)[labels.radius.max(1) > 0], minlength=len(pool))
    bars.say("best expert for " + ", ".join(f"{n} images: {name}" for n, name in zip(best, pool.names, strict=True)))
    paper = timed(
        "train flat", lambda: fit("flat", folder / "dual-rs", settings.label_images, recipe="dual-rs", routing_labels=labels)
    )
    routed = timed("train", lambda: fit("auto", folder / "router", settings.train_images, validation=held_out, recipe=recipe))
    bars.say(f"validation images chose a {routed.router.kind} router")
    plan = AdaptivePlan(settings.n_max, RADII, beta=settings.beta)
    data = {"name": "Fashion-MNIST, bundled test slice"}
    rows = range(settings.test_images)

    def certify(smoothed: Smooth | RoutedSmooth, path: Path, name: str, rule: str = "tree") -> Table:
        split = AlphaSplit.even(settings.alpha, smoothed.tree.paths)
        reach = plan.reach(smoothed.tree, split, "two" if isinstance(smoothed, RoutedSmooth) else "one")
        with bars.votes(f"certify {name}") as bar:
            return certify_table(
                smoothed,
                test,
                path,
                plan=plan.within(reach),
                alpha=settings.alpha,
                device=device,
                indices=rows,
                rule=rule,
                name=name,
                data=data,
                radii=SHOWN,
                progress=estimates(bar),
            )

    table = timed("certify", lambda: certify(routed, folder / "certificates.tsv", ROUTED))
    other = timed("certify flat", lambda: certify(paper, folder / "dual-rs.tsv", PAPER, "min"))
    experts = timed(
        "certify experts", lambda: tuple(certify(Smooth(e), folder / "experts" / f"{e.name}.tsv", e.name) for e in pool)
    )
    pictures = {i: test.image(i) for i in rows}
    page = timed(
        "report",
        lambda: write_report(
            {t.name: t for t in (table, other, *experts)},
            folder / "report",
            routed=[ROUTED, PAPER],
            experts=[t.name for t in experts],
            images=pictures,
            classes=CLASSES,
            radii=RADII,
            title="rsrouter demo: Fashion-MNIST",
        ),
    )
    return Outcome(folder, page, table, other, experts, seconds)
