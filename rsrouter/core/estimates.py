"""Votes of one stage turned into the bounds that the certificate reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from rsrouter.core.bounds import AlphaSplit, Array, binom_lower, binom_upper, sequence_lower, sequence_upper
from rsrouter.core.errors import PlanError
from rsrouter.core.passes import check_logits
from rsrouter.core.requests import PASS, VoteRequest
from rsrouter.core.tree import STAGE_TARGET, Stage, Tree
from rsrouter.core.types import ABSTAIN, SIDES

Counts = NDArray[np.int64]
Bound = Callable[[ArrayLike, ArrayLike, ArrayLike], Array]

#: Bound families: lower and upper bound of a binomial proportion.
FAMILIES: dict[str, tuple[Bound, Bound]] = {
    "clopper-pearson": (binom_lower, binom_upper),
    "mixture": (sequence_lower, sequence_upper),
}


@dataclass(frozen=True)
class StageBounds:
    """`(N, L)` lower and upper bounds on one stage's outcome probabilities."""

    lower: Array
    upper: Array


def check_sides(sides: str) -> None:
    """Raises PlanError unless `sides` is `"one"` or `"two"`."""
    if sides not in SIDES:
        raise PlanError("Unknown sidedness", expected="'one' or 'two'", received=repr(sides), remedy="choose before sampling")


def check_rows(stage: Stage, counts: Counts, n: NDArray[np.int64]) -> None:
    """Raises PlanError unless `counts (N, L)` are non-negative and every row sums to its `n`."""
    if counts.ndim != 2 or counts.shape[1] != stage.num_outcomes or counts.shape[0] != n.shape[0]:
        raise PlanError(
            f"Counts of stage {stage.name!r} have the wrong shape",
            expected=f"({n.shape[0]}, {stage.num_outcomes})",
            received=str(counts.shape),
            remedy="one column per vote outcome, invalid votes included",
        )
    if counts.dtype.kind not in "iu":
        raise PlanError(
            f"Counts of stage {stage.name!r} are not integers",
            expected="an integer array",
            received=str(counts.dtype),
            remedy="count votes",
        )
    if np.any(counts < 0) or np.any(counts.sum(1) != n):
        raise PlanError(
            f"Counts of stage {stage.name!r} do not sum to their look",
            expected=f"rows summing to {n[:3].tolist()}...",
            received=f"{counts.sum(1)[:3].tolist()}...",
            remedy="count every vote, invalid ones included",
        )


def stage_bounds(
    stage: Stage,
    counts: Counts,
    n: NDArray[np.int64],
    reference: NDArray[np.int64],
    c: NDArray[np.int64],
    level: Array,
    *,
    sides: str,
    lower_share: float,
    bounders: tuple[Bound, Bound] = FAMILIES["clopper-pearson"],
) -> StageBounds:
    """Bounds at failure probability `level (N,)`, by `bounders` (lower, upper); see `Plan.bounds` for the rest.

    A plurality stage, two-sided: `lower_share` of the level for the reference's lower bound, the rest for the
    upper bound of whichever *one* outcome the proof's path leaves by. One-sided: all of it for the lower bound,
    and every other outcome is at most one minus it. A threshold stage: all of the level for each bound, for the
    path leaves either by deferring (lower bound) or by one class (upper bound), never by both.

    Votes that answer ABSTAIN (invalid ones) count for every rival as well: an undecided draw of sound noise might
    have gone to any of them, and a larger count only loosens an upper bound.
    """
    lower_of, upper_of = bounders
    rows = np.arange(len(n))
    plurality = stage.kind == "plurality"
    # a threshold stage's outcomes are bounded from above by their own votes whatever the sides: it has no other bound
    both = sides == "two" or stage.kind == "threshold"
    lower_level = level * lower_share if plurality and both else level
    upper_level = level * (1.0 - lower_share) if plurality else level
    chosen, known = np.maximum(reference, 0), reference >= 0
    low = np.where(known, lower_of(counts[rows, chosen], n, lower_level), 0.0)
    lower, upper = np.zeros(counts.shape), np.ones(counts.shape)
    lower[rows, chosen] = low
    if both:
        answers = stage.answers[: stage.num_outcomes]
        rival = (answers[None, :] != c[:, None]) & (answers[None, :] != STAGE_TARGET)
        if plurality:
            rival[rows, chosen] &= ~known
        void = counts[:, answers == ABSTAIN].sum(1)
        if rival.any():
            # one bound for all of them: it grows with the count, so the most voted rival's holds for each
            most = np.where(rival & (answers != ABSTAIN)[None, :], counts, 0).max(1)
            shared = upper_of(np.minimum(most + void, n), n, upper_level)
            upper = np.where(rival, shared[:, None], upper)
        for column in np.flatnonzero(answers == STAGE_TARGET):
            upper[:, column] = upper_of(np.minimum(counts[:, column] + void, n), n, upper_level)
    if plurality:
        upper = np.minimum(upper, np.where(known, 1.0 - low, 1.0)[:, None])
        upper[rows, chosen] = np.where(known, 1.0, upper[rows, chosen])
    return StageBounds(lower, upper)


