"""A router that cannot be read here was not audited: that accuses nobody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rsrouter.audit import audit


@pytest.mark.parametrize("what", ["newer schema", "torn weights"])
def test_what_cannot_be_read_is_not_called_false(run: Path, what: str) -> None:
    config, weights = next(run.rglob("router/config.json")), next(run.rglob("router/router.safetensors"))
    if what == "newer schema":
        config.write_text(json.dumps({**json.loads(config.read_text()), "schema_version": 99}))
    else:
        weights.write_bytes(weights.read_bytes()[:20])
    report = audit(run, rows=1)
    assert report.exit_status == 2
    assert report.findings == ()
    (check,) = [c for c in report.checks if c.name == "weights"]
    assert (check.status, "could not be audited" in check.summary) == ("skipped", True)
    assert any("cannot be read here" in caveat for caveat in report.caveats)
