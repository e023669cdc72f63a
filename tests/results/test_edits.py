"""Attacks on a table's rows and on its JSON: what counts alone can find is found by every reader, and the rest is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsrouter.core import AdaptivePlan, FixedPlan, Plan
from rsrouter.core.errors import IntegrityError, ResultsError, RSRouterError
from rsrouter.report import summarise
from rsrouter.results import COLUMNS, ResultsWriter, TreeRecord, merge_tables, read_table, require_whole, unfinished, verify_rows
from rsrouter.results.about import unpack_ids
from rsrouter.results.rows import HEADER, Row
from tests.helpers.fake_rows import FINE, FIXED, TREES, described, make_rows

Cells = list[dict[str, str]]
Edit = Callable[[Cells, dict[str, Any]], None]

IMAGES = 25
PLAN = AdaptivePlan(2000, (0.25, 0.5, 1.0), 20)


def write(folder: Path, tree: str, plan: Plan, edit: Edit | None = None, **options: Any) -> Path:
    """A whole table, and what somebody made of it."""
    metadata = described(tree, plan, ids=range(IMAGES), **options)
    lines = [row.to_line() for row in make_rows(range(IMAGES), tree, plan, **options)]
    cells = [dict(zip(COLUMNS, line[:-1].split("\t"), strict=True)) for line in lines]
    if edit is not None:
        edit(cells, metadata)
    path = folder / "certificates.tsv"
    path.write_text(HEADER + "".join("\t".join(row.values()) + "\n" for row in cells))
    path.with_suffix(".json").write_text(json.dumps(metadata))
    return path


@pytest.mark.parametrize("plan", [FIXED, PLAN, FINE], ids=["fixed", "adaptive", "fine"])
@pytest.mark.parametrize("tree", TREES)
def test_an_honest_table_passes_everywhere(tmp_path: Path, tree: str, plan: Plan) -> None:
    for rule, sides in (("tree", "two"), ("min", "two"), ("tree", "one")):
        path = write(tmp_path, tree, plan, rule=rule, sides=sides)
        table = read_table(path, check="counts")
        assert table.checked
        assert require_whole(table) is table
        assert verify_rows(table) == []
        with ResultsWriter(path, json.loads(path.with_suffix(".json").read_text())) as writer:
            assert len(writer.done()) == IMAGES
        assert {table.answered_by[i] for i in range(IMAGES)} <= set(TREES[tree].stages)  # type: ignore[index]
        assert np.all(table.fixed_votes >= table.n_drawn)


def held(cells: Cells) -> dict[str, str]:
    return max(cells, key=lambda row: float(row["radius"]))


def gone(cells: Cells) -> dict[str, str]:
    return next(row for row in cells if row["predict"] == "-1")


def cell(column: str, change: Callable[[str], str], which: Callable[[Cells], dict[str, str]] = held) -> Edit:
    def edit(cells: Cells, _: dict[str, Any]) -> None:
        row = which(cells)
        before = row[column]
        row[column] = change(before)
        assert row[column] != before

    return edit


def votes(change: Callable[[dict[str, Any]], None], which: Callable[[Cells], dict[str, str]] = held) -> Edit:
    def edit(cells: Cells, _: dict[str, Any]) -> None:
        row = which(cells)
        content = json.loads(row["counts"])
        change(content)
        row["counts"] = json.dumps(content, separators=(",", ":"))

    return edit


def both(*edits: Edit) -> Edit:
    def edit(cells: Cells, metadata: dict[str, Any]) -> None:
        for one in edits:
            one(cells, metadata)

    return edit


def add(number: float) -> Callable[[str], str]:
    return lambda text: f"{float(text) + number:.8f}"


def shift(cells: Cells, _: dict[str, Any]) -> None:
    """One vote more for the certified class at the stage that limits the radius, one less for another outcome."""
    for row in cells:
        content = json.loads(row["counts"])
        counts = content["estimate"].get(row["bound_by"], [])
        others = [k for k, n in enumerate(counts[:-1]) if n and k != int(row["predict"])]
        if int(row["predict"]) >= 0 and len(counts) == 4 and others:
            counts[int(row["predict"])] += 1
            counts[others[0]] -= 1
            row["counts"] = json.dumps(content, separators=(",", ":"))
            return
    raise AssertionError("no such row")


def close(cells: Cells) -> dict[str, str]:
    """A certified row some of whose votes went elsewhere."""
    return next(
        row
        for row in cells
        if row["predict"] != "-1" and any(0 < max(v) < sum(v) for v in json.loads(row["counts"])["estimate"].values())
    )


def first(purpose: str, change: Callable[[list[int]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda content: change(next(iter(content[purpose].values())))


def swap(column: str) -> Edit:
    def edit(cells: Cells, _: dict[str, Any]) -> None:
        a = held(cells)
        b = next(row for row in cells if row[column] != a[column])
        a[column], b[column] = b[column], a[column]

    return edit


def copy_row(cells: Cells, _: dict[str, Any]) -> None:
    donor, target = held(cells), gone(cells)
    target.update({k: v for k, v in donor.items() if k not in ("idx", "label", "correct", "radius")})


def meta(*keys: str, to: Any) -> Edit:
    def edit(_: Cells, metadata: dict[str, Any]) -> None:
        place: Any = metadata
        for key in keys[:-1]:
            place = place[int(key)] if isinstance(place, list) else place[key]
        assert place[keys[-1]] != to
        place[keys[-1]] = to

    return edit


def drop(key: str) -> Edit:
    return lambda _, metadata: metadata.__delitem__(key)


ROWS: dict[str, Edit] = {
    "radius up by a hundredth": cell("radius", add(0.01)),
    "radius up by the last digit but one": cell("radius", add(2e-7)),
    "radius down": cell("radius", add(-0.01)),
    "radius to the next grid value": cell("radius", lambda t: f"{np.ceil(float(t) * 4) / 4 + 0.25:.8f}"),
    "radius to nothing": cell("radius", lambda t: "0.00000000"),
    "radius beyond any votes": cell("radius", lambda t: "9.0"),
    "radii of two rows swapped": swap("radius"),
    "all radii twice as large": lambda cells, _: [row.update(radius=f"{2 * float(row['radius']):.8f}") for row in cells] and None,
    "an abstention with a radius": cell("radius", lambda t: "0.5", gone),
    "an abstention with a class": cell("predict", lambda t: "1", gone),
    "an abstention with class, correctness and radius": both(
        cell("predict", lambda t: "1", gone),
        lambda cells, _: next(r for r in cells if r["radius"] == "0.00000000" and r["predict"] == "1").update(
            radius="0.75000000", label="1", correct="1"
        ),
    ),
    "class changed": cell("predict", lambda t: str((int(t) + 1) % 3)),
    "class changed to the label": lambda cells, _: next(
        row for row in cells if row["correct"] == "0" and row["predict"] != "-1"
    ).update(
        {"predict": next(row for row in cells if row["correct"] == "0" and row["predict"] != "-1")["label"], "correct": "1"}
    ),
    "class turned into an abstention": both(cell("predict", lambda t: "-1"), cell("radius", lambda t: "0.00000000")),
    "correct turned over": cell("correct", lambda t: "0" if t == "1" else "1"),
    "expert of another": cell("expert", lambda t: "sigma-9"),
    "expert left out": cell("expert", lambda t: ""),
    "rule of another": cell("rule", lambda t: "min"),
    "rule left out": cell("rule", lambda t: ""),
    "r_router up": cell("r_router", lambda t: "7.00000000"),
    "r_router left out": cell("r_router", lambda t: ""),
    "r_expert up": cell("r_expert", add(0.5)),
    "r_expert down": cell("r_expert", add(-0.1)),
    "r_expert without end": cell("r_expert", lambda t: "inf"),
    "votes drawn halved": cell("n_drawn", lambda t: str(int(t) // 2)),
    "votes drawn up": cell("n_drawn", lambda t: str(int(t) + 1)),
    "votes drawn left out": cell("n_drawn", lambda t: ""),
    "seed of another": cell("seed", lambda t: str(int(t) + 1)),
    "seed left out": cell("seed", lambda t: ""),
    "bound by another stage": cell("bound_by", lambda t: "sigma-0" if t != "sigma-0" else "sigma-1"),
    "bound by nothing": cell("bound_by", lambda t: ""),
    "image outside the job": cell("idx", lambda t: "4000"),
    "image twice": lambda cells, _: cells.append(dict(cells[0])),
    "row of another image over an abstention": copy_row,
    "counts of another row": swap("counts"),
    "counts left out": cell("counts", lambda t: ""),
    "counts of no stage": cell("counts", lambda t: '{"select":{},"estimate":{}}'),
    "one vote moved": shift,
    "one selection vote added": votes(first("select", lambda v: v.__setitem__(0, v[0] + 1))),
    "one vote added": votes(first("estimate", lambda v: v.__setitem__(0, v[0] + 1))),
    "one vote less": votes(first("estimate", lambda v: v.__setitem__(v.index(max(v)), max(v) - 1))),
    "a negative vote": cell("counts", lambda t: t.replace("[", "[-", 1)),
    "votes that overflow": votes(first("select", lambda v: v.__setitem__(slice(0, 2), [2**63 - 1, 2**63 - 1]))),
    "votes beyond 64 bits": votes(first("estimate", lambda v: v.__setitem__(0, 2**70))),
    "an outcome more": votes(first("estimate", lambda v: v.append(0))),
    "an outcome less": votes(first("estimate", lambda v: v.pop())),
    "selection left out": votes(lambda c: c["select"].clear()),
    "estimation left out": votes(lambda c: c["estimate"].clear()),
    "a stage of another router": votes(lambda c: c["estimate"].update(other=[1, 2])),
    "a stage renamed": votes(lambda c: c["select"].update(x=c["select"].pop(next(iter(c["select"]))))),
    "a stage twice": cell("counts", lambda t: t.replace('"estimate":{', '"estimate":{"sigma-2":[1,2,3,4],', 1)),
    "spaces between counts": cell("counts", lambda t: t.replace(",", ", ", 1)),
    "an earlier look invented": votes(
        lambda c: c.update(earlier={f"{s}@{sum(v)}": v for s, v in list(c["estimate"].items())[:1]}), close
    ),
    "an earlier look of no plan": votes(lambda c: c.update(earlier={f"{next(iter(c['estimate']))}@7": [7, 0, 0, 0]}), close),
    "an earlier look under another number": votes(
        lambda c: c.update(earlier={f"{next(iter(c['estimate']))}@99": [100, 0, 0, 0]}), close
    ),
    "votes scaled up": votes(
        lambda c: [v.__setitem__(slice(None), [10 * n for n in v]) for v in c["estimate"].values()] and None
    ),
    "counts that are no JSON": cell("counts", lambda t: t[:-3]),
    "a cell too many": cell("counts", lambda t: t + "\tx"),
    "a word for a radius": cell("radius", lambda t: "large"),
    "NaN for a radius": cell("radius", lambda t: "nan"),
}

JSON: dict[str, Edit] = {
    "alpha a hundred times larger": meta("terms", "alpha", to=0.1),
    "alpha that is none": meta("terms", "alpha", to=2.0),
    "another plan": meta("terms", "plan", to=FixedPlan(20, 5000).to_dict()),
    "other looks": meta("terms", "plan", "growth", to=1.5),
    "more selection votes": meta("terms", "plan", "n0", to=50),
    "alpha spent otherwise": meta("terms", "plan", "last_share", to=0.05),
    "another rule": meta("terms", "rule", to="min"),
    "an unknown rule": meta("terms", "rule", to="best"),
    "one side": meta("terms", "sides", to="one"),
    "sides left open": meta("terms", "sides", to=None),
    "another seed": meta("terms", "seed", to=3),
    "terms without a plan": meta("terms", to={"alpha": 0.1}),
    "sigma twice as large": meta("tree", "stages", "0", "sigma", to=2.0),
    "sigma of zero": meta("tree", "stages", "0", "sigma", to=0.0),
    "another threshold": meta("tree", "stages", "0", "tau", to=0.51),
    "a threshold below one half": meta("tree", "stages", "0", "tau", to=0.4),
    "a tree of another router": lambda _, m: m.update(tree=TreeRecord.of(TREES["flat"]).model_dump(mode="json")),
    "a root that does not exist": meta("tree", "root", to="nowhere"),
    "outcomes that lead elsewhere": lambda _, m: m["tree"]["stages"][-1].update(leads_to=[[1, 4], -1]),
    "a stage left out": lambda _, m: m["tree"]["stages"].pop(),
    "more outcomes than memory holds": lambda _, m: m["tree"]["stages"][-1].update(leads_to=[[0, 10**12], -1]),
    "stages on one network": lambda _, m: [s.update(network="one") for s in m["tree"]["stages"]] and None,
    "another role": meta("role", to="expert"),
    "an unknown role": meta("role", to="judge"),
    "images that are others": meta("indices", to=[[100, 125, 1]]),
    "a number of images that is another": meta("num_images", to=5),
    "more images than memory holds": lambda _, m: m.update(indices=[[0, 10**12, 1]], num_images=10**12),
    "no digest": drop("digest"),
    "no terms": drop("terms"),
    "no tree": drop("tree"),
    "a digest that is a number": meta("digest", to=7),
    "a shard that cannot be": lambda _, m: m.update(shard={"index": 3, "count": 2}),
    "an earlier schema": meta("schema_version", to=1),
    "a later schema": meta("schema_version", to=3),
    "not our kind": meta("kind", to="something"),
}

#: What votes and JSON cannot tell by themselves, and who can.
BLIND: dict[str, tuple[Edit, str]] = {
    "a label with its correctness": (
        lambda cells, _: held(cells).update(label=held(cells)["predict"], correct="1"),
        "the labels are the data set's: the audit compares them",
    ),
    "time": (cell("time", lambda t: "9.000"), "no part of a certificate"),
    "digest": (meta("digest", to="e" * 64), "it is the router's: audit and publication compare it"),
    "name": (meta("name", to="better"), "a name"),
    "data": (meta("data", "name", to="test, easy half"), "the data set's fingerprint is the audit's"),
    "seed not derived": (meta("seed_derived", to=False), "the router derives it: audit and publication compare it"),
    "a vote moved where nothing depends on it": (
        votes(
            lambda c: c["select"].update({s: [v[0] - 1, v[1] + 1, *v[2:]] for s, v in c["select"].items() if v[0] > 11}), close
        ),
        "no cell changes: drawing the votes again finds it",
    ),
    "device": (meta("device", to="GPU"), "where it ran; decides how an audit compares votes, which says so"),
}


def refused(path: Path) -> RSRouterError:
    with pytest.raises((IntegrityError, ResultsError)) as caught:
        read_table(path, check="counts")
    return caught.value


@pytest.mark.parametrize("name", ROWS)
def test_an_edited_row_is_found(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, "cascade", PLAN, ROWS[name])
    error = refused(path)
    assert error.expected
    assert error.received
    assert error.remedy
    before = path.read_bytes()
    with pytest.raises((IntegrityError, ResultsError)):
        ResultsWriter(path, json.loads(path.with_suffix(".json").read_text()))
    with pytest.raises((IntegrityError, ResultsError)):
        merge_tables([path], tmp_path / "merged.tsv")
    with pytest.raises((IntegrityError, ResultsError)):
        summarise(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", JSON)
def test_an_edited_json_is_found(tmp_path: Path, name: str) -> None:
    tree = "flat" if name in ("one side", "outcomes that lead elsewhere") else "cascade"  # whose last stage answers rarely
    path = write(tmp_path, tree, PLAN, JSON[name])
    honest = described(tree, PLAN, ids=range(IMAGES))
    with pytest.raises((IntegrityError, ResultsError)):
        ResultsWriter(path, honest)
    with pytest.raises((IntegrityError, ResultsError)):
        merge_tables([path], tmp_path / "merged.tsv")
    if name == "not our kind":  # then it claims nothing, and the report says so
        assert any(note.startswith("UNVERIFIED") for _, note in summarise(path).notes)
    else:
        assert refused(path).remedy


@pytest.mark.parametrize("name", BLIND)
def test_what_counts_cannot_tell(tmp_path: Path, name: str) -> None:
    edit, who = BLIND[name]
    assert who
    assert read_table(write(tmp_path, "cascade", PLAN, edit), check="counts").checked


@pytest.mark.parametrize("tree", TREES)
def test_random_votes_never_pass_unseen(tmp_path: Path, tree: str) -> None:
    """Votes moved at random inside one row: whatever they support now is not what the row says, or it says the same."""
    rng = np.random.default_rng(len(tree))
    found = 0
    for _ in range(25):

        def edit(cells: Cells, _: dict[str, Any]) -> None:
            row = cells[int(rng.integers(IMAGES))]
            content = json.loads(row["counts"])
            stages = [v for purpose in ("select", "estimate") for v in content[purpose].values()]
            counts = stages[int(rng.integers(len(stages)))]
            a, b = rng.choice(len(counts), 2, replace=False)
            moved = int(rng.integers(0, counts[a] + 1))
            counts[a], counts[b] = counts[a] - moved, counts[b] + moved
            row["counts"] = json.dumps(content, separators=(",", ":"))

        table = read_table(write(tmp_path, tree, FIXED, edit))
        wrong = verify_rows(table)
        found += bool(wrong)
        assert {m.column for m in wrong} <= {
            "counts",
            "predict",
            "radius",
            "r_router",
            "r_expert",
            "expert",
            "n_drawn",
            "bound_by",
        }
    assert found > 0


def test_rows_that_are_missing_are_said(tmp_path: Path) -> None:
    path = write(tmp_path, "flat", FIXED, lambda cells, _: cells.__delitem__(slice(18, None)))
    table = read_table(path, check="counts")
    assert unfinished(table) == "18 of 25 images"
    with pytest.raises(ResultsError, match="unfinished") as caught:
        require_whole(table)
    assert caught.value.received == "18 of 25"
    assert any(note.startswith("UNFINISHED: 18 of 25 images") for _, note in summarise(path).notes)
    assert unfinished(read_table(write(tmp_path, "flat", FIXED))) == ""


def test_images_that_were_picked_are_known(tmp_path: Path) -> None:
    chosen = [3, 17, 4, 90]
    path = tmp_path / "t.tsv"
    with ResultsWriter(path, described(ids=chosen)) as writer:
        writer.extend(make_rows(chosen))
    about = read_table(path, check="counts").described()
    assert about.picked
    assert unpack_ids(about.indices).tolist() == chosen
    assert not read_table(write(tmp_path, "flat", FIXED)).described().picked


def test_a_single_row_certificate_is_what_its_line_says(tmp_path: Path) -> None:
    row: Row = next(r for r in make_rows(range(9), "single") if r.predict >= 0)
    assert (row.rule, row.expert, row.r_router) == ("", "sigma-1", float("inf"))
