"""Rules for every verb: one output convention, examples that parse, exit codes, no traceback for what a user can mend."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest
import torch
from typer.main import get_command

from rsrouter import CascadeRouter, ExpertPool, RoutedSmooth
from rsrouter.cli import BROKEN, app
from rsrouter.cli.options import echo_json
from rsrouter.demo import load_pool, load_slice

COMMANDS = get_command(app).commands


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A router, a pool, images, a table, and things that are none of these."""
    folder = tmp_path_factory.mktemp("files")
    images, labels = load_slice("test").batch(range(3))
    np.savez(folder / "test.npz", images=(images * 255).round().to(torch.uint8).numpy(), labels=labels.numpy())
    np.savez(folder / "unlabelled.npz", images=(images * 255).round().to(torch.uint8).numpy())
    np.savez(folder / "wrong.npz", images=np.zeros((2, 3, 5, 5), np.uint8), labels=np.zeros(2, np.int64))
    pool = ExpertPool([load_pool()["sigma_0.5"], load_pool()["sigma_1"]])
    RoutedSmooth(pool, CascadeRouter((0.6,))).save_pretrained(folder / "router")
    pool.save(folder / "pool.json")
    (folder / "table.tsv").write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.377\t1\t0:00:14.1\n")
    (folder / "noise.bin").write_bytes(bytes(range(256)) * 20)
    (folder / "broken.json").write_text("{")
    (folder / "broken.toml").write_text("[[expert\n")
    (folder / "empty").mkdir()
    (folder / "file").write_text("a file where a folder should be")
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_every_verb_prints_json_and_its_examples_parse(name):
    options = {text for p in COMMANDS[name].params for text in (*p.opts, *p.secondary_opts)}
    assert "--format" in options
    examples = re.findall(rf"rsrouter {name} (.*?)(?:\n\n|\Z)", COMMANDS[name].help, flags=re.DOTALL)
    assert examples
    for example in examples:
        used = {word for word in shlex.split(example) if word.startswith("-") and not re.fullmatch(r"-\d.*", word)}
        assert used <= options, f"{name}: {used - options}"


def test_json_has_no_word_for_nan(capsys, tmp_path):
    echo_json({"a": float("nan"), "b": [np.float64("inf"), np.int64(3)], "c": np.arange(2), "path": tmp_path, "d": None})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 3], "c": [0, 1], "path": str(tmp_path), "d": None}


