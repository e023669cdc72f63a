"""The command line: exit codes, errors without tracebacks, resuming, and no verb without an example."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.main import get_command

from rsrouter import CascadeRouter, ExpertPool, RoutedSmooth, read_table
from rsrouter.cli import app
from rsrouter.cli.options import read_data
from rsrouter.cli.reading import parse_numbers, parse_radii
from rsrouter.core.errors import InputError
from rsrouter.demo import load_pool, load_slice
from tests.helpers import small_router as small

pytestmark = pytest.mark.usefixtures("small_batches")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A cascade's folder and a few images."""
    folder = tmp_path_factory.mktemp("files")
    images, labels = load_slice("test").batch(range(5))
    np.savez(folder / "test.npz", images=(images * 255).round().to(torch.uint8).numpy(), labels=labels.numpy())
    pool = ExpertPool([load_pool()["sigma_0.5"], load_pool()["sigma_1"]])
    RoutedSmooth(pool, CascadeRouter((0.6,))).save_pretrained(folder / "router")
    pool.save(folder / "pool.json")
    return folder


def test_every_verb_has_help_with_an_example():
    commands = get_command(app).commands
    assert {
        "demo",
        "wrap",
        "label",
        "train",
        "certify",
        "predict",
        "report",
        "merge",
        "publish",
        "audit",
        "plan",
        "bench",
    } <= set(commands)
    for name, command in commands.items():
        assert f"rsrouter {name}" in (command.help or ""), f"{name} shows no example"


def test_version_and_no_arguments(call):
    assert call("--version")[1].startswith("rsrouter ")
    status, out, err = call()
    assert status == 2
    assert "certify" in out + err


def test_certify_writes_a_table_and_goes_on_with_it(call, files, tmp_path):
    words = (
        "certify",
        files / "router",
        "--data",
        files / "test.npz",
        "--out",
        tmp_path / "t.tsv",
        "--n",
        300,
        "--radii",
        "0,0.5",
    )
    status, out, _ = call(*words, "--format", "json")
    assert status == 0
    assert json.loads(out)["rows"] == 5
    before = (tmp_path / "t.tsv").read_bytes()
    assert call(*words)[0] == 0
    assert (tmp_path / "t.tsv").read_bytes() == before
    status, _, err = call(*words, "--alpha", 0.01)
    assert status == 2
    assert "alpha" in err
    assert (tmp_path / "t.tsv").read_bytes() == before


def test_a_report_shows_no_images_of_another_data_set(call, files, tmp_path):
    table = tmp_path / "t.tsv"
    images = files / "test.npz"
    assert call("certify", files / "router", "--data", images, "--out", table, "--n", 300, "--radii", "0,0.5")[0] == 0
    with np.load(images) as held:
        np.savez(tmp_path / "other.npz", images=held["images"][::-1], labels=held["labels"])
    status, _, err = call("report", table, "--data", tmp_path / "other.npz", "--out", tmp_path / "page")
    assert status == 2
    assert "not those of the table" in err
    assert not (tmp_path / "page").exists()
    assert call("report", table, "--data", images, "--out", tmp_path / "page")[0] == 0


def test_a_contact_sheet_replaces_nothing(call, files, tmp_path):
    weights = tmp_path / "weights.png"
    weights.write_bytes(b"weights")
    status, _, err = call("inspect", files / "test.npz", "--contact-sheet", weights)
    assert status == 2
    assert "another --contact-sheet" in err
    assert weights.read_bytes() == b"weights"


def test_certify_one_expert_of_a_pool_as_cohen(call, files, tmp_path):
    status, _, _ = call(
        "certify",
        files / "pool.json",
        "--expert",
        "sigma_1",
        "--data",
        files / "test.npz",
        "--out",
        tmp_path / "e.tsv",
        "--plan",
        "fixed",
        "--n",
        200,
        "--count",
        2,
        "--every",
        2,
    )
    assert status == 0
    table = read_table(tmp_path / "e.tsv")
    assert table.idx.tolist() == [0]
    assert table.n_drawn.tolist() == [300]


