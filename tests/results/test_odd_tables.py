"""Tables of the field in every form that was met: read where their meaning is plain, refused in words where it is not."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from rsrouter.core.errors import InputError, ResultsError
from rsrouter.experts.select import held_radii
from rsrouter.report import summarise
from rsrouter.results import Table, read_table
from rsrouter.results.field import compare_votes, votes_behind

HEAD = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
ROWS = ["0\t3\t-1\t0.0\t0\t0:00:14.114881", "20\t8\t8\t0.36\t1\t0:00:13.996586", "40\t8\t1\t1.2\t0\t1 day, 0:00:01"]
PLAIN = HEAD + "\n".join(ROWS) + "\n"


def read(folder: Path, text: str | bytes, name: str = "sigma_0.25.tsv") -> Table:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_table(path)


def lines(*rows: str) -> str:
    return HEAD + "\n".join(rows) + "\n"


def with_row(row: str) -> str:
    return lines(ROWS[0], row, ROWS[2])


#: Forms that say the same as PLAIN, and nothing that a reader should be told.
SAME: dict[str, str | bytes] = {
    "as Cohen's script prints it": PLAIN,
    "a byte order mark": "\ufeff" + PLAIN,
    "Windows line ends": PLAIN.replace("\n", "\r\n"),
    "old Macintosh line ends": PLAIN.replace("\n", "\r"),
    "no last newline": PLAIN[:-1],
    "blank last lines": PLAIN + "\n\n  \n",
    "blank lines between": PLAIN.replace("\n", "\n\n"),
    "tabs at the ends of lines": PLAIN.replace("\n", "\t\n"),
    "booleans": PLAIN.replace("\t0\t0:", "\tFalse\t0:").replace("\t1\t0:", "\tTrue\t0:"),
    "booleans in capitals": PLAIN.replace("\t0\t0:", "\tFALSE\t0:").replace("\t1\t0:", "\tTRUE\t0:"),
    "numbers as floats": PLAIN.replace("20\t8\t8", "20.0\t8.0\t8.0"),
    "numbers in tensors": PLAIN.replace("20\t8\t8", "20\ttensor(8)\ttensor(8, device='cuda:0')"),
    "numbers in arrays": PLAIN.replace("20\t8\t8", "20\t[8]\tarray(8)"),
    "numbers in exponents": PLAIN.replace("0.36", "3.6e-01"),
    "correct as a float": PLAIN.replace("0.36\t1\t", "0.36\t1.0\t"),
    "further columns": PLAIN.replace("\n", "\t7\t[1 2]\n").replace("time\t7\t[1 2]", "time\traw_count\tcounts_of_top"),
    "columns in another order": "predict\tidx\tradius\tlabel\n-1\t0\t0.0\t3\n8\t20\t0.36\t8\n1\t40\t1.2\t8\n",
    "no correct and no time": "idx\tlabel\tpredict\tradius\n0\t3\t-1\t0.0\n20\t8\t8\t0.36\n40\t8\t1\t1.2\n",
    "commas": "idx,label,predict,radius\n0,3,-1,0.0\n20,8,8,0.36\n40,8,1,1.2\n",
    "commas with an index column": ",idx,label,predict,radius\n0,0,3,-1,0.0\n1,20,8,8,0.36\n2,40,8,1,1.2\n",
    "spaces": "idx label predict radius\n0 3 -1 0.0\n20 8 8 0.36\n40 8 1 1.2\n",
    "capitals in the header": PLAIN.replace("idx\tlabel", "Idx\tLabel"),
    "a comment sign before the header": "#" + PLAIN,
    "log lines before the header": "Files already downloaded\nseed: 0\n\n" + PLAIN,
    "prediction instead of predict": PLAIN.replace("predict", "prediction"),
    "index instead of idx": PLAIN.replace("idx", "index"),
    "times as seconds": PLAIN.replace("0:00:14.114881", "14.114881"),
    "times in words": PLAIN.replace("0:00:13.996586", "soon"),
    "times without hours": PLAIN.replace("0:00:13.996586", "00:13.9"),
    "times of pandas": PLAIN.replace("0:00:13.996586", "0 days 00:00:13.996586"),
    "times with a unit": PLAIN.replace("0:00:13.996586", "13.9s"),
    "a time that is missing": PLAIN.replace("\t0:00:13.996586", ""),
    "NaN for an abstention's radius": PLAIN.replace("-1\t0.0", "-1\tnan"),
    "nothing for an abstention's radius": PLAIN.replace("-1\t0.0", "-1\t"),
    "None for an abstention's radius": PLAIN.replace("-1\t0.0", "-1\tNone"),
    "a negative radius for an abstention": PLAIN.replace("-1\t0.0", "-1\t-1"),
    "spaces around cells": PLAIN.replace("\t", " \t "),
}

#: Forms whose meaning is plain, with something that a reader must be told.
TOLD: dict[str, tuple[str, str]] = {
    "a running total as correct": (PLAIN.replace("1.2\t0\t", "1.2\t2\t"), "correct differs"),
    "correct turned over": (PLAIN.replace("0.36\t1\t", "0.36\t0\t"), "1 of 3 rows; it is computed"),
    "correct that is no number": (PLAIN.replace("0.36\t1\t", "0.36\tyes\t"), "correct differs"),
    "a restart": (PLAIN + PLAIN, "1 further header"),
    "a restart without a header": (PLAIN + "\n".join(ROWS) + "\n", "3 of 6 rows repeat an image"),
    "a torn last line": (PLAIN + "60\t4\t", "line 5 is torn"),
    "a torn last line with a radius": (PLAIN + "60\t4\t4\t0.", "torn"),
    "a torn line before a restart": (lines(*ROWS[:1]) + "20\t8\n" + PLAIN, "torn"),
    "several headers": (HEAD + PLAIN + HEAD, "2 further headers"),
    "a header with another column": (PLAIN + HEAD.replace("time", "time\tnote"), "1 further header"),
    "an abstention with a radius": (PLAIN.replace("-1\t0.0", "-1\t0.5"), "1 of 3 rows have a radius and no class"),
}

#: Forms that are refused, and the word that the error must hold.
REFUSED: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "empty file"),
    "blank lines": ("\n\n\n", "empty file"),
    "a header alone": (HEAD, "no rows"),
    "prose": ("The results were good.\n", "not a results table"),
    "bytes": (b"\xff\xfe\x00\x01", "UTF-8"),
    "a web page": ("<!doctype html><html></html>", "not a results table"),
    "no predict": (PLAIN.replace("predict", "guess"), "no column predict"),
    "no radius": ("idx\tlabel\tpredict\n0\t1\t1\n", "no column radius"),
    "no label": ("idx\tpredict\tradius\n0\t1\t0.5\n", "no column label"),
    "accuracy by radius": ("radius\taccuracy\n0.25\t0.5\n", "no column idx, label, predict"),
    "a column twice": (PLAIN.replace("time", "radius"), "column twice"),
    "adaptive tables of smoothing-ensembles": (
        "idx\tlabel\tpredict\tradius proved\tcorrect\tlevels_needed\ttime\n0\t1\t1\t1\t1\t0\t0:01\n",
        "whether one radius",
    ),
    "a word for a radius": (with_row("20\t8\t8\tx\t1\t1"), "Line 3"),
    "an infinite radius": (with_row("20\t8\t8\tinf\t1\t1"), "finite radius"),
    "a class below -1": (with_row("20\t8\t-2\t0.1\t1\t1"), "class of 0 or more"),
    "a label below -1": (with_row("20\t-7\t2\t0.1\t1\t1"), "label of 0 or more"),
    "a negative image": (with_row("-20\t8\t2\t0.1\t1\t1"), "image id"),
    "half an image": (with_row("20.5\t8\t2\t0.1\t1\t1"), "whole number"),
    "a class by name": (with_row("20\tcat\tcat\t0.1\t1\t1"), "label to be a whole number"),
    "an image of two labels": (lines(*ROWS, "20\t7\t8\t0.36\t0\t1"), "one label for image 20"),
    "a torn line between": (lines(ROWS[0], "20\t8", ROWS[2]), "Line 3"),
    "a number beyond any": (with_row(f"{10**30}\t8\t2\t0.1\t1\t1"), "whole number"),
}


@pytest.mark.parametrize("name", SAME)
def test_forms_of_one_meaning(tmp_path: Path, name: str) -> None:
    table = read(tmp_path, SAME[name])
    assert table.idx.tolist() == [0, 20, 40]
    assert table.label.tolist() == [3, 8, 8]
    assert table.predict.tolist() == [-1, 8, 1]
    assert table.radius.tolist() == [0.0, 0.36, 1.2]
    assert table.correct.tolist() == [0, 1, 0]
    assert table.notes == ()
    assert not table.ours
    assert not table.checked
    assert np.all(np.isnan(table.time) | (table.time >= 0))


@pytest.mark.parametrize("name", TOLD)
def test_forms_that_a_reader_is_told_of(tmp_path: Path, name: str) -> None:
    text, word = TOLD[name]
    table = read(tmp_path, text)
    assert table.idx.tolist() == [0, 20, 40]
    assert table.predict.tolist() == [-1, 8, 1]
    assert table.radius.tolist() == [0.0, 0.36, 1.2]
    assert table.correct.tolist() == [0, 1, 0]
    assert any(word in note for note in table.notes), table.notes
    with pytest.warns(UserWarning, match=r"sigma_0\.25\.tsv: "):
        read_table(tmp_path / "sigma_0.25.tsv")
    assert {(t, n) for t, n in summarise(table).notes} >= {("sigma_0.25", note) for note in table.notes}


@pytest.mark.parametrize("name", REFUSED)
def test_forms_that_are_refused(tmp_path: Path, name: str) -> None:
    text, word = REFUSED[name]
    with pytest.raises(ResultsError) as caught:
        read(tmp_path, text)
    assert word in str(caught.value)
    assert caught.value.expected
    assert caught.value.received
    assert caught.value.remedy


@pytest.mark.parametrize("text", ["nan", "-0.1", "NaN", ""])
def test_a_radius_that_certifies_nothing(tmp_path: Path, text: str) -> None:
    table = read(tmp_path, with_row(f"20\t8\t8\t{text}\t1\t0:01"))
    assert (table.predict.tolist(), table.radius.tolist()) == ([-1, -1, 1], [0.0, 0.0, 1.2])
    assert any("1 of 3 rows have a radius of NaN or below 0" in note for note in table.notes)


def test_of_an_image_that_was_certified_twice_the_later_row_counts(tmp_path: Path) -> None:
    table = read(tmp_path, PLAIN + HEAD + "20\t8\t8\t0.5\t1\t1\n60\t1\t1\t0.1\t1\t1\n")
    assert table.idx.tolist() == [0, 20, 40, 60]
    assert table.radius.tolist() == [0.0, 0.5, 1.2, 0.1]
    assert any("(1 differ from an earlier one)" in note for note in table.notes)


def unanimous(name: str, ceiling: str, folder: Path) -> Table:
    return read(folder, lines(*(f"{i}\t1\t1\t{ceiling if i < 5 else 0.1}\t1\t1" for i in range(20))), f"{name}.tsv")


@pytest.mark.parametrize(
    ("name", "ceiling", "pair"),
    [
        ("sigma_0.25", "0.953", (100_000, 0.001)),
        ("sigma_0.50", "1.91", (100_000, 0.001)),
        ("sigma_1.00", "3.81", (100_000, 0.001)),
        ("sigma_0.12", "0.457", (100_000, 0.001)),
        ("sigma_1.00 short", "3.2", (10_000, 0.001)),
    ],
)
def test_votes_are_told_by_the_ceiling(tmp_path: Path, name: str, ceiling: str, pair: tuple[int, float]) -> None:
    assert pair in votes_behind(unanimous(name, ceiling, tmp_path))


def test_tables_of_different_votes_are_said(tmp_path: Path) -> None:
    many, few = unanimous("sigma_0.25", "0.953", tmp_path), unanimous("sigma_1.00", "3.2", tmp_path)
    (note,) = compare_votes([many, few])
    assert "n = 100,000, alpha = 0.001: sigma_0.25" in note
    assert "n = 10,000, alpha = 0.001: sigma_1.00" in note
    assert compare_votes([many, unanimous("sigma_0.50", "1.91", tmp_path)]) == []
    assert compare_votes([many]) == []
    assert votes_behind(read(tmp_path, PLAIN)) == set()  # nobody is unanimous


def test_selection_refuses_what_a_report_refuses(tmp_path: Path) -> None:
    a = read(tmp_path, PLAIN, "a.tsv")
    assert held_radii([a, a.renamed("b")]).tolist() == [[0.0, 0.0], [0.36, 0.36], [0.0, 0.0]]
    other = read(tmp_path, PLAIN.replace("20\t8\t8", "20\t7\t8"), "c.tsv")
    with pytest.raises(InputError, match="disagree about a label"):
        held_radii([a, other])
    less = a.take(np.array([1, 2]))
    with pytest.raises(InputError, match="different images"):
        held_radii([a, less])
    assert held_radii([a, less], common=True).shape == (2, 2)
    hidden = read(tmp_path, lines("0\t-1\t3\t0.5\t-1\t1"), "d.tsv")
    with pytest.raises(InputError, match="true classes"):
        held_radii([hidden])
