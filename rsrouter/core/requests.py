"""Vote requests: what a policy asks of an engine, and the checks on what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.errors import PlanError
from rsrouter.core.estimates import check_rows
from rsrouter.core.tree import Stage, Tree

#: Purposes: selection votes choose, estimation votes bound, prediction votes answer a query.
SELECT, ESTIMATE, PREDICT = "select", "estimate", "predict"


@dataclass(frozen=True, slots=True)
class VoteRequest:
    """Votes `start` to `start + count` of one network's stream on one image.

    Attributes:
        image: position of the image in the call.
        network: name of the network to run.
        purpose: which stream: select, estimate, predict, label, train, tune, audit.
        start: index of the first vote in the stream.
        count: how many votes.
    """

    image: int
    network: str
    purpose: str
    start: int
    count: int


def descend(tree: Tree, name: str, counts: NDArray[np.int64]) -> int:
    """Index into `leads_to` of the target that the votes `counts (L,)` choose; ties go to the lower index."""
    stage = tree.stages[name]
    top = int(counts.argmax())
    if stage.tau is not None and not counts[top] >= stage.tau * counts.sum():
        return len(stage.leads_to) - 1
    return top


def group_votes(
    requests: Sequence[VoteRequest], counts: Sequence[Mapping[str, NDArray[np.int64]]], stages: Mapping[str, Sequence[Stage]]
) -> dict[tuple[str, str], tuple[list[VoteRequest], dict[str, NDArray[np.int64]]]]:
    """Requests by (purpose, network), with `(R, L)` votes of every stage on it, checked.

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
        votes = {}
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
            check_rows(stage, matrix, totals)
            votes[stage.name] = matrix.astype(np.int64)
        grouped[purpose, network] = asked, votes
    return grouped


def check_split(tree: Tree, split: AlphaSplit) -> None:
    """Raises PlanError unless `split` was made for `tree` and stays within its total on every path."""
    if set(tree.stages) - set(split.stages) or set(split.paths) != set(tree.paths):
        raise PlanError(
            "The alpha split belongs to another tree",
            expected=f"paths {tree.paths}",
            received=f"paths {split.paths}",
            remedy="AlphaSplit.even(alpha, tree.paths)",
        )
    split.__post_init__()  # a mapping can be changed after it was checked


def stages_by_network(tree: Tree) -> dict[str, tuple[Stage, ...]]:
    """The stages that each network's votes serve; refuses different sigmas on one network."""
    stages = {g: tuple(tree.stages[s] for s in tree.order if tree.stages[s].network == g) for g in tree.networks}
    for network, members in stages.items():
        if len({stage.sigma for stage in members}) != 1:
            raise PlanError(
                f"Stages on network {network!r} have different sigmas",
                expected="one sigma per network",
                received=str({stage.name: stage.sigma for stage in members}),
                remedy="give them networks of their own",
            )
    return stages
