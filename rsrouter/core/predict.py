"""PREDICT for a routed classifier: its answer at one input, or ABSTAIN.

Every stage that is asked gets a *confidence set* of outcomes: one that misses the stage's true winner with
probability at most the stage's alpha. From the sets follow the answers that are still possible,

    P_j = union over outcomes l in the set of stage j of ({c} if l answers c, P_i if l leads to stage i),

a stage that was not asked keeping all of its outcomes. Where P_root has one element, that is the answer; so
outcomes that lead to one answer need no test between them. Otherwise the policy abstains.

Theorem. `answer` differs from both g(x) and ABSTAIN with probability at most the maximum over root-to-leaf
paths of the sum of the stages' alphas, for each query by itself, over noise drawn independently of x.
Proof. g walks one path, fixed by x. If no stage on it loses its true winner, then g(x) is in P_root, by
induction from the leaf. Which stages are asked may depend on anything: one that is not asked loses nothing.

Two rules give the sets; which one a stage uses is fixed by the shape of the tree, before any vote.

*Plurality, every outcome an answer of its own* (a classifier): the set is the top outcome alone if the two-sided
binomial test between it and the runner-up, `2 P(Bin(n_1 + n_2, 1/2) >= n_1) <= alpha`, rejects, else
everything (Cohen et al. 2019, PREDICT). It needs no correction for the number of outcomes (Hung and Fithian
2019, "Rank verification for exponential families"). Proof for a multinomial. Let w be the true winner, and let
D_m be the event that m has most votes, ties broken by independent uniform marks, so that the P(D_m) sum to 1. It
suffices that for each m != w the test rejects with probability at most alpha given D_m, s = n_m + n_w and all
other counts; let M be the largest of those. Given s, n_m ~ Bin(s, q) with q <= 1/2, conditioned on an upper
set of (n_m, marks); the tail grows with q, so take q = 1/2. For fixed (s, M) the test rejects on {n_m >= x},
where x > M, x > s/2 and `2 P(Bin(s', 1/2) >= x) <= alpha` with s' = x + max(M, s - x) >= s.
If M < s/2: a tie at the top can only be with w, so P(D_m | s, M) = 1/2 by symmetry, and the conditional
probability is `2 P(Bin(s) >= x) <= 2 P(Bin(s') >= x) <= alpha`. If M >= s/2: P(D_m | s, M) >= P(Bin(s) > M), and
`P(Bin(s) >= x) / P(Bin(s) > M)` is not larger with s' = x + M > s in the place of s (binomials are ordered by likelihood
ratio in s), where the denominator is at least 1/2 because s' >= 2 M + 1: again at most alpha.

*Any other plurality stage* (a router, or outcomes that share an answer): outcome l leaves the set if
`P(Bin(n_1 + n_l, 1/2) >= n_1) <= alpha / (L - 1)` for the top outcome 1 of L. Proof: for the true winner w and any
other m, n_m given n_m + n_w is Bin(., q) with q <= 1/2, so each of the L - 1 comparisons wrongly excludes w with
probability at most alpha / (L - 1). The uncorrected test would not do: with ten equal outcomes the top one is far
ahead of the last one too often.

*Threshold stage*: class l leaves the set if its Clopper-Pearson upper bound at alpha is below tau; no correction,
for only a true winner is lost wrongly, and there is one. Deferral leaves it if the top count k satisfies
`P(Bin(n, tau) >= k) + P(Bin(n, 1 - tau) >= k) <= alpha` and `k - 1 >= tau (n - 1)`. Proof: let g defer, so every
p_l < tau, and let k be the smallest such count, more than n / 2, so the events n_l >= k are disjoint and the error is
the sum of `f(p_l) = P(Bin(n, p_l) >= k)`. f(0) = 0 and f is convex up to (k - 1) / (n - 1) >= tau, so over all
p_l <= tau with sum at most 1 the sum of f is largest at the vertex (tau, 1 - tau, 0, ...).

*Deterministic stage*: what the rounding of its logits leaves open (`rsrouter.core.passes.pass_possible`), for certain; it spends
no alpha.

An `invalid` outcome answers ABSTAIN, like any outcome that leads nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from rsrouter.core.bounds import AlphaSplit, binom_upper, check_alpha, check_whole
from rsrouter.core.errors import PlanError
from rsrouter.core.estimates import check_rows, check_split, group_votes
from rsrouter.core.passes import pass_possible
from rsrouter.core.requests import PASS, PREDICT, VoteRequest
from rsrouter.core.tree import Stage, Tree
from rsrouter.core.types import ABSTAIN

#: Tests are done at alpha times one minus this, for the rounding of scipy's binomial tails.
_MARGIN = 1e-6


def _tail(k: NDArray[np.int64], n: NDArray[np.int64], p: float) -> NDArray[np.float64]:
    """`P(Bin(n, p) >= k)`; 1 for k <= 0, 0 for k > n."""
    inner = np.clip(k, 1, np.maximum(n, 1))
    tail = special.betainc(inner.astype(np.float64), (np.maximum(n, 1) - inner + 1).astype(np.float64), p)
    return np.where(k <= 0, 1.0, np.where(k > n, 0.0, tail))


def confidence_set(stage: Stage, counts: NDArray[np.int64], alpha: float) -> NDArray[np.bool_]:
    """Which targets of `stage` may be its true winner: a set that misses it with probability at most alpha.

    Args:
        stage: the smoothed vote.
        counts: `(N, L)` votes, every row summing to the votes drawn (invalid ones included).
        alpha: failure probability of the stage.

    Returns:
        `(N, len(stage.leads_to))` booleans, at least one True per row; see the module's text for the rules.

    Raises:
        PlanError: counts that are negative, empty or of the wrong width; alpha outside (0, 1).
    """
    votes = np.asarray(counts)
    totals = votes.sum(1) if votes.ndim == 2 else np.zeros(0, np.int64)
    check_rows(stage, votes, totals)
    if np.any(totals < 1):
        raise PlanError(f"Stage {stage.name!r} has no votes", expected="at least one vote", received="0", remedy="draw votes")
    level = float(check_alpha(alpha)) * (1.0 - _MARGIN)
    order = np.sort(votes, axis=1)
    top, runner_up = order[:, -1], order[:, -2]
    if stage.tau is not None:
        kept = binom_upper(votes, totals[:, None], level) >= stage.tau
        sure = _tail(top, totals, stage.tau) + _tail(top, totals, 1.0 - stage.tau) <= level
        sure &= top - 1 >= stage.tau * (totals - 1)
        kept |= sure[:, None] & (votes == top[:, None])
        return np.concatenate([kept, ~sure[:, None]], axis=1)
    if not stage.children and len(set(stage.leads_to)) == len(stage.leads_to):
        decided = 2.0 * _tail(top, top + runner_up, 0.5) <= level
        return np.where(decided[:, None], votes == top[:, None], True)
    pair = _tail(np.broadcast_to(top[:, None], votes.shape), top[:, None] + votes, 0.5)
    return np.asarray(~(pair <= level / (stage.num_outcomes - 1)) | (votes == top[:, None]))


class PredictPolicy:
    """Which votes `predict` draws next, and its answer: the statistics side, without torch.

    The tree is walked from the root; a stage is asked once some outcome that is still possible leads to it,
    and no stage is asked any more once two answers (or ABSTAIN) are possible for good.

    Args:
        tree: stages of the routed classifier.
        n: votes per stage that is asked.
        split: alpha of every stage, or one number to be divided evenly (`AlphaSplit.even`).
        num_images: how many queries take part.

    Raises:
        PlanError: n below 1, a split of another tree, stages of one network at different sigmas.
    """

    def __init__(self, tree: Tree, n: int, split: AlphaSplit | float, num_images: int) -> None:
        self.split = split if isinstance(split, AlphaSplit) else AlphaSplit.even(float(check_alpha(split)), tree.paths)
        check_split(tree, self.split)
        self.tree, self.n = tree, check_whole("n", n, 1)
        self._stages = tree.by_network
        self._possible: dict[str, NDArray[np.bool_]] = {
            s: np.ones((num_images, len(tree.stages[s].leads_to)), dtype=bool) for s in tree.order
        }
        self._asked = {g: np.zeros(num_images, dtype=bool) for g in tree.networks}
        self._next: list[tuple[str, ...]] = [(tree.stages[tree.root].network,)] * num_images
        self._answer = np.full(num_images, ABSTAIN)
        self.done = np.zeros(num_images, dtype=bool)

    def next_requests(self, images: Sequence[int]) -> list[VoteRequest]:
        """Requests that move each of `images` one step forward; none for those that are done."""
        return [self._request(int(i), g) for i in images if not self.done[i] for g in self._next[i]]

    def _request(self, i: int, network: str) -> VoteRequest:
        return VoteRequest(i, network, *((PASS, 0, 1) if network in self.tree.passing else (PREDICT, 0, self.n)))

    def update(self, requests: Sequence[VoteRequest], counts: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        """Takes the votes of `requests`: per request a mapping of every stage on its network to `(L,)` counts, or of a forward
        pass to `(k,)` logits.

        Raises:
            PlanError: votes that were not asked for, or that do not sum to their request.
        """
        grouped = group_votes(requests, counts, self._stages)
        for request in requests:
            i = request.image
            open_here = 0 <= i < len(self.done) and not self.done[i] and request.network in self._next[i]
            if not (open_here and request == self._request(i, request.network)):
                raise PlanError(
                    "Votes that no open request asked for",
                    expected="answers to next_requests, each once",
                    received=repr(request),
                    remedy="hand each request's votes back exactly once",
                )
        for (purpose, network), (asked, votes) in grouped.items():
            rows = np.array([request.image for request in asked])
            for name, matrix in votes.items():
                stage = self.tree.stages[name]
                left = pass_possible(stage, matrix) if purpose == PASS else confidence_set(stage, matrix, self.split.stages[name])
                self._possible[name][rows] = left
            self._asked[network][rows] = True
        for i in dict.fromkeys(request.image for request in requests):
            self._advance(i)

    def answer(self, i: int) -> int:
        """The class that query `i` gets, or ABSTAIN.

        Raises:
            PlanError: the query still waits for votes.
        """
        if not self.done[i]:
            raise PlanError(
                "The query is still being answered",
                expected="a finished query",
                received=f"query {i}",
                remedy="draw the requested votes first",
            )
        return int(self._answer[i])

    def _advance(self, i: int) -> None:
        """Follows the outcomes that are still possible: an answer, more votes, or none of both."""
        answers: set[int] = set()
        waiting: dict[str, None] = {}
        seen, todo = set(), [self.tree.root]
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            stage = self.tree.stages[name]
            if not self._asked[stage.network][i]:
                waiting[stage.network] = None
                continue
            for target in (stage.leads_to[k] for k in np.flatnonzero(self._possible[name][i])):
                if isinstance(target, str):
                    todo.append(target)
                else:
                    answers.add(int(target))
        if len(answers) > 1 or ABSTAIN in answers:
            self.done[i] = True
        elif waiting:
            self._next[i] = tuple(waiting)
        else:
            self._answer[i] = answers.pop()
            self.done[i] = True


__all__ = ["PredictPolicy", "confidence_set"]
