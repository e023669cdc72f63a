"""Reading results tables: ours and the field's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.errors import InputError, ResultsError
from rsrouter.core.types import ABSTAIN
from rsrouter.results.about import TableMetadata, understood
from rsrouter.results.metadata import metadata_path, read_metadata
from rsrouter.results.rows import FIELD_COLUMNS, check_counts, correctness, parse_counts, parse_time


@dataclass(frozen=True)
class Table:
    """A results table in memory; every array has one entry per image, in file order.

    Attributes:
        name: what to call it in a report.
        metadata: content of the JSON beside it, empty for a table of the field; `about` is the same, checked.
        idx, label, predict, correct, n_drawn: int64; -1 where unknown (predict -1 is abstention).
        radius, r_router, r_expert: float64, L2 in [0,1]-pixel units; r_router and r_expert NaN where unknown.
        time: float64 seconds.
        expert, rule, bound_by: text, "" where unknown.
        seed: Python ints or None.
        counts_text: the vote counts as JSON text, "" where unknown; `counts(i)` parses one.
        path: where it was read from, None if it was not.
        ours: whether it was written by this package. The field prints radii with three significant digits,
            to the *nearest*, so its tables may overstate a radius by half a digit.
    """

    name: str
    metadata: dict[str, Any]
    idx: NDArray[np.int64]
    label: NDArray[np.int64]
    predict: NDArray[np.int64]
    radius: NDArray[np.float64]
    correct: NDArray[np.int64]
    time: NDArray[np.float64]
    expert: NDArray[np.object_]
    rule: NDArray[np.object_]
    r_router: NDArray[np.float64]
    r_expert: NDArray[np.float64]
    n_drawn: NDArray[np.int64]
    seed: NDArray[np.object_]
    bound_by: NDArray[np.object_]
    counts_text: NDArray[np.object_] = field(repr=False)
    path: Path | None = None
    ours: bool = True

    def __len__(self) -> int:
        return len(self.idx)

    @cached_property
    def about(self) -> TableMetadata | None:
        """What the table's own JSON says about its run; None where it has none, or another program's.

        Raises:
            ResultsError: the JSON is of this package, and of another version, or damaged.
        """
        return understood(self.metadata, f"The metadata of table {self.name!r}")

    def described(self) -> TableMetadata:
        """`about`, of a table that must have it.

        Raises:
            ResultsError: the table does not say how it was made.
        """
        if self.about is None:
            raise ResultsError(
                f"Table {self.name!r} does not say how it was made",
                expected="the JSON that `certify` writes beside a table",
                received="none" if not self.metadata else f"a JSON of another kind, with {sorted(self.metadata)[:8]}",
                remedy="certify with this package; a table of the field cannot be verified",
            )
        return self.about

    @property
    def abstained(self) -> NDArray[np.bool_]:
        """`(N,)` whether the image got no class."""
        return np.equal(self.predict, ABSTAIN)

    @property
    def labelled(self) -> bool:
        """Whether every image's label is known."""
        return bool(np.all(self.correct >= 0))

    def counts(self, i: int) -> dict[str, dict[str, tuple[int, ...]]]:
        """Votes of row `i`: `{"select": {stage: votes}, "estimate": {stage: votes}}`; empty where unknown."""
        text = str(self.counts_text[i])
        return parse_counts(text) if text else {"select": {}, "estimate": {}}

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Table:
        """The table of some rows (positions or a mask), in that order."""
        arrays = {name: getattr(self, name)[rows] for name in _ARRAYS}
        return Table(name=self.name, metadata=self.metadata, path=self.path, ours=self.ours, **arrays)

    def renamed(self, name: str) -> Table:
        """The same table under another name."""
        arrays = {key: getattr(self, key) for key in _ARRAYS}
        return Table(name=name, metadata=self.metadata, path=self.path, ours=self.ours, **arrays)


_ARRAYS = (
    "idx",
    "label",
    "predict",
    "radius",
    "correct",
    "time",
    "expert",
    "rule",
    "r_router",
    "r_expert",
    "n_drawn",
    "seed",
    "bound_by",
    "counts_text",
)
_INTEGERS = ("idx", "label", "predict", "correct")


