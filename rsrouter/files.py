"""Files that are written whole or not at all, and their digests."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape as glob_escape
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Makes new or renamed entries of `folder` survive a power loss (where the system can)."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:  # not every system opens folders
        return
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `path` whole or not at all: a temporary file, fsync, rename, fsync of the folder."""
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the body is done: a crash leaves no half of it.

    What an earlier, killed run left beside `target` is removed. `target` may exist as an empty folder.

    Raises:
        OSError: `target` holds something, or the disk refuses.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f".{glob_escape(target.name)}.*.part"):
        shutil.rmtree(old, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    try:
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o777 & ~umask)
        yield scratch
        if target.is_dir():
            target.rmdir()
        os.rename(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync_folder(target.parent)


def is_leftover(path: Path, names: Iterable[str]) -> bool:
    """Whether `path` is what `write_atomically` leaves of a file called one of `names` when it is killed."""
    return path.suffix == ".tmp" and any(path.name.startswith(f".{name}.") for name in names)


def sha256_of(content: bytes | Path) -> str:
    """Hex sha256 of bytes, or of a file's content."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
