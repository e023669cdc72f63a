"""Routing between experts that are known by their certification tables only: the tree's recursion, and the study's report.

Used by `study_published_tables.py`. With router votes and the experts' published radii the recursion of the tree certificate
(`rsrouter.core.certificates`) needs nothing else: a leaf answers its table's class, and holds it as far as the table says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rsrouter.core.bounds import LOWER_SHARE
from rsrouter.core.certificates import entry_radii, group_entries, no_entries, recursion
from rsrouter.core.estimates import stage_bounds
from rsrouter.core.tree import Stage, Tree, expert_stage
from rsrouter.core.types import ABSTAIN
from rsrouter.report import curves
from rsrouter.report.regret import by_stage, losses
from rsrouter.results import Table, align, read_table

RADII = np.arange(0.0, 2.51, 0.25)
COVERED = RADII[RADII <= 2.0]
N0, N, ALPHA = 100, 10_000, 1e-3
COARSE, FINE = 1.0, 0.5
FLAT = ("flat-dual-rs", "flat-coverage")
#: Estimation votes: per image the fewest that should lose nothing, decided on the selection votes.
LOOKS = (1_000, 3_000, N)
BASELINE = "flat, Dual RS recipe, min rule"
WARNING = "estimates of routing quality, no certificates"


def table_paths(folder: Path) -> dict[str, Path]:
    """Expert name to its table, by sigma."""
    found = sorted(folder.rglob("sigma_*.tsv"), key=lambda p: float(p.stem.removeprefix("sigma_")))
    if len(found) < 2:
        raise SystemExit(f"{folder} holds fewer than two sigma_*.tsv")
    return {path.stem: path for path in found}


def sigma_of(name: str) -> float:
    return float(name.removeprefix("sigma_"))


def rows_of(idx: np.ndarray, part: Sequence[int]) -> np.ndarray:
    """Positions of the images whose row number falls into `part` (modulo 10)."""
    return np.flatnonzero(np.isin(idx % 10, part))


def read_tables(paths: Mapping[str, Path]) -> list[Table]:
    return align([read_table(path, name=name) for name, path in paths.items()], common=True)


def flat_of(names: Sequence[str]) -> Tree:
    return Tree.of([Stage("router", COARSE, "plurality", None, (*names, ABSTAIN)), *leaves(names)])


def two_level(names: Sequence[str]) -> Tree:
    """Coarse to fine: at sigma 1.0 the largest expert or on, at 0.5 one of the others."""
    coarse = Stage("coarse", COARSE, "plurality", None, (names[-1], "fine", ABSTAIN))
    return Tree.of([coarse, Stage("fine", FINE, "plurality", None, (*names[:-1], ABSTAIN)), *leaves(names)])


def leaves(names: Sequence[str]) -> list[Stage]:
    return [expert_stage(name, sigma_of(name), 10) for name in names]


def entries(stage: Stage, counts: np.ndarray, reference: np.ndarray, c: np.ndarray, alpha: float) -> np.ndarray:
    """Entry radii `(N, L + 1)` of a router stage; 0 where it was not sampled."""
    out = np.zeros(counts.shape)
    drawn = np.flatnonzero(counts.sum(1))
    if drawn.size:
        some, n = counts[drawn], counts[drawn].sum(1)
        level = np.full(len(drawn), alpha)
        bounds = stage_bounds(stage, some, n, reference[drawn], c[drawn], level, sides="two", lower_share=LOWER_SHARE)
        out[drawn] = entry_radii(stage, bounds.lower, bounds.upper, reference[drawn])
    return out


def estimate(
    tree: Tree,
    experts: Sequence[Table],
    select: Mapping[str, np.ndarray],
    estimates: Mapping[str, np.ndarray],
    *,
    rule: str = "tree",
    name: str = "routed",
) -> Table:
    """What routing would hold: the tree's recursion, with V = an expert's table radius where it predicts c, else 0.

    Args:
        tree: router stages over stages named like `experts`.
        experts: their tables, the same images in the same order.
        select, estimates: router stage to its votes `(N, L + 1)`, invalid ones last; a row of zeros was not sampled.
        rule: `"tree"` (agreement), or `"min"` (Dual RS: everything but the selected path counts as unsampled).

    The router spends ALPHA along a path (split evenly over its stages) and each table its own 0.001 on top.
    """
    first, count = experts[0], len(experts[0])
    position = {t.name: k for k, t in enumerate(experts)}
    routers = [s for s in reversed(tree.order) if s not in position]
    depth = max(sum(s in routers for s in path) for path in tree.paths)
    at = np.full(count, tree.root, dtype=object)
    on = {}
    for s in routers:
        on[s] = at == s
        target = np.array([*tree.stages[s].leads_to], dtype=object)[select[s].argmax(1)]
        at = np.where(on[s], target, at)
    chosen = np.array([position.get(a, -1) for a in at])
    rows = np.arange(count)
    predict, radius = (np.stack([getattr(t, column) for t in experts], axis=1) for column in ("predict", "radius"))
    c = np.where(chosen >= 0, predict[rows, chosen], ABSTAIN)
    grouped, path_only = {}, {}
    for s in tree.order:
        stage = tree.stages[s]
        if s in position:
            k = position[s]
            held = np.where((predict[:, k] == c) & (c > ABSTAIN), radius[:, k], 0.0)
            grouped[s] = (held if rule == "tree" else np.where(chosen == k, held, 0.0))[:, None]
            path_only[s] = np.where(chosen == k, np.inf, 0.0)[:, None]
            continue
        entry = entries(stage, estimates[s], select[s].argmax(1), c, ALPHA / depth)
        alone = np.where(on[s][:, None], group_entries(stage, entry, c), no_entries(stage, c))
        grouped[s], path_only[s] = (group_entries(stage, entry, c) if rule == "tree" else alone), alone
    reached, by = recursion(tree, grouped)
    router_alone, _ = recursion(tree, path_only)
    reached = np.where((c > ABSTAIN) & (reached > 0.0), reached, 0.0)
    answer = np.where(reached > 0.0, c, ABSTAIN)
    return replace(
        first.renamed(name),
        metadata={"role": "routed", "what": "estimate of routing quality from published tables, no certificate"},
        predict=answer,
        radius=reached,
        correct=(answer == first.label).astype(np.int64),
        expert=np.where(chosen >= 0, at, "").astype(object),
        rule=np.full(count, rule, dtype=object),
        r_router=router_alone,
        r_expert=np.where(chosen >= 0, radius[rows, chosen], 0.0),
        bound_by=np.array(tree.order, dtype=object)[by],
    )


def votes_that_pay(held: Sequence[Table], select: Mapping[str, np.ndarray], looks: Sequence[int]) -> np.ndarray:
    """Per image the fewest of `looks` estimation votes that should lose less than 0.02 of radius in every method.

    Decided on selection votes alone, before any estimation vote, so the binomial bounds at that n hold as they stand.
    """
    names = [t.name for t in held]
    n0 = int(next(iter(select.values()))[0].sum())
    trees = [(flat_of(names), {"router": key}) for key in FLAT] + [(two_level(names), {"coarse": "coarse", "fine": "fine"})]

    def hoped(n: int) -> np.ndarray:
        votes = {key: counts * (n // n0) for key, counts in select.items()}
        return np.stack([estimate(tree, held, {s: select[k] for s, k in stages.items()},
                                  {s: votes[k] for s, k in stages.items()}).radius for tree, stages in trees])  # fmt: skip

    most = hoped(looks[-1])
    enough = np.stack([(most - hoped(n)).max(0) < 0.02 for n in looks])
    return np.asarray(looks)[enough.argmax(0)]


def methods(experts: Sequence[Table], found: Mapping[str, np.ndarray]) -> list[Table]:
    """Every routed method on one set of router votes."""
    names = [t.name for t in experts]
    flat, two = flat_of(names), two_level(names)

    def votes(**stages: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        return tuple({s: found[f"{what}/{key}"] for s, key in stages.items()} for what in ("select", "estimate"))  # type: ignore[return-value]

    def made(tree: Tree, name: str, rule: str, **stages: str) -> Table:
        return estimate(tree, experts, *votes(**stages), rule=rule, name=name)

    return [
        made(flat, BASELINE, "min", router="flat-dual-rs"),
        made(flat, "flat, Dual RS recipe, agreement", "tree", router="flat-dual-rs"),
        made(flat, "flat, coverage recipe, min rule", "min", router="flat-coverage"),
        made(flat, "flat, coverage recipe, agreement", "tree", router="flat-coverage"),
        made(two, "coarse to fine, min rule", "min", coarse="coarse", fine="fine"),
        made(two, "coarse to fine, agreement", "tree", coarse="coarse", fine="fine"),
    ]


def report(experts: Sequence[Table], routed: Sequence[Table]) -> tuple[str, dict]:
    """The study's table as Markdown, and its numbers."""
    envelope = curves.envelope(experts, RADII)
    base = next(t for t in routed if t.name == BASELINE)
    lines = [
        f"{len(experts[0])} evaluation rows of the test split; {WARNING.upper()}. Share of images held at each radius in %; "
        "brackets: 95% bootstrap intervals over images (2,000 resamples), differences paired over images.",
        "",
        "| | "
        + " | ".join(f"{r:g}" for r in RADII)
        + " | abstains | coverage 0 to 2 | less the first routed row | least ratio | ACR |",
        "|---" * (len(RADII) + 6) + "|",
    ]
    numbers: dict = {"images": len(experts[0]), "radii": RADII.tolist(), "what": WARNING, "methods": {}}

    def add(name: str, values: np.ndarray, *rest: str) -> None:
        cells = [f"{100 * v:.1f}" if v > 0 else "" for v in values]
        lines.append(f"| {name} | " + " | ".join([*cells, *rest]) + " |")

    for t in experts:
        curve = curves.certified_accuracy(t, RADII)
        acr, gone = curves.average_certified_radius(t), curves.abstention_rate(t)
        add(f"expert {t.name}", curve.accuracy, f"{100 * gone:.1f}", "", "", "", f"{acr:.3f}")
        numbers["methods"][t.name] = {"share": curve.accuracy.tolist(), "abstains": gone, "acr": acr}
    add("best expert at each radius (envelope)", envelope, "", "1", "", "1", "")
    best = curves.oracle(experts, RADII)
    some = curves.envelope(experts, COVERED)
    ratio = best[: len(COVERED)] / some
    add("oracle (knows the label)", best, "", f"{ratio.mean():.3f}", "", f"{ratio.min():.3f}", "")
    numbers["envelope"], numbers["oracle"] = envelope.tolist(), best.tolist()
    for t in routed:
        curve = curves.certified_accuracy(t, RADII)
        cover, spread = curves.coverage(t, experts, COVERED), curves.coverage_interval(t, experts, COVERED)
        least = float((curve.accuracy[: len(COVERED)] / some).min())
        gain = None if t is base else curves.coverage_difference(t, base, experts, COVERED)
        acr, gone = curves.average_certified_radius(t), curves.abstention_rate(t)
        add(
            t.name,
            curve.accuracy,
            f"{100 * gone:.1f}",
            f"{cover:.3f} [{spread[0]:.3f}, {spread[1]:.3f}]",
            "" if gain is None else f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]",
            f"{least:.3f}",
            f"{acr:.3f}",
        )
        numbers["methods"][t.name] = {
            "share": curve.accuracy.tolist(),
            "low": curve.low.tolist(),
            "high": curve.high.tolist(),
            "abstains": gone,
            "coverage": cover,
            "coverage_interval": list(spread),
            "coverage_less_baseline": gain,
            "least_ratio": least,
            "acr": acr,
        }
    return "\n".join(lines) + "\n", numbers


