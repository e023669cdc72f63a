"""Drawing the curve and starting a process that loads the router take most of a publication's time: most tests do without."""

from __future__ import annotations

import json
import subprocess

import pytest

from rsrouter.publish import anew


@pytest.fixture
def this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process says what a fresh one would print: its start takes seconds, and other tests make one."""

    def here(command: list[str], *, input: str, **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, json.dumps(anew.answer(json.loads(input))), "")

    monkeypatch.setattr("rsrouter.publish.anew.subprocess.run", here)


@pytest.fixture
def real_figure() -> None:
    """Ask for it to have the curve drawn."""


@pytest.fixture
def real_load() -> None:
    """Ask for it to have the router loaded by a fresh process before it is published."""


@pytest.fixture(autouse=True)
def _stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_figure" not in request.fixturenames:
        monkeypatch.setattr("rsrouter.report.charts.curve_file", lambda *_: b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    if "real_load" not in request.fixturenames:
        monkeypatch.setattr("rsrouter.publish.commit.load_anew", lambda *_, **__: None)
        request.getfixturevalue("small_batches")  # of which a fresh process knows nothing
