"""What verbs over whole data sets print."""

from __future__ import annotations

from math import nan

from rsrouter.cli.jobs import show_patience
from rsrouter.core.patience import PatienceCost


def test_patience_where_nothing_is_certified_keeps_no_radius(capsys):
    show_patience([PatienceCost(0.1, 500.0, 0.05, None, 0.0, 0.0, nan), PatienceCost(0.5, 200.0, 0.02, 0.01, 0.0, 0.0, 0.5)], "x")
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.split()[-1] == "-"
    assert second.split()[-1] == "0.500"
