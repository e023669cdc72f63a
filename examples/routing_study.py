"""Shared by both routing studies: certifying every method on the same votes, and the tables and figures.

Each method is certified by the package's own `certify_table`, in shards of consecutive work that may run in several
processes and resume where they stopped; the networks' votes are drawn once per image and shared by all methods
(`VoteMemo`), each of which spends its own total alpha. Everything printed comes from the tables.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from rsrouter import AdaptivePlan, CascadeRouter, ExpertPool, RoutedSmooth, Smooth
from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.terms import Terms
from rsrouter.experts import build_architecture
from rsrouter.jobs import certify_table
from rsrouter.report import write_report
from rsrouter.report.curves import average_certified_radius, certified_correct
from rsrouter.results import Table, merge_tables, read_table
from rsrouter.results.metadata import describe, differences
from rsrouter.results.table import ARRAYS, align
from rsrouter.router.chain import Voter
from rsrouter.sampling import Execution, VoteMemo
from rsrouter.training import DeferralRecipe, ResumeStore, Training, label_votes, train_deferral, train_router, tune_cascade
from rsrouter.training.flat import RECIPES
from rsrouter.training.flat_network import default_flat
from rsrouter.training.heads import HeadRecipe
from rsrouter.training.labels import Labels, target_radii

RADII = np.arange(0.0, 2.51, 0.25)
COVERED = RADII <= 2.0
ALPHA, N0, N = 1e-3, 100, 100_000


def plan(n: int) -> AdaptivePlan:
    """At most `n` votes a stage, over the radii of the study."""
    return AdaptivePlan(n, tuple(RADII), n0=N0)


#: Shards of a study; any number of processes may work on them.
SHARDS = 20
RESAMPLES = 1000

#: The paper's method on a head of ours, the paper's method with a network of its own (as published), and ours.
REFERENCE, PUBLISHED, BEST = "flat, min rule (Dual RS)", "flat with its own network, min rule (Dual RS)", "deferral"
#: As published, between the experts of the least and of the largest sigma alone.
TWO = "flat with its own network, two experts, min rule (Dual RS)"
#: How the deferral router's heads are trained, each of them at every noise level.
HEADS = (
    HeadRecipe(steps=3000, cross_entropy=0.03),
    HeadRecipe(steps=3000, cross_entropy=0.1),
    HeadRecipe(steps=3000, cross_entropy=0.1, tilt=3.0),
    HeadRecipe(steps=3000, cross_entropy=0.2),
)
#: Dual RS as its authors run it: a whole network of the experts' architecture.
OWN_RECIPE = RECIPES["dual-rs"]

Method = tuple[Smooth | RoutedSmooth, str]
Labelled = tuple[Tensor, Tensor]


def train_all(
    pool: ExpertPool,
    work: Path,
    unseen: Labelled,
    heads: Labelled,
    validation: Labelled,
    recipe: DeferralRecipe,
    execution: Execution,
    only: Sequence[str] = (),
    chosen_on: Labelled | None = None,
    floor: float = 0.915,
    label_copies: int = 100,
) -> None:
    """Trains every router into `work/NAME`, each once, resumable; every choice is made on `validation`.

    Args:
        pool: the experts.
        work: folder of routers and logs.
        unseen: images that no expert was trained on, for the flat router.
        heads: images that heads are trained on.
        validation: what nothing is trained on.
        recipe: of the deferral router; the tuned cascade draws as many votes.
        execution: how the experts run.
        only: names of the routers to train; empty: all of them.
        chosen_on: what the deferral router is chosen on; default: `validation`.
        floor: least ratio to the envelope wanted of the deferral router.
        label_copies: votes of each expert on each of the flat router's images.
    """
    radii = tuple(RADII[COVERED])

    def make(name: str, build: Callable[[Callable[[dict[str, Any]], None]], RoutedSmooth]) -> None:
        if (work / name / "config.json").exists() or (only and name not in only):
            return
        start, lines = time.time(), []
        routed = build(lines.append)
        routed.save_pretrained(work / name)
        lines.append({"seconds": round(time.time() - start)})
        (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(name, json.dumps(lines[-2:]), flush=True)

    store = ResumeStore(work / f"state-{only[0]}" if len(only) == 1 else work / "state")  # two of them tune on the same votes
    chain = Training(
        pool, "deferral", *heads, radii=radii, recipe=recipe, validation=validation, execution=execution, store=store
    )

    def routing_labels() -> Labels:
        votes = label_votes(pool, unseen[0], n=label_copies, execution=execution, store=store)
        return target_radii(votes, unseen[1].numpy(), pool.sigmas)

    def flat(log: Callable[[dict[str, Any]], None]) -> RoutedSmooth:
        made = {"radii": radii, "recipe": "dual-rs-head", "routing_labels": routing_labels(), "store": store}
        return train_router(pool, default_flat(pool, 0), *unseen, **made)

    def cascade(log: Callable[[dict[str, Any]], None]) -> RoutedSmooth:
        return RoutedSmooth(pool, tune_cascade(replace(chain, log=log), n=recipe.tune_copies), execution=execution)

    def deferral(log: Callable[[dict[str, Any]], None]) -> RoutedSmooth:
        chosen = replace(chain, log=log, validation=chosen_on or validation, floor=floor)
        return RoutedSmooth(pool, train_deferral(chosen), execution=execution)

    def own(log: Callable[[dict[str, Any]], None]) -> RoutedSmooth:
        return train_router(pool, "flat", *unseen, radii=radii, recipe=OWN_RECIPE, store=store)

    def own_two(log: Callable[[dict[str, Any]], None]) -> RoutedSmooth:
        return train_router(outer(pool), "flat", *unseen, radii=radii, recipe=OWN_RECIPE, store=store)

    make("flat", flat)
    make("own", own)
    if "own-two" in only:
        make("own-two", own_two)
    make("cascade", cascade)
    make("deferral", deferral)


def choose_chain(
    pool: ExpertPool,
    networks: Sequence[tuple[Path, tuple[float, ...]]],
    like: str,
    sigmas: Sequence[float],
    validation: Labelled,
    out: Path,
    *,
    copies: int,
    sure_copies: int = 0,
    stages: int = 3,
    confidences: Sequence[float] = (),
    heads: tuple[DeferralRecipe, Labelled] | None = None,
    **settings: Any,
) -> None:
    """A deferral router over networks that are trained already: chooses on `validation` who is asked, at which noise level, in
    which order and from which share of votes on; saved in `out`, and what was tried printed.

    Args:
        pool: the experts.
        networks: runs of a trainer (`model.safetensors`, `config.json`), asked before the experts or among them, each with the
            noise levels at which it may be asked; without any, at `sigmas`.
        like: the expert whose preprocessing they share.
        sigmas: noise levels of the networks that name none.
        validation: images that nothing was trained on, and their labels.
        out: folder of the router.
        copies: votes per validation image and network.
        sure_copies: further votes where nearly all of these agree (`DeferralRecipe.sure_copies`).
        stages: the longest chain.
        confidences: softmax probability that a vote for a class needs (`DeferralRecipe.confidences`).
        heads: heads to train beside them: the recipe, and images and labels that they are trained on.
        settings: further fields of `Training`.
    """
    voters, notes = [], []
    for folder, levels in networks:
        config = json.loads((folder / "config.json").read_text())
        network = build_architecture(config["architecture"], config["num_classes"], config["kwargs"])
        network.load_state_dict(load_file(folder / "model.safetensors"))
        head = "own" if len(networks) == 1 else folder.name.replace(".", "_")
        voters += [(Voter(like, sigma, head, whole=True), network.eval()) for sigma in levels or sigmas]
        notes.append(config["training"])
    recipe, images = heads or (DeferralRecipe(heads=()), (validation[0][:2], validation[1][:2]))
    train_router(
        pool,
        "deferral",
        *images,
        validation=validation,
        recipe=replace(recipe, tune_copies=copies, sure_copies=sure_copies, stages=stages, confidences=tuple(confidences)),
        networks=voters,
        out=out,
        notes={"network": notes[0] if len(notes) == 1 else notes},
        show=True,
        **{"radii": tuple(RADII[COVERED]), **settings},
    )
    print((out / "training.jsonl").read_text())


def chain_arguments(parser: argparse.ArgumentParser, like: str) -> None:
    """What a command line says of `choose_chain`."""
    parser.add_argument(
        "--network",
        type=network_levels,
        nargs="+",
        required=True,
        metavar="FOLDER[=SIGMA,SIGMA]",
        help="folders that the trainer wrote, one for each network; =SIGMA,SIGMA: noise levels of its own",
    )
    parser.add_argument("--sigmas", type=float, nargs="+", required=True, help="noise levels at which the others may be asked")
    parser.add_argument(
        "--confidences",
        type=float,
        nargs="*",
        default=[],
        help="softmax probability that a vote for a class needs; 0 is tried as well",
    )
    parser.add_argument("--like", default=like, help="the expert it started as")
    parser.add_argument("--copies", type=int, default=500, help="votes per validation image and network")
    parser.add_argument("--sure-copies", type=int, default=0, help="further votes where nearly all of these agree")
    parser.add_argument("--images", type=int, default=1000, help="validation images")
    parser.add_argument("--stages", type=int, default=3, help="the longest chain")
    parser.add_argument("--floor", type=float, default=0.915, help="least ratio to the experts' envelope wanted")


def network_levels(text: str) -> tuple[Path, tuple[float, ...]]:
    """A network's folder, and the noise levels that are named for it alone.

    >>> network_levels("runs/catrs_0.6=0.5,0.6")[1], network_levels("runs/catrs_0.6")[1]
    ((0.5, 0.6), ())
    """
    folder, _, levels = text.partition("=")
    return Path(folder), tuple(float(level) for level in levels.split(",")) if levels else ()


def outer(pool: ExpertPool) -> ExpertPool:
    """The experts of the least and of the largest sigma."""
    return ExpertPool([pool[0], pool[-1]])


def methods(
    pool: ExpertPool, work: Path, execution: Execution, part: str = "all", own: bool = True, card: Path | None = None
) -> dict[str, Method]:
    """By name, in the order of the table: experts first, then what routes; `part` is `all`, `best` or `others`, `own` whether a
    flat router with a network of its own is among them. Routers that are not in `work` are taken from `card`."""

    def routed(name: str) -> RoutedSmooth:
        folder = work / name
        if card is not None and not folder.exists():
            folder = card / ("router" if name == "deferral" else f"compared/{name}")
        return RoutedSmooth(pool, RoutedSmooth.from_pretrained(folder).router, execution=execution)

    if part == "best":
        return {BEST: (routed("deferral"), "tree")}
    found: dict[str, Method] = {e.name: (Smooth(e, execution=execution), "tree") for e in pool}
    found[REFERENCE] = (routed("flat"), "min")
    if own:
        found[PUBLISHED] = (routed("own"), "min")
    if (work / "own-two" / "config.json").exists():
        router = RoutedSmooth.from_pretrained(work / "own-two").router
        found[TWO] = (RoutedSmooth(outer(pool), router, execution=execution), "min")
    found["flat, agreement (tree)"] = (routed("flat"), "tree")
    plain = CascadeRouter([0.55] * (len(pool) - 1))
    found["Multiscale-like cascade (.55)"] = (RoutedSmooth(pool, plain, execution=execution), "tree")
    found["cascade, tuned"] = (routed("cascade"), "tree")
    if part == "all":
        found[BEST] = (routed("deferral"), "tree")
    return found


def file_name(method: str) -> str:
    """A method's name as part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", method.lower()).strip("-.")


