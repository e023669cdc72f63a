"""Architectures of a user's own: announced by an installed package, or imported by the reader; never from the repository."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from rsrouter import CascadeRouter, CheckpointError, ExpertPool, RoutedSmooth, load_expert
from rsrouter.cli import main
from rsrouter.experts import registry
from rsrouter.publish.anew import load_anew
from rsrouter.publish.card import render_card
from rsrouter.serialise import CONFIG, Saved, load_folder, read_router_config
from tests.helpers import small_router as small

NET = """
from torch import nn

class {name}(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, num_classes))

    def forward(self, x):
        return self.layers(x)
"""


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test registers is unknown to the next."""
    before = dict(registry._ARCHITECTURES)
    registry._announced.cache_clear()
    yield
    registry._ARCHITECTURES.clear()
    registry._ARCHITECTURES.update(before)
    registry._announced.cache_clear()
    for name in ("announced_nets", "loose_nets_of_mine"):
        sys.modules.pop(name, None)


def router_over(folder: Path, architecture: str) -> Path:
    build = registry.build_architecture(architecture, 3)
    save_file(build.state_dict(), folder / "w.safetensors")
    settings = {"sigma": 0.5, "num_classes": 3, "input_shape": small.SHAPE, "normalisation": "none"}
    expert = load_expert(folder / "w.safetensors", architecture=architecture, **settings)
    pool = ExpertPool([expert, small.expert(0.25)])
    return RoutedSmooth(pool, CascadeRouter((0.6,))).save_pretrained(folder / "router")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that announces `announced_net`."""
    site = tmp_path / "site"
    (site / "announced_nets-1.2.dist-info").mkdir(parents=True)
    (site / "announced_nets.py").write_text(NET.format(name="Net"))
    (site / "announced_nets-1.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: announced-nets\nVersion: 1.2\n")
    points = "[rsrouter.architectures]\nannounced_net = announced_nets:Net\n"
    (site / "announced_nets-1.2.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", f"{site}:{Path(__file__).parents[2]}")
    return site


@pytest.mark.usefixtures("this_process")
def test_a_package_announces_it(package: Path, tmp_path: Path) -> None:
    folder = router_over(tmp_path, "announced_net")
    assert read_router_config(folder).needs == {"announced-nets": "1.2"}
    saved: Saved = load_folder(folder)
    load_anew(folder, saved.routed.digest, allow_local=True)
    text = render_card(saved, "org/router", needs=read_router_config(folder).needs).text
    assert "announced-nets (tested with 1.2): install what is missing first" in text


def test_without_the_package(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = router_over(tmp_path, "announced_net")
    digest = load_folder(folder).routed.digest
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with pytest.raises(CheckpointError, match="not installed") as caught:
        load_anew(folder, digest, allow_local=True)
    assert "pip install announced-nets==1.2" in caught.value.remedy


def test_the_reader_imports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    own = f"{NET.format(name='Net')}\nimport rsrouter\nrsrouter.register_architecture('net_of_mine', Net)\n"
    (tmp_path / "loose_nets_of_mine.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    __import__("loose_nets_of_mine")
    folder = router_over(tmp_path, "net_of_mine")
    assert json.loads((folder / CONFIG).read_text())["needs"] == {}
    sys.modules.pop("loose_nets_of_mine")
    registry._ARCHITECTURES.pop("net_of_mine")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    with pytest.raises(CheckpointError, match="Unknown architecture") as caught:
        load_folder(folder)
    assert "--import" in caught.value.remedy
    words = ["rsrouter", "card", str(folder), "--out", str(tmp_path / "card"), "--name", "org/router"]
    for more, status in ((["--import", "no_such_module"], 2), (["--import", "loose_nets_of_mine"], 2)):
        monkeypatch.setattr("sys.argv", [*words, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == status
    # imported, and refused for what it is: nobody else could build it
    assert "nobody else could build" in capsys.readouterr().err
