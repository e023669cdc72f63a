"""The JSON beside a results table: what makes it reproducible, and what tells two runs apart."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsrouter.core.errors import ResultsError
from rsrouter.files import write_atomically
from rsrouter.stored import read_json

#: Keys that describe a run without being part of it; not compared, but for `DECISIVE`.
NOT_COMPARED = ("info",)
#: What of `info` decides how a CPU rounds sums, and so the bits of a vote; on an accelerator it decides nothing.
DECISIVE = ("threads", "instructions")


def metadata_path(table: str | os.PathLike[str]) -> Path:
    """`certificates.tsv` -> `certificates.json`."""
    path = Path(table)
    if path.suffix == ".json" or not path.name:
        raise ResultsError(
            "A results table cannot have this name",
            expected="a file such as certificates.tsv",
            received=str(path),
            remedy="its metadata is written to the same name with .json",
        )
    return path.with_suffix(".json")


def normalise(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`metadata` as it reads back from JSON.

    Raises:
        ResultsError: values that JSON cannot hold (arrays, paths, NaN).
    """
    try:
        return dict(json.loads(json.dumps(dict(metadata), allow_nan=False, sort_keys=True)))
    except (TypeError, ValueError) as error:
        raise ResultsError(
            "The metadata cannot be written as JSON",
            expected="text, finite numbers, booleans, lists and mappings",
            received=str(error),
            remedy="convert arrays with .tolist() and paths with str()",
        ) from error


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay whole, but for those of named entries, which go by their names.

    >>> flatten({"plan": {"n": 1}, "stages": [{"name": "a", "sigma": 0.5}]})
    {'plan.n': 1, 'stages': ['a'], 'stages.a.name': 'a', 'stages.a.sigma': 0.5}
    """
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) and "name" in entry for entry in value):
        names = [str(entry["name"]) for entry in value]
        if len(set(names)) == len(names):
            return {prefix: names, **flatten(dict(zip(names, value, strict=True)), prefix)}
    if isinstance(value, Mapping) and value:
        flat: dict[str, Any] = {}
        for key, inner in value.items():
            flat.update(flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: value}


def differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, ignore: tuple[str, ...] = NOT_COMPARED
) -> list[tuple[str, str, str]]:
    """`(key, ours, theirs)` for every dotted key on which two metadata differ; `(absent)` where one lacks it.

    Of `info` only what decides bits is compared, between tables of CPUs that both tell it.
    """
    left = flatten({k: v for k, v in ours.items() if k not in ignore})
    right = flatten({k: v for k, v in theirs.items() if k not in ignore})
    infos = [side.get("info") for side in (ours, theirs)]
    if ours.get("device") == theirs.get("device") == "cpu" and all(isinstance(info, Mapping) for info in infos):
        for key in DECISIVE:
            if all(key in info for info in infos):  # type: ignore[operator]
                left[f"info.{key}"], right[f"info.{key}"] = (info[key] for info in infos)  # type: ignore[index]
    texts = []
    for key in sorted(set(left) | set(right)):
        a, b = ("(absent)" if key not in side else json.dumps(side[key], sort_keys=True) for side in (left, right))
        if a != b:
            texts.append((key, a, b))
    return texts


def describe(found: list[tuple[str, str, str]], limit: int = 8) -> str:
    """The keys of `differences` in words, for an error text."""
    words = [f"{key}: {_short(a)} against {_short(b)}" for key, a, b in found[:limit]]
    return "; ".join(words) + (f"; and {len(found) - limit} more" if len(found) > limit else "")


def _short(text: str, width: int = 80) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The metadata file at `path`, None if there is none.

    Raises:
        ResultsError: unreadable, or not a JSON object.
    """
    if not path.exists():
        return None
    remedy = "it belongs to the table of the same name; restore it or start in a new folder"
    data = read_json(path, f"The metadata {path.name}", error=ResultsError, remedy=remedy)
    if not isinstance(data, dict):
        raise ResultsError(
            f"Cannot read the metadata {path.name}",
            expected="a JSON object",
            received=type(data).__name__,
            remedy=remedy,
        )
    return data


def write_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """`normalise`d metadata as indented JSON, atomically."""
    write_atomically(path, (json.dumps(normalise(metadata), indent=2, sort_keys=True) + "\n").encode())
