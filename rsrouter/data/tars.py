"""WebDataset shards: tar files in which `000017.jpg` and `000017.cls` (or `.json`) belong together."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rsrouter.core.errors import InputError
from rsrouter.data.columns import LABEL_COLUMNS, NONE, Reading, class_indices, find_label
from rsrouter.data.digests import files_digest, with_labels
from rsrouter.data.folders import NO_PICTURES, PIPES, is_hidden, say_passed
from rsrouter.data.images import ImageData, Origin
from rsrouter.data.pictures import SUFFIXES, Pictures, spread
from rsrouter.inputs import printable
from rsrouter.stored import parse_json

#: A label is no longer.
MOST_LABEL = 1 << 20
_CLASS = ("cls", "label", "cls.txt", "class", "target")


@dataclass
class Sample:
    """One image in a shard: where its bytes are, and the fields beside it."""

    shard: Path
    key: str
    at: int = -1
    size: int = 0
    fields: dict[str, bytes] = field(default_factory=dict)


def from_tars(paths: Sequence[Path], root: Path, name: str, reading: Reading) -> ImageData:
    """The images of tar shards, read where they lie; nothing is unpacked.

    Raises:
        InputError: damaged or compressed shards, samples without a label.
    """
    passed: dict[str, list[str]] = {}
    samples = [s for path in paths for s in _index(path, passed)]
    noted = {k: tuple(v) for k, v in passed.items()}
    say_passed(name, noted)
    labels, classes, label = _labels(samples, reading, name)

    def fetch(i: int) -> bytes:
        with samples[i].shard.open("rb") as file:
            file.seek(samples[i].at)
            return file.read(samples[i].size)

    def who(i: int) -> str:
        return printable(f"{samples[i].key} in {samples[i].shard}")

    return ImageData(
        Pictures(fetch, who, spread(len(samples)), reading.channels),
        labels,
        fingerprint=lambda: with_labels(files_digest(paths, root), labels),
        name=printable(name),
        length=len(samples),
        classes=classes,
        reading=reading,
        origin=Origin("webdataset", split=reading.split, label=label, passed=noted),
        who=who,
    )


def _index(path: Path, passed: dict[str, list[str]]) -> list[Sample]:
    found: dict[str, Sample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if member.isdir():
                    continue
                if is_hidden(base):
                    passed.setdefault("hidden or of the system", []).append(printable(member.name))
                elif not member.isreg() or member.issparse():
                    passed.setdefault(PIPES, []).append(printable(member.name))
                elif f".{suffix.rsplit('.', 1)[-1].lower()}" in SUFFIXES:
                    sample = found.setdefault(key, Sample(path, key))
                    if sample.at >= 0:
                        passed.setdefault("further pictures of a sample", []).append(printable(member.name))
                        continue
                    sample.at, sample.size = member.offset_data, member.size
                elif member.size <= MOST_LABEL and (file := tar.extractfile(member)) is not None:
                    found.setdefault(key, Sample(path, key)).fields[suffix.lower()] = file.read()
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputError(
            f"{printable(path)} is not a readable tar file",
            expected="an uncompressed tar shard",
            received=str(error).splitlines()[0] if str(error) else type(error).__name__,
            remedy="unpack gzip first, or fetch the file again",
        ) from error
    for sample in found.values():
        if sample.at < 0:
            passed.setdefault(NO_PICTURES, []).append(printable(sample.key))
    return [s for s in found.values() if s.at >= 0]


def _labels(samples: Sequence[Sample], reading: Reading, name: str) -> tuple[Any, tuple[str, ...] | None, str | None]:
    if not samples or reading.label == NONE:
        return None, None, None
    fields = list(dict.fromkeys(key for s in samples for key in s.fields))
    if (plain := next((f for f in ((reading.label,) if reading.label else _CLASS) if f in fields), None)) is not None:
        values: list[Any] = [s.fields.get(plain, b"").decode("utf-8", "replace").strip() for s in samples]
        label: str | None = plain
    elif "json" in fields:
        content = [
            parse_json(s.fields.get("json", b"{}"), printable(f"{s.key}.json in {s.shard}"), remedy="mend the shard")
            for s in samples
        ]
        rows = [c if isinstance(c, dict) else {} for c in content]
        label = find_label(list(dict.fromkeys(k for r in rows for k in r)), "", reading.label, name)
        if label is None:
            return None, None, None
        values = [row.get(label) for row in rows]
    else:
        label = find_label(fields, "", reading.label, name)
        return None, None, label
    listed = [int(v) if isinstance(v, str) and v.removeprefix("-").isdecimal() and len(v) < 19 else v for v in values]
    if missing := [
        s.key for s, v in zip(samples, listed, strict=True) if v is None or v == "" or isinstance(v, float | list | dict)
    ]:
        raise InputError(
            f"{printable(name)} has samples without a label",
            expected=f"a class beside every image: .cls, or one of {', '.join(LABEL_COLUMNS[:4])} in .json",
            received=f"{len(missing)} of {len(samples)}, {printable(missing[0])} the first",
            remedy=f"complete the shards, or label={NONE!r} (--label {NONE})",
        )
    whole = all(isinstance(v, int) for v in listed)
    labels, classes = class_indices(
        np.array(listed) if whole else np.array([str(v) for v in listed], dtype=object), None, reading, name
    )
    return labels, classes, label
