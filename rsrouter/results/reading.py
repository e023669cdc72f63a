"""Reading results tables from disk: our own strictly, the field's by `rsrouter.results.field`."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.errors import ResultsError
from rsrouter.core.types import ABSTAIN
from rsrouter.results.about import understood
from rsrouter.results.field import parse_field
from rsrouter.results.metadata import metadata_path, read_metadata
from rsrouter.results.rows import COLUMNS, all_counts, check_counts, parse_time
from rsrouter.results.table import Table
from rsrouter.results.verify import require_sound

#: What numbers are written with; letters are those of 1e-05, inf and nan, which have errors of their own.
_DIGITS = frozenset("0123456789+-.eEinfaINFA")


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: it looks through millions of cells that are all kept, half of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


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


def read_table(path: str | os.PathLike[str], *, name: str | None = None, check: Literal["counts"] | None = None) -> Table:
    """Reads a results table: ours, or any of the field's with columns `idx label predict radius`.

    A table of the field is read in whatever form its meaning is plain (`rsrouter.results.field`); what was unusual stands in
    `Table.notes` and is warned about.

    Args:
        path: the TSV; its metadata is read from the `.json` beside it if there is one.
        name: what to call it (default: `name` of the metadata, else the file's name).
        check: "counts" computes every row of our own tables again from its votes, for every use that is more than a look:
            about a second for 10,000 rows. A table of the field holds no votes, so nothing is checked, and `checked` stays
            False.

    Raises:
        ResultsError: missing, truncated or malformed (the text names the line, what was expected and what stood there), or
            metadata of another version.
        IntegrityError: with `check`: rows that do not follow from their votes.
    """
    path = Path(path)
    content = read_bytes(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ResultsError(
            f"{path.name} is not a results table",
            expected="UTF-8 text",
            received=str(error),
            remedy="give the TSV that certify wrote",
        ) from error
    header = text.split("\n", 1)[0]
    metadata = (read_metadata(metadata_path(path)) if path.suffix != ".json" else None) or {}
    own_name = metadata.get("name")
    called = name or (own_name if isinstance(own_name, str) and own_name else path.stem)
    if "counts" not in header.rstrip("\r").split("\t"):
        table = parse_field(text, path=path, metadata=metadata, name=called)
        for note in table.notes:
            warnings.warn(f"{path.name}: {note}", stacklevel=2)
        return table
    understood(metadata, f"The metadata {metadata_path(path).name}")  # of another version: that is the better message
    if not text.endswith("\n"):
        raise ResultsError(
            f"{path.name} is truncated",
            expected=f"line {text.count(chr(10)) + 1} to be whole",
            received=repr(text[-60:]),
            remedy="run the same certify command again: it redoes the torn row and goes on",
        )
    every = check == "counts" and understood(metadata, "") is not None  # then each cell of votes is read below
    with uncollected():
        table = parse_rows(text[:-1].split("\n"), path=path, metadata=metadata, name=called, votes=not every)
    if len(table) == 0:
        raise ResultsError(
            f"{path.name} holds no rows",
            expected="a header and at least one row",
            received="a header only",
            remedy="run certify again: it goes on where it stopped",
        )
    if not every:
        return table
    with uncollected():
        try:
            return require_sound(table)
        except ValueError:  # votes that are not votes: this names their line
            parse_rows(text[:-1].split("\n"), path=path, metadata=metadata, name=called)
            raise


def parse_rows(lines: Sequence[str], *, path: Path, metadata: dict[str, Any], name: str, votes: bool = True) -> Table:
    """A table of ours from its lines, the header first; every cell is checked by itself (without `votes`, all but the votes).

    Raises:
        ResultsError: a line that is not a row, named by its number.
    """
    columns = lines[0].rstrip("\r").split("\t")
    rows = lines[1:]
    if "\r" in "\t".join(rows):
        rows = [line.rstrip("\r") for line in rows]
    widths = [cells + 1 for cells in map(str.count, rows, repeat("\t"))]
    if set(widths) - {len(columns)}:
        at = next(k for k, width in enumerate(widths) if width != len(columns))
        raise bad_row(path, at + 2, f"{len(columns)} tab-separated cells", f"{widths[at]}: {rows[at][:80]!r}")
    cells = "\t".join(rows).split("\t") if rows else []
    texts: dict[str, Sequence[str]] = {c: cells[k :: len(columns)] for k, c in enumerate(columns)}
    missing = [c for c in ("idx", "label", "predict", "radius", "correct", "time") if c not in texts]
    if missing or len(texts) != len(columns) or not texts.keys() <= set(COLUMNS):
        raise ResultsError(
            f"{path.name} is not a results table",
            expected="a header with the columns of `certify`, each once, and no other",
            received=repr(lines[0][:80]),
            remedy="give the TSV that certify wrote",
        )

    def column(what: str, convert: Callable[[str], Any], missing: Any, expected: str, dtype: Any = np.int64) -> NDArray[Any]:
        given = texts.get(what)
        array = np.empty(len(rows), dtype=dtype)
        try:
            if given is None or convert is str:
                array[:] = missing if given is None else list(given)
            else:
                array[:] = [convert(t) if t else missing for t in given] if "" in given else list(map(convert, given))
        except (ValueError, OverflowError) as error:
            for number, text in enumerate(given or (), start=2):
                try:
                    np.array([convert(text) if text else 0], dtype=dtype)
                except (ValueError, OverflowError):
                    raise bad_row(path, number, f"{what} to be {expected}", repr(text[:80])) from error
            raise
        return array

    def refuse(wrong: NDArray[np.bool_], expected: Callable[[int], str], received: Callable[[int], str]) -> None:
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            raise bad_row(path, i + 2, expected(i), received(i))

    for what in ("idx", "label", "predict", "correct", "radius", "time"):
        if "" in texts[what]:
            raise bad_row(path, texts[what].index("") + 2, f"{what} to be a number", "an empty cell")
    for what in ("idx", "label", "predict", "correct", "radius", "r_router", "r_expert", "n_drawn", "seed", "core"):
        # Python alone reads 1_000, and digits of other scripts
        if not _DIGITS.issuperset("".join(texts.get(what, ()))):
            number, cell = next((k, t) for k, t in enumerate(texts[what], start=2) if not _DIGITS.issuperset(t))
            raise bad_row(path, number, f"{what} in plain digits", repr(cell[:80]))
    idx, label, predict, correct = (column(c, int, 0, "a whole number") for c in ("idx", "label", "predict", "correct"))
    radius = column("radius", float, 0.0, "a number", np.float64)
    refuse(
        (idx < 0) | (label < -1) | (predict < ABSTAIN),
        lambda i: "idx >= 0, label >= -1, predict >= -1",
        lambda i: f"{idx[i]}, {label[i]}, {predict[i]}",
    )
    refuse(~((radius >= 0) & (radius < np.inf)), lambda i: "a finite radius of at least 0", lambda i: repr(texts["radius"][i]))
    refuse(
        (predict == ABSTAIN) & (radius > 0),
        lambda i: "radius 0 where predict is -1 (abstained)",
        lambda i: f"radius {radius[i]}",
    )
    core = column("core", int, ABSTAIN, "a whole number")
    refuse(
        (core != ABSTAIN) & ((core < 0) | (predict != ABSTAIN)),
        lambda i: "no answer of the core where predict is a class: nothing of it is certified",
        lambda i: f"core {core[i]}, predict {predict[i]}",
    )
    right = np.where(label < 0, -1, label == predict)
    refuse(
        correct != right,
        lambda i: f"correct {right[i]} (label {label[i]}, predict {predict[i]})",
        lambda i: f"correct {correct[i]}",
    )
    _refuse_twice(idx, path)
    counts = np.empty(len(rows), dtype=object)
    counts[:] = list(texts.get("counts", [""] * len(rows)))
    if votes and not all_counts(counts.tolist()):
        counts = column("counts", check_counts, "", "votes as JSON text", object)
    return Table(
        name=name,
        metadata=metadata,
        path=path,
        idx=idx,
        label=label,
        predict=predict,
        radius=radius,
        correct=correct,
        time=column("time", parse_time if ":" in "".join(texts["time"]) else float, 0.0, "seconds, or h:mm:ss", np.float64),
        expert=column("expert", str, "", "text", object),
        rule=column("rule", str, "", "text", object),
        bound_by=column("bound_by", str, "", "text", object),
        r_router=column("r_router", float, np.nan, "a number", np.float64),
        r_expert=column("r_expert", float, np.nan, "a number", np.float64),
        n_drawn=column("n_drawn", int, -1, "a whole number"),
        seed=column("seed", int, None, "a whole number", object),
        core=core,
        counts_text=counts,
    )


def _refuse_twice(idx: NDArray[np.int64], path: Path) -> None:
    order = np.argsort(idx, kind="stable")
    again = order[1:][idx[order[1:]] == idx[order[:-1]]]
    if again.size:
        i = int(again.min())
        first = int(np.flatnonzero(idx == idx[i])[0])
        raise bad_row(path, i + 2, "each image once", f"image {idx[i]} again (first in line {first + 2})")


def bad_row(path: Path, number: int, expected: str, received: str) -> ResultsError:
    """The error about one line of a table."""
    return ResultsError(
        f"Line {number} of {path.name} is not a valid row",
        expected=expected,
        received=received,
        remedy="restore the file; a row is never repaired by guessing",
    )