def certify_all(
    methods: Mapping[str, Method],
    images: Any,
    out: Path,
    *,
    seed: int,
    count: int,
    part: tuple[int, int] = (0, 1),
    n: int = N,
    data: dict[str, Any] | None = None,
    shards: int | None = None,
    kept: Path | None = None,
) -> None:
    """Certifies the first `count` images with every method, into `out/NAME.I.tsv` for each shard I of this part.

    Args:
        methods: by name: classifier and rule.
        images: the data set.
        out: folder of the tables.
        seed: of every method's votes, the same for all so that they share them.
        count: how many images.
        part: `(i, of)`: this process takes the shards i, i + of, ...
        n: most votes a stage.
        data: for the metadata.
        shards: of the whole study; None: `SHARDS`.
        kept: folder of tables of earlier runs (`keep_tables`): what a method has there is not certified again.
    """
    shards = shards or SHARDS
    out.mkdir(parents=True, exist_ok=True)
    done = {
        name: {i for table in kept_tables(name, kept, by, images) for i in table.idx.tolist()}
        for name, (by, _) in methods.items()
    }
    for shard in range(part[0], shards, part[1]):
        memo, start = VoteMemo(), time.time()
        for name, (smoothed, rule) in methods.items():
            if done[name].issuperset(range(shard, count, shards)):
                continue
            smoothed.memo = memo
            sides = "two" if isinstance(smoothed, RoutedSmooth) else "one"
            reach = plan(n).reach(smoothed.tree, AlphaSplit.even(ALPHA, smoothed.tree.paths), sides)
            certify_table(
                smoothed,
                images,
                out / f"{file_name(name)}.{shard}.tsv",
                Terms(plan(n).within(reach), alpha=ALPHA, rule=rule, seed=seed),
                indices=range(count),
                shard=(shard, shards),
                name=name,
                data=data,
            )
            print(f"shard {shard} {name}: {time.time() - start:.0f} s, votes drawn {memo.drawn:,} of {memo.asked:,}", flush=True)


