"""`rsrouter report` and `rsrouter merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from rsrouter.cli.report import register
from rsrouter.core.errors import InputError, ResultsError
from rsrouter.core.recompute import recompute
from rsrouter.results import ResultsWriter, Row, TableMetadata
from tests.helpers.report_tables import described

app = typer.Typer()
register(app)


def certified(folder: Path, name: str, ids: range, **metadata: object) -> Path:
    path = folder / f"{name}.tsv"
    stated: dict[str, Any] = described(
        "expert", name="", **{"indices": [[0, max(ids) + 1, 1]], "num_images": max(ids) + 1, **metadata}
    )
    about = TableMetadata.read(stated, name)
    votes = [{"select": {"e": [10, 0, 0]}, "estimate": {"e": [99 - i, 1 + i, 0]}} for i in ids]
    found = recompute(about.tree.tree, about.plan, about.split, votes, sides=about.sides)
    with ResultsWriter(path, stated) as writer:
        writer.extend(Row.from_certificate(c, idx=i, label=0, seed=about.seed) for i, c in zip(ids, found, strict=True))  # type: ignore[arg-type]
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_report(tmp_path: Path) -> None:
    a, b = certified(tmp_path, "a", range(20)), certified(tmp_path, "b", range(20))
    printed = run("report", f"mine={a}", b, "--routed", "mine", "--radii", "0,0.5", "--out", tmp_path / "out")
    assert "mine" in printed
    assert "100.0" in printed
    assert (tmp_path / "out" / "index.html").exists()
    data = json.loads(run("report", a, b, "--out", tmp_path / "out", "--format", "json"))
    assert [s["name"] for s in data["series"]] == ["a", "b", "envelope", "oracle"]
    assert data["series"][0]["accuracy"][0] == 1.0


def test_report_with_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=np.zeros((30, 1, 8, 8), np.uint8), labels=np.ones(30, np.int64))
    run("report", certified(tmp_path, "a", range(0, 30, 3)), "--data", tmp_path / "data.npz", "--out", tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/png") == 10
    assert "#27" in page


def test_a_file_with_an_equals_sign_is_a_file(tmp_path: Path) -> None:
    path = certified(tmp_path, "n=100", range(3))
    assert json.loads(run("report", path, "--out", tmp_path / "out", "--format", "json"))["series"][0]["name"] == "n=100"


def test_report_errors_are_typed(tmp_path: Path) -> None:
    path = certified(tmp_path, "a", range(3))
    for error, arguments in ((ResultsError, [tmp_path / "none.tsv"]), (InputError, [f"x={path}", f"x={path}"]),
                             (InputError, [path, "--radii", "zero"]), (InputError, [path, "--routed", "b"])):  # fmt: skip
        with pytest.raises(error):
            CliRunner().invoke(app, ["report", *map(str, arguments), "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_merge(tmp_path: Path) -> None:
    shared = {"indices": [[0, 10, 1]], "num_images": 10}
    shards = [certified(tmp_path, f"s{i}", range(i, 10, 2), shard={"index": i, "count": 2}, **shared) for i in range(2)]
    assert "10 rows" in run("merge", *shards, "--out", tmp_path / "all.tsv")
    assert json.loads(run("merge", *shards, "--out", tmp_path / "all.tsv", "--format", "json"))["rows"] == 10
    with pytest.raises(ResultsError, match="no shard 1"):
        CliRunner().invoke(app, ["merge", str(shards[0]), "--out", str(tmp_path / "x.tsv")], catch_exceptions=False)
    assert "5 rows" in run("merge", shards[0], "--partial", "--out", tmp_path / "part.tsv")
