"""Folders of pictures: one subfolder per class, splits above them, or a metadata file that names classes."""

from __future__ import annotations

import csv
import io
import os
import stat
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from rsrouter.core.errors import InputError
from rsrouter.data.columns import NONE, Reading, as_numbers, chosen_order, class_indices, class_order, find_label
from rsrouter.data.digests import files_digest
from rsrouter.data.images import ImageData, Origin
from rsrouter.data.pictures import FOREIGN, SUFFIXES, Pictures, UnreadableError, spread
from rsrouter.data.splits import choose, is_split
from rsrouter.inputs import printable
from rsrouter.stored import parse_json, read_bytes

#: What systems leave behind; hidden names (with a dot in front, `._*` among them) count as well.
SYSTEM = frozenset(
    (
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "system volume information", "@eadir"),
        *("#recycle", "lost+found", "__pycache__"),
    )
)
METADATA = ("metadata.jsonl", "metadata.csv")
HIDDEN, PIPES, NO_PICTURES, UNKNOWN_FORMATS = (
    "hidden or of the system",
    "pipes or devices",
    "of other kinds",
    "in formats that are not read",
)
UNLISTED, LOOSE, OTHER_CLASSES = "not in the metadata file", "beside the class folders", "of classes that were not asked for"


def is_hidden(name: str) -> bool:
    """Whether a name is hidden, or one that systems leave behind.

    >>> is_hidden(".ipynb_checkpoints"), is_hidden("Thumbs.db"), is_hidden("cat")
    (True, True, False)
    """
    return name.startswith(".") or name.lower() in SYSTEM


@dataclass
class Found:
    """Files below a folder.

    Attributes:
        pictures: files of a known suffix, relative to the folder, sorted.
        others: regular files of other suffixes.
        folders: all visible folders.
        passed: reason to names that were passed over.
    """

    pictures: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    passed: dict[str, list[str]] = field(default_factory=dict)

    def pass_over(self, reason: str, name: object) -> None:
        """Notes a file that is not read."""
        self.passed.setdefault(reason, []).append(printable(name))

    def below(self, part: Path) -> list[Path]:
        """Pictures in one of the folders."""
        return [p for p in self.pictures if p.is_relative_to(part)]


def scan(root: Path) -> Found:
    """All files below a folder; links are followed (in no circle), and nothing is opened.

    Raises:
        InputError: a folder that cannot be listed.
    """
    found, seen = Found(), set()

    def refuse(error: OSError) -> None:
        raise InputError(
            "A folder cannot be listed",
            expected="a folder that may be read",
            received=printable(f"{error.filename}: {error.strerror}"),
            remedy="check its rights",
        ) from error

    for place, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        here = Path(place)
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in [f for f in folders if is_hidden(f)]:
            found.pass_over(HIDDEN, (here / name).relative_to(root))
        folders[:] = sorted(f for f in folders if not is_hidden(f))
        found.folders += [(here / f).relative_to(root) for f in folders]
        for name in sorted(names):
            path = (here / name).relative_to(root)
            if is_hidden(name):
                found.pass_over(HIDDEN, path)
            elif not _may_be_file(here / name):
                found.pass_over(PIPES, path)
            elif path.suffix.lower() in SUFFIXES:
                found.pictures.append(path)
            else:
                found.others.append(path)
    found.pictures.sort()
    return found


def _may_be_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:  # a link to nothing: an image that cannot be read, at its place in the order
        return True


def from_folder(root: Path, found: Found, name: str, reading: Reading) -> ImageData:
    """Pictures below a folder.

    Args:
        root: the folder.
        found: what `scan` found there.
        name: for messages and metadata.
        reading: split, classes, and how pictures are read.

    Raises:
        InputError: no pictures, several splits and none named, a class folder without pictures, classes that do not fit.
    """
    below = {p.parts[0] for p in found.pictures if len(p.parts) > 1}
    tops = [p for p in found.folders if len(p.parts) == 1]
    splits = [] if _are_classes(tops, reading) else _splits(found, tops, below)
    if not splits:
        if reading.split is not None:
            choose("split", reading.split, [], name)
        return _labelled(root, Path(), found, name, reading, None)
    if reading.split is None and (strays := sorted(below - {p.name for p in splits})):
        raise InputError(
            f"{name} holds folders that are splits and others that are not",
            expected="splits, or classes",
            received=f"{', '.join(p.name for p in splits)} beside {', '.join(map(printable, strays[:5]))}",
            remedy="name a split (--split), or the classes (--classes)",
        )
    chosen = Path(choose("split", reading.split, [p.name for p in splits], name))
    # one numbering for all splits: a class that one of them lacks moves no other
    everywhere = {p.parts[1] for s in splits for p in found.below(s) if len(p.parts) > 2}
    return _labelled(root, chosen, found, f"{name}/{chosen}", replace(reading, split=str(chosen)), everywhere)


