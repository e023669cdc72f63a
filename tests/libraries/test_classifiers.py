"""Models of other libraries, from a Hub to a published and audited router, by the command line alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from rsrouter.cli import main
from tests.helpers.hub_server import HubServer
from tests.helpers.library_models import NAMES, open_clip_folder, transformers_folder

pytestmark = pytest.mark.libraries
SIDE = 32
KINDS = ("timm", "timm at another size", "vit", "vit at another size", "vit on disk", "convnext", "dinov2", "resnet", "open_clip")


def written(folder: Path, kind: str, turned: bool) -> list[str]:
    """Writes the model; gives what `rsrouter wrap` is told beside its repository and sigma.

    A turned one answers otherwise on every image, its classes in another order; so a router has something to choose from.
    """
    names = NAMES[1:] + NAMES[:1] if turned else NAMES
    if kind.startswith("timm"):
        folder.mkdir()
        side = SIDE if kind == "timm" else 48
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=3)
        cfg = {"input_size": [3, side, side], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "crop_pct": 0.9}
        config = {"architecture": "test_resnet", "num_classes": 3, "label_names": names, "pretrained_cfg": cfg}
        (folder / "config.json").write_text(json.dumps(config))
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        return [] if kind == "timm" else ["--input-size", str(SIDE)]
    if kind == "open_clip":
        pytest.importorskip("open_clip", reason="the extra [open-clip] is not installed")
        open_clip_folder(folder, side=SIDE, turned=turned)
        return ["--class-names", ",".join(NAMES), "--template", "a photo of a {}.", "--template", "a drawing of a {}."]
    pytest.importorskip("transformers", reason="the extra [transformers] is not installed")
    name, *other = kind.split()
    transformers_folder(folder, name, side=48 if "another" in other else SIDE, labels=names)
    return ["--input-size", str(SIDE)] if "another" in other else []


def pictures(folder: Path) -> dict[str, Path]:
    """Three sets of small pictures whose class shows in their colour."""
    rng, found = np.random.default_rng(0), {}
    for name, count in (("train", 24), ("validation", 24), ("test", 4)):
        labels = np.arange(count) % 3
        images = rng.integers(0, 120, (count, 3, SIDE, SIDE)).astype(np.uint8)
        images[np.arange(count), labels] += 100
        found[name] = folder / f"{name}.npz"
        np.savez(found[name], images=images, labels=labels)
    return found


@pytest.fixture
def rsrouter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["rsrouter", *map(str, words)])
        capsys.readouterr()
        status: Any = 0
        try:
            main()
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        assert not status, f"{words[0]}: {err}"
        return out

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_repository_to_an_audited_router(kind: str, hub: HubServer, rsrouter: Any, tmp_path: Path) -> None:
    data, told = pictures(tmp_path), []
    for name, turned in (("a", False), ("b", True)):
        told = written(tmp_path / name, kind, turned)
        hub.put(f"org/{name}", {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}, tag="v1")
    pool, run = tmp_path / "pool" / "pool.json", tmp_path / "run"
    pool.parent.mkdir()
    places = (tmp_path / "a", tmp_path / "b") if kind.endswith("on disk") else ("hf-hub:org/a@v1", "hf-hub:org/b@v1")
    sources = (*places, "--sigma", "0.25,0.5", *told)
    rsrouter("wrap", *sources, "--label-map", "first", "--out", pool, "--data", data["train"])
    entry = json.loads(pool.read_text())["experts"][0]
    assert entry["labels"] == list(NAMES)
    assert tuple(entry["input_shape"]) == (3, SIDE, SIDE)
    radii = ("--radii", "0,0.1,0.2")
    rsrouter("label", pool, "--data", data["train"], "--n", 50, "--unseen", "--out", tmp_path / "votes.npz")
    sets = ("--data", data["train"], "--validation", data["validation"], *radii, "--n", 200)
    flat = ("--kind", "flat", "--recipe", "utility", "--labels", tmp_path / "votes.npz", "--out", tmp_path / "flat")
    rsrouter("train", pool, *sets, *flat)
    assert json.loads((tmp_path / "flat" / "config.json").read_text())["router"]["kind"] == "flat"
    rsrouter("train", pool, *sets, "--kind", "deferral", "--recipe", "quick", "--out", run / "router")
    log = "".join(p.read_text() for p in (run / "router").glob("*.jsonl"))
    assert "no_head" not in log
    rsrouter("certify", run / "router", "--data", data["test"], "--out", run / "certificates.tsv", "--n", 200, *radii)
    rsrouter("publish", run, "org/router", "--with-experts", "org/part", "--licence", "other")
    code = (
        "from rsrouter import RoutedSmooth\n"
        "router = RoutedSmooth.from_pretrained('org/router')\n"
        "print(router.digest, *router.pool.labels)"
    )
    fresh = hub.run(code, HF_HOME=str(tmp_path / "empty"), HF_HUB_OFFLINE="0")
    assert fresh.returncode == 0, fresh.stderr[-2000:]
    assert fresh.stdout.split()[1:] == list(NAMES)
    needs = json.loads(hub.files("org/router")["config.json"])["needs"]
    assert set(needs) == {"timm" if kind.startswith("timm") else "open_clip_torch" if kind == "open_clip" else "transformers"}
    checks = ("--rows", 1, "--fresh-votes", 200, "--attack-steps", 2)
    audited = json.loads(rsrouter("audit", "org/router", "--data", data["test"], *checks, "--format", "json"))
    assert audited["ok"]
