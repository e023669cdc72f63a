"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.hub_server import HubServer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on loopback; the huggingface_hub client of this process talks to it, with an empty cache."""
    with HubServer(tmp_path / "hub") as server:
        server.attach(monkeypatch)
        yield server