def _are_classes(tops: Sequence[Path], reading: Reading) -> bool:
    return reading.classes is not None and reading.split is None and {p.name for p in tops} <= set(reading.classes)


def _splits(found: Found, tops: Sequence[Path], below: set[str]) -> list[Path]:
    named = [p for p in tops if is_split(p.name) and p.name in below]
    inner = [p for p in named if any(len(q.parts) > 2 for q in found.below(p))]
    return named if inner or (named and {p.name for p in named} == below) else []


def _labelled(root: Path, part: Path, found: Found, name: str, reading: Reading, everywhere: set[str] | None) -> ImageData:
    depth = len(part.parts)
    if (table := next((part / m for m in METADATA if (part / m) in found.others), None)) is not None:
        return _from_metadata(root, part, table, found, name, reading)
    pictures = found.below(part)
    tops = {p.parts[depth] for p in found.folders if len(p.parts) == depth + 1 and p.is_relative_to(part)}
    used = {p.parts[depth] for p in pictures if len(p.parts) > depth + 1}
    if not used or reading.label == NONE:
        if tops and reading.label != NONE:
            _refuse_empty(sorted(tops), name, pictures)
        if pictures and reading.label != NONE:
            warnings.warn(f"{printable(name)} has no class folders: its images are without labels", stacklevel=5)
        return _data(root, pictures, None, None, found, name, reading)
    known = everywhere or used
    if reading.classes is not None:
        missing = sorted(set(reading.classes) - tops)
        # some of the experts' classes will do; a name that has no folder beside a folder that has no name looks like a slip
        if missing and everywhere is None and not used <= set(reading.classes):
            raise InputError(
                f"{name} has no folder for a class that was given",
                expected=f"folders among {', '.join(map(printable, sorted(tops)[:12]))}",
                received=", ".join(map(printable, missing[:5])),
                remedy="check classes= (--classes)",
            )
        if missing and everywhere is None:
            warnings.warn(
                f"{printable(name)} has pictures of {len(used)} of the {len(reading.classes)} classes that were given",
                stacklevel=5,
            )
        ranks, classes = chosen_order([], reading.classes, name), tuple(map(printable, reading.classes))
    else:
        numbers = as_numbers(tops)
        if numbers is not None and 0 in numbers.values():
            known = tops | known  # an empty folder shifts no number
        if empty := sorted(tops - known):
            _refuse_empty(empty, name, pictures)
        _refuse_wrapped(part, used, pictures, name, depth)
        ranks, classes = class_order(known, name)
    kept = []
    for p in pictures:
        if len(p.parts) == depth + 1:
            found.pass_over(LOOSE, p)
        elif p.parts[depth] not in ranks:
            found.pass_over(OTHER_CLASSES, p)
        else:
            kept.append(p)
    kept.sort(key=lambda p: ranks[p.parts[depth]])
    return _data(root, kept, np.array([ranks[p.parts[depth]] for p in kept], dtype=np.int64), classes, found, name, reading)


def _refuse_empty(empty: Sequence[str], name: str, pictures: Sequence[Path]) -> None:
    raise InputError(
        f"{name} has a folder without pictures" if pictures else f"The data set is empty: no pictures below {name}",
        expected="pictures in every class folder: a folder more or less gives every later class another number",
        received=", ".join(printable(e) for e in empty[:5]) + (f", and {len(empty) - 5} more" if len(empty) > 5 else ""),
        remedy="remove it, or give the classes in the experts' order: classes= (--classes)",
    )


def _refuse_wrapped(part: Path, used: set[str], pictures: Sequence[Path], name: str, depth: int) -> None:
    if len(used) > 1 or any(len(p.parts) == depth + 2 for p in pictures):
        return
    inner = sorted({p.parts[depth + 1] for p in pictures if len(p.parts) > depth + 2})
    only = next(iter(used))
    if len(inner) > 1:
        raise InputError(
            f"{name} holds one folder of folders",
            expected="one folder per class",
            received=f"{printable(only)} with {', '.join(map(printable, inner[:5]))}",
            remedy=f"give the folder {printable(only)} itself, or classes= (--classes) if it is the only class",
        )


