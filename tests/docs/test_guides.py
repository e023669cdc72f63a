"""The documentation's blocks run as they stand: Python, doctests, and command lines in one process.

A block after `<!-- not run: why -->` is not run; its command lines are still parsed. Commands other than `rsrouter` (pip, git,
curl) are not run. A page's blocks share one folder and one namespace, which `FOLDERS` prepares, and `SMALLER` says what
the test scales down.
"""

from __future__ import annotations

import doctest
import glob
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.main import get_command

import rsrouter
from rsrouter import CascadeRouter, ExpertPool, RoutedSmooth, load_expert, register_architecture
from rsrouter.cli import app, main
from rsrouter.demo import load_pool
from rsrouter.training import DEFERRAL_RECIPES
from tests.helpers import small_router as small
from tests.helpers.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / ".docs" / "pages"
NAMES = sorted(str(p.relative_to(PAGES)) for p in PAGES.rglob("*.md"))
#: pages whose command lines are parsed, not run
PARSED = {"clusters.md": "several machines; tests/jobs and tests/cli run what one can"}
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<kind>\w+)(?: title=\"(?P<file>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    why: str | None
    file: str | None

    @property
    def commands(self) -> list[tuple[list[str], str]]:
        """Words of every `rsrouter` line, and the output that a console block shows for it."""
        if self.kind == "console":
            parts = [part.partition("\n") for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]]
        else:
            parts = [(line, "", "") for line in self.text.replace("\\\n", " ").splitlines()] if self.kind == "sh" else []
        found = [(shlex.split(line, comments=True), output) for line, _, output in parts]
        return [(words[1:], output) for words, output in found if words[:1] == ["rsrouter"]]


def blocks(page: str) -> list[Block]:
    text = (PAGES / page).read_text(encoding="utf-8")
    return [Block(m["kind"], m["text"], m["why"], m["file"]) for m in BLOCK.finditer(text)]


