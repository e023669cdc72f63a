"""Fingerprint of a data set: sha256 over names and contents of its files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rsrouter.files import sha256_of


def files_digest(paths: Sequence[Path], root: Path) -> str:
    """sha256 over names (relative to `root`) and contents; several files are read at a time."""
    with ThreadPoolExecutor(4) as pool:
        return names_digest(zip((p.relative_to(root).as_posix() for p in paths), pool.map(_content, paths), strict=True))


def _content(path: Path) -> str:
    try:
        return sha256_of(path) if path.is_file() else "none"
    except OSError:
        return "unreadable"


def names_digest(files: Iterable[tuple[str, str]]) -> str:
    """sha256 over `(name, sha256 of the content)` of several files."""
    digest = sha256()
    for name, content in files:
        digest.update(os.fsencode(name) + f" {content}\n".encode())
    return digest.hexdigest()


def with_labels(digest: str, labels: NDArray[Any] | None) -> str:
    """The digest of files whose images have these labels: another label column is other data."""
    return digest if labels is None else sha256(digest.encode() + labels.tobytes()).hexdigest()
