"""The greedy choice of a pool: objective, monotonicity, submodularity, and the (1 - 1/e) bound against brute force."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rsrouter.core.errors import InputError
from rsrouter.experts import select_experts

GRID = (0.0, 0.25, 0.5, 1.0)
TABLES = arrays(
    np.float64, st.tuples(st.integers(1, 8), st.integers(2, 6)), elements=st.sampled_from([-1.0, 0.0, 0.1, 0.25, 0.4, 0.5, 1.2])
)


def objective(table: np.ndarray, columns: tuple[int, ...], grid: tuple[float, ...] = GRID) -> float:
    """Certified accuracy of the oracle, averaged over the radii; counted one image and radius at a time."""
    hits = 0
    for row in table:
        best = max((row[j] for j in columns), default=-1.0)
        hits += sum(best > 0 and best >= r for r in grid)
    return hits / (len(table) * len(grid))


@given(TABLES, st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_against_brute_force(table: np.ndarray, k: int) -> None:
    k = min(k, table.shape[1])
    found = select_experts(table, k, GRID)
    assert len(set(found.chosen)) == k
    for j in range(k):
        assert found.values[j] == pytest.approx(objective(table, found.chosen[: j + 1]))
    best = max(objective(table, c) for c in combinations(range(table.shape[1]), k))
    assert found.values[-1] >= (1 - (1 - 1 / k) ** k) * best - 1e-12
    assert best - 1e-9 <= found.bound <= found.values[-1] / (1 - 1 / math.e) + 1e-9
    assert sum(found.curve) / len(GRID) == pytest.approx(found.values[-1])
    assert all(a <= b + 1e-12 for a, b in zip(found.curve, found.curve_all, strict=True))


@given(TABLES, st.data())
@settings(max_examples=150, deadline=None)
def test_objective_is_monotone_and_submodular(table: np.ndarray, data: st.DataObject) -> None:
    m = table.shape[1]
    new = data.draw(st.integers(0, m - 1))
    large = tuple(data.draw(st.sets(st.sampled_from([j for j in range(m) if j != new]))))
    small = tuple(j for j in large if data.draw(st.booleans()))
    gain_small = objective(table, (*small, new)) - objective(table, small)
    gain_large = objective(table, (*large, new)) - objective(table, large)
    assert gain_large >= -1e-12
    assert gain_small >= gain_large - 1e-12


def test_complementary_experts_beat_the_best_single_ones() -> None:
    # candidates 0 and 1 hold the same images; 2 is weaker alone but holds the rest
    table = np.array([[1, 1, 0], [1, 1, 0], [1, 0.9, 0], [0, 0, 1], [0, 0, 1]], dtype=float)
    found = select_experts(table, 2, [0.5], names=["a", "b", "c"])
    assert found.names == ("a", "c")
    assert found.values == (0.6, 1.0)
    assert found.curve == (1.0,)


def test_weights_of_radii_decide() -> None:
    table = np.array([[0.3, 1.1], [0.3, 0.0], [0.3, 0.0]])
    assert select_experts(table, 1, [0.25, 1.0]).chosen == (0,)
    assert select_experts(table, 1, [0.25, 1.0], weights=[0.1, 10]).chosen == (1,)


def test_wrong_images_count_for_nothing_at_radius_zero() -> None:
    assert select_experts([[0.0, -1.0, 1e-9]], 1, [0.0]).chosen == (2,)
    assert select_experts([[0.0, -1.0]], 2, [0.0]).values[-1] == 0.0


@pytest.mark.parametrize(
    ("table", "k", "grid", "extra"),
    [
        ([[1.0]], 0, [0.5], {}),
        ([[1.0]], 2, [0.5], {}),
        ([[1.0]], True, [0.5], {}),
        ([1.0], 1, [0.5], {}),
        ([[math.nan]], 1, [0.5], {}),
        ([[1.0]], 1, [], {}),
        ([[1.0]], 1, [-0.5], {}),
        ([[1.0]], 1, [math.nan], {}),
        ([[1.0]], 1, [0.5], {"weights": [0.0]}),
        ([[1.0]], 1, [0.5], {"weights": [1.0, 1.0]}),
        ([[1.0]], 1, [0.5], {"names": ["a", "b"]}),
        (np.zeros((0, 2)), 1, [0.5], {}),
    ],
)
def test_bad_input(table: object, k: int, grid: list[float], extra: dict[str, object]) -> None:
    with pytest.raises(InputError):
        select_experts(table, k, grid, **extra)  # type: ignore[arg-type]