class Tiny(nn.Module):
    """Brightness of 16 fields of a 3 x 32 x 32 image, one class per field, with timm's three methods."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.pool, self.fc = nn.AvgPool2d(8), nn.Linear(48, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.pool(x).flatten(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def checkpoints() -> None:
    """What the researcher has: three checkpoints in Cohen's format, and images."""
    register_architecture("docs_tiny", Tiny, input_shape=(3, 32, 32))
    torch.manual_seed(0)
    for sigma in ("0.25", "0.50", "1.00"):
        net = Tiny()
        with torch.no_grad():
            net.fc.weight.copy_(40 * torch.eye(10, 16).repeat(1, 3) + torch.randn(10, 48))
        path = Path(f"models/noise_{sigma}/checkpoint.pth.tar")
        path.parent.mkdir(parents=True)
        state = {f"1.module.{name}": value for name, value in net.state_dict().items()}
        torch.save({"epoch": 90, "arch": "docs_tiny", "state_dict": state, "optimizer": {"state": {}}}, path)
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("validation", 20), ("test", 6)):
        labels = rng.integers(0, 10, count)
        pixels = rng.integers(60, 120, (count, 3, 32, 32))
        for image, label in zip(pixels, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 60
        np.savez(f"{name}.npz", images=pixels.astype(np.uint8), labels=labels)


def cascade(folder: str) -> None:
    """What a demo run or a training leaves: a router over two bundled experts."""
    pool = ExpertPool([load_pool()["sigma_0.5"], load_pool()["sigma_1"]])
    RoutedSmooth(pool, CascadeRouter((0.6,))).save_pretrained(folder)


def publication(request: pytest.FixtureRequest) -> None:
    """A run over experts on a Hub on loopback, and a checkpoint."""
    checkpoints()
    hub: HubServer = request.getfixturevalue("hub")
    scratch = Path("scratch")
    scratch.mkdir()
    small.run_folder(small.routed(small.put_experts(hub, scratch)), Path("run"))
    data = small.images()
    pixels = (small.pixels(data) * 255).round().to(torch.uint8).numpy()
    np.savez("test.npz", images=pixels, labels=data.labels.numpy())


def choosing() -> None:
    """The tables of the repository, and a pool with images."""
    Path("model_cards").symlink_to(ROOT / "model_cards")
    checkpoints()
    how: dict[str, Any] = {"architecture": "docs_tiny", "normalisation": "none"}
    levels = {"0.25": 0.25, "0.50": 0.5, "1.00": 1.0}
    experts = [load_expert(f"models/noise_{name}/checkpoint.pth.tar", sigma=s, **how) for name, s in levels.items()]
    ExpertPool(experts).save("pool.json")


def heads() -> None:
    """A pool, images, and two last layers."""
    checkpoints()
    trunk = load_expert("models/noise_0.50/checkpoint.pth.tar", sigma=0.5, architecture="docs_tiny", normalisation="none")
    ExpertPool([trunk]).save("pool.json")
    for name in ("a", "b"):
        save_file(nn.Linear(48, 10).state_dict(), f"{name}.safetensors")


FOLDERS = {
    "guide/deterministic.md": lambda request: heads(),
    "install.md": lambda request: cascade("demo-run/router"),
    "guide/researcher.md": lambda request: checkpoints(),
    "guide/deploy.md": lambda request: cascade("router"),
    "guide/publish.md": publication,
    "guide/choosing.md": lambda request: choosing(),
}
SMALLER = {
    "guide/researcher.md": {
        "cifar_resnet110": "docs_tiny",
        "train pool.json --data": "train pool.json --recipe quick --n 600 --radii 0:0.5:0.25 --data",
        "--radii 0:2:0.25 --out router\n": "--out router\n",
        "--recipe quick --n 600 --radii 0:0.5:0.25 --data train.npz --kind flat": "--data train.npz --kind flat",
        "certify router ": "certify router --n 600 --count 3 ",
        "--radii 0:2:0.25 --experts": "--radii 0:0.5:0.25 --experts",
        "--data test.npz --shard": "--radii 0:0.5:0.25 --data test.npz --shard",
        "--n 100 --unseen": "--n 20 --unseen",
    },
    "guide/publish.md": {"cifar_resnet110": "docs_tiny", "--rows 4": "--rows 1 --fresh-votes 200 --attack-steps 2"},
    "guide/deterministic.md": {"--n 10000": "--n 200", "--count 200": "--count 2"},
    "guide/deploy.md": {"batch(range(4))": "batch(range(1))", "n=1000": "n=100"},
    "guide/choosing.md": {"train pool.json --data": "train pool.json --recipe quick --n 600 --radii 0:0.5:0.25 --data"},
    "install.md": {"--n 2000": "--n 500 --radii 0:0.25:0.25"},
}


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command line in this process: (exit status, what it printed)."""

    def run(words: list[str]) -> tuple[int, str]:
        expanded = [path for word in words for path in (sorted(glob.glob(word)) or [word])]
        monkeypatch.setattr(sys, "argv", ["rsrouter", *expanded])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return status, out + err

    return run


def lines(text: str) -> list[str]:
    """Lines without what trails them."""
    return [line.rstrip() for line in text.strip("\n").splitlines()]


@pytest.mark.parametrize(
    "page",
    [n for n in NAMES if n not in PARSED and any(b.kind in ("sh", "python", "pycon", "console") for b in blocks(n))],
)
def test_blocks_run(page, tmp_path, monkeypatch, call, request, small_batches):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("rsrouter.publish.commit.load_anew", lambda *_, **__: None)  # a process; tests/publish starts it
    quick = DEFERRAL_RECIPES["quick"]
    shorter = replace(quick, copies=4, tune_copies=40, heads=tuple(replace(head, steps=20) for head in quick.heads))
    monkeypatch.setitem(DEFERRAL_RECIPES, "quick", shorter)
    FOLDERS.get(page, lambda request: None)(request)
    smaller = dict(SMALLER.get(page, {}))
    used, namespace, ran = set(), {}, 0
    for block in blocks(page):
        if block.why is not None:
            continue
        text = block.text
        for old, new in smaller.items():
            if old in text:
                used.add(old)
                text = text.replace(old, new)
        block = Block(block.kind, text, None, block.file)
        if block.file is not None:
            Path(block.file).write_text(text, encoding="utf-8")
        elif block.kind == "python":
            exec(compile(text, page, "exec"), namespace)
        elif block.kind == "pycon":
            test = doctest.DocTestParser().get_doctest(text, namespace, page, page, 0)
            said: list[str] = []
            result = doctest.DocTestRunner(verbose=False).run(test, out=said.append, clear_globs=False)
            namespace.update(test.globs)
            assert not result.failed, "".join(said)
        for words, wanted in block.commands:
            status, printed = call(words)
            if block.kind == "console":
                assert lines(printed) == lines(wanted), f"rsrouter {shlex.join(words)} prints\n{printed}"
            else:
                assert status == 0, f"rsrouter {shlex.join(words)}: {printed}"
        ran += 1
    assert ran
    assert used == smaller.keys(), "a scaled-down text stands no more on the page"


def test_command_lines_parse():
    """Also those that are not run."""
    verbs = get_command(app).commands
    count = 0
    for page in NAMES:
        for block in blocks(page):
            for words, _ in block.commands:
                verbs[words[0]].make_context(words[0], list(words[1:]))
                count += 1
    assert count > 20


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(p.read_text(encoding="utf-8") for p in (PAGES / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: rsrouter\.(?:\w+\.)*(\w+)$", pages, flags=re.MULTILINE))
    plain = {"__version__", "ABSTAIN", "core"}
    assert set(rsrouter.__all__) - plain <= shown
    assert set(rsrouter.core.__all__) - set(rsrouter.__all__) - {"RULES", "SIDES"} <= shown


def test_every_public_name_explains_itself():
    for name in sorted({*rsrouter.__all__} - {"__version__", "ABSTAIN", "core"}):
        assert (getattr(rsrouter, name).__doc__ or "").strip(), name


def test_tutorials_are_scripts_whose_commands_parse():
    """They are executed when the site is built (`.docs/build.py`)."""
    verbs, commands = get_command(app).commands, 0
    scripts = sorted((ROOT / ".docs" / "tutorials").glob("*.py"))
    assert len(scripts) >= 5
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        compile(text, str(script), "exec")
        for line in re.findall(r"^# !rsrouter (.*)$", text.replace("\\\n#", ""), flags=re.MULTILINE):
            words = shlex.split(re.split(r" (?:\d?> |\|\| )", line)[0])
            verbs[words[0]].make_context(words[0], words[1:])
            commands += 1
    assert commands > 10