def merged(methods: Sequence[str], out: Path, shards: int | None = None, kept: Path | None = None) -> dict[str, Table]:
    """One table per method, over the images that every method has certified: in the finished shards in `out`, and in the tables
    of earlier runs in `kept`."""
    shards = shards or SHARDS
    tables = {}
    for name in methods:
        paths = [path for i in range(shards) if (path := out / f"{file_name(name)}.{i}.tsv").exists()]
        finished = [path for path in paths if len(found := read_table(path)) == found.expected]
        target = out / f"{file_name(name)}.tsv"
        for old in (target, target.with_suffix(".json")):
            old.unlink(missing_ok=True)
        if finished:
            merge_tables(finished, target, partial=len(finished) < shards)
        here = [read_table(target, name=name)] if finished else []
        tables[name] = joined([*kept_tables(name, kept), *here], name)
    return dict(zip(tables, align(list(tables.values()), common=True), strict=True))


def study_tables(names: Sequence[str], args: argparse.Namespace, shards: int | None = None) -> dict[str, Table]:
    """`merged` for the verb `table`, with the card's earlier runs; with `--keep` this run joins them."""
    if args.keep and args.card is None:
        raise SystemExit("--keep needs --card, the folder to keep the tables in")
    tables = merged(names, args.work / "tables", shards, kept=args.card and args.card / "tables")
    if args.keep:
        keep_tables(names, args.work / "tables", args.card / "tables")
    return tables


