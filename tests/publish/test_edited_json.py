"""A table whose JSON says something else about its classifier than is true: publish refuses what the audit would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rsrouter import ExpertPool, Smooth, Terms
from rsrouter.core.errors import IntegrityError, ResultsError
from rsrouter.jobs import certify_table
from rsrouter.publish.files import check_table
from rsrouter.results import read_table
from rsrouter.serialise import Saved
from tests.helpers import small_router as small


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Saved]:
    routed = small.routed(ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)]))
    folder = tmp_path_factory.mktemp("honest")
    certify_table(routed, small.images(2), folder / "t.tsv", small.PLAN)
    return folder, Saved(routed.pool, routed.router, routed.execution, routed.noise)


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "sigma of a stage": lambda m: m["tree"]["stages"][-1].update(sigma=9.0),
    "sigma of an expert": lambda m: m["experts"][1].update(sigma=9.0),
    "name of an expert": lambda m: m["experts"][1].update(name="other"),
    "order of the experts": lambda m: m["experts"].reverse(),
    "an expert twice": lambda m: m["experts"].append(dict(m["experts"][0])),
    "kind of the router": lambda m: m.update(router="cascade"),
    "kernels": lambda m: m.update(kernels={}),
    "stream": lambda m: m.update(stream={"chunk": 7}),
    "role": lambda m: m.update(role="expert"),
    "title of a stage": lambda m: m["tree"]["stages"][0].update(title="certified at 99.9%"),
    "seed_derived": lambda m: m.update(seed_derived=False),
}


def test_an_honest_table_is_published(honest: tuple[Path, Saved]) -> None:
    assert check_table(read_table(honest[0] / "t.tsv"), honest[1]).checked


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_json_is_refused(honest: tuple[Path, Saved], tmp_path: Path, name: str) -> None:
    folder, saved = honest
    content = json.loads((folder / "t.json").read_text())
    EDITS[name](content)
    (tmp_path / "t.json").write_text(json.dumps(content))
    (tmp_path / "t.tsv").write_bytes((folder / "t.tsv").read_bytes())
    with pytest.raises(IntegrityError, match=r"something else about its classifier.*in the (table|router)"):
        check_table(read_table(tmp_path / "t.tsv"), saved)


@pytest.mark.parametrize("role", ["routed", "expert"])
def test_a_seed_that_was_chosen_by_hand_is_refused(honest: tuple[Path, Saved], tmp_path: Path, role: str) -> None:
    saved = honest[1]
    subject = small.routed(saved.pool) if role == "routed" else Smooth(saved.pool[0])
    table = certify_table(subject, small.images(2), tmp_path / "t.tsv", Terms(small.PLAN, seed=7))
    with pytest.raises(ResultsError, match="chosen by hand") as caught:
        check_table(table, saved)
    assert (caught.value.received, "--seed-from TEXT" in caught.value.remedy) == ("seed 7", True)
    mixed = certify_table(subject, small.images(2), tmp_path / "m.tsv", small.PLAN, seed_from="2026-11-28")
    assert check_table(mixed, saved).checked
