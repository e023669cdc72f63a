"""Drawing the curve and starting a process that loads the router take most of a publication's time: most tests do without."""

from __future__ import annotations

import pytest


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