BAD = {
    "wrap, nothing there": "wrap nowhere.pth --sigma 1 --architecture small_resnet --out {new}",
    "wrap, not a checkpoint": "wrap {files}/noise.bin --sigma 1 --architecture small_resnet --normalisation none "
    "--input-shape 1,28,28 --num-classes 10 --out {new}",
    "wrap, spec that does not parse": "wrap {files}/broken.toml --out {new}",
    "wrap, no spec": "wrap {files}/none.toml --out {new}",
    "wrap, numbers": "wrap {files}/noise.bin --sigma large --out {new}",
    "wrap, shape": "wrap {files}/noise.bin --sigma 1 --input-shape 3.5,32,32 --out {new}",
    "wrap, spec and flags": "wrap {files}/broken.toml --sigma 1 --out {new}",
    "wrap, data": "wrap {files}/broken.toml --data nowhere.npz --out {new}",
    "convert, nothing there": "convert nowhere.pth --out {new}",
    "convert, unsaid": "convert {files}/noise.bin --out {new}",
    "convert, output is a file": "convert {files}/noise.bin --sigma 1 --out {files}/file",
    "select, nothing there": "select nowhere.tsv --k 1",
    "select, k": "select {files}/table.tsv --k 0",
    "select, radii": "select {files}/table.tsv --k 1 --radii much",
    "inspect, nothing there": "inspect nowhere.npz",
    "inspect, not an image": "inspect {files}/noise.bin",
    "inspect, a split of one file": "inspect {files}/test.npz --split test",
    "inspect, an array that is not there": "inspect {files}/test.npz --label y",
    "inspect, sheet": "inspect {files}/test.npz --contact-sheet {files}/sheet.pdf",
    "inspect, channels": "inspect {files}/test.npz --channels 2",
    "heads, nothing declared": "heads certify {files}/empty",
    "heads, no trunk": "heads declare {new} --head {files}/noise.bin",
    "heads, no head": "heads declare {new} --trunk {files}/pool.json --expert sigma_0.5",
    "heads, not a head": "heads declare {new} --trunk {files}/pool.json --expert sigma_0.5 --head {files}/noise.bin",
    "transfer, nothing there": "transfer nowhere.tsv --router {files}/router --data {files}/test.npz --out {new}",
    "transfer, a table without votes": "transfer {files}/table.tsv --router {files}/router --data {files}/test.npz --out {new}",
    "certify, classes": "certify {files}/router --data {files}/test.npz --classes cat,dog --out {new}",
    "label, no pool": "label nowhere.json --data {files}/test.npz --out {new}",
    "label, broken pool": "label {files}/broken.json --data {files}/test.npz --out {new}",
    "label, no labels": "label {files}/pool.json --data {files}/unlabelled.npz --out {new}",
    "label, other images": "label {files}/pool.json --data {files}/wrong.npz --out {new}",
    "label, n": "label {files}/pool.json --data {files}/test.npz --n 0 --out {new}",
    "label, start": "label {files}/pool.json --data {files}/test.npz --start 99 --out {new}",
    "train, no data": "train {files}/pool.json --out {new}",
    "train, no pool": "train --data {files}/test.npz --out {new}",
    "train, kind": "train {files}/pool.json --data {files}/test.npz --kind magic --out {new}",
    "train, folder taken": "train {files}/pool.json --data {files}/test.npz --kind flat --out {files}/router",
    "train, recipe": "train {files}/pool.json --data {files}/test.npz --kind flat --recipe cake --out {new}",
    "certify, other images": "certify {files}/router --data {files}/wrong.npz --out {new}",
    "certify, broken data": "certify {files}/router --data {files}/noise.bin --out {new}",
    "certify, alpha": "certify {files}/router --data {files}/test.npz --alpha 2 --out {new}",
    "certify, count": "certify {files}/router --data {files}/test.npz --count -3 --out {new}",
    "certify, start": "certify {files}/router --data {files}/test.npz --start 99 --n 200 --radii 0,0.5 --out {new}",
    "certify, output in a file": "certify {files}/router --data {files}/test.npz --n 200 --radii 0,0.5 --out {files}/file/t.tsv",
    "certify, a folder that is no router": "certify {files}/empty --data {files}/test.npz --out {new}",
    "predict, nothing there": "predict nowhere --data {files}/test.npz",
    "predict, n": "predict {files}/router --data {files}/test.npz --n 0",
    "predict, device": "predict {files}/router --data {files}/test.npz --device quantum",
    "report, nothing there": "report nowhere.tsv --out {new}",
    "report, no table": "report {files}/noise.bin --out {new}",
    "report, taken folder": "report {files}/table.tsv --out {files}/router",
    "report, output is a file": "report {files}/table.tsv --out {files}/file",
    "report, confidence": "report {files}/table.tsv --confidence 95 --out {new}",
    "report, data": "report {files}/table.tsv --data nowhere.npz --out {new}",
    "merge, no JSON beside it": "merge {files}/table.tsv --out {new}",
    "publish, no router": "publish {files}/empty org/name --dry-run",
    "publish, name": "publish {files}/router 'not a name' --dry-run",
    "publish, experts on disk only": "publish {files}/router org/name --dry-run --certificates nowhere",
    "card, no router": "card {files}/empty --name org/name --out {new}",
    "audit, nothing there": "audit nowhere",
    "audit, report cannot be written": "audit {files}/router --data nowhere.npz --out {files}/file/report.json",
    "plan, alpha": "plan --sigma 1 --alpha 7",
    "plan, n": "plan --sigma 1 --n 0",
    "bench, no router": "bench --router nowhere",
    "bench, report cannot be written": "bench --router {files}/router --out {files}/file/bench.json",
    "bench, device": "bench --device quantum",
    "demo, device": "demo --out {new} --device quantum",
    "demo, taken folder": "demo --out {files}/router",
    "demo, output is a file": "demo --out {files}/file",
    "calibrate, nothing there": "calibrate nowhere",
    "calibrate, dtype": "calibrate {files}/router --dtype float8",
    "calibrate, a Hub name cannot be saved": "calibrate org/name --save",
    "doctor, device": "doctor --device quantum",
    "plan, no such option": "plan --colour red",
    "predict, nothing said": "predict",
    "certify, a run of one expert": "certify {files}/pool.json --expert sigma_1 --experts --data {files}/test.npz --out {new}",
    "report, a folder without tables": "report {files}/empty --out {new}",
}


