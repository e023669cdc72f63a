"""The finished units of a long training, kept so that a killed one resumes where it stopped and ends at the same bits.

The functions that do the long work (`label_votes`, `noisy_features`, `train_head`, `train_flat`) take a `ResumeStore`. Every unit
is filed under a key of everything that decides its result.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rsrouter.core.errors import ResultsError
from rsrouter.files import write_atomically


def unit_key(*parts: object) -> str:
    """A file name that stands for `parts` (bytes as they are, anything else as its `repr`).

    >>> unit_key("votes", 0.25) == unit_key("votes", 0.25) != unit_key("votes", 0.5)
    True
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside the `with` block a refusal of the disk is a ResultsError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ResultsError(
            f"Cannot write {path}",
            expected="room on the disk and permission to write",
            received=str(error),
            remedy="make room and run the same command again: it resumes where it stopped",
        ) from error


class ResumeStore:
    """Finished units of one training.

    Args:
        folder: where they are kept; None: in memory, small ones only.
        every: seconds between two states of a loop that saves as it goes.

    >>> store = ResumeStore()
    >>> store.put("a", [1, 2], small=True)
    >>> store.get("a"), store.get("b")
    ([1, 2], None)
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, every: float = 10.0) -> None:
        self.folder, self.every = None if folder is None else Path(folder), every
        self._memory: dict[str, Any] = {}
        self._saved: dict[str, float] = {}

    def get(self, key: str) -> Any:
        """What was put under `key`; None where nothing was.

        Raises:
            ResultsError: a file that cannot be read.
        """
        if self.folder is None:
            return self._memory.get(key)
        path = self.folder / f"{key}.pt"
        if not path.exists():
            return None
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:  # torch raises many kinds; whichever it is, the file is not what was written
            raise ResultsError(
                "The state of an unfinished training cannot be read",
                expected="a file that this training wrote",
                received=f"{path}: {type(error).__name__}",
                remedy=f"remove {self.folder} and train again",
            ) from error

    def put(self, key: str, value: Any, *, small: bool = False) -> None:
        """Keeps `value` (tensors, numbers, text and containers of them); without a folder only where it is `small`.

        Raises:
            ResultsError: the disk refuses.
        """
        if self.folder is None:
            if small:
                self._memory[key] = value
            return
        path, buffer = self.folder / f"{key}.pt", io.BytesIO()
        torch.save(value, buffer)
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getvalue())
        self._saved[key] = time.monotonic()

    def due(self, key: str) -> bool:
        """Whether a loop's state is worth writing again: there is a folder, and the last one is `every` seconds old."""
        return self.folder is not None and time.monotonic() - self._saved.setdefault(key, time.monotonic()) >= self.every

    def clear(self) -> None:
        """Forgets everything: the training is finished."""
        self._memory.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
