"""Drawing the curve takes half of a publication's time: most tests publish a stand-in."""

from __future__ import annotations

import pytest


@pytest.fixture
def real_figure() -> None:
    """Ask for it to have the curve drawn."""


@pytest.fixture(autouse=True)
def _stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_figure" not in request.fixturenames:
        monkeypatch.setattr("rsrouter.report.charts.curve_file", lambda *_: b"<svg xmlns='http://www.w3.org/2000/svg'/>")