@pytest.mark.parametrize("kind", BAD)
def test_what_a_user_can_mend_exits_with_2_and_no_traceback(call, files, tmp_path, kind):
    words = [w.format(files=files, new=tmp_path / "new") for w in shlex.split(BAD[kind])]
    before = sorted((p.relative_to(files), p.stat().st_size) for p in files.rglob("*"))
    status, out, err = call(*words, "--format", "json")
    assert "Traceback" not in out + err
    assert status == 2
    assert err.strip()
    error = json.loads(out)["error"]
    assert error["message"]
    assert error["remedy"] or error["expected"]
    assert sorted((p.relative_to(files), p.stat().st_size) for p in files.rglob("*")) == before


def test_every_verb_is_among_them():
    told = {text.split()[0] for text in BAD.values()}
    assert told == set(COMMANDS)


def test_errors_in_text_leave_stdout_alone(call, files):
    status, out, err = call("report", "nowhere.tsv")
    assert (status, out) == (2, "")
    for word in ("error:", "expected:", "received:", "do:"):
        assert word in err


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (OSError(28, "No space left on device"), 2, "No space left"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "memory"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("a bug"), BROKEN, "bug in rsrouter"),
    ],
)
def test_what_else_can_go_wrong(call, monkeypatch, raised, status, told):
    def broken(*_, **__):
        raise raised

    monkeypatch.setattr("rsrouter.core.budget.budget_table", broken)
    found, _, err = call("plan", "--sigma", 1)
    assert found == status
    assert told in err
    assert ("Traceback" in err) == (status == BROKEN)


def test_exit_codes_and_completion_are_told(call):
    status, out, _ = call("--help")
    assert status == 0
    for word in ("Exit codes", "--install-completion", "doctor"):
        assert word in out


def test_completion_names_the_verbs(call, monkeypatch):
    monkeypatch.setenv("_RSROUTER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "rsrouter c")
    monkeypatch.setenv("COMP_CWORD", "1")
    status, out, _ = call()
    assert status == 0
    assert {"certify", "convert", "card"} <= set(out.split())
    assert "train" not in out.split()


def test_convert_and_card_print_json(call, files, tmp_path):
    status, out, _ = call("plan", "--sigma", 0.5, "--format", "json")
    assert status == 0
    assert json.loads(out)["rows"]
    torch.save({"state_dict": load_pool()["sigma_0.5"].module.state_dict(), "arch": "small_cnn"}, tmp_path / "c.pth.tar")
    status, out, _ = call("convert", tmp_path / "c.pth.tar", "--sigma", 0.5, "--normalisation", "fashion_mnist", "--input-shape",
                          "1,28,28", "--out", tmp_path / "converted", "--format", "json")  # fmt: skip
    assert status == 0
    assert json.loads(out)["files"] == ["README.md", "config.json", "model.safetensors"]