def read_bytes(path: Path) -> bytes:
    """The file's bytes, or a ResultsError that says why not."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ResultsError(
            "There is no such results table",
            expected="a TSV file",
            received=str(path),
            remedy="check the path; `certify` writes certificates.tsv",
        ) from error
    except OSError as error:
        raise ResultsError(
            f"Cannot read the results table {path}",
            expected="a readable TSV file",
            received=str(error),
            remedy="check the path and its permissions",
        ) from error


def read_table(path: str | os.PathLike[str], *, name: str | None = None) -> Table:
    """Reads a results table: ours, or any TSV with the field's columns `idx label predict radius correct time`.

    Args:
        path: the TSV; its metadata is read from the `.json` beside it if there is one.
        name: what to call it (default: `name` of the metadata, else the file's name).

    Raises:
        ResultsError: missing, truncated or malformed; the text names the line, what was expected and what stood there.
    """
    path = Path(path)
    content = read_bytes(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ResultsError(
            f"{path.name} is not a results table",
            expected="UTF-8 text",
            received=str(error),
            remedy="give the TSV that certify wrote",
        ) from error
    lines = text.split("\n")
    whole = lines[-1] == ""
    lines = [line.removesuffix("\r") for line in (lines[:-1] if whole else lines)]
    columns = lines[0].split("\t") if lines else []
    if not set(FIELD_COLUMNS) <= set(columns) or len(set(columns)) != len(columns):
        raise ResultsError(
            f"{path.name} is not a results table",
            expected=f"a header with the columns {' '.join(FIELD_COLUMNS)}, tab-separated",
            received=repr(lines[0][:80]) if lines and lines[0] else "an empty file",
            remedy="give the TSV that certify wrote",
        )
    ours = "counts" in columns
    # the field's files may lack a last newline; in ours that means a writer was interrupted
    if not whole and (ours or len(lines[-1].split("\t")) < len(columns)):
        raise ResultsError(
            f"{path.name} is truncated",
            expected=f"line {len(lines)} to be whole",
            received=repr(lines[-1][-60:]),
            remedy="run the same certify command again: it redoes the torn row and goes on",
        )
    if len(lines) < 2:
        raise ResultsError(
            f"{path.name} holds no rows",
            expected="a header and at least one row",
            received="a header only",
            remedy="run certify again: it goes on where it stopped",
        )
    metadata = (read_metadata(metadata_path(path)) if path.suffix != ".json" else None) or {}
    own_name = metadata.get("name")
    return parse_rows(
        lines,
        columns,
        path=path,
        metadata=metadata,
        ours=ours,
        name=name or (own_name if isinstance(own_name, str) and own_name else path.stem),
    )


def parse_rows(
    lines: Sequence[str], columns: Sequence[str], *, path: Path, metadata: dict[str, Any], ours: bool, name: str
) -> Table:
    """A `Table` of `lines` (the header first); every row is checked."""
    where = {column: columns.index(column) for column in columns}
    kept: dict[str, list[Any]] = {column: [] for column in _ARRAYS}
    seen: dict[int, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split("\t")
        if len(cells) != len(columns):
            raise _bad_row(path, number, f"{len(columns)} tab-separated cells", f"{len(cells)}: {line[:80]!r}")
        row = _parse_row(cells, where, path, number)
        if row["idx"] in seen:
            raise _bad_row(path, number, "each image once", f"image {row['idx']} again (first in line {seen[row['idx']]})")
        seen[row["idx"]] = number
        for column, value in row.items():
            kept[column].append(value)
    types = {
        **dict.fromkeys(("idx", "label", "predict", "correct", "n_drawn"), np.int64),
        **dict.fromkeys(("radius", "time", "r_router", "r_expert"), np.float64),
    }
    arrays = {column: _array(values, types.get(column, object)) for column, values in kept.items()}
    return Table(name=name, metadata=metadata, path=path, ours=ours, **arrays)


def _array(values: list[Any], dtype: Any) -> NDArray[Any]:
    array = np.empty(len(values), dtype=dtype)
    array[:] = values
    return array


def _parse_row(cells: Sequence[str], where: dict[str, int], path: Path, number: int) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for column in _INTEGERS:
        row[column] = _cell(int, cells[where[column]], column, "a whole number", path, number)
    row["radius"] = _cell(float, cells[where["radius"]], "radius", "a number", path, number)
    row["time"] = _cell(parse_time, cells[where["time"]], "time", "seconds, or h:mm:ss", path, number)
    if row["idx"] < 0 or row["label"] < -1 or row["predict"] < ABSTAIN:
        raise _bad_row(path, number, "idx >= 0, label >= -1, predict >= -1", f"{row['idx']}, {row['label']}, {row['predict']}")
    if not 0.0 <= row["radius"] < np.inf:
        raise _bad_row(path, number, "a finite radius of at least 0", repr(cells[where["radius"]]))
    if row["predict"] == ABSTAIN and row["radius"] > 0.0:
        raise _bad_row(path, number, "radius 0 where predict is -1 (abstained)", f"radius {row['radius']}")
    if row["correct"] != correctness(row["label"], row["predict"]):
        raise _bad_row(
            path,
            number,
            f"correct {correctness(row['label'], row['predict'])} (label {row['label']}, predict {row['predict']})",
            f"correct {row['correct']}",
        )

    def optional(column: str, convert: Any, missing: Any, expected: str) -> Any:
        if column not in where or cells[where[column]] == "":
            return missing
        return _cell(convert, cells[where[column]], column, expected, path, number)

    for column in ("expert", "rule", "bound_by"):
        row[column] = optional(column, str, "", "text")
    for column in ("r_router", "r_expert"):
        row[column] = optional(column, float, np.nan, "a number")
    row["n_drawn"] = optional("n_drawn", int, -1, "a whole number")
    row["seed"] = optional("seed", int, None, "a whole number")
    row["counts_text"] = optional("counts", check_counts, "", "votes as JSON text")
    return row


def _cell(convert: Any, text: str, column: str, expected: str, path: Path, number: int) -> Any:
    try:
        return convert(text)
    except ValueError as error:
        raise _bad_row(path, number, f"{column} to be {expected}", f"{text[:80]!r}") from error


def _bad_row(path: Path, number: int, expected: str, received: str) -> ResultsError:
    return ResultsError(
        f"Line {number} of {path.name} is not a valid row",
        expected=expected,
        received=received,
        remedy="restore the file; a row is never repaired by guessing",
    )


def align(tables: Sequence[Table], *, common: bool = False) -> list[Table]:
    """The tables with their rows sorted by image id, over the same images.

    Args:
        tables: one or more.
        common: keep only the images that every table holds, instead of refusing.

    Raises:
        InputError: tables over different images, or that disagree about an image's label.
    """
    if not tables:
        return []
    shared = set(tables[0].idx.tolist()).intersection(*(table.idx.tolist() for table in tables[1:]))
    if not common and any(len(table) != len(shared) for table in tables):
        raise InputError(
            "The tables are over different images",
            expected="the same image ids in every table",
            received=", ".join(f"{table.name}: {len(table)} images" for table in tables) + f"; {len(shared)} in all of them",
            remedy="certify the same images with each, or compare only the images they share (common)",
        )
    if not shared:
        raise InputError(
            "The tables have no image in common",
            expected="at least one shared image id",
            received=", ".join(table.name for table in tables),
            remedy="certify the same images with each",
        )
    keep = np.array(sorted(shared), dtype=np.int64)
    aligned = []
    for table in tables:
        order = np.argsort(table.idx, kind="stable")
        aligned.append(table.take(order[np.searchsorted(table.idx[order], keep)]))
    first = aligned[0]
    for other in aligned[1:]:
        clash = np.flatnonzero((first.label != other.label) & (first.label >= 0) & (other.label >= 0))
        if clash.size:
            i = int(clash[0])
            raise InputError(
                "Two tables disagree about a label",
                expected=f"image {first.idx[i]} to be class {first.label[i]} as in {first.name}",
                received=f"class {other.label[i]} in {other.name}",
                remedy="are both over the same data set and split?",
            )
    return aligned
