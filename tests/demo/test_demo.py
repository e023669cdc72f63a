"""The bundled assets and the whole path in one call."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import rsrouter.demo.flow as flow
from rsrouter import ExpertPool, ResultsError, RoutedSmooth, Smooth
from rsrouter.demo import SLICES, load_pool, load_router, load_slice, run
from rsrouter.demo.bundled import ASSETS
from rsrouter.files import sha256_of
from rsrouter.results import read_table
from rsrouter.sampling import execution
from rsrouter.training.flat import RECIPES

CARD = Path(__file__).parents[2] / "model_cards/demo"

SMALL = {
    "head_images": 30,
    "head_steps": 20,
    "validation_images": 10,
    "flat_images": 30,
    "label_votes": 20,
    "test_images": 4,
    "n_max": 300,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One run with very few images and votes."""
    patch = pytest.MonkeyPatch()
    patch.setattr(flow, "QUICK", SMALL)
    patch.setitem(execution.BATCH_BYTES, "cpu", 2**17)
    patch.setitem(RECIPES, "dual-rs-head", replace(RECIPES["dual-rs-head"], epochs=2))
    out = tmp_path_factory.mktemp("demo") / "run"
    yield run(out, quick=True, show=False), out, patch
    patch.undo()


def test_bundled_experts_are_small_and_ordinary():
    pool = load_pool()
    assert pool.sigmas == (0.25, 0.5, 1.0)
    for folder in (ASSETS / "experts").iterdir():
        assert (folder / "model.safetensors").stat().st_size <= 1_000_000
    assert all(e.provenance.source == "bundled" for e in pool)


def test_the_bundled_router_is_small_and_over_the_bundled_experts():
    routed = load_router()
    assert [e.digest for e in routed.pool] == [e.digest for e in load_pool()]
    assert sum(file.stat().st_size for file in (ASSETS / "router").iterdir()) <= 1_000_000
    assert any(voter.whole for voter in routed.router.voters)


def test_slices_are_disjoint_and_labelled():
    fingerprints = {name: load_slice(name).fingerprint for name in SLICES}
    assert len(set(fingerprints.values())) == 3
    assert [len(load_slice(name)) for name in SLICES] == [6000, 1000, 1000]


def test_a_run_leaves_everything(small):
    outcome, out, _ = small
    for name in (
        "pool.json",
        "router/config.json",
        "router/router.safetensors",
        "trained/config.json",
        "trained.tsv",
        "dual-rs.tsv",
        "certificates.tsv",
        "certificates.json",
        "report/index.html",
    ):
        assert (out / name).is_file(), name
    header = (out / "certificates.tsv").read_text().splitlines()[0].split("\t")
    assert header[:6] == ["idx", "label", "predict", "radius", "correct", "time"]
    assert len(outcome.routed) == len(outcome.trained) == len(outcome.paper) == 4
    assert (out / "router" / "router.safetensors").read_bytes() == (ASSETS / "router" / "router.safetensors").read_bytes()
    assert len(ExpertPool.load(out / "pool.json")) == 3
    assert json.loads((out / "certificates.json").read_text())["seed_derived"] is True
    assert RoutedSmooth.from_pretrained(out / "router").digest == json.loads((out / "certificates.json").read_text())["digest"]


@pytest.mark.parametrize("name", ["sigma_0.25", "sigma_0.5", "sigma_1"])
def test_the_bundled_tables_are_about_the_bundled_experts(name: str) -> None:
    table = read_table(CARD / "certificates" / f"{name}.tsv", check="counts")
    alone = Smooth(load_pool()[name]).routed
    assert table.metadata["digest"] == alone.digest
    assert table.metadata["terms"]["seed"] == alone.default_seed(table.metadata["seed_from"])


def test_the_bundled_router_is_the_one_of_its_table() -> None:
    routed = RoutedSmooth.from_pretrained(CARD)
    assert routed.digest == load_router().digest
    table = read_table(CARD / "certificates" / "certificates.tsv", check="counts")
    assert (table.metadata["digest"], table.metadata["seed_derived"]) == (routed.digest, True)


def rows_without_time(path):
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return [cells[:5] + cells[6:] for cells in lines]


def test_the_same_seed_gives_the_same_bytes_and_a_stopped_run_goes_on(small, tmp_path, monkeypatch):
    _, out, _ = small
    monkeypatch.setattr(flow, "write_report", lambda tables, folder, **_: folder)  # the first run drew its own
    run(tmp_path / "again", quick=True, show=False)
    assert rows_without_time(tmp_path / "again" / "certificates.tsv") == rows_without_time(out / "certificates.tsv")
    for name in ("trained", "dual-rs"):
        weights = Path(name) / "router.safetensors"
        assert not (out / weights).exists() or (tmp_path / "again" / weights).read_bytes() == (out / weights).read_bytes()
    # cut the table in the middle of a line, and go on
    table = tmp_path / "again" / "certificates.tsv"
    data = table.read_bytes()
    table.write_bytes(data[: len(data) * 2 // 3])
    run(tmp_path / "again", quick=True, show=False)
    assert rows_without_time(table) == rows_without_time(out / "certificates.tsv")


def test_a_folder_of_something_else_is_refused_and_kept(small, tmp_path):
    _, out, _ = small
    with pytest.raises(ResultsError, match="not written by this command"):
        run(out, quick=True, seed=1, show=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ResultsError, match="not written by this command"):
        run(tmp_path / "mine", quick=True, show=False)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_changed_weights_refuse_to_load(small, tmp_path):
    _, out, _ = small
    copy = tmp_path / "router"
    shutil.copytree(out / "router", copy)
    weights = copy / "router.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    before = sha256_of(weights)
    with pytest.raises(Exception, match=r"not the one that was saved|cannot be read"):
        RoutedSmooth.from_pretrained(copy)
    assert sha256_of(weights) == before
