"""The audit's own statistics: what it says it would detect, it detects; what is honest, it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats

from rsrouter.audit.votes import FreshRow, pooled_p_value, repeated_rows, smallest_inflation, smallest_inflation_seen

LEVEL = 1e-3


def row(stored: int, n: int, fresh: int, m: int) -> FreshRow:
    return FreshRow(1.0, 9.0, (stored / n, fresh / m), (n, m), 0.0)


@pytest.mark.parametrize(("share", "n", "m"), [(0.6, 1000, 1000), (0.9, 10_000, 2000), (0.99, 10_000, 2000)])
def test_one_row_at_the_smallest_detectable_inflation(share: float, n: int, m: int) -> None:
    rng = np.random.default_rng(0)
    inflation = smallest_inflation([share], [n], [m], LEVEL)
    true = special.ndtr(special.ndtri(share) / (1 + inflation))
    fresh = rng.binomial(m, true, 300)
    stored = rng.binomial(n, share, 300)
    p = [stats.fisher_exact([[a, n - a], [b, m - b]], alternative="greater").pvalue for a, b in zip(stored, fresh, strict=True)]
    seen = int(np.sum(np.array(p) < LEVEL))
    # stated 95% (a normal approximation); a rate below 85% would be refuted here
    assert stats.binomtest(seen, 300, 0.85, alternative="less").pvalue > 1e-3
    assert seen / 300 > 0.85


def test_many_rows_show_less_and_honest_rows_nothing() -> None:
    rng = np.random.default_rng(1)
    shares = rng.uniform(0.6, 0.95, 40)
    inflation = smallest_inflation(shares, [5000] * 40, [2000] * 40, LEVEL)
    assert inflation < 0.3 * smallest_inflation([0.8], [5000], [2000], LEVEL)
    true = special.ndtr(special.ndtri(shares) / (1 + inflation))
    seen = honest = 0
    for _ in range(300):
        stored = rng.binomial(5000, shares)
        seen += pooled_p_value([row(a, 5000, b, 2000) for a, b in zip(stored, rng.binomial(2000, true), strict=True)]) < LEVEL
        honest += pooled_p_value([row(a, 5000, b, 2000) for a, b in zip(stored, rng.binomial(2000, shares), strict=True)]) < LEVEL
    assert seen > 0.9 * 300
    assert honest <= 3


def test_any_of_several_rows() -> None:
    rows = [row(800, 1000, 800, 1000)] * 10
    alone = smallest_inflation([0.8], [1000], [1000], LEVEL)
    assert 0 < smallest_inflation_seen(rows, LEVEL) < alone
    assert smallest_inflation_seen([row(1, 2, 1, 2)], LEVEL) == float("inf")


def test_votes_that_repeat() -> None:
    rng = np.random.default_rng(2)
    wide = [(i, {"estimate": {"s": tuple(rng.multinomial(10_000, [0.4, 0.3, 0.2, 0.1]).tolist())}}) for i in range(30)]
    assert repeated_rows(wide) == []
    assert repeated_rows([*wide, (99, wide[3][1])]) == [(3, 99)]
    # unanimous rows agree by nature
    assert repeated_rows([(i, {"estimate": {"s": (10_000, 0, 0)}}) for i in range(30)]) == []
