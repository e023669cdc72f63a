"""Splits and configurations of a data set that lies in several files, by the names of files and folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any

from rsrouter.core.errors import InputError
from rsrouter.inputs import printable

#: Names for the same split, as the Hub has them.
SYNONYMS = (
    ("train", "training"),
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval", "evaluation", "t10k"),
)
_SHARD = re.compile(r"[-_.](?:\d+(?:-of-\d+)?(?:-[0-9a-f]{8,})?|part[-_.]?\d+|shard[-_.]?\d+)$")
#: File and folder names that say nothing.
_PLAIN = re.compile(r"(?:|data|part|shard|file|chunk|batch|dataset|images?|parquet|arrow)(?:[-_.]?\d+)*")


def synonyms(split: str) -> tuple[str, ...]:
    """The split and what else it may be called.

    >>> synonyms("val")
    ('val', 'validation', 'valid', 'dev')
    """
    return (split, *(other for group in SYNONYMS if split.lower() in group for other in group if other != split))


def is_split(name: str) -> bool:
    """Whether a folder of that name is a split."""
    return any(name.lower() in group for group in SYNONYMS)


def split_of(path: PurePath) -> tuple[str, str]:
    """Configuration and split of a file, `""` where its name does not tell.

    >>> split_of(PurePath("data/train-00000-of-00002.parquet")), split_of(PurePath("plain/test/0000.parquet"))
    (('', 'train'), ('plain', 'test'))
    """
    stem = path.name.partition(".")[0] if path.name.count(".") == 1 else path.name.rsplit(".", 1)[0]
    while (shorter := _SHARD.sub("", stem)) != stem:
        stem = shorter
    parents = list(path.parts[:-1])
    split = "" if _PLAIN.fullmatch(stem.lower()) else stem
    if (
        not is_split(split)
        and parents
        and (is_split(_whole(parents[-1])) or (not split and not _PLAIN.fullmatch(parents[-1].lower())))
    ):
        split = _whole(parents.pop())
    return "/".join(p for p in parents if not _PLAIN.fullmatch(p.lower())), split


def _whole(folder: str) -> str:
    return folder.removeprefix("partial-")


def match(split: str, there: Sequence[str]) -> str | None:
    """The one of the splits there are that `split` means: itself, or a synonym."""
    return next((name for name in synonyms(split) if name in there), None)


def choose(kind: str, wanted: str | None, there: Sequence[str], name: str) -> str:
    """The split, or configuration, that is read.

    Raises:
        InputError: several and none named, or no such one.

    >>> choose("split", "val", ["train", "validation"], "data")
    'validation'
    """
    found = wanted if wanted in there else None
    if wanted is not None and found is None and kind == "split":
        found = match(wanted, there)
    if wanted is None and len(there) == 1:
        found = there[0]
    if found is None:
        flag = "split= (--split)" if kind == "split" else "config= (--config)"
        listed = ", ".join(printable(t) or "(unnamed)" for t in there)
        raise InputError(
            f"{name} has {'several' if there else 'no'} {kind}s" if wanted is None else f"{name} has no such {kind}",
            expected=f"one of: {listed}" if there else f"data without {kind}s",
            received="none named" if wanted is None else repr(printable(wanted)),
            remedy=f"give {flag}" if there else f"leave {flag} out",
        )
    return found


def choose_files(
    paths: Sequence[PurePath],
    split: str | None,
    config: str | None,
    name: str,
    declared: dict[str, dict[str, list[str]]] | None = None,
) -> tuple[list[Any], str, str]:
    """The files of one split.

    Args:
        paths: of all files, relative to the data set.
        split, config: which; None where there is only one.
        name: of the data set.
        declared: configuration to split to patterns, as the data set's card says; None: their names tell.

    Returns:
        Files, configuration and split.

    Raises:
        InputError: as `choose`.
    """
    paths = sorted(paths)
    table: dict[str, dict[str, list[Any]]] = {}
    for key, parts in (declared or {}).items():
        for part, patterns in parts.items():
            if found := [p for p in paths if any(_matches(p.as_posix(), pattern) for pattern in patterns)]:
                table.setdefault(key, {})[part] = found
    if config is None and "default" in table:
        config = "default"
    if not table:
        for path in paths:
            key, part = split_of(path)
            table.setdefault(key or "default", {}).setdefault(part, []).append(path)
    chosen = choose("configuration", config, sorted(table), name)
    parts = table[chosen]
    part = choose("split", split, sorted(parts), name)
    return parts[part], chosen, part


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or ("**/" in pattern and fnmatchcase(path, pattern.replace("**/", "")))
