"""Rows: text that never claims more than the certificate, and reads back as what was written."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsrouter.core import Certificate
from rsrouter.core.errors import ResultsError
from rsrouter.core.rows import VoteColumns
from rsrouter.results import COLUMNS, FIELD_COLUMNS, RADIUS_DECIMALS, ResultsWriter, Row, format_radius, read_table
from rsrouter.results.rows import _COUNTS, _columns, check_counts, parse_counts, parse_time, votes_of
from tests.helpers.fake_rows import METADATA, make_row, run_job

radii = st.floats(min_value=0.0, max_value=1e6, allow_nan=False)


@settings(deadline=None)
@given(radii)
def test_a_written_radius_is_never_rounded_up(radius: float) -> None:
    text = format_radius(radius)
    assert Decimal(text) <= Decimal(radius)
    assert float(text) <= radius
    assert Decimal(radius) - Decimal(text) < Decimal(1).scaleb(-RADIUS_DECIMALS)


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(-3, 3))
def test_radii_next_to_a_grid_value_stay_on_their_side(quarter: int, steps: int) -> None:
    grid = quarter / 40
    radius = grid
    for _ in range(abs(steps)):
        radius = math.nextafter(radius, math.inf if steps > 0 else 0.0)
    if radius < grid:
        # what the field's three digits get wrong
        assert float(format_radius(radius)) < grid
    assert float(format_radius(radius)) <= radius


@settings(max_examples=40, deadline=None)
@given(
    radius=radii,
    r_router=st.one_of(radii, st.just(math.inf)),
    r_expert=radii,
    predict=st.integers(0, 999),
    label=st.integers(-1, 999),
)
def test_a_row_reads_back(tmp_path_factory: pytest.TempPathFactory, radius: float, r_router: float, r_expert: float,
                          predict: int, label: int) -> None:  # fmt: skip
    certificate = Certificate(
        predict, radius, "b", 300, {"router": (5, 6, 0)}, "router", {"router": (1, 0, 0)}, r_router, r_expert
    )
    path = tmp_path_factory.mktemp("row") / "t.tsv"
    with ResultsWriter(path, METADATA) as writer:
        writer.append(Row.from_certificate(certificate, idx=3, label=label, seconds=1.5, rule="min", seed=11))
    table = read_table(path)
    assert table.radius[0] <= radius
    assert table.r_router[0] <= r_router
    assert table.r_expert[0] <= r_expert
    assert (table.predict[0], table.label[0], table.idx[0]) == (predict, label, 3)
    assert table.correct[0] == (-1 if label < 0 else int(label == predict))
    assert (table.expert[0], table.rule[0], table.seed[0], table.bound_by[0], table.n_drawn[0]) == ("b", "min", 11, "router", 300)
    assert table.counts(0) == {"select": {"router": (1, 0, 0)}, "estimate": {"router": (5, 6, 0)}}


def test_columns_are_the_fields_own_first() -> None:
    assert COLUMNS[:6] == FIELD_COLUMNS == ("idx", "label", "predict", "radius", "correct", "time")
    assert COLUMNS[6:] == ("expert", "rule", "r_router", "r_expert", "n_drawn", "seed", "bound_by", "core", "counts")


def test_the_fields_own_analysis_reads_the_table(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    run_job(tmp_path / "t.tsv", range(40))
    ours = read_table(tmp_path / "t.tsv")
    # code/analyze.py of locuslab/smoothing, ApproximateAccuracy.at_radii
    frame = pandas.read_csv(tmp_path / "t.tsv", delimiter="\t")
    for r in (0.0, 0.25, 1.0):
        theirs = (frame["correct"].eq(1) & (frame["radius"] >= r)).mean()
        assert theirs == pytest.approx(np.mean((ours.correct == 1) & (ours.radius >= r)), abs=0)
    assert list(frame["counts"]) == list(ours.counts_text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("12.5", 12.5),
        ("0:00:14.114881", 14.114881),
        ("1:02:03", 3723.0),
        ("1 day, 0:00:01", 86401.0),
        ("-1 day, 23:59:59.5", -0.5),
    ],
)
def test_times_of_both_kinds(text: str, seconds: float) -> None:
    assert parse_time(text) == pytest.approx(seconds)


@pytest.mark.parametrize("radius", [math.nan, -1e-9])
def test_no_radius(radius: float) -> None:
    with pytest.raises(ResultsError, match="radius"):
        format_radius(radius)


@pytest.mark.parametrize(
    "change",
    [{"radius": math.nan}, {"radius": math.inf}, {"predict": -1}, {"predict": -2}, {"label": -2}, {"idx": -1}, {"n_drawn": -5},
     {"time": math.nan}, {"expert": "a\tb"}, {"expert": "a\nb"}, {"bound_by": "a\rb"}, {"expert": '"a'}],
)  # fmt: skip
def test_values_that_no_table_may_hold(change: dict[str, object]) -> None:
    good = {"idx": 0, "label": 1, "predict": 1, "radius": 0.5, "time": 1.0}
    assert Row(**good).to_line().count("\t") == len(COLUMNS) - 1  # type: ignore[arg-type]
    with pytest.raises(ResultsError):
        Row(**{**good, **change}).to_line()  # type: ignore[arg-type]


def test_a_clock_that_jumped_back_leaves_a_readable_row(tmp_path: Path) -> None:
    with ResultsWriter(tmp_path / "t.tsv", METADATA) as writer:
        writer.append(make_row(0, seconds=-3600.0))
    assert read_table(tmp_path / "t.tsv").time[0] == 0.0


def counts_of(idx: int) -> str:
    return make_row(idx).to_line().rstrip("\n").split("\t")[-1]


def readable(read: object, text: str) -> bool:
    try:
        read(text)  # type: ignore[operator]
    except ValueError:
        return False
    return True


@settings(deadline=None, max_examples=500)
@given(st.integers(0, 400), st.integers(0, 400), st.text('{}[],:"\\019 -.eu\x00\nä', max_size=3), st.integers(0, 3))
def test_votes_are_checked_as_they_are_parsed(idx: int, at: int, text: str, skip: int) -> None:
    counts = counts_of(idx)
    assert _COUNTS.fullmatch(counts)  # the quick way is taken
    at %= len(counts)
    changed = counts[:at] + text + counts[at + skip :]
    assert readable(check_counts, changed) == readable(parse_counts, changed)


def listed(columns: VoteColumns) -> list[tuple[str, str, int, list[int]]]:
    return sorted(
        (p, k, i, list(v)) for p in (*columns.counts, *columns.others) for k in columns.keys(p) for i, v in columns.each(p, k)
    )


@settings(deadline=None, max_examples=500)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 400),
    st.text('{}[],:"\\019 -.eu\x00\x01\nä', max_size=3),
    st.integers(0, 3),
)
def test_all_votes_at_once_are_the_votes_one_by_one(rows: list[int], row: int, at: int, text: str, skip: int) -> None:
    texts = [counts_of(idx) for idx in rows]
    assert _columns(texts)  # the quick way is taken
    row, at = row % len(texts), at % len(texts[row % len(texts)])
    texts[row] = texts[row][:at] + text + texts[row][at + skip :]
    if all(readable(check_counts, changed) for changed in texts):
        columns, odd = votes_of(texts)
        assert listed(columns) == listed(VoteColumns.of([parse_counts(changed) for changed in texts]))
        assert odd == {i for i, t in enumerate(texts) if json.dumps(json.loads(t), separators=(",", ":")) != t}
    else:
        assert not readable(votes_of, texts)  # type: ignore[arg-type]


def test_brackets_in_names_and_characters_that_mark_lists_are_not_taken_for_lists() -> None:
    plain = '{"select":{"a":[1,2]},"estimate":{}}'
    assert _columns([plain, plain])
    for hostile in (
        ['{"select":{"a[1,2]":[3]},"estimate":{}}', plain.replace("[1,2]", "\x01\x00")],
        [plain.replace("1,2", "1],[2"), plain],
        [plain.replace("1,2", "01,2"), plain],
        [plain.replace("1,2", ",1"), plain],
        [plain.replace('"a":[1,2]', '"a":[1,2],"a":[3,4]'), plain],
        [plain.replace("1,2", "1\n2"), plain],
        [plain.replace("1,2", "\u0661"), plain],  # a digit of another script
    ):
        assert _columns(hostile) is None


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"select":{},"estimate":{}}', True),
        ('{"select":{},"estimate":{"a":[]}}', True),
        ('{"select":{},"estimate":{"a\\u00e4":[1]},"earlier":{"a@10":[0,10]}}', True),
        ('{"select":{},"estimate":{"a":[1],}}', False),
        ('{"select":{},"estimate":{"a":[1,]}}', False),
        ('{"select":{},"estimate":{"a":[01]}}', False),
        ('{"select":{},"estimate":{"a":[-1]}}', False),
        ('{"select":{},"estimate":{"a":[1.0]}}', False),
        ('{"select":{},"estimate":{"a":[1]"b":[1]}}', False),
        ('{"select":{},"estimate":{"a\t":[1]}}', False),
        ('{"select":{},"estimate":{}}{}', False),
        ('{"estimate":{"a":[1]}}', False),
        ("", False),
    ],
)
def test_votes_that_are_and_are_not(text: str, valid: bool) -> None:
    assert readable(check_counts, text) == readable(parse_counts, text) == valid