def kept_tables(
    method: str, folder: Path | None, smoothed: Smooth | RoutedSmooth | None = None, images: Any = None
) -> list[Table]:
    """A method's tables of earlier runs, in the order of the runs; SystemExit where they are not of `smoothed` on `images`."""
    paths = [] if folder is None else sorted(folder.glob(f"{file_name(method)}.run*.tsv"))
    tables = [read_table(path, name=method) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        about = table.described()
        if smoothed is not None and (about.digest, about.data["fingerprint"]) != (smoothed.digest, images.fingerprint):
            raise SystemExit(f"{path} is a table of another classifier or of other images: remove it, or leave --card out")
    return tables


def keep_tables(methods: Sequence[str], work: Path, folder: Path) -> None:
    """Keeps what `merged` made of this run's shards in `folder`, as the next run. Runs stay tables of their own: processors round
    differently, so their rows are certificates of networks that differ in rounding, and the package does not merge them."""
    folder.mkdir(parents=True, exist_ok=True)
    run = 1 + max((int(path.stem.rpartition("run")[2]) for path in folder.glob("*.run*.tsv")), default=0)
    for path in (work / f"{file_name(name)}.tsv" for name in methods):
        for part in (path, path.with_suffix(".json")):
            if part.exists():
                shutil.copy(part, folder / f"{path.stem}.run{run}{part.suffix}")


def joined(tables: Sequence[Table], name: str) -> Table:
    """The rows of several runs of one method in one table, described as the first; of an image that two hold, the earlier."""
    if not tables:
        raise SystemExit(f"{name}: no shard is finished; run certify first")
    first = tables[0]
    for table in tables[1:]:
        if found := [
            d for d in differences(first.metadata, table.metadata) if not d[0].startswith(("info.", "versions.", "shard"))
        ]:
            raise SystemExit(f"{name}: the runs are not of one job: {describe(found)}")
    arrays = {column: np.concatenate([getattr(table, column) for table in tables]) for column in ARRAYS}
    rows = np.unique(arrays["idx"], return_index=True)[1]
    return replace(first, name=name, **{column: array[rows] for column, array in arrays.items()})


def summarise(
    tables: Mapping[str, Table],
    experts: Sequence[str],
    references: Sequence[str],
    best: str,
    *,
    published: Sequence[Table] = (),
    seed: int = 0,
) -> tuple[list[str], dict[str, Any]]:
    """Markdown lines and a JSON-able summary.

    Args:
        tables: every method's table over the same images.
        experts: which of them are single experts (they make the envelope and the oracle).
        references: methods that `best` is compared with, paired over images (the paper's).
        best: the method chosen on validation images.
        published: certification tables of others over the same images, by position.
        seed: of the bootstrap.
    """
    hits = {name: certified_correct(table, RADII) for name, table in tables.items()}
    stack = np.stack([hits[name] for name in experts])
    hits["oracle"] = stack.any(0)
    n = stack.shape[1]
    draws = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    means = {name: np.stack([h[rows].mean(0) for rows in draws]) for name, h in hits.items()}
    best_at = np.max([h.mean(0) for h in stack], axis=0)
    best_resampled = np.max([means[name] for name in experts], axis=0)

    def coverage(reached: np.ndarray, envelope: np.ndarray) -> np.ndarray:
        ratio = np.where(envelope > 0, reached / np.where(envelope > 0, envelope, 1.0), np.nan)
        return np.nanmean(ratio[..., COVERED], axis=-1)

    def row(name: str, cells: Sequence[str]) -> str:
        return f"| {name} | " + " | ".join(cells) + " |"

    lines = [
        row("method", [f"{r:g}" for r in RADII] + ["abstains", "coverage 0 to 2", "least ratio", "ACR", "votes"]),
        "|---" * (len(RADII) + 6) + "|",
    ]
    summary: dict[str, Any] = {"images": n, "radii": RADII.tolist(), "envelope": best_at.tolist(), "methods": {}}
    order = [*experts, "envelope", "oracle", *[name for name in tables if name not in experts]]
    for name in order:
        if name == "envelope":
            cells = [f"{100 * a:.1f}" for a in best_at]
            lines.append(row("best expert at each radius (envelope)", [*cells, "", "1", "1", "", ""]))
            continue
        reached = hits[name].mean(0)
        ratio = reached[COVERED & (best_at > 0)] / best_at[COVERED & (best_at > 0)]
        spread = np.percentile(coverage(means[name], best_resampled), [2.5, 97.5])
        low, high = np.percentile(means[name], [2.5, 97.5], axis=0)
        entry: dict[str, Any] = {
            "accuracy": reached.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
            "coverage": float(coverage(reached, best_at)),
            "coverage_interval": spread.tolist(),
            "least_ratio": float(ratio.min()),
        }
        table = tables.get(name)
        if table is not None:
            entry["abstains"] = float(table.abstained.mean())
            entry["acr"] = average_certified_radius(table)
            entry["votes"] = float(table.n_drawn.mean())
        summary["methods"][name] = entry
        lines.append(
            row(
                f"**{name}**" if name == best else name,
                [f"{100 * a:.1f}" for a in reached]
                + [
                    "" if table is None else f"{100 * entry['abstains']:.1f}",
                    f"{entry['coverage']:.3f} [{spread[0]:.3f}, {spread[1]:.3f}]",
                    f"{entry['least_ratio']:.3f}",
                    "" if table is None else f"{entry['acr']:.3f}",
                    "" if table is None else f"{entry['votes']:,.0f}",
                ],
            )
        )
    alone = max(experts, key=lambda name: summary["methods"][name]["coverage"])
    entry = summary["methods"][alone]
    summary["best_single"] = {"name": alone, "coverage": entry["coverage"], "least_ratio": entry["least_ratio"]}
    lines += ["", f"Best single expert: {alone}, coverage {entry['coverage']:.3f}, least ratio {entry['least_ratio']:.3f}."]
    if published:
        others = np.stack([certified_correct(table, RADII) for table in published])
        theirs = others.mean(1).max(0)
        resampled = np.max([np.stack([h[rows].mean(0) for rows in draws]) for h in others], axis=0)
        reached = hits[best].mean(0)
        ratio, total = reached[COVERED] / theirs[COVERED], coverage(reached, theirs)
        low, high = np.percentile(coverage(means[best], resampled), [2.5, 97.5])
        summary["published"] = {"tables": len(published), "envelope": theirs.tolist(), "coverage": [float(total), low, high]}
        summary["published"]["least_ratio"] = float(ratio.min())
        lines += [
            "",
            f"Envelope of {len(published)} published classifiers on these images: "
            + ", ".join(f"{100 * a:.1f} at {r:g}" for a, r in zip(theirs, RADII, strict=True) if r <= 2.0)
            + f". {best} reaches {total:.3f} of it [{low:.3f}, {high:.3f}] in the mean, {ratio.min():.3f} at least.",
        ]
    summary["paired"] = []
    for other in references:
        gap = coverage(means[best], best_resampled) - coverage(means[other], best_resampled)
        low, high = np.percentile(gap, [2.5, 97.5])
        at = hits[best].astype(float) - hits[other].astype(float)
        spread_at = np.percentile(means[best] - means[other], [2.5, 97.5], axis=0)
        total = summary["methods"][best]["coverage"] - summary["methods"][other]["coverage"]
        paired = {
            "best": best,
            "reference": other,
            "coverage": [total, low, high],
            "accuracy": at.mean(0).tolist(),
            "low": spread_at[0].tolist(),
            "high": spread_at[1].tolist(),
        }
        summary["paired"].append(paired)
        lines += ["", _compared(paired)]
    return lines, summary


def _compared(paired: Mapping[str, Any]) -> str:
    """One paired comparison in words."""
    total, low, high = paired["coverage"]
    each = zip(RADII, paired["accuracy"], paired["low"], paired["high"], strict=True)
    return (
        f"Coverage of {paired['best']} less that of {paired['reference']}: {total:+.3f} [{low:+.3f}, {high:+.3f}] (paired over "
        "images). Certified accuracy at each radius, in points: "
        + ", ".join(f"{100 * d:+.1f} [{100 * a:+.1f}, {100 * b:+.1f}] at {r:g}" for r, d, a, b in each if r <= 2.0)
        + "."
    )


def figure(path: Path, summary: Mapping[str, Any], experts: Sequence[str], title: str) -> None:
    """Certified accuracy over radius, and its share of the envelope, of every method."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "rsrouter"
    from matplotlib import pyplot as plt

    canvas, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    envelope = np.array(summary["envelope"])
    left.plot(RADII, 100 * envelope, color="0.3", lw=2.5, label="best expert at each radius")
    right.axhline(1.0, color="0.3", lw=2.5)
    shown = COVERED & (envelope > 0)
    for name, entry in summary["methods"].items():
        reached = np.array(entry["accuracy"])
        if name in experts:
            left.plot(RADII, 100 * reached, color="0.6", lw=1, ls=":")
            continue
        line = left.plot(RADII, 100 * reached, marker="o", ms=3, lw=1.2, label=name)[0]
        right.plot(RADII[shown], reached[shown] / envelope[shown], marker="o", ms=3, lw=1.2, color=line.get_color())
    left.set(xlabel="L2 radius", ylabel="certified accuracy, %", title=title)
    right.set(xlabel="L2 radius", ylabel="share of the envelope", title="routed / best expert")
    left.legend(fontsize=7)
    canvas.tight_layout()
    canvas.savefig(path, metadata={"Date": None})


def write_study(
    tables: Mapping[str, Table],
    experts: Sequence[str],
    references: Sequence[str],
    best: str,
    out: Path,
    title: str,
    report: Path | None = None,
    published: Sequence[Table] = (),
) -> None:
    """`table.md`, `table.json` and `curves.svg` in `out`, and the report page in `report`."""
    lines, summary = summarise(tables, experts, references, best, published=published)
    most = max(table.described().terms.plan.n_max for table in tables.values())
    head = (
        f"{summary['images']:,} test images, at most N = {most:,} votes per stage and n0 = {N0} for selection (adaptive, radii "
        f"0.25 apart), alpha = {ALPHA} in total for each method, votes shared. Certified accuracy in %; brackets: 95% bootstrap "
        f"intervals over images ({RESAMPLES:,} resamples). In bold what was chosen on validation images."
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text("\n".join([head, "", *lines]) + "\n")
    (out / "table.json").write_text(json.dumps(summary, indent=1) + "\n")
    figure(out / "curves.svg", summary, experts, title)
    if report is not None:
        write_report(
            {name: tables[name] for name in (best, *references, *experts)},
            report,
            routed=[best, *references],
            experts=experts,
            title=title,
            radii=RADII[COVERED],  # those that coverage is about
        )
    print(head, "", *lines, sep="\n")


def command_line(
    text: str | None,
    verbs: Mapping[str, Callable[[argparse.Namespace], None]],
    arguments: Callable[[str, argparse.ArgumentParser], None],
) -> None:
    """Runs one of a study's verbs (`train`, `choose`, `certify`, `table`).

    Args:
        text: what `--help` says.
        verbs: by name, what each does.
        arguments: adds to a verb's parser what this study needs beyond the common options.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_subparsers(required=True)
    for name, run in verbs.items():
        verb = chosen.add_parser(name)
        verb.add_argument("--work", type=Path, required=True, help="routers and tables")
        if name == "table":
            verb.add_argument("--out", type=Path, required=True)
            verb.add_argument("--report", type=Path, default=None)
            verb.add_argument("--keep", action="store_true", help="keep this run's tables in CARD/tables")
        if name in ("certify", "table"):
            verb.add_argument("--card", type=Path, default=None, help="the study's card: routers, and tables of earlier runs")
        if name != "table":
            verb.add_argument("--dtype", default="float32")
            verb.add_argument("--threads", type=int, default=1)
        if name == "train":
            verb.add_argument("--only", nargs="*", default=(), help="flat, own, cascade, deferral: a process each may train some")
        if name == "certify":
            verb.add_argument("--n", type=int, default=N, help="most votes a stage")
            verb.add_argument("--part", default="0/1", help="i/n: this process takes the shards i, i + n, ...")
            parts = ("all", "best", "others")
            verb.add_argument("--methods", choices=parts, default="all", help="others: before the deferral router is trained")
        arguments(name, verb)
        verb.set_defaults(run=run)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if "threads" in args:
        torch.set_num_threads(args.threads)
    args.run(args)
