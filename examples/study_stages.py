"""Stages that cost no votes, measured on Fashion-MNIST: a 1-Lipschitz expert in the pool, and a gate that decides in one pass.

    python examples/lipschitz_fashion.py --data /usr/share/datasets/fashion-mnist --out lipschitz-fashion
    python examples/study_stages.py --network lipschitz-fashion/lipschitz.safetensors --out study-stages

The pool is the bundled one. Order and thresholds of every chain, and the scale of the gates' training, are chosen on validation
images alone; what is printed is measured on the test images 500 to 699 of the bundled slice, certified once, at the end. Votes
are drawn once for all classifiers (paired differences). Started again, it goes on with the tables that are there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lipschitz_fashion import forward, network, orthonormal
from safetensors.torch import load_file
from torch import Tensor, nn

from rsrouter import AdaptivePlan, CascadeRouter, Expert, ExpertPool, FlatRouter, RoutedSmooth, Smooth, Terms
from rsrouter.demo import load_pool, load_slice
from rsrouter.experts.lipschitz import compute
from rsrouter.jobs import certify_table
from rsrouter.report.curves import certified_accuracy, coverage, envelope, least_ratio
from rsrouter.results import Table
from rsrouter.sampling.memo import VoteMemo
from rsrouter.training.labels import Labels, label_votes, target_radii
from rsrouter.training.losses import envelope_weights, good_sets, utility_loss

RADII = tuple(np.arange(0.0, 2.01, 0.25).tolist())
TAUS, LEADS = (0.55, 0.65, 0.8, 0.95), (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
SEED = 2026


def lipschitz_expert(weights: Path, pool: ExpertPool) -> Expert:
    """The trained network, with the constant that its weights give."""
    net = network()
    net.load_state_dict(load_file(weights))
    shape = pool.input_shape
    return Expert(net.eval(), lipschitz="compute", num_classes=10, input_shape=shape, name="lipschitz", labels=pool.labels)


def curve(answers: np.ndarray, radius: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Certified accuracy at RADII."""
    held = (answers == labels)[:, None] & (radius[:, None] >= np.maximum(RADII, np.nextafter(0.0, 1.0)))
    return np.asarray(held.mean(0))


class Bench:
    """Certified accuracy and votes of candidates on validation images, whose votes are drawn once."""

    def __init__(self, count: int, n: int) -> None:
        images, labels = load_slice("validation").batch(range(count))
        self.images, self.labels, self.memo = images, np.asarray(labels), VoteMemo()
        self.terms = Terms(AdaptivePlan(n, RADII), seed=SEED)

    def look(self, smoothed: Smooth | RoutedSmooth) -> tuple[np.ndarray, float]:
        smoothed.memo = self.memo
        found = smoothed.certify(self.images, smoothed.routed.within_reach(self.terms), ids=range(len(self.images)))
        answers, radius = np.array([c.predict for c in found]), np.array([c.radius for c in found])
        return curve(answers, radius, self.labels), float(np.mean([c.n_drawn for c in found]))


def score(reached: np.ndarray, best: np.ndarray) -> float:
    """Coverage and least ratio, equally."""
    ratio = reached[best > 0] / best[best > 0]
    return float(ratio.mean() + ratio.min()) / 2


def chains(names: Sequence[str], without: bool) -> list[tuple[tuple[float, ...], tuple[str, ...]]]:
    """Thresholds and order: the voting experts from the largest noise level down, the 1-Lipschitz one first, last or nowhere."""
    found = [(taus, tuple(names)) for taus in product(TAUS, repeat=len(names) - 1)]
    if without:
        return found
    first = [((lead, *taus), ("lipschitz", *names)) for lead in LEADS for taus, _ in found]
    last = [(taus, (*names, "lipschitz")) for taus in product(TAUS, repeat=len(names))]
    return [*found, *first, *last]