def test_shards_merge_to_the_table_of_one_process(call, files, tmp_path):
    words = ("certify", files / "router", "--data", files / "test.npz", "--n", 300, "--radii", "0,0.5")
    assert call(*words, "--out", tmp_path / "whole.tsv")[0] == 0
    parts = [tmp_path / f"part{i}.tsv" for i in range(3)]
    for i, part in enumerate(parts):
        assert call(*words, "--out", part, "--shard", f"{i}/3")[0] == 0
    assert call("merge", *parts, "--out", tmp_path / "merged.tsv")[0] == 0

    def untimed(path):
        return [line.split("\t")[:5] + line.split("\t")[6:] for line in path.read_text().splitlines()]

    assert untimed(tmp_path / "merged.tsv") == untimed(tmp_path / "whole.tsv")
    assert call(*words, "--out", tmp_path / "bad.tsv", "--shard", "3/3")[0] == 2
    assert call(*words, "--out", tmp_path / "whole.tsv", "--count", 2)[0] == 2, "another job must not join the table"


def test_patience_is_part_of_the_table(call, files, tmp_path):
    words = (
        "certify",
        files / "pool.json",
        "--expert",
        "sigma_1",
        "--data",
        files / "test.npz",
        "--n",
        4000,
        "--radii",
        "0:1:0.25",
    )
    drawn = {}
    for name, more in (("default", ()), ("patient", ("--patience", "0.01")), ("impatient", ("--patience", "0.5"))):
        assert call(*words, *more, "--out", tmp_path / f"{name}.tsv")[0] == 0
        table = read_table(tmp_path / f"{name}.tsv")
        drawn[name] = table.n_drawn.tolist()
        assert table.about.plan.beta == (0.5 if name == "impatient" else 0.01)
    assert drawn["default"] == drawn["patient"]
    assert sum(drawn["impatient"]) < sum(drawn["patient"])
    before = (tmp_path / "impatient.tsv").read_bytes()
    for more in ((), ("--patience", "0.2")):
        status, _, err = call(*words, *more, "--out", tmp_path / "impatient.tsv")
        assert status == 2
        assert "beta" in err
    assert (tmp_path / "impatient.tsv").read_bytes() == before
    assert call("report", tmp_path / "impatient.tsv", "--out", tmp_path / "report")[0] == 0


def test_plan_and_estimate_print_what_patience_saves_and_costs(call, files, tmp_path):
    status, out, _ = call("plan", "--sigma", "0.5", "--n", 2000, "--radii", "0,0.5", "--patience", ".01,.5", "--format", "json")
    assert status == 0
    patient, impatient = json.loads(out)["patience"]
    assert impatient["votes"] < patient["votes"]
    assert impatient["lost"] >= patient["lost"]
    job = ("certify", files / "router", "--data", files / "test.npz", "--n", 300, "--radii", "0,0.5")
    status, out, _ = call(*job, "--estimate", "--count", 2)
    assert status == 0
    assert "lost, points" in out
    assert call(*job, "--out", tmp_path / "t.tsv", "--count", 2)[0] == 0
    status, out, _ = call("plan", "--table", tmp_path / "t.tsv", "--patience", "0.1")
    assert (status, "0.1  " in out, "largest radius" in out) == (0, True, False)


def test_predict(call, files):
    status, out, _ = call("predict", files / "router", "--data", files / "test.npz", "--n", 200, "--count", 3, "--format", "json")
    assert status == 0
    assert set(json.loads(out)) == {"0", "1", "2"}


