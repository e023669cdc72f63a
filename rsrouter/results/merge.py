"""Shards into one table."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rsrouter.core.errors import ResultsError
from rsrouter.files import sync_folder, write_atomically
from rsrouter.results.about import TableMetadata, unpack_ids
from rsrouter.results.metadata import NOT_COMPARED, describe, differences, metadata_path, normalise, read_metadata, write_metadata
from rsrouter.results.reading import read_bytes, read_table
from rsrouter.results.rows import COLUMNS, FIELD_COLUMNS, HEADER

_TIME = FIELD_COLUMNS.index("time")


def merge_tables(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, partial: bool = False) -> Path:
    """Merges shards of one run into the table that one uninterrupted run writes.

    Rows stand in the order of the job's images and are copied byte for byte, so the result depends neither on the number
    of shards nor on the order in which they are named (time column aside). Every row must follow from its votes. One that
    several shards hold is kept once; its other cells must agree (of the times the smallest is kept).

    Metadata: every key must agree but `shard` and `info`; of `info`, what decides bits must (`differences`), and what all
    shards agree on is kept. Every shard that holds an image must be there.

    Args:
        paths: the shards' tables, each with its metadata beside it.
        out: where to write; its metadata goes beside it. Refused if it exists, unless it is the same result.
        partial: accept missing shards and rows.

    Raises:
        ResultsError: no shards, different metadata (with what differs), duplicates that differ, a missing shard
            or missing rows, or `out` is taken.
        IntegrityError: rows that do not follow from their votes.
    """
    if not paths:
        raise ResultsError(
            "There is nothing to merge",
            expected="at least one results table",
            received="none",
            remedy="name the shards' TSV files",
        )
    out = Path(out)
    metadata: dict[str, Any] = {}
    first: Path | None = None
    info: dict[str, Any] = {}
    rows: dict[int, str] = {}
    read: list[tuple[Path, Collection[int]]] = []
    present: dict[int, int] = {}
    count, about = None, None
    for path in map(Path, paths):
        if path.resolve() == out.resolve():
            raise ResultsError(
                "The merged table would replace one of its shards",
                expected="an output that is not a shard",
                received=str(out),
                remedy="give another output",
            )
        stored = read_metadata(metadata_path(path))
        if stored is None:
            read_bytes(path)  # a missing table is the better message
            raise ResultsError(
                f"{path.name} has no metadata",
                expected=f"{metadata_path(path).name} beside it",
                received="none",
                remedy="run its certify command again if it has only begun; tables of others cannot be merged",
            )
        own = TableMetadata.read(stored, f"The metadata {metadata_path(path).name}")
        stored.pop("shard", None)
        if first is None:
            first, metadata, info, about = path, stored, own.info, own
        info = {key: value for key, value in info.items() if own.info.get(key) == value}
        found = differences(metadata, stored)
        if found:
            raise ResultsError(
                f"{path} belongs to another run than {first}",
                expected="shards of one configuration",
                received=describe(found),
                remedy="merge only shards of the same certify command",
            )
        index, total = (own.shard.index, own.shard.count) if own.shard else (0, None)
        if total is not None:
            if count not in (None, total):
                raise ResultsError(
                    f"{path} was cut differently from {first}",
                    expected=f"one of {count} shards",
                    received=f"one of {total} shards",
                    remedy="merge only shards of the same certify command",
                )
            count = total
        found_rows = _lines(path)
        present[index] = max(present.get(index, 0), len(found_rows))
        twice = rows.keys() & found_rows.keys()
        for idx in sorted(twice):
            source = next(earlier for earlier, ids in read if idx in ids)
            mine, theirs = rows[idx].split("\t"), found_rows[idx].split("\t")
            if _untimed(mine) != _untimed(theirs):
                column = next(c for c, a, b in zip(COLUMNS, mine, theirs, strict=True) if a != b and c != "time")
                raise ResultsError(
                    f"Two shards disagree about image {idx}",
                    expected=f"{column} {mine[COLUMNS.index(column)]!r} as in {source}",
                    received=f"{theirs[COLUMNS.index(column)]!r} in {path}",
                    remedy="certify this image again; one of the files is damaged",
                )
            if float(theirs[_TIME]) >= float(mine[_TIME]):
                del found_rows[idx]
        rows |= found_rows
        read.append((path, found_rows.keys()))
    if not partial:
        _check_complete(metadata, rows, present, count)
    metadata = {k: v for k, v in metadata.items() if k not in NOT_COMPARED} | ({"info": info} if info else {})
    order = [int(i) for i in unpack_ids(about.indices)] if about else []
    text = "\n".join([HEADER.rstrip("\n"), *[rows[idx] for idx in order if idx in rows], ""])
    _write(out, text.encode(), metadata)
    return out


def _lines(path: Path) -> dict[int, str]:
    """The lines of a shard by image id, every row seen to follow from its votes."""
    content = read_bytes(path)
    if content == HEADER.encode():
        return {}  # begun, and nothing finished
    if not content.startswith(HEADER.encode()):
        raise ResultsError(
            f"{path.name} is not a table of this package",
            expected=f"the header {' '.join(COLUMNS)}",
            received=repr(content[:80].split(b"\n", 1)[0].decode("utf-8", errors="replace")),
            remedy="only tables of this package can be merged",
        )
    table = read_table(path, check="counts")
    return dict(zip(table.idx.tolist(), content.decode().split("\n")[1:], strict=False))


def _untimed(cells: list[str]) -> list[str]:
    return cells[:_TIME] + cells[_TIME + 1 :]


def _check_complete(metadata: dict[str, Any], rows: dict[int, Any], present: dict[int, int], count: int | None) -> None:
    whole = int(metadata["num_images"])
    asked = 0 if count is None else min(count, whole)
    missing = sorted(set(range(asked)) - set(present))
    if missing:
        raise ResultsError(
            "Shards are missing",
            expected=f"all {count} shards",
            received=f"no shard {', '.join(map(str, missing[:20]))}",
            remedy="certify them, or merge what there is with partial",
        )
    if len(rows) != whole:
        sizes = {index: len(range(index, whole, count)) for index in present} if count is not None else {}
        short = [f"shard {i}: {present[i]} of {size}" for i, size in sorted(sizes.items()) if present[i] < size]
        raise ResultsError(
            "The shards do not hold every image",
            expected=f"{whole} rows",
            received=f"{len(rows)} rows" + (f" ({', '.join(short[:20])})" if short else ""),
            remedy="run the unfinished shards' certify commands again, or merge what there is with partial",
        )


def _write(out: Path, text: bytes, metadata: dict[str, Any]) -> None:
    beside = metadata_path(out)
    taken = [p for p in (out, beside) if p.exists()]
    if taken:
        same = out.is_file() and out.read_bytes() == text and read_metadata(beside) == normalise(metadata)
        if same:
            return
        # metadata that a killed merge left alone is ours to complete
        if taken != [beside] or read_metadata(beside) != normalise(metadata):
            raise ResultsError(
                f"{taken[0]} exists and is something else",
                expected="an output that does not exist",
                received=str(taken[0]),
                remedy="give another output; nothing was changed",
            )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_metadata(beside, metadata)
        write_atomically(out, text)
        sync_folder(out.parent)
    except OSError as error:
        raise ResultsError(
            f"Cannot write the merged table {out}",
            expected="room on the disk and permission to write",
            received=str(error),
            remedy="make room and merge again",
        ) from error
