"""The study on published tables: its arithmetic by hand, and its quick form on synthetic tables from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rsrouter.core.bounds import LOWER_SHARE, binom_lower, binom_upper
from rsrouter.core.certificates import vote_radius
from rsrouter.experts import Expert
from rsrouter.experts.small_resnet import SmallResNet
from rsrouter.results import Table
from rsrouter.sampling import Engine

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("sigma_0.25", "sigma_0.50", "sigma_1.00")


@pytest.fixture(scope="module")
def study() -> tuple[object, object]:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import published_tables
        import study_published_tables
    finally:
        sys.path.remove(str(EXAMPLES))
    return published_tables, study_published_tables


def write_tables(folder: Path, count: int, seed: int = 0) -> None:
    """Tables in the field's format: larger sigma, fewer right answers, larger radii."""
    rng = np.random.default_rng(seed)
    hard = rng.random(count)
    for name, ease, reach in zip(NAMES, (0.9, 0.75, 0.6), (0.9, 1.6, 2.4), strict=True):
        lines = ["idx\tlabel\tpredict\tradius\tcorrect\ttime"]
        for i in range(count):
            margin = ease - hard[i] + 0.1 * rng.standard_normal()
            label = i % 10
            predict = label if margin > 0 else (-1 if margin > -0.1 else (label + 1) % 10)
            radius = 0.0 if predict < 0 else min(reach, abs(margin) * 2 * reach)
            lines.append(f"{i}\t{label}\t{predict}\t{radius:.3}\t{int(predict == label)}\t0:00:01.0")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")


def entry(sigma: float, chosen: int, rival: int, n: int, alpha: float) -> float:
    """By the formula of DESIGN section 3, in plain scipy."""
    lower = binom_lower(chosen, n, alpha * LOWER_SHARE)
    upper = np.minimum(binom_upper(rival, n, alpha * (1 - LOWER_SHARE)), 1 - lower)
    return float(vote_radius(sigma, lower, upper))


def test_estimates_by_hand(study, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tables, _ = study
    # image 0: all agree; 1: the chosen one is right, the others wrong; 2: the chosen one abstains; 3: a clear router
    rows = {
        NAMES[0]: [(7, 0.6), (1, 0.5), (4, 0.3), (2, 0.4)],
        NAMES[1]: [(7, 0.9), (1, 0.5), (4, 0.3), (3, 0.9)],
        NAMES[2]: [(7, 1.5), (5, 2.0), (-1, 0.0), (3, 1.8)],
    }
    for name, cells in rows.items():
        lines = [f"{i}\t{(7, 5, 4, 3)[i]}\t{p}\t{r}\t{int(p == (7, 5, 4, 3)[i])}\t0:00:01" for i, (p, r) in enumerate(cells)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["idx\tlabel\tpredict\tradius\tcorrect\ttime", *lines]) + "\n")
    experts = tables.read_tables(tables.table_paths(tmp_path))
    select = {"router": np.array([[0, 30, 70, 0], [0, 40, 60, 0], [0, 0, 100, 0], [0, 0, 100, 0]])}
    votes = {"router": np.array([[100, 3900, 6000, 0], [0, 4000, 6000, 0], [0, 0, 10_000, 0], [0, 0, 10_000, 0]])}
    near = {k: entry(1.0, 6000, k, 10_000, 1e-3) for k in (0, 100, 3900, 4000)}
    sure = entry(1.0, 10_000, 0, 10_000, 1e-3)
    tree = tables.estimate(tables.flat_of(NAMES), experts, select, votes)
    least = tables.estimate(tables.flat_of(NAMES), experts, select, votes, rule="min")
    assert tree.predict.tolist() == [7, 5, -1, 3]
    # agreement: every expert says 7, so each holds what it holds even where the router might name it
    assert tree.radius[0] == pytest.approx(min(1.5, max(near[100], 0.6), max(near[3900], 0.9)), abs=1e-9)
    assert least.radius[0] == pytest.approx(min(1.5, near[3900], near[0]), abs=1e-9)
    assert tree.radius[1] == least.radius[1] == pytest.approx(near[4000], abs=1e-9)
    assert tree.radius[2] == 0.0
    assert tree.radius[3] == pytest.approx(min(1.8, sure), abs=1e-9)
    assert tree.correct.tolist() == [1, 1, 0, 1]
    assert tree.expert.tolist() == [NAMES[2]] * 4
    assert tree.r_router[1] == pytest.approx(near[4000], abs=1e-9)
    assert tree.bound_by.tolist()[1] == "router"
    # two levels: each stage at half of the router's alpha; a fine stage without votes contributes 0
    two = tables.two_level(NAMES)
    select2 = {"coarse": np.array([[20, 80, 0]] * 4), "fine": np.array([[90, 10, 0]] * 4)}
    votes2 = {"coarse": np.array([[1000, 9000, 0]] * 4), "fine": np.array([[9500, 500, 0]] * 4)}
    found = tables.estimate(two, experts, select2, votes2)
    up, down = entry(1.0, 9000, 1000, 10_000, 5e-4), entry(0.5, 9500, 500, 10_000, 5e-4)
    below = min(0.6, max(down, 0.9))
    assert found.predict.tolist() == [7, 1, 4, 2]
    assert found.radius[0] == pytest.approx(min(max(up, 1.5), max(0.0, below)), abs=1e-9)
    empty = tables.estimate(two, experts, select2, {**votes2, "fine": np.zeros((4, 3), dtype=np.int64)})
    assert empty.radius[3] == 0.0
    assert (empty.radius <= found.radius).all()