BAD = {
    "no router": (("certify", "nowhere", "--data", "x.npz", "--out", "t.tsv"), "No router there"),
    "no data": (("certify", "{files}/router", "--data", "nowhere.npz", "--out", "{tmp}/t.tsv"), "nowhere.npz"),
    "device": (("certify", "{files}/router", "--data", "{files}/test.npz", "--out", "{tmp}/t.tsv", "--device", "warp"), "device"),
    "plan": (
        ("certify", "{files}/router", "--data", "{files}/test.npz", "--out", "{tmp}/t.tsv", "--plan", "magic"),
        "Unknown plan",
    ),
    "radii": (("certify", "{files}/router", "--data", "{files}/test.npz", "--out", "{tmp}/t.tsv", "--radii", "a,b"), "Radii"),
    "radius too large": (
        ("certify", "{files}/router", "--data", "{files}/test.npz", "--out", "{tmp}/t.tsv", "--radii", "0,50"),
        "radius 50",
    ),
    "pool without expert": (("certify", "{files}/pool.json", "--data", "{files}/test.npz", "--out", "{tmp}/t.tsv"), "no router"),
    "unknown expert": (
        ("certify", "{files}/pool.json", "--expert", "x", "--data", "{files}/test.npz", "--out", "{tmp}/t.tsv"),
        "No such expert",
    ),
    "sigma": (("plan", "--sigma", "-1"), "noise level"),
    "no sigma": (("plan",), "--sigma 0.5"),
    "patience": (("plan", "--sigma", "1", "--patience", ".01,.7"), "from 0.01 (patient) to 0.5"),
    "patience that is no number": (("plan", "--sigma", "1", "--patience", "much"), "--patience cannot be read"),
    "patience of a certificate": (
        ("certify", "{files}/router", "--data", "{files}/test.npz", "--out", "{tmp}/t.tsv", "--patience", "0.001"),
        "from 0.01 (patient) to 0.5",
    ),
    "patience nan": (
        ("certify", "{files}/router", "--data", "{files}/test.npz", "--out", "{tmp}/t.tsv", "--patience", "nan"),
        "from 0.01 (patient) to 0.5",
    ),
    "patience of a fixed plan": (
        (
            "certify",
            "{files}/router",
            "--data",
            "{files}/test.npz",
            "--out",
            "{tmp}/t.tsv",
            "--plan",
            "fixed",
            "--patience",
            "0.1",
        ),
        "adaptive",
    ),
    "no such option": (("plan", "--sigma", "1", "--colour", "red"), "No such option"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_exits_with_2_and_says_what_to_do(call, files, tmp_path, kind):
    words, message = BAD[kind]
    status, out, err = call(*(w.format(files=files, tmp=tmp_path) for w in words))
    assert status == 2
    assert message in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "t.tsv").exists()


def test_radii():
    assert parse_radii("0:1:0.25") == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert parse_radii("0,0.5") == (0.0, 0.5)
    for text in ("0:inf:1", "0:1e9:1e-3", "", "1:0:0.5", "0:1:0", "x"):
        with pytest.raises(InputError):
            parse_radii(text)


def test_a_fraction_is_a_number() -> None:
    assert parse_numbers("0.25,64/255", "sigma") == [0.25, 64 / 255]
    assert parse_radii("0,64/255") == (0.0, 64 / 255)
    for text in ("64/0", "a/b", "1/2/3", "", "1,,2"):
        with pytest.raises(InputError, match="--sigma cannot be read"):
            parse_numbers(text, "sigma")


def test_a_bundled_slice_has_a_name_that_can_be_typed():
    for name in ("test", "validation", "train"):
        data = load_slice(name)
        assert len(read_data(data.name, {})) == len(data)
        assert read_data(data.name, {}).name == data.name
    with pytest.raises(InputError, match="Unknown slice"):
        read_data("demo:other", {})
    with pytest.raises(InputError, match="Two bundled slices"):
        read_data("demo:train", {"split": "validation"})


def test_some_of_the_experts_classes_are_told(tmp_path, capsys):
    """A folder with three of a network's ten classes counts them from 0, which are other classes of the network."""
    for name in ("ankle", "bag", "coat"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.fromarray(np.full((28, 28), 90, np.uint8)).save(tmp_path / "val" / name / "0.png")
    names = ["ant", "ankle", "bag", "coat", *"defghi"]
    blind, named = load_pool()["sigma_1"], small.expert(0.5).with_settings(labels=("coat", "ankle", "bag"))
    assert read_data(str(tmp_path / "val"), {}, expert=blind).labels.tolist() == [0, 1, 2]
    assert "3 classes, and the experts have 10" in " ".join(capsys.readouterr().err.split())
    read_data(str(tmp_path / "val"), {}, expert=named)
    assert "class 0 is ankle, and theirs coat" in " ".join(capsys.readouterr().err.split())
    assert read_data(str(tmp_path / "val"), {"classes": names}, expert=blind).labels.tolist() == [1, 2, 3]
    assert capsys.readouterr().err == "warning: val has pictures of 3 of the 10 classes that were given\n"
    with pytest.raises(InputError, match="no folder for a class"):  # a slip: coat has no name, and cot no folder
        read_data(str(tmp_path / "val"), {"classes": ["ankle", "bag", "cot"]})
    capsys.readouterr()
    read_data(str(tmp_path / "val"), {})
    assert capsys.readouterr().err == ""
