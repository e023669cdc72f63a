"""Patience on the votes of a table: what is read, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rsrouter import AdaptivePlan, ExpertPool, FixedPlan, Terms
from rsrouter.core.errors import IntegrityError, ResultsError
from rsrouter.jobs import certify_table
from rsrouter.results import Table, table_patience
from tests.helpers import small_router as small

PLAN = AdaptivePlan(2000, (0.0, 0.25, 0.5), 50)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    router = small.routed(ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)]))
    return certify_table(router, small.images(12), tmp_path_factory.mktemp("t") / "t.tsv", Terms(PLAN), threads=1)


def test_the_default_level_draws_about_what_the_table_drew(table: Table) -> None:
    patient, impatient = table_patience(table, levels=(0.01, 0.5))
    assert impatient.votes < patient.votes
    assert patient.votes == pytest.approx(table.n_drawn.mean(), rel=0.35)
    assert 0 < patient.share < 1


def test_a_fixed_table_needs_a_grid(tmp_path: Path) -> None:
    router = small.routed(ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)]))
    fixed = certify_table(router, small.images(3), tmp_path / "f.tsv", Terms(FixedPlan(50, 500)), threads=1)
    with pytest.raises(ResultsError, match="fixed plan"):
        table_patience(fixed)
    assert table_patience(fixed, levels=(0.1,), radii=(0.0, 0.25, 99.0))[0].beta == 0.1  # beyond reach: left out


def test_tables_that_cannot_be_read(table: Table) -> None:
    with pytest.raises(ResultsError, match="empty"):
        table_patience(table.take(np.zeros(0, np.int64)))
    with pytest.raises(ResultsError, match="does not say"):
        table_patience(replace(table, metadata={}))
    with pytest.raises(IntegrityError):
        table_patience(replace(table, radius=table.radius + 1.0))