def test_agreement_is_never_below_the_min_rule(study, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tables, _ = study
    write_tables(tmp_path, 200)
    experts = tables.read_tables(tables.table_paths(tmp_path))
    rng = np.random.default_rng(1)
    shares = rng.dirichlet([0.4] * 3, 200)
    select = {"router": np.pad(rng.multinomial(100, shares), ((0, 0), (0, 1)))}
    votes = {"router": np.pad(rng.multinomial(1000, shares), ((0, 0), (0, 1)))}
    both = [tables.estimate(tables.flat_of(NAMES), experts, select, votes, rule=rule) for rule in ("tree", "min")]
    assert (both[0].radius >= both[1].radius).all()
    assert (both[0].radius > both[1].radius + 0.1).any()
    held = np.stack([t.radius * (t.predict == both[0].predict) for t in experts])
    assert (both[0].radius <= held.max(0) + 1e-12).all()


def test_the_quick_form_on_synthetic_tables(study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    tables, script = study
    write_tables(tmp_path, 120)
    paths = tables.table_paths(tmp_path)
    held = tables.read_tables(paths)
    monkeypatch.setattr(script, "CANDIDATES", (("coverage", 5.0),))
    monkeypatch.setattr(script, "SHARES", (0.2, 0.5))
    monkeypatch.setitem(script.RECIPES, "coverage", script.replace(script.RECIPES["coverage"], epochs=2, check=1))
    monkeypatch.setitem(script.RECIPES, "dual-rs-head", script.replace(script.RECIPES["dual-rs-head"], epochs=2, check=1))
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.random((120, 3, 8, 8), dtype=np.float32))
    trunk = {}
    for sigma in (tables.COARSE, tables.FINE):
        torch.manual_seed(0)
        module = SmallResNet(10, in_channels=3, width=4, blocks=[[8, 2]]).eval()
        trunk[sigma] = Expert(module, sigma=sigma, num_classes=10, input_shape=(3, 8, 8), name=f"trunk_{sigma:.2f}")
    idx, _, labels = script.labels_from_tables(list(paths.values()))
    parts = {name: tables.rows_of(idx, part) for name, part in (("train", script.TRAIN), ("validation", script.VALIDATION))}
    assert [len(r) for r in parts.values()] == [72, 12]
    evaluated = tables.rows_of(idx, script.EVALUATION)
    assert not set(evaluated) & (set(parts["train"]) | set(parts["validation"]))
    chosen, log = script.choose(
        trunk,
        list(paths),
        {n: pixels[r] for n, r in parts.items()},
        {n: labels.radius[r] for n, r in parts.items()},
        [t.take(parts["validation"]) for t in held],
        10,
    )
    assert set(log) == {"flat-dual-rs", "flat-coverage", "two-level"}
    script.save_heads(tmp_path, chosen)
    models = script.vote_models(trunk, script.load_heads(tmp_path))
    engine = Engine(models, (3, 8, 8), seed=0)
    experts: list[Table] = [t.take(evaluated) for t in held]
    found = script.draw(engine, models, pixels[evaluated], experts, 20, (100, 200))
    assert set(found["estimate/coarse"].sum(1)) <= {100, 200}
    assert found["select/fine"].sum(1).tolist() == [20] * len(evaluated)
    text = tables.write(tmp_path / "out", experts, tables.methods(experts, found))
    assert "NO CERTIFICATES" in text
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"table.md", "table.json", "curve.svg", "curve.csv", "losses.svg"}
    numbers = json.loads((tmp_path / "out" / "table.json").read_text())
    assert numbers["images"] == 36
    least, agreement = (numbers["methods"][f"flat, Dual RS recipe, {rule}"] for rule in ("min rule", "agreement"))
    assert all(a >= b for a, b in zip(agreement["share"], least["share"], strict=True))
    assert agreement["coverage_less_baseline"][0] == pytest.approx(agreement["coverage"] - least["coverage"])
    assert "certif" not in (tmp_path / "out" / "table.md").read_text().lower().replace("no certificates", "")
