"""What a long training run has finished, kept so that a killed run goes on where it stopped and ends at the same bits.

The functions that do the long work (`label_votes`, `noisy_features`, `train_head`, `train_flat`) ask `current()` for the run they
belong to; outside of one they keep nothing. Every unit is filed under a key of everything that decides its result.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from rsrouter.core.errors import ResultsError


def unit_key(*parts: object) -> str:
    """A file name that stands for `parts` (bytes as they are, anything else as its `repr`)."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


class Checkpoint:
    """Finished units of one training run.

    Args:
        folder: where they are kept; None: in memory, small ones only, for as long as the run lasts.
        every: seconds between two states of a loop that saves as it goes.
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
        """Keeps `value` (tensors, numbers, text and containers of them); without a folder only where it is `small`."""
        if self.folder is None:
            if small:
                self._memory[key] = value
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{key}.{os.getpid()}"
        torch.save(value, temporary)
        os.replace(temporary, self.folder / f"{key}.pt")
        self._saved[key] = time.monotonic()

    def due(self, key: str) -> bool:
        """Whether a loop's state is worth writing again: there is a folder, and the last one is `every` seconds old."""
        return self.folder is not None and time.monotonic() - self._saved.setdefault(key, time.monotonic()) >= self.every

    def clear(self) -> None:
        """Forgets everything: the run is finished."""
        self._memory.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


_CURRENT: ContextVar[Checkpoint | None] = ContextVar("rsrouter_checkpoint", default=None)


def current() -> Checkpoint:
    """The checkpoint of the run that is under way; one that keeps nothing where there is none."""
    return _CURRENT.get() or Checkpoint()


@contextmanager
def resuming(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """Work inside the `with` block belongs to `checkpoint`."""
    token = _CURRENT.set(checkpoint)
    try:
        yield checkpoint
    finally:
        _CURRENT.reset(token)
