"""The study over one denoiser and one classifier runs from training to its table, with little of everything."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rsrouter import AdaptivePlan
from rsrouter.cli import main
from rsrouter.training.deferral import DeferralRecipe
from rsrouter.training.flat import RECIPES, Recipe
from rsrouter.training.heads import HeadRecipe

pytestmark = pytest.mark.libraries
pytest.importorskip("diffusers")
FOLDER = Path(__file__).resolve().parents[2] / "examples"
COUNTS = {"experts": 200, "train": 60, "validation": 20, "test": 4}


def pictures(data: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Ten classes that differ in colour and brightness."""
    rng, labels = np.random.default_rng(len(name)), np.arange(COUNTS[name]) % 10
    images = rng.integers(40, 90, (len(labels), 3, 32, 32))
    images[np.arange(len(labels)), labels % 3] += 50 * (labels // 3)[:, None, None]
    return images.astype(np.uint8), labels.astype(np.int64)


def test_from_two_networks_to_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_batches: None) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    shared, study = importlib.import_module("routing_study"), importlib.import_module("study_denoised")
    radii = tuple(shared.RADII[:3])
    for module, name, value in (
        (shared, "plan", lambda n: AdaptivePlan(120, radii, n0=20)),
        (shared, "RADII", np.array(radii)),
        (shared, "COVERED", np.ones(len(radii), bool)),
        (shared, "RESAMPLES", 50),
        (study, "SHARDS", 2),
        (study, "read_cifar", pictures),
        (importlib.import_module("study_cifar10"), "read_cifar", pictures),
        (study, "BATCH", 20),
        (study, "RECIPE", DeferralRecipe(copies=2, tune_copies=20, levels=(1.1,), heads=(HeadRecipe(steps=20),), trunks=1)),
    ):
        monkeypatch.setattr(module, name, value)
    made: Recipe = RECIPES["dual-rs-head"]
    monkeypatch.setitem(RECIPES, "dual-rs-head", type(made)(**{**vars(made), "epochs": 2}))
    verbs = {name: getattr(study, name) for name in ("denoiser", "classifier", "train", "certify", "table")}

    def run(verb: str, *words: object) -> None:
        data = [] if verb == "table" else ["--data", "unused"]
        monkeypatch.setattr(sys, "argv", ["study", verb, "--work", str(tmp_path), *data, *map(str, words)])
        shared.command_line("", verbs, study.arguments)

    run("denoiser", "--steps", 30)
    run("classifier", "--steps", 60)
    words = ("--denoiser", tmp_path / "denoiser", "--classifier", tmp_path / "classifier", "--sigma", "0.25,0.5,1")
    monkeypatch.setattr(sys, "argv", ["rsrouter", "wrap", *map(str, words), "--out", str(tmp_path / "pool.json")])
    main()
    run("train")
    run("certify", "--images", 4, "--first", 0)
    run("table", "--out", tmp_path / "card")
    summary = json.loads((tmp_path / "card" / "table.json").read_text())
    assert summary["images"] == 4
    assert {"flat, min rule (Dual RS)", "cascade, tuned", "deferral"} <= set(summary["methods"])
    before = (tmp_path / "card" / "table.md").read_text()
    run("certify", "--images", 4, "--first", 0)  # nothing left to do
    run("table", "--out", tmp_path / "card")
    assert (tmp_path / "card" / "table.md").read_text() == before