def hoped_counts(
    stage: Stage,
    counts: Counts,
    drawn: NDArray[np.int64],
    total: int,
    reference: NDArray[np.int64],
    c: NDArray[np.int64],
    beta: float,
) -> Counts:
    """Counts at `total` votes that are still plausible: the reference high, every other outcome low.

    One-sided prediction limits at level `beta`: the count at `total` given the votes so far is beta-binomial (flat
    prior), here by its mean and standard deviation. Rows need not sum to `total`: each column is only read for
    itself. Used to decide what to draw next, never for what is reported.
    """
    rows = np.arange(len(drawn))
    left = total - drawn
    some = np.maximum(drawn, 1)
    seen = np.where(drawn[:, None] > 0, counts, 0)
    chosen = np.maximum(reference, 0)
    z = -float(ndtri(beta))

    def predicted(count: NDArray[np.int64], sign: float) -> NDArray[np.int64]:
        share = (count + 1.0) / (some + 2.0)
        spread = np.sqrt(left * share * (1.0 - share) * (total / some))
        more = np.where(drawn > 0, np.rint(left * share + sign * z * spread), left if sign > 0 else 0)
        return np.asarray(count + np.clip(more, 0, left).astype(np.int64))

    future = seen.copy()
    answers = stage.answers[: stage.num_outcomes]
    rival = (answers[None, :] != c[:, None]) & (answers[None, :] != STAGE_TARGET)
    if stage.kind == "plurality":
        rival[rows, chosen] = False
    if rival.any():
        # only the most voted rival counts in `stage_bounds`
        most = np.where(rival, seen, 0).argmax(1)
        future[rows, most] = predicted(seen[rows, most], -1.0)
    for column in np.flatnonzero(answers == STAGE_TARGET):
        future[:, column] = predicted(seen[:, column], -1.0)
    future[rows, chosen] = predicted(seen[rows, chosen], 1.0)
    return np.asarray(np.clip(future, 0, total))


def group_votes(
    requests: Sequence[VoteRequest], counts: Sequence[Mapping[str, NDArray[Any]]], stages: Mapping[str, Sequence[Stage]]
) -> dict[tuple[str, str], tuple[list[VoteRequest], dict[str, NDArray[Any]]]]:
    """Requests by (purpose, network), with `(R, L)` votes (of a pass: `(R, k)` logits) of every stage on it, checked.

    Raises:
        PlanError: a request without votes, one answered twice, a stage missing, or votes that do not sum to the request.
    """
    if len(requests) != len(counts):
        raise PlanError(
            "Requests and votes do not pair up",
            expected=f"{len(requests)} answers",
            received=str(len(counts)),
            remedy="answer every request once",
        )
    members: dict[tuple[str, str], list[int]] = {}
    for position, request in enumerate(requests):
        members.setdefault((request.purpose, request.network), []).append(position)
    grouped = {}
    for (purpose, network), positions in members.items():
        asked = [requests[p] for p in positions]
        if network not in stages or len({request.image for request in asked}) != len(asked):
            raise PlanError(
                f"Votes of network {network!r} answer no open request",
                expected=f"one of {sorted(stages)}, once an image",
                received=f"{len(asked)} answers",
                remedy="answer every request once",
            )
        totals = np.array([request.count for request in asked])
        votes: dict[str, NDArray[Any]] = {}
        for stage in stages[network]:
            try:
                matrix = np.array([counts[p][stage.name] for p in positions])
            except (KeyError, ValueError) as error:
                raise PlanError(
                    f"Votes of stage {stage.name!r} are missing or ragged",
                    expected=f"{stage.num_outcomes} counts each",
                    received=str(error),
                    remedy="answer every stage on the request's network",
                ) from error
            if purpose == PASS:
                votes[stage.name] = check_logits(stage, matrix)
                continue
            check_rows(stage, matrix, totals)
            votes[stage.name] = matrix.astype(np.int64)
        grouped[purpose, network] = asked, votes
    return grouped


def check_split(tree: Tree, split: AlphaSplit) -> None:
    """Raises PlanError unless `split` was made for `tree` and stays within its total on every path."""
    if {name for name, stage in tree.stages.items() if stage.votes} - set(split.stages) or set(split.paths) != set(tree.paths):
        raise PlanError(
            "The alpha split belongs to another tree",
            expected=f"paths {tree.paths}",
            received=f"paths {split.paths}",
            remedy="AlphaSplit.even(alpha, tree.paths)",
        )
    split.__post_init__()  # a mapping can be changed after it was checked
