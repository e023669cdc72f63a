"""Both routing studies and the measurements beside them run from end to end, with little of everything, offline."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rsrouter import AdaptivePlan, RoutedSmooth, load_expert, read_table
from rsrouter.demo import load_pool, load_router, load_slice
from rsrouter.experts.registry import build_architecture
from rsrouter.training.deferral import DeferralRecipe
from rsrouter.training.flat import RECIPES
from rsrouter.training.heads import HeadRecipe

FOLDER = Path(__file__).resolve().parents[2] / "examples"
LITTLE = DeferralRecipe(copies=2, tune_copies=20, levels=(1.1,), heads=(HeadRecipe(steps=20),))
COUNTS = {"train": 24, "experts": 8, "validation": 6, "test": 4}


def pixels(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A few bundled images as bytes, and their labels."""
    images, labels = load_slice({"experts": "validation"}.get(name, name)).batch(range(COUNTS[name]))
    return (images * 255).round().to(torch.uint8).numpy(), labels.numpy()


@pytest.fixture
def study(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small_batches: None) -> Iterator[ModuleType]:
    """One of the studies, with few votes, images and steps."""
    monkeypatch.syspath_prepend(str(FOLDER))
    shared, found = importlib.import_module("routing_study"), importlib.import_module(request.param)
    radii = tuple(shared.RADII[:4])
    monkeypatch.setattr(shared, "plan", lambda n: AdaptivePlan(150, radii, n0=20))
    monkeypatch.setattr(shared, "RADII", np.array(radii))
    monkeypatch.setattr(shared, "COVERED", np.ones(len(radii), bool))
    monkeypatch.setattr(shared, "SHARDS", 2)
    monkeypatch.setattr(shared, "RESAMPLES", 50)
    monkeypatch.setattr(found, "RECIPE", LITTLE)
    monkeypatch.setitem(RECIPES, "dual-rs-head", replace(RECIPES["dual-rs-head"], epochs=2))
    monkeypatch.setattr(shared, "OWN_RECIPE", replace(RECIPES["dual-rs"], epochs=2))
    if request.param == "study_fashion_mnist":
        monkeypatch.setattr(
            found, "bundled", lambda name: (torch.from_numpy(pixels(name)[0]) / 255, torch.from_numpy(pixels(name)[1]))
        )
    else:
        # experts and images of the other data set: what is under test is the way through the study
        monkeypatch.setattr(found, "load_pool", lambda folder: load_pool())
        monkeypatch.setattr(found, "read_cifar", lambda data, name: pixels(name))
    threads = torch.get_num_threads()
    yield found
    torch.set_num_threads(threads)


def a_run(folder: Path) -> Path:
    """What a trainer leaves: an untrained network."""
    folder.mkdir()
    config = {"architecture": "small_cnn", "num_classes": 10, "kwargs": {"channels": [2, 2], "hidden": 4}}
    save_file(build_architecture("small_cnn", 10, config["kwargs"]).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"training": {"recipe": "none"}}))
    return folder


