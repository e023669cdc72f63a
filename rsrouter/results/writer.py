"""An append-only, crash-safe results table: kill it at any moment, run again, and nothing is lost or doubled."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rsrouter.core.errors import ResultsError
from rsrouter.files import is_leftover, sync_folder, write_atomically
from rsrouter.results.about import KIND
from rsrouter.results.metadata import describe, differences, metadata_path, normalise, read_metadata, write_metadata
from rsrouter.results.reading import parse_rows
from rsrouter.results.rows import COLUMNS, HEADER, Row
from rsrouter.results.verify import require_sound

try:
    import fcntl
except ImportError:  # Windows: no advisory locks on open files
    fcntl = None  # type: ignore[assignment]

_open_writers: weakref.WeakSet[ResultsWriter] = weakref.WeakSet()


class ResultsWriter:
    """Appends rows to `path`, whose metadata stands beside it as JSON; resumes what is already there.

    What holds at every moment: the metadata is written whole before the first row; the table is the
    rows appended so far, plus at most one torn line at its end, which opening cuts off. A killed
    process loses no whole row; a power loss at most those of the last `sync_seconds`, which are done again.

    A second writer is kept out by a lock on the file. Where the file system has none, or keeps it to one machine, rows
    of another are noticed before the next one is written; so is a table that was deleted or replaced.

    Args:
        path: the table, such as `certificates.tsv`; its folder is made if need be.
        metadata: what makes the run reproducible, JSON-ready. Everything but the key `info` must be the same
            for a later run to go on with the table.
        sync_seconds: rows are forced to disk (fsync) when the last time lies this long back; 0 syncs every row.

    Raises:
        ResultsError: the table belongs to another run (with what differs), another process writes to it, it
            is damaged other than by a torn last line, or the disk refuses.
        IntegrityError: rows of certificates that do not follow from their votes.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: Mapping[str, Any], *, sync_seconds: float = 1.0) -> None:
        self.path = Path(path)
        self._absolute = Path(os.path.abspath(self.path))
        self.metadata = normalise(metadata)
        self._metadata_path = metadata_path(self.path)
        self._sync_seconds = sync_seconds
        self._done: set[int] = set()
        self._size = 0
        self._dirty = False
        self._fd = -1
        self._check_metadata()  # before anything is created, and again under the lock
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise ResultsError(
                f"Cannot open the results table {self.path}",
                expected="a file that can be written",
                received=str(error),
                remedy="check the path and its permissions",
            ) from error
        _open_writers.add(self)
        try:
            self._lock()
            self._start()
        except OSError as error:
            self._abandon()
            raise _refused(self.path, error) from error
        except BaseException:
            self._abandon()
            raise

    def done(self) -> frozenset[int]:
        """Image ids that the table already holds."""
        return frozenset(self._done)

    def append(self, row: Row) -> None:
        """Adds one row.

        Raises:
            ResultsError: the image is already in the table, the row is malformed, or the disk refuses (full,
                over quota); the table then still ends in a whole row and can be resumed.
        """
        self.extend((row,))

    def extend(self, rows: Iterable[Row]) -> None:
        """Adds several rows; the errors of `append`. All are checked before the first is written."""
        if self._fd < 0:
            raise ResultsError(
                "This results table is closed",
                expected="an open ResultsWriter",
                received=f"{self.path.name}, closed",
                remedy="open it again: it goes on where it stopped",
            )
        text, fresh = [], set[int]()
        for row in rows:
            if row.idx in self._done or row.idx in fresh:
                raise ResultsError(
                    f"Image {row.idx} is already in {self.path.name}",
                    expected="each image once",
                    received="a second row",
                    remedy="skip the images in done()",
                )
            fresh.add(row.idx)
            text.append(row.to_line())
        try:
            self._check_file()
            self._write("".join(text).encode())
            self._size = os.fstat(self._fd).st_size
            self._done |= fresh
            if time.monotonic() - self._synced >= self._sync_seconds:
                self.sync()
        except OSError as error:
            self._cut_torn_line()
            self._abandon()
            raise _refused(self.path, error) from error
        except ResultsError:
            self._abandon()
            raise

    def arrange(self, order: Sequence[int]) -> None:
        """Puts the rows into the order of the ids in `order`, in one atomic step, and closes the table.

        Does nothing to a table whose rows stand in that order. Killed in between, the table is the old one or the new.

        Raises:
            ResultsError: `order` lacks a row's id, or the disk refuses; the table is then unchanged.
        """
        place = {idx: at for at, idx in enumerate(order)}
        try:
            self._check_file()
            self.sync()
            lines = self._bytes().decode().splitlines(keepends=True)
            ids = [int(line.split("\t", 1)[0]) for line in lines[1:]]
            if missing := [idx for idx in ids if idx not in place]:
                raise ResultsError(
                    f"{self.path.name} holds an image that is not part of this job",
                    expected="rows of the job's images",
                    received=f"image {missing[0]}",
                    remedy="give another output",
                )
            ranks = [place[idx] for idx in ids]
            if ranks != sorted(ranks):
                rows = sorted(zip(ranks, lines[1:], strict=True))
                write_atomically(self.path, (lines[0] + "".join(line for _, line in rows)).encode())
        except OSError as error:
            raise _refused(self.path, error) from error
        finally:
            self._abandon()

    def sync(self) -> None:
        """Forces every row so far to disk."""
        if self._dirty and self._fd >= 0:
            os.fsync(self._fd)
            self._dirty = False
        self._synced = time.monotonic()

    def close(self) -> None:
        """Syncs and lets go of the table."""
        try:
            self.sync()
        except OSError as error:
            raise _refused(self.path, error) from error
        finally:
            self._abandon()

    def __enter__(self) -> ResultsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self._abandon()

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:  # a nearly full disk takes a part, and only then refuses
            self._dirty = True
            left = left[os.write(self._fd, left) :]

    def _abandon(self) -> None:
        fd, self._fd = getattr(self, "_fd", -1), -1
        if fd >= 0:
            os.close(fd)  # closing also releases the lock

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            # on the open file, not the process: it ends with the process, however that ends
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResultsError(
                f"Another process is writing to {self.path.name}",
                expected="one job per results table",
                received=f"a lock on {self.path}",
                remedy="wait for it, or give this job another output or shard",
            ) from error
        except OSError:
            pass  # a file system without locks: nothing to hold on to

    def _check_file(self) -> None:
        """Whether the file is still the one at `path`, and as long as this writer left it."""
        mine = os.fstat(self._fd)
        there = self._absolute.stat() if self._absolute.exists() else None
        # not every file system counts links or keeps inode numbers; a replaced file shows in both
        if there is None or (mine.st_nlink == 0 and not os.path.samestat(mine, there)):
            raise ResultsError(
                f"{self.path} was deleted or replaced while this job wrote it",
                expected="the table that this job began or went on with",
                received="another file, or none, in its place",
                remedy="run the command again; give each job an output of its own",
            )
        if mine.st_size != self._size:
            raise ResultsError(
                f"Something else is writing to {self.path}",
                expected=f"{self._size} bytes, as this job left it",
                received=f"{mine.st_size} bytes",
                remedy="end the other job and run the command again; this file system does not lock files between jobs",
            )

    def _start(self) -> None:
        self._synced = time.monotonic()
        self._size = os.fstat(self._fd).st_size
        self._check_file()  # another job may have put its finished table in this one's place before the lock was free
        stored = self._check_metadata()
        content = self._read()
        rows = content.split("\0", 1)[0]  # a power loss can leave zeros where rows were on their way
        if not stored and content:  # the metadata is written before the first byte
            raise ResultsError(
                f"{self.path} was not begun by this package, or lost its metadata",
                expected=f"{self._metadata_path.name} beside it",
                received="a table without metadata",
                remedy="give another output; nothing was changed",
            )
        if not HEADER.startswith(rows[: len(HEADER)]):
            raise ResultsError(
                f"{self.path} is not a results table of this version",
                expected=f"the header {' '.join(COLUMNS)}",
                received=repr(content[:60]),
                remedy="give another output; nothing was changed",
            )
        for path in self.path.parent.iterdir():
            if is_leftover(path, [self._metadata_path.name, self.path.name]):
                path.unlink(missing_ok=True)
        if not stored:
            write_metadata(self._metadata_path, self.metadata)
        whole = rows[: rows.rfind("\n") + 1]
        if whole.count("\n") > 1:
            table = parse_rows(whole[:-1].split("\n"), path=self.path, metadata=self.metadata, name=self.path.name)
            if self.metadata.get("kind") == KIND:
                require_sound(table)
            self._done = set(table.idx.tolist())
        if len(whole) < len(content):
            os.ftruncate(self._fd, len(whole.encode()))
        if not whole:
            self._write(HEADER.encode())
        os.fsync(self._fd)
        self._size = os.fstat(self._fd).st_size
        sync_folder(self.path.parent)

    def _check_metadata(self) -> bool:
        """Whether there is metadata on disk; refuses one that differs."""
        stored = read_metadata(self._metadata_path)
        if stored is None:
            return False
        found = differences(stored, self.metadata)
        if found:
            raise ResultsError(
                f"{self.path} belongs to another run",
                expected="the metadata of the run that began it",
                received=f"{describe(found)} (on disk against now)",
                remedy="give another output, or repeat the first run's settings",
            )
        return True

    def _read(self) -> str:
        data = self._bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            # the torn tail may end inside a character; its length in bytes still counts
            return whole.decode("utf-8") + "?" * (len(data) - len(whole)) if whole else data.decode("utf-8", errors="replace")
        except UnicodeDecodeError as error:
            raise ResultsError(
                f"{self.path} is not a results table",
                expected="UTF-8 text",
                received=str(error),
                remedy="give another output; nothing was changed",
            ) from error

    def _bytes(self) -> bytes:
        os.lseek(self._fd, 0, os.SEEK_SET)
        chunks = []
        while chunk := os.read(self._fd, 1 << 24):
            chunks.append(chunk)
        return b"".join(chunks)

    def _cut_torn_line(self) -> None:
        try:
            data = self._bytes()
            if not data.endswith(b"\n"):
                os.ftruncate(self._fd, data.rfind(b"\n") + 1)
        except OSError:
            pass  # opening the table again cuts it


def _refused(path: Path, error: OSError) -> ResultsError:
    return ResultsError(
        f"Cannot write to {path}",
        expected="room on the disk and permission to write",
        received=str(error),
        remedy="make room and run the same command again: it goes on after the last whole row",
    )


def _forget_in_child() -> None:
    # a forked child must not keep a killed parent's lock alive
    for writer in list(_open_writers):
        writer._abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
