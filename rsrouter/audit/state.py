"""An audit under construction: its settings, its checks and findings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rsrouter._version import __version__
from rsrouter.audit.report import FAILED, PASSED, SKIPPED, Check, Finding
from rsrouter.sampling.execution import device_name, instructions, resolve_device


@dataclass(frozen=True)
class Settings:
    """Arguments of `rsrouter.audit.audit`, with its seed drawn."""

    rows: int | None
    fresh_votes: int
    attack_steps: int
    predict_votes: int
    level: float
    seed: int
    device: str | None


class State:
    """Checks and findings under construction."""

    def __init__(self, settings: Settings, progress: Callable[[str, int, int], None] | None) -> None:
        self.settings, self.progress = settings, progress
        self.checks: list[Check] = []
        self.findings: list[Finding] = []
        self.caveats: list[str] = []

    def add(self, name: str, table: str, found: Sequence[tuple[int | None, str]], summary: str, **details: Any) -> None:
        """One finished check; it failed where something was found."""
        self.checks.append(Check(name, table, FAILED if found else PASSED, summary, details))
        self.findings += [Finding(name, table, idx, text) for idx, text in found]

    def skip(self, name: str, table: str, why: str) -> None:
        """A check that could not be made."""
        self.checks.append(Check(name, table, SKIPPED, why))

    def tell(self, what: str, at: int, of: int) -> None:
        if self.progress is not None:
            self.progress(what, at, of)

    def warn(self, table: str, text: str) -> None:
        """What a reader must know before everything else."""
        self.caveats.append(f"{table}: {text}" if table else text)


def environment(device: str | None) -> dict[str, Any]:
    """What decides bits where the audit runs."""
    where = resolve_device(device)
    return {
        "device": device_name(where),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "instructions": instructions(where),
        "rsrouter": __version__,
    }
