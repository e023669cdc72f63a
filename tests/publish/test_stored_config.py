"""Every odd edit of a router's config.json is a typed error, or loads as what it says."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rsrouter import CascadeRouter, CheckpointError, ExpertPool, InputError, RoutedSmooth, RSRouterError
from rsrouter.router import DeferralRouter, Voter
from rsrouter.router.stored import MOST_STAGES
from rsrouter.serialise import CONFIG, load_folder
from tests.helpers import small_router as small

GONE = object()
ODD: list[Any] = [None, [], {}, "x", -1, 0, 1e300, 10**20, True, [[]], {"a": None}, "\0", GONE]


def paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
    yield at
    for key in value if isinstance(value, dict) else range(min(len(value), 2)) if isinstance(value, list) else ():
        yield from paths(value[key], (*at, key))


def edited(value: Any, at: tuple, new: Any) -> Any:
    if not at:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    if new is GONE:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return value


@pytest.fixture
def pool() -> ExpertPool:
    return ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)])


@pytest.mark.parametrize("kind", ["flat", "cascade", "deferral"])
@pytest.mark.filterwarnings("ignore:config.json")
def test_every_odd_edit(pool: ExpertPool, tmp_path: Path, kind: str) -> None:
    made = {
        "flat": lambda: small.routed(pool),
        "cascade": lambda: RoutedSmooth(pool, CascadeRouter((0.6,))),
        "deferral": lambda: RoutedSmooth(pool, DeferralRouter([Voter("sigma_0.5", 0.4), "sigma_0.25"], (0.7,))),
    }[kind]()
    folder = made.save_pretrained(tmp_path / "router")
    content = json.loads((folder / CONFIG).read_text())
    assert load_folder(folder).routed.digest == made.digest
    count, refused = 0, 0
    for at in [p for p in paths(content) if p[:1] != ("pool",) or len(p) < 3]:  # entries of experts: tests/experts
        for new in ODD if at else ODD[:-1]:
            (folder / CONFIG).write_text(json.dumps(edited(content, at, new)))
            count += 1
            try:
                load_folder(folder).routed  # noqa: B018
            except RSRouterError as error:
                refused += bool(error.expected and error.remedy)
    assert count > 150
    assert refused > 0.9 * count


def test_a_chain_of_a_thousand_stages(pool: ExpertPool, tmp_path: Path) -> None:
    folder = RoutedSmooth(pool, CascadeRouter((0.6,))).save_pretrained(tmp_path / "router")
    content = json.loads((folder / CONFIG).read_text())
    content["router"] |= {"thresholds": [0.6] * 999, "experts": ["sigma_0.5", "sigma_0.25"] * 500}
    (folder / CONFIG).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="thresholds"):
        load_folder(folder)
    with pytest.raises(InputError, match="too long"):
        RoutedSmooth(pool, CascadeRouter((0.6,) * (2 * MOST_STAGES - 1), ["sigma_0.5", "sigma_0.25"] * MOST_STAGES))


def test_nested_deep_and_old(pool: ExpertPool, tmp_path: Path) -> None:
    folder = small.routed(pool).save_pretrained(tmp_path / "router")
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not JSON"):
        load_folder(folder)
    (folder / CONFIG).write_text(json.dumps({**content, "schema_version": 1}))
    with pytest.raises(CheckpointError, match="unsupported schema version") as caught:
        load_folder(folder)
    assert "unreleased version" in caught.value.remedy


def test_packages_that_are_not_here(pool: ExpertPool, tmp_path: Path) -> None:
    folder = small.routed(pool).save_pretrained(tmp_path / "router")
    content = json.loads((folder / CONFIG).read_text())
    assert content["needs"] == {}
    (folder / CONFIG).write_text(json.dumps({**content, "needs": {"no-such-package-anywhere": "1.2.3", "torch": "2"}}))
    with pytest.raises(CheckpointError, match="not installed") as caught:
        load_folder(folder)
    assert caught.value.remedy.endswith("pip install no-such-package-anywhere==1.2.3")
