"""A router with a deterministic gate and a deterministic expert: certified, written, read, edited, audited."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rsrouter import Expert, ExpertPool, FixedPlan, FlatRouter, InputError, IntegrityError, NetworkError, RoutedSmooth, Smooth
from rsrouter.audit import audit
from rsrouter.core import ABSTAIN
from rsrouter.experts.lipschitz import compute
from rsrouter.jobs import label_table
from rsrouter.results import read_table, require_sound
from tests.helpers import small_router as small

COUNT = 10


def silent(name: str = "silent") -> Expert:
    made = small.expert(0.5, tilt=0.01)
    return Expert(made.module, lipschitz="compute", num_classes=small.CLASSES, input_shape=small.SHAPE, name=name)


def gated() -> RoutedSmooth:
    module = small.router_module()
    found = compute(module, small.SHAPE)
    router = FlatRouter(module, lipschitz=found.constants, rounding=found.rounding, experts=["sigma_0.25", "silent"])
    return RoutedSmooth(ExpertPool([small.expert(0.25), silent()]), router)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gated")
    small.run_folder(gated(), folder, small.images(COUNT))
    return folder


@pytest.fixture
def run(clean: Path, tmp_path: Path) -> Path:
    shutil.copytree(clean, tmp_path / "run")
    return tmp_path / "run"


def change_logits(run: Path, by: float, *, recompute: bool) -> None:
    """Adds `by` to the gate's first logit in the first row, which raises what follows from it."""
    path = run / "certificates.tsv"
    cells = [line.split("\t") for line in path.read_text().splitlines()]
    counts = json.loads(cells[1][-1])
    counts["logits"]["router"][0] += by
    cells[1][-1] = json.dumps(counts, separators=(",", ":"))
    if recompute:
        table = read_table(path).take(np.array([0]))
        about = table.described()
        from rsrouter.core.recompute import recompute as again

        made = again(about.tree.tree, about.plan, about.split, [counts], rule=about.rule, sides=about.sides)[0]
        names = cells[0]
        for key in ("radius", "r_router", "r_expert"):
            cells[1][names.index(key)] = f"{np.floor(getattr(made, key) * 1e8) / 1e8:.8f}"
        cells[1][names.index("bound_by")] = made.bound_by
    path.write_text("\n".join("\t".join(row) for row in cells) + "\n")


def test_rows_follow_from_their_logits_and_an_edited_one_does_not(run: Path) -> None:
    table = require_sound(read_table(run / "certificates.tsv"))
    assert (table.radius > 0).sum() >= 5
    assert "logits" in str(table.counts_text[0])
    change_logits(run, 0.2, recompute=False)
    with pytest.raises(IntegrityError, match="do not follow"):
        require_sound(read_table(run / "certificates.tsv"))


def test_an_audit_passes_and_finds_logits_that_the_network_does_not_give(run: Path) -> None:
    data = small.images(COUNT)
    report = audit(run, data=data, rows=None, seed=1)
    assert report.ok, report.findings
    assert report.complete
    assert [c.status for c in report.checks if c.name == "passes"] == ["passed"]
    change_logits(run, 0.2, recompute=True)
    require_sound(read_table(run / "certificates.tsv"))  # the row follows from its logits
    failed = {c.name for c in audit(run, data=data, rows=None, seed=1).checks if c.status == "failed"}
    assert failed == {"passes"}


def test_a_constant_edited_in_the_metadata_is_found(run: Path) -> None:
    path = next(p for p in run.glob("certificates*.json"))
    content = json.loads(path.read_text())
    for stage in content["tree"]["stages"]:
        if stage["name"] == "router":
            stage["lipschitz"] = [[0.95 * v for v in row] for row in stage["lipschitz"]]
    path.write_text(json.dumps(content))
    failed = {c.name for c in audit(run, data=small.images(COUNT), rows=None, seed=1).checks if c.status == "failed"}
    assert "digests" in failed


def test_a_loaded_router_is_the_saved_one(clean: Path) -> None:
    loaded = RoutedSmooth.from_pretrained(clean / "router" if (clean / "router").exists() else clean)
    assert loaded.digest == gated().digest


def test_one_expert_needs_no_votes() -> None:
    x, labels = small.images(6).tensors()
    made = Smooth(silent())
    found = made.certify(x, FixedPlan(10, 100))
    assert [c.n_drawn for c in found] == [0] * 6
    assert sum(c.predict == int(v) for c, v in zip(found, labels, strict=True)) >= 5
    assert max(c.radius for c in found) > 0.1
    answers = made.predict(x, n=10)
    assert all(a in (c.predict, ABSTAIN) for a, c in zip(answers.tolist(), found, strict=True) if c.predict >= 0)
    assert "one pass without noise" in made.describe()


def test_nan_never_certifies() -> None:
    class Sometimes(nn.Module):
        def forward(self, x):
            z = x.flatten(1)[:, :3]
            return torch.where(x.flatten(1)[:, :1] == 1.0, torch.nan, z)

    expert = Expert(Sometimes(), lipschitz=2.0, num_classes=3, input_shape=small.SHAPE)
    x = torch.full((2, *small.SHAPE), 0.2)
    x[0, 0, 0, 1] = 0.9
    x[1, 0, 0, 0] = 1.0
    found = Smooth(expert).certify(x, FixedPlan(10, 10))
    assert found[0].radius > 0
    assert (found[1].predict, found[1].radius) == (ABSTAIN, 0.0)
    assert Smooth(expert).predict(x, n=5).tolist() == [1, ABSTAIN]


def test_a_network_that_looks_at_its_batch_is_refused() -> None:
    class Centred(nn.Module):
        def forward(self, x):
            return 1e-7 * (x.flatten(1)[:, :3] - x.flatten(1)[:, :3].mean(0, keepdim=True))

    expert = Expert(Centred(), lipschitz=2.0, num_classes=3, input_shape=small.SHAPE)
    with pytest.raises(NetworkError, match="rest of the batch"):
        Smooth(expert).certify(torch.rand(2, *small.SHAPE), FixedPlan(10, 10))


def test_what_needs_votes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kind of noise"):
        Smooth(silent(), noise="sound")
    with pytest.raises(InputError, match="casts no votes"):
        label_table(ExpertPool([small.expert(0.25), silent()]), small.images(4), tmp_path / "labels.npz", n=10)


def test_a_router_takes_noise_or_a_constant() -> None:
    for settings in ({"sigma": 0.5}, {"trunk": "silent"}):
        with pytest.raises(InputError, match="noise level or a trunk"):
            FlatRouter(small.router_module(), lipschitz=1.0, **settings)
