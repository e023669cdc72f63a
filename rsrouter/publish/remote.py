"""Files as the Hub keeps them, and requests that do not take for ever."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rsrouter.core.errors import HubError
from rsrouter.files import sha256_of

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
T = TypeVar("T")


@dataclass(frozen=True)
class File:
    """One file of a publication: path in the repository, size in bytes, sha256."""

    path: str
    size: int
    sha256: str


def describe(folder: Path, path: str) -> File:
    """The file at `path` below `folder`."""
    return File(path, (folder / path).stat().st_size, sha256_of(folder / path))


def is_stored(entry: Any, path: Path, file: File) -> bool:
    """Whether the Hub's entry (of `get_paths_info`) has the content of `path`, by the Hub's own checksums."""
    if entry is None:
        return False
    if lfs := getattr(entry, "lfs", None):
        return bool(lfs.sha256 == file.sha256)
    data = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return bool(getattr(entry, "blob_id", None) == blob)


def within(seconds: float, what: str, work: Callable[[], T]) -> T:
    """`work()`, or an error where it takes longer: a server that sends a byte now and then resets every other timeout.

    Raises:
        HubError: not done in time. Whatever `work` raises.

    >>> within(1.0, "adding", lambda: 1 + 1)
    2
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True, name=f"rsrouter: {what}")
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise HubError(
            f"The Hub did not finish {what} in time",
            expected=f"an answer within {seconds:.0f} s",
            received="none so far",
            remedy="run the same command again: what the Hub has by now is found there",
        )
    return done[0]


__all__ = ["REPO_ID", "File", "describe", "is_stored", "within"]
