"""Study 1: how near one routed classifier comes to the best expert at every radius (Fashion-MNIST, bundled experts).

    python examples/study_fashion_mnist.py train --work WORK
    python examples/study_fashion_mnist.py votes --work WORK [--part 0/2] [--data DIR --images 2000]
    python examples/study_fashion_mnist.py table --work WORK --out model_cards/fashion-mnist-study

`train` trains every router on the router training slice (no expert has seen it) and makes every choice on the
validation slice. `votes` draws, once per test image and network, 100 selection and 10,000 estimation votes (the
FixedPlan of published tables); it resumes where it stopped, and several processes may share the work (`--part`).
`table` certifies every method on those same votes, each with a total alpha of 0.001, and may be run at any time on
the images done so far. Without `--data` the test images are the bundled 1,000 (the beginning of the official test
set); `--data DIR` reads the official test set (`t10k-*-ubyte.gz`) for more.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rsrouter import CascadeRouter, FixedPlan, FlatRouter, RoutedSmooth
from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.policy import CertifyPolicy, VoteRequest
from rsrouter.core.tree import Tree
from rsrouter.demo import load_pool, load_slice
from rsrouter.experts import ExpertPool, build_architecture
from rsrouter.router import HeadedTrunk, label_votes
from rsrouter.router.base import single_tree, vote_model
from rsrouter.router.labels import target_radii
from rsrouter.sampling import Engine, VoteModel, image_identity
from rsrouter.training import train_router
from rsrouter.training.deferral import DeferralRecipe, train_deferral
from rsrouter.training.tune import tune_cascade

RADII = np.arange(0.0, 2.51, 0.25)
COVERED = RADII <= 2.0
ALPHA, N0, N = 1e-3, 100, 10_000
BLOCK = 4
FLAT = ("flat-dual-rs", "flat-utility")


def slice_of(name: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    data = load_slice(name)
    x, y = data.batch(range(len(data) if count is None else count))
    return x, torch.as_tensor(y)


def read_test(folder: Path | None, count: int) -> tuple[Tensor, np.ndarray]:
    """The first `count` official test images: bundled, or from the IDX files in `folder`."""
    if folder is None:
        x, y = slice_of("test")
        return x[:count], y[:count].numpy()
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)[:count]
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)[:count]
    return torch.from_numpy(images.copy()).float().div_(255), labels.astype(np.int64)


def train(args: argparse.Namespace) -> None:
    """Every router, each once; a router that is there is kept."""
    pool = load_pool()
    x, y = slice_of("train")
    validation = slice_of("validation")
    radii = tuple(RADII[COVERED])

    def make(name: str, build: Callable[[Callable[[dict], None]], RoutedSmooth]) -> None:
        if (args.work / name / "config.json").exists() or (args.only and name.split("-")[0] not in args.only):
            return
        start, lines = time.time(), []
        routed = build(lines.append)
        routed.save_pretrained(args.work / name)
        lines.append({"seconds": round(time.time() - start)})
        (args.work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(
            name, routed.router.to_config() if name in ("cascade", "deferral") else "", f"{time.time() - start:.0f} s", flush=True
        )

    make(
        "deferral",
        lambda log: RoutedSmooth(
            pool,
            train_deferral(
                pool, x, y, validation, radii, recipe=DeferralRecipe(copies=args.copies, tune_copies=args.tune_copies), log=log
            ),
        ),
    )
    make("cascade", lambda log: RoutedSmooth(pool, tune_cascade(pool, *validation, radii, n=args.tune_copies, log=log)))
    wanted = not args.only or "flat" in args.only
    if wanted and not all((args.work / name / "config.json").exists() for name in FLAT):
        few, target = x[: args.flat_images], y[: args.flat_images]
        labels = target_radii(label_votes(pool, few, n=100), target.numpy(), pool.sigmas)
        for name in FLAT:
            make(
                name,
                lambda log, name=name: train_router(
                    pool,
                    FlatRouter(build_architecture("mlp_head", 3, {"in_features": 74}), sigma=1.0, trunk="sigma_1"),
                    few,
                    target,
                    radii=radii,
                    recipe=name.removeprefix("flat-"),
                    routing_labels=labels,
                ),
            )


def load_routers(work: Path) -> dict[str, RoutedSmooth]:
    return {name: RoutedSmooth.from_pretrained(work / name) for name in ("deferral", "cascade", *FLAT)}


def networks(pool: ExpertPool, routers: dict[str, RoutedSmooth]) -> list[VoteModel]:
    """Every network once: experts (the largest also casts the flat routers' votes), then the deferral router's own."""
    largest = pool[len(pool) - 1]
    heads = [routers[name].router.module for name in FLAT]
    shared = VoteModel(
        largest.name,
        HeadedTrunk(largest, heads),
        largest.sigma,
        (largest.name, *FLAT),
        (10, 3, 3),
        largest.digest + "".join(routers[name].router.digest for name in FLAT),
    )
    own = [m for m in routers["deferral"].router.bind(pool).models if m.name not in pool.names]
    return [vote_model(pool[0]), vote_model(pool[1]), shared, *own]


def votes(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    pool = load_pool()
    routers = load_routers(args.work)
    x, labels = read_test(args.data, args.images)
    models = networks(pool, routers)
    engine = Engine(models, pool.input_shape, seed=args.seed)
    folder = args.work / "votes"
    folder.mkdir(parents=True, exist_ok=True)
    part, parts = (int(v) for v in args.part.split("/"))
    for number, start in enumerate(range(0, len(x), BLOCK)):
        target = folder / f"{start:05d}.npz"
        if number % parts != part or target.exists():
            continue
        block = x[start : start + BLOCK]
        began = time.time()
        found: dict[str, np.ndarray] = {"labels": labels[start : start + BLOCK]}
        for purpose, count in (("select", N0), ("estimate", N)):
            requests = [VoteRequest(i, m.name, purpose, 0, count) for m in models for i in range(len(block))]
            counts = engine.run(block, [image_identity(image) for image in block], requests)
            for model in models:
                rows = [c for r, c in zip(requests, counts, strict=True) if r.network == model.name]
                for stage in model.stages:
                    found[f"{purpose}/{stage}"] = np.stack([row[stage] for row in rows])
        temporary = folder / f".{start:05d}.{os.getpid()}.npz"
        np.savez_compressed(temporary, **found)
        os.replace(temporary, target)
        print(start, f"{time.time() - began:.1f} s", flush=True)


def certify(
    tree: Tree, found: dict[str, np.ndarray], source: Callable[[str], str], rule: str, sides: str
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and radii of one method on the stored votes, by the package's own policy."""
    n = len(found["labels"])
    policy = CertifyPolicy(tree, FixedPlan(N0, N), AlphaSplit.even(ALPHA, tree.paths), n, rule=rule, sides=sides)
    on = {network: [s.name for s in tree.stages.values() if s.network == network] for network in tree.networks}
    while live := [i for i in range(n) if not policy.done[i]]:
        requests = policy.next_requests(live)
        policy.update(requests, [{s: found[f"{r.purpose}/{source(s)}"][r.image] for s in on[r.network]} for r in requests])
    done = [policy.certificate(i) for i in range(n)]
    return np.array([c.predict for c in done]), np.array([c.radius for c in done])


def methods(pool: ExpertPool, routers: dict[str, RoutedSmooth]) -> dict[str, tuple[Tree, Callable[[str], str], str, str]]:
    """Name to (tree, where a stage's votes are stored, rule, sides)."""

    def plain(stage: str) -> str:
        return stage.split(":")[0] if stage.split(":")[0] in pool.names else stage

    table: dict[str, tuple[Tree, Callable[[str], str], str, str]] = {
        f"expert {e.name}": (single_tree(e).tree, plain, "tree", "one") for e in pool
    }
    for name in FLAT:
        tree = routers[name].tree

        def source(stage: str, name: str = name) -> str:
            return name if stage == "router" else stage

        table[f"{name}, min rule"] = (tree, source, "min", "two")
        table[f"{name}, agreement (tree)"] = (tree, source, "tree", "two")
    table["Multiscale-like cascade (.55, .55)"] = (CascadeRouter((0.55, 0.55)).bind(pool).tree, plain, "tree", "two")
    table["cascade, tuned"] = (routers["cascade"].tree, plain, "tree", "two")
    table["deferral"] = (routers["deferral"].tree, plain, "tree", "two")
    return table


def table(args: argparse.Namespace) -> None:
    pool = load_pool()
    routers = load_routers(args.work)
    files = sorted((args.work / "votes").glob("[0-9]*.npz"))
    blocks = [dict(np.load(file)) for file in files]
    found = {key: np.concatenate([b[key] for b in blocks]) for key in blocks[0]}
    labels = found["labels"]
    held: dict[str, np.ndarray] = {}
    abstained, radius_mean = {}, {}
    for name, (tree, source, rule, sides) in methods(pool, routers).items():
        predict, radius = certify(tree, found, source, rule, sides)
        held[name] = np.where(predict == labels, radius, -1.0)
        abstained[name] = float(np.mean(predict < 0))
        radius_mean[name] = float(np.mean(np.maximum(held[name], 0.0)))
    experts = [held[f"expert {e.name}"] for e in pool]
    held["oracle"] = np.max(experts, axis=0)
    radius_mean["oracle"] = float(np.mean(np.maximum(held["oracle"], 0.0)))
    edges = np.maximum(RADII, 1e-12)
    hits = {name: h[:, None] >= edges for name, h in held.items()}
    envelope = np.max([(h[:, None] >= edges).mean(0) for h in experts], axis=0)
    rng = np.random.default_rng(0)
    draws = rng.integers(len(labels), size=(1000, len(labels)))

    def coverage(rows: np.ndarray | slice, name: str) -> float:
        best = np.max([(h[rows][:, None] >= edges[COVERED]).mean(0) for h in experts], axis=0)
        some = best > 0
        return float((hits[name][rows][:, COVERED].mean(0)[some] / best[some]).mean())

    lines = [
        f"{len(labels)} test images (positions {', '.join(_ranges(files))} of the official test set), FixedPlan n0 = {N0}, "
        f"N = {N:,}, alpha = {ALPHA} in total for each method, the same votes for all. Certified accuracy in %; brackets: "
        "95% bootstrap intervals over images (1,000 resamples).",
        "",
        "| method | " + " | ".join(f"{r:g}" for r in RADII) + " | abstains | coverage 0 to 2 | least ratio | ACR |",
        "|---" * (len(RADII) + 5) + "|",
    ]
    summary = {}
    for name in [
        *[n for n in held if n.startswith("expert")],
        "envelope",
        "oracle",
        *[n for n in held if n != "oracle" and "expert" not in n],
    ]:
        if name == "envelope":
            lines.append(
                "| best expert at each radius (envelope) | " + " | ".join(f"{100 * a:.1f}" for a in envelope) + " | | 1 | 1 | |"
            )
            continue
        reached = hits[name].mean(0)
        spread = np.percentile([coverage(rows, name) for rows in draws[:300]], [2.5, 97.5])
        low, high = np.percentile(np.stack([hits[name][rows].mean(0) for rows in draws]), [2.5, 97.5], axis=0)
        ratio = reached[COVERED] / envelope[COVERED]
        summary[name] = {
            "accuracy": reached.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
            "coverage": coverage(slice(None), name),
            "coverage_interval": spread.tolist(),
            "least_ratio": float(ratio.min()),
            "acr": radius_mean[name],
            "abstains": abstained.get(name),
        }
        lines.append(
            f"| {name} | "
            + " | ".join(f"{100 * a:.1f}" for a in reached)
            + (f" | {100 * abstained[name]:.1f}" if name in abstained else " | ")
            + f" | {summary[name]['coverage']:.3f} [{spread[0]:.3f}, {spread[1]:.3f}] | {ratio.min():.3f} "
            f"| {radius_mean[name]:.3f} |"
        )
    paired = [coverage(rows, "deferral") - coverage(rows, "flat-dual-rs, min rule") for rows in draws[:300]]
    lines += [
        "",
        "Coverage of deferral less that of the flat router with the min rule: "
        f"{coverage(slice(None), 'deferral') - coverage(slice(None), 'flat-dual-rs, min rule'):.3f} "
        f"[{np.percentile(paired, 2.5):.3f}, {np.percentile(paired, 97.5):.3f}] (paired over images).",
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    (args.out / "table.json").write_text(
        json.dumps({"radii": RADII.tolist(), "envelope": envelope.tolist(), "images": len(labels), "methods": summary}, indent=1)
        + "\n"
    )
    figure(args.out / "curves.svg", summary, envelope)
    print("\n".join(lines))


def _ranges(files: list[Path]) -> list[str]:
    """Runs of consecutive blocks, as text."""
    starts = [int(file.stem) for file in files]
    runs: list[list[int]] = []
    for s in starts:
        if runs and runs[-1][1] == s:
            runs[-1][1] = s + BLOCK
        else:
            runs.append([s, s + BLOCK])
    return [f"{a} to {b - 1}" for a, b in runs]


def figure(path: Path, summary: dict[str, dict], envelope: np.ndarray) -> None:
    """Certified accuracy over radius as a share of the envelope."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "rsrouter"
    from matplotlib import pyplot as plt

    axes = plt.subplots(figsize=(7, 4))[1]
    axes.axhline(1.0, color="0.4", lw=1, label="best expert at each radius")
    for name, row in summary.items():
        if not name.startswith("expert"):
            axes.plot(RADII[COVERED], np.array(row["accuracy"])[COVERED] / envelope[COVERED], marker="o", ms=3, label=name)
    axes.set(
        xlabel="L2 radius",
        ylabel="certified accuracy / envelope",
        title="Fashion-MNIST: share of the experts' envelope",
        ylim=(0.3, 1.25),
    )
    axes.legend(fontsize=7, ncol=2)
    axes.figure.tight_layout()
    axes.figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for name, run in (("train", train), ("votes", votes), ("table", table)):
        verb = verbs.add_parser(name)
        verb.add_argument("--work", type=Path, required=True, help="routers and votes; may be deleted afterwards")
        verb.set_defaults(run=run)
        if name == "train":
            verb.add_argument("--copies", type=int, default=16)
            verb.add_argument("--tune-copies", type=int, default=200)
            verb.add_argument("--flat-images", type=int, default=2000)
            verb.add_argument("--only", nargs="*", default=[], help="deferral, cascade, flat; nothing: all")
        if name == "votes":
            verb.add_argument("--data", type=Path, default=None)
            verb.add_argument("--images", type=int, default=1000)
            verb.add_argument("--part", default="0/1")
            verb.add_argument("--seed", type=int, default=20260000)
        if name == "table":
            verb.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.run(args)


if __name__ == "__main__":
    main()
