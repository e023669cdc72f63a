"""`label --tables`, `train --labels` and `train --from` on the bundled experts."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.main import get_command

from rsrouter import CascadeRouter, ExpertPool, FlatRouter, RoutedSmooth
from rsrouter.cli import app, main
from rsrouter.cli.options import told_warnings
from rsrouter.core.budget import largest_radius
from rsrouter.demo import load_pool, load_slice
from rsrouter.experts import build_architecture
from rsrouter.training import cascade, train
from rsrouter.training.deferral import DEFERRAL_RECIPES
from rsrouter.training.flat import RECIPES


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    images, labels = load_slice("train").batch(range(24))
    np.savez(folder / "train.npz", images=(images * 255).round().to(torch.uint8).numpy(), labels=labels.numpy())
    pool = ExpertPool([load_pool()["sigma_0.5"], load_pool()["sigma_1"]])
    pool.save(folder / "pool.json")
    torch.manual_seed(0)
    head = build_architecture("mlp_head", 2, {"in_features": 110, "hidden": 8})
    RoutedSmooth(pool, FlatRouter(head, sigma=1.0, trunk="sigma_1")).save_pretrained(folder / "flat")
    RoutedSmooth(pool, CascadeRouter((0.7,))).save_pretrained(folder / "cascade")
    rng = np.random.default_rng(0)
    for k, name in enumerate(pool.names):
        rows = [f"{i}\t{label}\t{label}\t{rng.uniform(0.1, 1 + k):.3f}\t1\t0:00:01" for i, label in enumerate(labels.tolist())]
        (folder / f"{name}.tsv").write_text("\n".join(["idx\tlabel\tpredict\tradius\tcorrect\ttime", *rows]) + "\n")
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["rsrouter", *map(str, words)])
        capsys.readouterr()
        status: Any = 0
        try:
            main()
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_tables_become_labels_and_a_parent_is_trained_on(call: Any, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.npz"
    tables = [word for name in ("sigma_0.5", "sigma_1") for word in ("--tables", f"{name}={files / name}.tsv")]
    status, text, _ = call("label", files / "pool.json", *tables, "--unseen", "--out", out, "--format", "json")
    assert status == 0
    assert json.loads(text)["tables"] == {"sigma_0.5": "sigma_0.5.tsv", "sigma_1": "sigma_1.tsv"}
    status, _, err = call("label", files / "pool.json", "--out", tmp_path / "none.npz")
    assert status == 2
    assert "--tables" in err
    words = ("--from", files / "flat", "--data", files / "train.npz", "--start", 4, "--count", 20, "--labels", out)
    status, text, err = call("train", *words, "--out", tmp_path / "router")
    assert status == 0, err
    assert "flat router" in text
    head = json.loads((tmp_path / "router" / "training.jsonl").read_text().splitlines()[0])
    old = RoutedSmooth.from_pretrained(files / "flat")
    assert head["parent"] == {"name": "flat", "revision": None, "digest": old.router.digest}
    assert head["labels"]["kind"] == "routing-labels-tables"
    assert head["labels"]["unseen"] is True
    assert RoutedSmooth.from_pretrained(tmp_path / "router").router.digest != old.router.digest


def test_a_cascade_goes_on_from_its_parent(call: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cascade, "TUNE_VOTES", 40)
    monkeypatch.setattr(train, "TUNE_VOTES", 40)
    words = ("--from", files / "cascade", "--kind", "cascade", "--data", files / "train.npz", "--validation", files / "train.npz")
    status, text, err = call("train", *words, "--radii", "0,0.5", "--n", 1000, "--out", tmp_path / "router")
    assert status == 0, err
    assert "as shares of the experts' envelope" in text
    assert text.count("\n  * ") == 1  # where the choice stopped, on the frontier
    last, router = text.splitlines()[-1], tmp_path / "router"
    assert last == f"next: rsrouter certify {router} --data TEST --n 1000 --radii 0,0.5 --experts --out {router}-run"
    command = last.removeprefix("next: rsrouter ").replace("TEST", str(files / "train.npz")).split()
    status, text, err = call(*command, "--count", 2)  # what is printed works when it is followed
    assert status == 0, err
    assert err.count("\r") < 5  # a log does not want ten lines a second
    lines = [json.loads(line) for line in (tmp_path / "router" / "training.jsonl").read_text().splitlines()]
    start = next(line for line in lines if line.get("start") == "parent")
    assert lines[-1]["score"] >= start["score"]


def test_tables_are_named_and_checked(call: Any, files: Path, tmp_path: Path) -> None:
    def label(*words: object) -> tuple[Any, str, str]:
        return call("label", files / "pool.json", *words, "--unseen", "--out", tmp_path / "labels.npz")

    small, large = files / "sigma_0.5.tsv", tmp_path / "large.tsv"
    rows = (files / "sigma_1.tsv").read_text().splitlines()
    large.write_text("\n".join([rows[0], *[row.replace(row.split("\t")[3], "3.03") for row in rows[1:]]]) + "\n")
    status, _, err = label("--tables", f"sigma_1={small}", "--tables", f"sigma_0.5={large}")  # the wrong way round
    assert status == 2
    assert f"at most {largest_radius(0.5, 100_000):.3f}" in err
    assert "belong to sigma_1" in err
    assert not (tmp_path / "labels.npz").exists()
    for words in (("--tables", small), ("--tables", f"sigma_1={small}"), ("--tables", f"sigma_1={small}") * 2):
        status, _, err = label(*words)
        assert status == 2, err
        assert "--tables" in err
    status, _, err = label("--tables", f"sigma_0.5={small}", "--tables", f"sigma_1={large}", "--n", 100)
    assert status == 2
    assert "100 votes" in err
    status, _, err = label("--tables", f"sigma_0.5={small}", "--tables", f"sigma_1={large}")
    assert status == 0, err


def test_what_is_wanted_is_read(call: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cascade, "TUNE_VOTES", 40)
    words = ["train", files / "pool.json", "--kind", "cascade", "--data", files / "train.npz", "--radii", "0,0.5", "--n", 1000]
    wanted = ["--floor", "0:0.5,0.5:2", "--weights", "0:3", "--never-below", "sigma_1@0.5"]
    status, text, err = call(*words, *wanted, "--out", tmp_path / "router")
    assert status == 0, err
    lines = [json.loads(line) for line in (tmp_path / "router" / "training.jsonl").read_text().splitlines()]
    assert lines[-1]["floor"] == [0.5, 2.0]
    assert "the floor is missed by" in text
    assert err.count("warning: only 4 validation images") == 1
    status, text, _ = call(*words, "--format", "json", "--out", tmp_path / "told")
    assert status == 0
    assert any(doubt.startswith("only 4 validation images") for doubt in json.loads(text)["doubts"])
    for wrong in (
        ["--floor", "0:0.5,0:0.6"],
        ["--floor", "7:0.5"],
        ["--floor", "0.5,0.9"],
        ["--never-below", "sigma_9@0.5"],
        ["--weights", "x"],
        ["--never-below", "sigma_1"],
    ):
        status, _, err = call(*words, *wrong, "--out", tmp_path / "other")
        assert status == 2, wrong


def test_warnings_are_told_when_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    """Not after the hours that they are about; each once."""
    with told_warnings():
        for _ in range(2):
            warnings.warn("few images", stacklevel=1)
        assert capsys.readouterr().err == "warning: few images\n"
    assert capsys.readouterr().err == ""


def test_help_names_every_recipe():
    (said,) = (option.help for option in get_command(app).commands["train"].params if option.name == "recipe")
    assert set(re.findall(r"[\w-]+", said)) == {"Flat", "others", *RECIPES, *DEFERRAL_RECIPES}