def costs(experts: Sequence[Table], routed: Sequence[Table]) -> tuple[str, dict]:
    """What drives it: mean radius lost by choosing another expert and by holding the choice, by the stage that limits it."""
    lines = [
        "Mean radius lost against each image's best expert (0 where wrong): routing regret (another expert was better) and loss "
        "of the routed radius against the chosen expert's own; by the stage that limits the radius.",
        "",
        "| | limited by | images, % | mean radius | routing regret | loss |",
        "|---|---|---|---|---|---|",
    ]
    numbers: dict = {}
    for t in routed:
        rows = by_stage(losses(t, experts))
        numbers[t.name] = [vars(row) for row in rows]
        lines += [
            f"| {t.name} | {row.stage} | {100 * row.share:.1f} | {row.routed:.3f} | {row.regret:.3f} | {row.loss:+.3f} |"
            for row in rows
        ]
    return "\n".join(lines) + "\n", numbers


def write(out: Path, experts: Sequence[Table], routed: Sequence[Table]) -> str:
    """`table.md`, `table.json`, `curve.csv`, and curves and losses as SVG into `out`; returns the Markdown."""
    from rsrouter.report.charts import curve_file, lost_file
    from rsrouter.report.overview import curve_csv
    from rsrouter.report.summary import summarise

    text, numbers = report(experts, routed)
    more, numbers["costs"] = costs(experts, routed)
    text += "\n" + more
    shown = [routed[0], routed[1], routed[-1]]
    summary = summarise([*shown, *experts], routed=[t.name for t in shown], experts=[t.name for t in experts], radii=COVERED)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text)
    (out / "table.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (out / "curve.csv").write_bytes(curve_csv(summary))
    (out / "curve.svg").write_bytes(curve_file(summary, "Routing between published CIFAR-10 experts: estimates, no certificates"))
    best = max(routed, key=lambda t: curves.coverage(t, experts, COVERED))
    (out / "losses.svg").write_bytes(lost_file(losses(best, experts), f"{best.name}: estimates, no certificates"))
    return text