def choose(bench: Bench, pool: ExpertPool, candidates: Any, best: np.ndarray) -> list[dict[str, Any]]:
    """Every candidate with what it reaches on validation images, the best first."""
    seen = []
    for thresholds, names in candidates:
        reached, votes = bench.look(RoutedSmooth(pool, CascadeRouter(thresholds, names)))
        told = {"thresholds": list(thresholds), "experts": list(names), "reached": reached.tolist(), "votes": votes}
        seen.append({**told, "score": score(reached, best)})
    return sorted(seen, key=lambda c: -c["score"])


def fit_gate(images: Tensor, labels: Labels, scale: float, seed: int = 0, epochs: int = 30) -> nn.Sequential:
    """A 1-Lipschitz network that names an expert which holds the image: the objective of flat routers, on scaled logits."""
    torch.manual_seed(seed)
    net = network((784, 128, 128, labels.radius.shape[1] + labels.radius.shape[1] % 2))[:]
    good = good_sets(labels.radius, RADII)
    good = torch.cat([good, torch.zeros(*good.shape[:2], net[-1].out_features - good.shape[2])], 2)
    weights = envelope_weights(good)
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(128):
            loss = utility_loss(scale * forward(net, images[rows], 3), good[rows], weights).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                for layer in net:
                    if isinstance(layer, nn.Linear):
                        layer.weight.copy_(orthonormal(layer.weight, 3))
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(orthonormal(layer.weight.double(), 20).float())
        last = net[-1]
        kept = nn.Linear(last.in_features, labels.radius.shape[1])
        kept.weight.copy_(last.weight[: kept.out_features])
        kept.bias.copy_(last.bias[: kept.out_features])
        net[-1] = kept
    return net.eval().requires_grad_(False)


def gates(pool: ExpertPool, bench: Bench, best: np.ndarray, count: int, out: Path) -> dict[str, RoutedSmooth]:
    """A gate that votes at the largest noise level and one that decides in one pass: equal networks, trained alike."""
    images, classes = load_slice("train").batch(range(count))
    file = out / "labels.npy"
    if not file.exists():
        np.save(file, label_votes(pool, images, n=50, seed=0))
    labels = target_radii(np.load(file), np.asarray(classes), pool.sigmas, plan_n=10_000, alpha=1e-3)
    found: dict[str, RoutedSmooth] = {}
    told: dict[str, Any] = {}
    for kind in ("one pass", "votes"):
        tried = []
        for scale in (4.0, 16.0):
            noisy = images if kind == "one pass" else images + pool.sigmas[-1] * torch.randn(
                images.shape, generator=torch.Generator().manual_seed(1)
            )  # fmt: skip
            net = fit_gate(noisy, labels, scale)
            if kind == "one pass":
                known = compute(net, pool.input_shape)
                router = FlatRouter(net, lipschitz=known.constants, rounding=known.rounding)
            else:
                router = FlatRouter(net, sigma=pool.sigmas[-1])
            routed = RoutedSmooth(pool, router)
            reached, votes = bench.look(routed)
            tried.append((score(reached, best), scale, reached.tolist(), votes, routed))
        top = max(tried, key=lambda t: t[0])
        found[f"gate, {kind}"] = top[-1]
        told[kind] = [t[:-1] for t in tried]
    (out / "gates.json").write_text(json.dumps(told, indent=1))
    return found


def cheapest(candidates: list[dict[str, Any]], against: dict[str, Any], images: int) -> dict[str, Any] | None:
    """Of the chains with the 1-Lipschitz network first that lose at most one image at any radius, the one with fewest votes."""
    wanted = np.array(against["reached"]) - 1.01 / images
    equal = [c for c in candidates if c["experts"][0] == "lipschitz" and np.all(np.array(c["reached"]) >= wanted)]
    return min(equal, key=lambda c: c["votes"], default=None)


