"""Greedy choice of the K experts to route between, from labels of many candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsrouter.core.errors import InputError
from rsrouter.results import Table, align


@dataclass(frozen=True)
class Selection:
    """A pool chosen greedily.

    Attributes:
        chosen: columns, in the order of choice.
        names: of the chosen candidates.
        values: objective after each choice.
        grid: the radii.
        curve: share of images an oracle router over the chosen experts certifies at each radius.
        curve_all: the same with every candidate.
        bound: no K candidates reach more than this (computed from the data, never looser than value / (1 - 1/e)).
    """

    chosen: tuple[int, ...]
    names: tuple[str, ...]
    values: tuple[float, ...]
    grid: tuple[float, ...]
    curve: tuple[float, ...]
    curve_all: tuple[float, ...]
    bound: float


def held_radii(tables: Sequence[Table], *, common: bool = False) -> NDArray[np.float64]:
    """`(N, M)` radii within which each table's classifier holds the true class: what `select_experts` takes.

    Args:
        tables: one per candidate, over the same images.
        common: keep only the images that every table holds, instead of refusing tables over different ones.

    Raises:
        InputError: tables over different images, that disagree about a label, or without labels.
    """
    aligned = align(tables, common=common)
    if unknown := [t.name for t in aligned if not t.labelled]:
        raise InputError(
            "Choosing experts needs the true classes",
            expected="tables with labels",
            received=f"images without a label in {', '.join(unknown[:5])}",
            remedy="certify labelled images",
        )
    return np.stack([np.where(t.correct == 1, t.radius, 0.0) for t in aligned], axis=1)


def select_experts(
    radii: ArrayLike,
    k: int,
    grid: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
) -> Selection:
    """K of M candidate experts (checkpoints x sigmas) that certify most over the user's radii, if routed perfectly.

    The objective is what an oracle router certifies: F(S) = mean over images i of sum_r w_r [max_{m in S} R_im >= r]. An
    image is worth u_i(R) = sum_r w_r [R >= r], nondecreasing in its radius, so max and u_i commute and
    F(S) = mean_i max_{m in S} u_i(R_im): a facility-location function with nonnegative values. It is monotone, since the
    maximum over more experts is no smaller, and submodular: adding m gains max(0, u_im - max_{S} u_i) on image i, which
    can only shrink as S grows. Hence greedy choice reaches at least 1 - (1 - 1/K)^K >= 1 - 1/e (63%) of the best K
    experts (Nemhauser, Wolsey and Fisher 1978); `bound` says how much could be missing here. F(S) is what routing could
    reach, not what a router does reach: choose on labels of training images, never on certified ones.

    Args:
        radii: `(N, M)`, the radius within which candidate m holds the true class of image i; 0 (or ABSTAIN) where it
            is wrong. A candidate counts at radius 0 only where its radius is above 0.
        k: how many to choose.
        grid: radii that count, in [0,1]-pixel units.
        weights: of the radii, nonnegative; default equal. They are scaled to sum 1.
        names: of the candidates.

    Raises:
        InputError: shapes, radii, weights or k that cannot work.
    """
    table = np.asarray(radii, dtype=np.float64)
    if table.ndim != 2 or 0 in table.shape or np.isnan(table).any():
        raise InputError(
            "Radii do not fit",
            expected="(images, candidates), no NaN",
            received=f"shape {table.shape}",
            remedy="one row per image, one column per candidate",
        )
    n, m = table.shape
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= m:
        raise InputError("The number of experts does not fit", expected=f"1 to {m}", received=repr(k), remedy="choose fewer")
    points = np.asarray(grid, dtype=np.float64)
    share = np.ones(len(points)) if weights is None else np.asarray(weights, dtype=np.float64)
    if (
        points.ndim != 1
        or not len(points)
        or not (points >= 0).all()
        or share.shape != points.shape
        or not (share >= 0).all()
        or not 0 < share.sum() < np.inf
    ):
        raise InputError(
            "Radii or weights do not fit",
            expected="radii >= 0 and as many weights >= 0",
            received=f"{grid}, {weights}",
            remedy="--radii 0,0.25,0.5",
        )
    labels = tuple(names) if names is not None else tuple(str(j) for j in range(m))
    if len(labels) != m:
        raise InputError(
            "Names do not fit the candidates", expected=f"{m} names", received=str(labels), remedy="name every column"
        )
    share = share / share.sum()
    held: NDArray[np.float64] = np.where(table > 0, table, -1.0)
    worth = (held[:, :, None] >= points).astype(np.float64) @ share  # (N, M)

    best = np.zeros(n)
    chosen: list[int] = []
    values: list[float] = []
    bound = float(worth.max(axis=1).mean())
    for _ in range(k):
        gains = np.maximum(worth - best[:, None], 0.0).mean(axis=0)
        # any K experts add at most the K largest single gains to what is chosen already
        bound = min(bound, float(best.mean() + np.sort(gains)[::-1][:k].sum()))
        gains[chosen] = -1.0
        pick = int(gains.argmax())
        chosen.append(pick)
        best = np.maximum(best, worth[:, pick])
        values.append(float(best.mean()))

    def curve(columns: Sequence[int]) -> tuple[float, ...]:
        top = held[:, columns].max(axis=1)
        return tuple(float((top >= r).mean()) for r in points)

    return Selection(
        tuple(chosen),
        tuple(labels[j] for j in chosen),
        tuple(values),
        tuple(float(r) for r in points),
        curve(chosen),
        curve(range(m)),
        max(bound, values[-1]),
    )