def _data(
    root: Path, paths: Sequence[Path], labels: Any, classes: tuple[str, ...] | None, found: Found, name: str, reading: Reading
) -> ImageData:
    for path in found.others:
        if path.name not in METADATA:
            found.pass_over(UNKNOWN_FORMATS if path.suffix.lower() in FOREIGN else NO_PICTURES, path)
    passed = {reason: tuple(names) for reason, names in found.passed.items()}
    say_passed(name, passed)
    if not paths:
        listed = "; ".join(f"{len(v)} {k} ({v[0]})" for k, v in passed.items()) or "an empty folder"
        raise InputError(
            "The data set is empty",
            expected="pictures: PNG, JPEG, ...",
            received=f"{printable(name)}: {listed}",
            remedy="check the path",
        )

    def fetch(i: int) -> bytes:
        return picture_bytes(root / paths[i], who(i))

    def who(i: int) -> str:
        return printable(root / paths[i])

    pictures = Pictures(fetch, who, spread(len(paths)), reading.channels)
    return ImageData(
        pictures,
        labels,
        length=len(paths),
        name=printable(name),
        reading=reading,
        fingerprint=lambda: files_digest([root / p for p in paths], root),
        classes=classes,
        origin=Origin("folder", split=reading.split, passed=passed),
        who=who,
    )


def picture_bytes(path: Path, who: str) -> bytes:
    """The content of a picture file; only regular files are opened.

    Raises:
        UnreadableError: nothing there, no regular file, no right to read it.
    """
    return read_bytes(path, who, error=UnreadableError, remedy="fetch it again, or skip_unreadable=True (--skip-unreadable)")


def say_passed(name: str, passed: Mapping[str, Sequence[str]]) -> None:
    """Warns of files that were passed over, but for hidden ones."""
    told = [
        f"{len(names)} {reason} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        for reason, names in passed.items()
        if reason != HIDDEN
    ]
    if told:
        warnings.warn(f"{printable(name)}: passed over: {'; '.join(told)}", stacklevel=6)


def _from_metadata(root: Path, part: Path, table: Path, found: Found, name: str, reading: Reading) -> ImageData:
    what = printable(root / table)
    content = read_bytes(root / table, what)
    rows = _json_lines(content, what) if table.suffix == ".jsonl" else _csv_rows(content, what)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    there = {p.relative_to(part).as_posix(): p for p in found.below(part)}
    paths = []
    for at, row in enumerate(rows):
        file = row.get("file_name")
        path = there.get(PurePosixPath(file).as_posix()) if isinstance(file, str) else None
        if path is None:
            raise InputError(
                f"{what} names a picture that is not there",
                expected="file_name: a picture below the same folder",
                received=f"row {at}: {printable(repr(file))[:80]}",
                remedy="mend the row; names are relative to the metadata file",
            )
        paths.append(path)
    for path in sorted(set(there.values()) - set(paths)):
        found.pass_over(UNLISTED, path)
    label = find_label(columns, "file_name", reading.label, what)
    labels, classes = None, None
    if label is not None:
        values = [row.get(label) for row in rows]
        if table.suffix == ".csv" and all(isinstance(v, str) and v.strip().removeprefix("-").isdecimal() for v in values):
            values = [int(str(v)) for v in values]
        array = np.array(values) if all(isinstance(v, int) for v in values) else np.array(values, dtype=object)
        labels, classes = class_indices(array, None, reading, what)
    return _data(root, paths, labels, classes, found, name, replace(reading, label=label))


def _json_lines(content: bytes, what: str) -> list[dict[str, Any]]:
    rows = [
        parse_json(line, what, remedy="one JSON object a line")
        for line in content.removeprefix(b"\xef\xbb\xbf").splitlines()
        if line.strip()
    ]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(
            f"{what} is not a list of pictures",
            expected="one JSON object a line",
            received="none, or another value",
            remedy="mend it",
        )
    return rows


def _csv_rows(content: bytes, what: str) -> list[dict[str, Any]]:
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{what} is not CSV", expected="UTF-8 text", received=str(error), remedy="write it again") from error
    if not rows or any(None in row for row in rows):
        raise InputError(
            f"{what} is not a table",
            expected="a header, and rows with as many cells",
            received="no rows, or cells too many",
            remedy="mend it",
        )
    return rows
