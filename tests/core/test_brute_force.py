"""No point inside a claimed radius changes the routed answer: random trees with closed-form probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from rsrouter.core import Stage, Tree, tree_radius
from tests.helpers.closed_form import ball, random_tree, routed_answer, true_radius_1d, winners

#: Absolute error of a closed-form probability.
ROUNDING = 4e-15


@dataclass
class Tally:
    trees: int = 0
    positive: int = 0
    points: int = 0
    violations: int = 0
    tightness: list[float] = field(default_factory=list)


def claims(rng: np.random.Generator, tree: Tree, models, dim: int):
    """A class and a radius from exact probabilities at 0, sometimes loosened, some stages left out."""
    x = np.zeros((1, dim))
    c = routed_answer(tree, models, x)
    exact = rng.random() < 0.5
    lower, upper, logits, stages = {}, {}, {}, []
    path, name = {}, tree.root
    while isinstance(name, str):
        stage = tree.stages[name]
        path[name] = int(winners(stage, models[name].probabilities(x))[0])
        name = stage.leads_to[path[name]]
    for name, stage in tree.stages.items():
        p = models[name].probabilities(x)
        if not stage.votes:
            if exact or rng.random() < 0.9:
                logits[name] = p + rng.uniform(-1.0, 1.0, p.shape) * stage.rounding
            stages.append(stage)
            continue
        same = np.flatnonzero(stage.answers[: stage.num_outcomes] == c[0])
        if name in path and path[name] < stage.num_outcomes:
            reference = path[name]
        else:
            reference = int(same[0]) if same.size else int(p[0].argmax())
        if not exact and rng.random() < 0.2:
            reference = int(rng.integers(-1, stage.num_outcomes))
        # the probabilities themselves are rounded: 1 - p of 1e-11 is known to five digits only
        slack = ROUNDING if exact else rng.choice([ROUNDING, 0.003, 0.03])
        if exact or rng.random() < 0.9:
            lower[name] = np.clip(p - slack, 0, 1)
            upper[name] = np.clip(p + slack, 0, 1)
        stages.append(Stage(name, stage.sigma, stage.kind, stage.tau, stage.leads_to, reference))
    radius, by = tree_radius(stages, tree.root, lower, upper, c, logits=logits)
    assert by[0] in tree.stages
    return int(c[0]), float(radius[0]), exact


def search(seed: int, trees: int, *, dense: int, tight: bool = True, silent: float = 0.0) -> Tally:
    rng = np.random.default_rng(seed)
    tally = Tally()
    for _ in range(trees):
        dim = int(rng.choice([1, 2, 3]))
        tree, models = random_tree(rng, dim, silent)
        c, radius, exact = claims(rng, tree, models, dim)
        tally.trees += 1
        if not radius > 0.0:
            continue
        tally.positive += 1
        points = ball(rng, models, dim, min(radius, 50.0), dense=dense)
        tally.points += len(points)
        tally.violations += int((routed_answer(tree, models, points) != c).any())
        if tight and dim == 1 and exact and radius < 8.0:  # as far as the truth is searched
            tally.tightness.append(radius / true_radius_1d(tree, models, c))
    return tally


def report(tally: Tally) -> None:
    share = np.array(tally.tightness)
    print(
        f"\n{tally.trees} trees, {tally.positive / tally.trees:.1%} with R > 0, {tally.points} points, "
        f"{tally.violations} violations"
    )
    print(
        f"claimed over true radius (dim 1, exact bounds, {len(share)} trees): median {np.median(share):.3f}, "
        f"mean {share.mean():.3f}, max {share.max():.6f}"
    )


def check(tally: Tally) -> None:
    report(tally)
    assert tally.violations == 0
    assert tally.positive >= 0.3 * tally.trees
    assert max(tally.tightness) <= 1.0 + 1e-9
    assert np.median(tally.tightness) > 0.5


def test_no_point_inside_the_radius_changes_the_answer():
    check(search(20260101, 1200, dense=50))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_no_point_inside_the_radius_changes_the_answer_100k(seed: int):
    check(search(seed, 20_000, dense=250))


def test_no_point_inside_the_radius_of_a_mixed_tree_changes_the_answer():
    check(search(20260102, 800, dense=50, silent=0.5))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_no_point_inside_the_radius_of_a_mixed_tree_changes_the_answer_100k(seed: int):
    check(search(100 + seed, 20_000, dense=250, silent=0.5))


@pytest.mark.parametrize("planted", ["constant understated", "rounding forgotten", "deferral at the lead itself"])
def test_the_search_finds_planted_mistakes_of_deterministic_stages(monkeypatch: pytest.MonkeyPatch, planted: str):
    """A constant that is 5% too small, among others."""
    from rsrouter.core import certificates

    honest = certificates.pass_entries

    def entries(stage, logits):
        if planted == "rounding forgotten":
            return honest(replace(stage, rounding=0.0), logits)
        found = honest(stage, logits)
        if planted == "constant understated":
            return found / 0.95
        if stage.tau is not None:
            found[:, -1] = honest(replace(stage, tau=stage.tau / 2), logits)[:, -1]
        return found

    assert search(7, 400, dense=50, tight=False, silent=0.5).violations == 0
    monkeypatch.setattr(certificates, "pass_entries", entries)
    assert search(7, 400, dense=50, tight=False, silent=0.5).violations > 0


@pytest.mark.parametrize("planted", ["full sigma", "forget deferral", "best of both children"])
def test_the_search_finds_planted_mistakes(monkeypatch: pytest.MonkeyPatch, planted: str):
    """The same search must catch wrong certificates, or its silence means nothing."""
    from rsrouter.core import certificates

    original_entry, original_recursion = certificates.entry_radii, certificates.recursion

    def entry(stage, lower, upper, reference):
        found = original_entry(stage, lower, upper, reference)
        if planted == "full sigma" and stage.kind == "plurality":
            found = found * 1.2
        if planted == "forget deferral" and stage.kind == "threshold":
            found[:, -1] = np.inf
        return found

    def recursion(tree, grouped):
        if planted == "best of both children":
            grouped = {s: np.concatenate([e[:, :1], np.maximum(e[:, 1:], 0.2)], axis=1) for s, e in grouped.items()}
        return original_recursion(tree, grouped)

    monkeypatch.setattr(certificates, "entry_radii", entry)
    monkeypatch.setattr(certificates, "recursion", recursion)
    assert search(7, 400, dense=40, tight=False).violations > 0
