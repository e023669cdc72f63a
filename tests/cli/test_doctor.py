"""`rsrouter doctor`: what it tells, what it does not, and that a broken machine shows."""

from __future__ import annotations

import json
import sys
from importlib import metadata

import pytest

import rsrouter.doctor as doctor
from rsrouter.cli import main
from rsrouter.core.errors import InputError
from rsrouter.speed import Speed

TOKEN = "hf_" + "x" * 30


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """No measurements, no load of other processes, an empty cache, nobody's token."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return tmp_path


def run(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["rsrouter", "doctor", *words])
    try:
        main()
        status = 0
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    return status, out, err


def test_it_tells_versions_machine_caches_hub_and_experts(quiet, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    (quiet / "hub" / "models--org--name").mkdir(parents=True)
    with (quiet / "hub" / "models--org--name" / "blob").open("wb") as file:
        file.truncate(200_000_000)
    status, out, _ = run(monkeypatch, capsys, "--no-measure", "--no-network", "--format", "json")
    assert status == 0
    found = json.loads(out)
    assert found["healthy"]
    assert found["sections"]["versions"]["torch"] == metadata.version("torch")
    assert found["sections"]["Hub"]["token"] == "yes"
    assert "0.2 GB" in found["sections"]["caches"]["Hub"]
    assert len(found["sections"]["bundled experts"]) == 3
    assert TOKEN not in out
    status, out, _ = run(monkeypatch, capsys, "--no-measure", "--no-network")
    assert status == 0
    assert TOKEN not in out
    assert "what to do" in out


def test_the_hub_is_asked_unless_offline(quiet, monkeypatch, hub):
    assert doctor.examine(measure=False).sections["Hub"]["reachable"].startswith("yes")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    report = doctor.examine(measure=False)
    assert report.sections["Hub"]["reachable"].startswith("no")
    assert report.healthy, "pools on this machine work without the Hub"
    assert any("not reached" in a.what for a in report.advice)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    report = doctor.examine(measure=False)
    assert "reachable" not in report.sections["Hub"]
    assert any("HF_HUB_OFFLINE" in a.what for a in report.advice)


def test_what_is_broken_exits_with_1(quiet, monkeypatch, capsys, tmp_path):
    def version(name: str) -> str:
        if name == "timm":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor.metadata, "version", version)
    status, out, _ = run(monkeypatch, capsys, "--no-measure", "--no-network")
    assert status == 1
    assert "timm is not installed" in out
    assert "pip install timm" in out


def test_damaged_experts_show(quiet, monkeypatch, tmp_path):
    (tmp_path / "experts" / "sigma_1").mkdir(parents=True)
    (tmp_path / "experts" / "sigma_1" / "model.safetensors").write_bytes(b"not weights")
    monkeypatch.setattr("rsrouter.experts.loaders.ASSETS", tmp_path)
    report = doctor.examine(measure=False, network=False)
    assert not report.healthy
    assert any("bundled experts" in a.what for a in report.advice)


def test_few_threads_and_a_busy_machine_are_slow(quiet, monkeypatch):
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    said = {a.what: a for a in doctor.examine(measure=False, network=False).advice if a.level == doctor.SLOW}
    assert any("of 64 cores" in what for what in said)
    assert any("busy: load 99.0" in what for what in said)
    assert all(a.do for a in said.values())


def test_speed_is_measured_and_what_would_be_slow_is_told(quiet, monkeypatch):
    clock = {"float32": 0.01, "bfloat16": 0.04}
    monkeypatch.setattr(doctor, "_forward", lambda module, shape, batch, dtype, where: (dtype, batch))
    monkeypatch.setattr(doctor, "_timed", lambda works, where, rounds=3: {name: clock[w[0]] for name, w in works.items()})
    monkeypatch.setattr(doctor, "build_architecture", lambda name, classes: None)
    monkeypatch.setattr(doctor, "measure_speed", lambda smooth, **_: Speed(0.5, 0.001, 1))
    report = doctor.examine(network=False)
    lines = report.sections["speed (random or bundled weights)"]
    assert lines["demo expert"] == "1,000 votes a second; 100,000 votes take 1.7 minutes"
    assert lines["bf16"].startswith("0.25 times")
    assert "100 forward passes a second" in lines["ImageNet ResNet-50"]  # one row in 0.01 seconds
    assert "16.7 minutes" in lines["ImageNet ResNet-50"]
    slow = [a.what for a in report.advice if a.level == doctor.SLOW]
    assert any("ImageNet ResNet-50: 500 certificates of 100,000 votes would take 5.8 days" in what for what in slow)
    assert any("bf16 is 4.0 times slower" in a.what for a in report.advice)


def test_forward_passes_of_the_field_run():
    where = doctor.resolve_device("cpu")
    module = doctor.build_architecture("cifar_resnet20", 10)
    for dtype in ("float32", "bfloat16"):
        assert doctor._timed({dtype: doctor._forward(module, (3, 32, 32), 2, dtype, where)}, where)[dtype] > 0


@pytest.mark.parametrize(("seconds", "words"), [(0.002, "2 ms"), (1.0, "1.0 seconds"), (95.0, "1.6 minutes"),
                                                (7200.0, "2.0 hours"), (864_000.0, "10.0 days")])  # fmt: skip
def test_durations(seconds, words):
    assert doctor.duration(seconds) == words


def test_an_unusable_device_is_an_input_error():
    with pytest.raises(InputError):
        doctor.examine("quantum")
