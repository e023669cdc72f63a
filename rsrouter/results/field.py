"""Certification tables of the field: every form whose meaning is plain is read, and what is missing in the others is said.

`certify.py` of Cohen et al. (2019) prints `idx label predict radius correct time`, and dozens of repositories print it their own
way. Only `idx`, `label`, `predict` and `radius` carry information: `correct` follows from label and predict, and the time says
nothing about a certificate.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from rsrouter.core.errors import ResultsError
from rsrouter.core.types import ABSTAIN
from rsrouter.results.rows import parse_time
from rsrouter.results.table import ARRAYS, Table

NEEDED = ("idx", "label", "predict", "radius")

#: Votes, failure probabilities and noise levels that the field uses; the first of each kind is the most common.
_VOTES = (100_000, 10_000, 1_000, 500, 2_000, 5_000, 20_000, 50_000, 200_000, 500_000, 1_000_000)
_ALPHAS = (0.001, 0.01, 0.05, 0.002, 0.0001)
_SIGMAS = (0.25, 0.5, 1.0, 0.12, 0.06, 0.1, 0.125, 0.15, 0.18, 0.2, 0.3, 0.35, 0.36, 0.6, 0.75, 0.8, 1.5, 2.0)

_NAMES = {
    "index": "idx",
    "id": "idx",
    "target": "label",
    "true": "label",
    "prediction": "predict",
    "pred": "predict",
    "predicted": "predict",
    "radius_l2": "radius",
    "certified_radius": "radius",
}
_WRAPPED = re.compile(r"(?:tensor|array|np\.\w+)?\(?\[?\s*(-?[\d.]+(?:e[+-]?\d+)?)\s*\]?(?:,\s*\w+=[^)]*)?\)?", re.IGNORECASE)
_BOOLEAN = {"true": 1, "false": 0}


def parse_field(text: str, *, path: Path, metadata: dict[str, Any], name: str) -> Table:
    """A table of the field from its text.

    Read without a word: a byte order mark, any line ends, blank lines, commas instead of tabs, further columns, log lines before
    the header, whole numbers written as `3.0` or `tensor(3)`, times in any notation. Read, and noted in `Table.notes`: a
    `correct` column that says something else than label and predict, radii that are NaN or below 0 (they certify nothing), an
    abstention with a radius, headers in between and images that occur again (restarts: the last one counts), a torn last line.

    Raises:
        ResultsError: not such a table; the text says which columns are missing, or which line cannot be read and why.
    """
    lines = [line.strip("\r") for line in re.split(r"\r\n|\n|\r", text.removeprefix("\ufeff"))]
    split, at = _find_header(lines, path)
    columns = _columns(split(lines[at]))
    _check_columns(columns, path)
    where = {column: columns.index(column) for column in NEEDED}
    notes: list[str] = []
    cells: list[tuple[int, list[str]]] = []
    last = max((k for k, line in enumerate(lines) if line.strip()), default=0)
    headers = 0
    for number in range(at + 1, last + 1):
        if not lines[number].strip():
            continue
        row = split(lines[number])
        if _columns(row)[: len(columns)] == columns or set(NEEDED) <= set(_columns(row)):
            columns, headers = _columns(row), headers + 1
            where = {column: columns.index(column) for column in NEEDED}
            continue
        if len(row) <= max(where.values()) or (len(row) < len(columns) and number == last):
            torn = number == last or _columns(split(lines[number + 1])) == columns
            if not torn:
                raise _bad_line(path, number, f"{len(columns)} cells", f"{len(row)}: {lines[number][:80]!r}")
            notes.append(f"line {number + 1} is torn and left out")
            continue
        picked = [row[where[column]] for column in NEEDED]
        picked += [row[columns.index(c)] if c in columns and columns.index(c) < len(row) else "" for c in ("correct", "time")]
        cells.append((number, picked))
    if not cells:
        raise ResultsError(
            f"{path.name} holds no rows",
            expected="a header and at least one row",
            received="a header only",
            remedy="certify again; or was the file cut off?",
        )
    if headers:
        notes.append(f"{headers} further header{'s' if headers > 1 else ''}: runs that were started again, one after the other")
    idx, label, predict = (_whole(cells, k, NEEDED[k], path) for k in range(3))
    radius = _radii(cells, path)
    _refuse(idx < 0, cells, path, "an image id of 0 or more", idx)
    _refuse(label < -1, cells, path, "a label of 0 or more, -1 where unknown", label)
    _refuse(predict < ABSTAIN, cells, path, "a class of 0 or more, -1 for an abstention", predict)
    _refuse(np.isposinf(radius), cells, path, "a finite radius: no number of votes certifies more", radius)
    nothing = ~(radius >= 0) & (predict != ABSTAIN)
    if nothing.any():
        notes.append(f"{_rows(nothing)} a radius of NaN or below 0: they certify nothing and count as abstained")
    predict = np.where(nothing, ABSTAIN, predict)
    surplus = (predict == ABSTAIN) & (radius > 0)
    if surplus.any():
        notes.append(f"{_rows(surplus)} a radius and no class: it counts as 0")
    radius = np.where((predict == ABSTAIN) | ~(radius >= 0), 0.0, radius)
    _refuse_relabelled(idx, label, cells, path)
    correct = np.where(label < 0, -1, label == predict)
    notes += _compare_correct([c[1][4] for c in cells], correct)
    keep = _last_of_each(idx, predict, radius, notes)
    count = len(keep)
    arrays: dict[str, Any] = dict.fromkeys(ARRAYS)
    arrays |= {"idx": idx[keep], "label": label[keep], "predict": predict[keep], "radius": radius[keep], "correct": correct[keep]}
    arrays["time"] = np.array([_seconds(cells[k][1][5]) for k in keep])
    for column in ("expert", "rule", "bound_by", "counts_text"):
        arrays[column] = np.full(count, "", dtype=object)
    arrays["seed"] = np.full(count, None, dtype=object)
    arrays["n_drawn"] = np.full(count, -1, dtype=np.int64)
    arrays["core"] = np.full(count, ABSTAIN, dtype=np.int64)
    for column in ("r_router", "r_expert"):
        arrays[column] = np.full(count, np.nan)
    return Table(name=name, metadata=metadata, path=path, ours=False, notes=tuple(notes), **arrays)


def _find_header(lines: Sequence[str], path: Path) -> tuple[Callable[[str], list[str]], int]:
    """How lines are split, and which one is the header: the first that names the columns, log lines before it aside."""
    splits: tuple[Callable[[str], list[str]], ...] = (
        lambda line: line.split("\t"),
        lambda line: next(csv.reader([line.replace("\0", "")]), []),
        lambda line: line.split(),
    )
    nearest: list[str] = []
    for at, line in enumerate(lines[:200]):
        for split in splits:
            found = _columns(split(line))
            if set(NEEDED) <= set(found) or any("radius proved" in c for c in found):
                return split, at
            if len(set(NEEDED) & set(found)) > len(set(NEEDED) & set(nearest)):
                nearest = found
    missing = [c for c in NEEDED if c not in nearest]
    first = next((line for line in lines if line.strip()), "")
    raise ResultsError(
        f"{path.name} is not a results table" + (f": it has no column {', '.join(missing)}" if nearest else ""),
        expected=f"a header with the columns {' '.join(NEEDED)}, as certify.py of Cohen et al. prints it",
        received=repr(first[:80]) if first else "an empty file",
        remedy="give the TSV that certify wrote",
    )


def _columns(cells: Sequence[str]) -> list[str]:
    names = [cell.strip().strip("#").strip().lower() for cell in cells]
    return [_NAMES.get(name, name) for name in names]


def _check_columns(columns: Sequence[str], path: Path) -> None:
    if any("radius proved" in column for column in columns):
        raise ResultsError(
            f"{path.name} says only whether one radius was certified, and has no radius for each image",
            expected="a column radius with each image's own",
            received="radius proved (smoothing-ensembles, adaptive: 1 stands for the radius it was started with)",
            remedy="write that radius into the column where it says 1 and 0 elsewhere, and call the column radius",
        )
    twice = [column for column in NEEDED if columns.count(column) > 1]
    if twice:
        raise ResultsError(
            f"{path.name} has a column twice",
            expected="each column once",
            received=", ".join(twice),
            remedy="remove the one that is not meant",
        )


def _whole(cells: Sequence[tuple[int, list[str]]], k: int, column: str, path: Path) -> NDArray[np.int64]:
    texts = [row[k] for _, row in cells]
    try:
        return np.array([int(t) for t in texts], dtype=np.int64)
    except (ValueError, OverflowError):
        pass
    values = np.zeros(len(texts), dtype=np.int64)
    for i, text in enumerate(texts):
        match = _WRAPPED.fullmatch(text.strip())
        try:
            number = float(match[1]) if match else float("nan")
        except ValueError:
            number = float("nan")
        if not (number == np.floor(number) and abs(number) < 2**53):
            raise _bad_line(path, cells[i][0], f"{column} to be a whole number", repr(text[:80]))
        values[i] = int(number)
    return values


def _radii(cells: Sequence[tuple[int, list[str]]], path: Path) -> NDArray[np.float64]:
    values = np.zeros(len(cells))
    for i, (number, row) in enumerate(cells):
        text = row[3].strip()
        try:
            values[i] = float(text)
        except ValueError:
            match = _WRAPPED.fullmatch(text)
            try:
                values[i] = (
                    float(match[1]) if match else np.nan if text.lower() in ("", "none", "null", "na", "n/a") else float("x")
                )
            except ValueError as error:
                raise _bad_line(path, number, "radius to be a number", repr(text[:80])) from error
    return values


def _seconds(text: str) -> float:
    """Seconds from a time in whatever notation, NaN where it is none: a certificate does not depend on it."""
    text = text.strip().replace(" days ", " days, ").replace(" day ", " day, ")
    for form in (text, text.removesuffix("s").strip(), f"0:{text}", text.removesuffix("sec").strip()):
        try:
            value = parse_time(form)
        except ValueError:
            continue
        return value if 0.0 <= value < np.inf else np.nan
    return float("nan")


def _compare_correct(told: Sequence[str], correct: NDArray[np.int64]) -> list[str]:
    """A note where the column says something else than label and predict do."""
    if not any(text.strip() for text in told):
        return []
    other = 0
    for text, value in zip(told, correct.tolist(), strict=True):
        stripped = text.strip().lower()
        try:
            said = float(_BOOLEAN.get(stripped, stripped))
        except ValueError:
            said = float("nan")
        other += said != value
    if not other:
        return []
    return [
        f"the column correct differs from what label and predict say in {other} of {len(told)} rows; it is computed from them"
    ]


def _last_of_each(
    idx: NDArray[np.int64], predict: NDArray[np.int64], radius: NDArray[np.float64], notes: list[str]
) -> NDArray[np.int64]:
    """Positions of the rows that count: of an image that occurs again the last, at the place of the first."""
    latest: dict[int, int] = {}
    other = again = 0
    for k, i in enumerate(idx.tolist()):
        if i in latest:
            again += 1
            before = latest[i]
            other += (predict[before], radius[before]) != (predict[k], radius[k])
        latest[i] = k
    if again:
        notes.append(f"{again} of {len(idx)} rows repeat an image; the last of each counts ({other} differ from an earlier one)")
    return np.array(list(latest.values()), dtype=np.int64)


def _rows(mask: NDArray[np.bool_]) -> str:
    return f"{int(mask.sum())} of {len(mask)} rows have"


def _refuse_relabelled(
    idx: NDArray[np.int64], label: NDArray[np.int64], cells: Sequence[tuple[int, list[str]]], path: Path
) -> None:
    """A table that gives one image two labels is of two data sets."""
    order = np.argsort(idx, kind="stable")
    same = idx[order[1:]] == idx[order[:-1]]
    other = order[1:][same & (label[order[1:]] != label[order[:-1]])]
    if other.size:
        i = int(other.min())
        raise _bad_line(path, cells[i][0], f"one label for image {idx[i]}", f"{label[i]}, and another before")


def _refuse(wrong: NDArray[np.bool_], cells: Sequence[tuple[int, list[str]]], path: Path, expected: str, values: Any) -> None:
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise _bad_line(path, cells[i][0], expected, str(values[i]))


def _bad_line(path: Path, number: int, expected: str, received: str) -> ResultsError:
    return ResultsError(
        f"Line {number + 1} of {path.name} is not a valid row",
        expected=expected,
        received=received,
        remedy="restore the file; a row is never repaired by guessing",
    )


def votes_behind(table: Table) -> set[tuple[int, float]]:
    """Pairs `(n, alpha)` that the largest radius of a published table agrees with; empty where nothing can be told.

    A unanimous vote certifies `sigma * Phi^-1(alpha ** (1 / n))` and no more (Cohen et al. 2019), and in most tables several
    images reach it: the ceiling of the radii tells n and alpha for the sigmas that are in use.
    """
    top = float(table.radius.max()) if len(table) else 0.0
    if top <= 0 or int(np.sum(table.radius >= top * (1 - 1e-9))) < max(3, len(table) // 500):
        return set()
    told = {float(m) for m in re.findall(r"\d*\.?\d+", f"{table.name} {table.path or ''}") if float(m) in _SIGMAS}
    return {(n, alpha) for n, alpha, sigma in product(_VOTES, _ALPHAS, told or _SIGMAS) if _agrees(top, sigma, n, alpha)}


def _agrees(top: float, sigma: float, n: int, alpha: float) -> bool:
    ceiling = sigma * float(ndtri(alpha ** (1.0 / n)))
    digits = 2 - int(np.floor(np.log10(top)))
    return bool(abs(ceiling - top) <= 0.5001 * 10.0**-digits)


def compare_votes(tables: Sequence[Table]) -> list[str]:
    """Notes where published tables of one figure were certified with different numbers of votes or failure probabilities."""
    found = [(table.name, votes_behind(table)) for table in tables if not table.ours]
    found = [(name, pairs) for name, pairs in found if pairs]
    if len(found) < 2 or set.intersection(*(pairs for _, pairs in found)):
        return []

    def words(pairs: set[tuple[int, float]]) -> str:
        n, alpha = min(pairs, key=lambda p: (_VOTES.index(p[0]), _ALPHAS.index(p[1])))
        return f"n = {n:,}, alpha = {alpha:g}"

    kinds: dict[str, list[str]] = {}
    for name, pairs in found:
        kinds.setdefault(words(pairs), []).append(name)
    told = "; ".join(f"{kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" for kind, names in kinds.items())
    return [f"the tables seem to be certified with different votes, by the largest radius of each ({told})"]


__all__ = ["compare_votes", "parse_field", "votes_behind"]