def line(name: str, table: Table, old: list[Table], new: list[Table]) -> str:
    accuracy = certified_accuracy(table, RADII).accuracy
    cells = " | ".join(f"{100 * a:.1f}" for a in accuracy)
    against = [f"{coverage(table, pool, RADII):.3f} | {least_ratio(table, pool, RADII)[0]:.3f}" for pool in (old, new)]
    return f"| {name} | {cells} | {' | '.join(against)} | {table.n_drawn.mean():,.0f} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", type=Path, required=True, help="lipschitz.safetensors of lipschitz_fashion.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--validation", type=int, default=150, help="images that choices are made on")
    parser.add_argument("--labelled", type=int, default=800, help="training images of the gates")
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--tune-n", type=int, default=2000)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--radii", type=float, nargs=2, default=(2.0, 0.25), metavar=("LAST", "STEP"), help="from 0 on")
    args = parser.parse_args(arguments)
    global RADII
    RADII = tuple(np.arange(0.0, args.radii[0] + 1e-9, args.radii[1]).tolist())
    args.out.mkdir(parents=True, exist_ok=True)
    voting = load_pool()
    lip = lipschitz_expert(args.network, voting)
    mixed = ExpertPool([*voting, lip])
    names = tuple(reversed(voting.names))
    bench = Bench(args.validation, args.tune_n)
    alone = {e.name: bench.look(Smooth(e))[0] for e in mixed}
    old, new = (np.max([alone[n] for n in pool.names], axis=0) for pool in (voting, mixed))
    file = args.out / "choice.json"
    if not file.exists():
        plain = choose(bench, voting, chains(names, True), old)
        joined = choose(bench, mixed, chains(names, False), new)
        chosen = {"without": plain[0], "with": joined[0], "as much, fewest votes": cheapest(joined, plain[0], args.validation)}
        file.write_text(json.dumps({"alone": {k: v.tolist() for k, v in alone.items()}, "chosen": chosen}, indent=1))
    chosen = json.loads(file.read_text())["chosen"]
    routers: dict[str, Smooth | RoutedSmooth] = {e.name: Smooth(e) for e in mixed}
    for name, found in chosen.items():
        if found is not None:
            cascade = CascadeRouter(found["thresholds"], found["experts"])
            routers[f"chain {name}"] = RoutedSmooth(mixed if "lipschitz" in found["experts"] else voting, cascade)
    routers |= gates(voting, bench, old, args.labelled, args.out)
    test, memo, tables = load_slice("test"), VoteMemo(), {}
    rows, terms = range(500, 500 + args.test), Terms(AdaptivePlan(args.n, RADII), seed=SEED)
    for name, smoothed in routers.items():
        smoothed.memo = memo
        path = args.out / f"{name.replace(' ', '_').replace(',', '')}.tsv"
        asked = smoothed.routed.within_reach(terms)
        tables[name] = certify_table(smoothed, test, path, asked, indices=rows, name=name, data={"name": "bundled test slice"})
        print(name, "done", flush=True)
    old_tables, new_tables = ([tables[n] for n in pool.names] for pool in (voting, mixed))
    head = " | ".join(f"r = {r:g}" for r in RADII)
    lines = [
        f"| classifier | {head} | coverage, old pool | least | coverage, with lipschitz | least | votes |",
        "|" + "---|" * (len(RADII) + 6),
        *(line(name, table, old_tables, new_tables) for name, table in tables.items()),
    ]
    best = [envelope(pool, RADII) for pool in (old_tables, new_tables)]
    lines += [
        f"| envelope, {who} | {' | '.join(f'{100 * a:.1f}' for a in reached)} | | | | | |"
        for who, reached in zip(("old pool", "with lipschitz"), best, strict=True)
    ]
    text = "\n".join(lines)
    (args.out / "table.md").write_text(text + "\n")
    print(text)
    print(json.dumps({k: v and {"experts": v["experts"], "thresholds": v["thresholds"]} for k, v in chosen.items()}))


if __name__ == "__main__":
    main()