def a_place(folder: Path) -> Path:
    """The folder, whose parents are made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("study", ["study_fashion_mnist", "study_cifar10"], indirect=True)
def test_a_routing_study_trains_certifies_and_reports(study, tmp_path, monkeypatch, capsys):
    own = ["--experts", "unused"] if study.__name__ == "study_cifar10" else []
    images = 4 if own else 2
    data = ["--data", "unused"] if own else []

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", [study.__name__, *words, "--work", str(tmp_path / "work"), *own])
        verbs = {name: getattr(study, name) for name in ("train", "choose", "certify", "table") if hasattr(study, name)}
        study.command_line(study.__doc__, verbs, study.arguments)
        return capsys.readouterr().out

    run("train", *data)
    trained = {p.parent.name for p in (tmp_path / "work").glob("*/config.json")}
    assert trained == {"cascade", "flat", "own", *(["own-two"] if own else [])}
    if own:
        network = a_run(tmp_path / "network")
        chosen = run(
            "choose", *data, "--network", f"{network}=0.5,0.6", "--sigmas", "0.5", "--copies", "20", "--images", "6", "--heads"
        )
        assert '"network": {"recipe": "none"}' in chosen
        assert RoutedSmooth.from_pretrained(tmp_path / "work" / "deferral").router.kind == "deferral"
    else:  # the router of interest comes from a script of its own
        load_router().save_pretrained(tmp_path / "work" / "deferral")
    few = ("certify", *data, "--images", str(images))
    run(*few, "--part", "0/2", *(["--methods", "others"] if own else []))
    if own:  # parts are the same in both studies
        run(*few, "--part", "0/2", "--methods", "best")
    run(*few, "--part", "1/2")
    printed = run("table", "--out", str(tmp_path / "out"), "--report", str(tmp_path / "report"))
    lines = (tmp_path / "work" / "tables").glob("*.tsv")
    tables = {t.metadata["name"]: t for t in map(read_table, lines) if len(t) == images}
    assert len(tables) == 10
    assert {tuple(t.idx) for t in tables.values()} == {tuple(range(images))}
    assert "| **deferral** |" in printed
    assert (tmp_path / "out" / "table.md").read_text() in printed + "\n"
    summary = json.loads((tmp_path / "out" / "table.json").read_text())
    assert summary["images"] == images
    for name, entry in summary["methods"].items():
        if name in ("sigma_0.25", "sigma_0.5", "sigma_1"):
            right = tables[name].correct == 1
            assert entry["accuracy"] == [
                float(np.mean(right & (tables[name].radius >= r) & (tables[name].predict >= 0))) for r in summary["radii"]
            ]
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("<details") == 6
    assert "Runs side by side" in page
    if own:
        return
    # another session, which finds the routers and half of the rows on the card
    card, work = tmp_path / "card", tmp_path / "work"
    for name in ("flat", "own", "cascade", "deferral"):
        (work / name).rename(a_place(card / ("router" if name == "deferral" else f"compared/{name}")))
    for shard in (work / "tables").glob("*.1.*"):
        shard.unlink()
    run("table", "--out", str(card), "--card", str(card), "--keep")
    assert json.loads((card / "table.json").read_text())["images"] == 1
    assert len(list((card / "tables").glob("*.run1.tsv"))) == len(tables)
    shutil.rmtree(work / "tables")
    printed = run(*few, "--card", str(card))
    assert "shard 1 deferral" in printed
    assert "shard 0" not in printed
    run("table", "--out", str(tmp_path / "again"), "--card", str(card))
    again = json.loads((tmp_path / "again" / "table.json").read_text())
    assert again["images"] == summary["images"]
    assert again["methods"]["deferral"]["accuracy"] == summary["methods"]["deferral"]["accuracy"]


def test_what_the_statistics_cost(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    bench = importlib.import_module("bench_certificates")
    monkeypatch.setattr(sys, "argv", ["bench", "--images", "20"])
    bench.main()
    assert len(re.findall(r"\d+\.\d+", capsys.readouterr().out)) >= 3


def test_what_an_adaptive_plan_saves(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    rows = [
        f"{i}\t{i % 10}\t{i % 10 if r > 0 else -1}\t{r:.3}\t{int(r > 0)}\t0:00:01"
        for i, r in enumerate(rng.uniform(-0.3, 0.9, 40))
    ]
    (tmp_path / "sigma_0.25.tsv").write_text("\n".join(["idx\tlabel\tpredict\tradius\tcorrect\ttime", *rows]) + "\n")
    monkeypatch.syspath_prepend(str(FOLDER))
    replay = importlib.import_module("replay_adaptive")
    monkeypatch.setattr(sys, "argv", ["replay", "--tables", str(tmp_path)])
    replay.main()
    assert "0.25" in capsys.readouterr().out
    monkeypatch.setattr(
        sys, "argv", ["replay", "--tables", str(tmp_path), "--patience", ".01,.5", "--rows", "30", "--n", "10000"]
    )
    replay.main()
    patient, hasty = (line.split() for line in capsys.readouterr().out.splitlines()[2:])
    assert float(patient[3].rstrip("%")) > float(hasty[3].rstrip("%"))  # fewer votes


def test_a_network_of_the_cifar_router_is_trained(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    trainer, script = importlib.import_module("expert_training"), importlib.import_module("train_cifar_networks")
    rng = np.random.default_rng(0)
    counts = {"experts": 96, "validation": 1040}
    some = {name: (rng.integers(0, 256, (n, 3, 32, 32)).astype(np.uint8), rng.integers(0, 10, n)) for name, n in counts.items()}
    monkeypatch.setattr(script, "read_cifar", lambda data, name: some[name])
    job = trainer.read_jobs(FOLDER / "cifar_study_jobs.json")[0]
    little = {"in_channels": 3, "width": 4, "blocks": [[4, 2]]}
    first = replace(job, name="experts", start=None, kwargs=little, epochs=1, batch=32, estimate=4, every=1)
    for settings in (first, replace(first, name="own", start="experts")):
        trainer.Run(script.TASK, settings, tmp_path).train(*script.read("none"))
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert config["training"]["start"] == "experts"
    assert load_expert(tmp_path / "own").sigma == 0.6


def test_a_cifar_expert_is_trained_and_wrapped(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    trainer = importlib.import_module("train_cifar_experts")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (256, 3, 32, 32)).astype(np.uint8), rng.integers(0, 10, 256)
    monkeypatch.setattr(trainer, "read_cifar", lambda data, name: (images, labels))
    monkeypatch.setattr(trainer, "KWARGS", {"in_channels": 3, "width": 4, "blocks": [[4, 2]]})
    monkeypatch.setattr(sys, "argv", ["train", "--data", "none", "--out", str(tmp_path), "--sigma", "0.5", "--epochs", "1"])
    trainer.main()
    expert = load_expert(tmp_path / "sigma_0.50")
    assert (expert.sigma, expert.input_shape, expert.num_classes) == (0.5, (3, 32, 32), 10)
    assert json.loads((tmp_path / "sigma_0.50" / "config.json").read_text())["training"]["consistency"] == 2.0
