"""Stages in a row: each voter answers where one class reaches its threshold and defers otherwise; the last one answers always.

A voter is an expert's frozen trunk at some noise level, with the expert's own logits or with a small trained head.
An expert may be asked more than once: first when it is sure, at the end when nobody was. Voters that share trunk and
noise level share every forward pass and vote; the union bound over the path's stages covers that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log
from numbers import Real

import torch
from torch import Tensor, nn

from rsrouter.core.errors import InputError
from rsrouter.core.tree import INVALID_TARGET, Stage, cascade_tree, expert_stage
from rsrouter.experts.expert import Expert, check_sigma
from rsrouter.experts.identity import unique_digest
from rsrouter.experts.pool import ExpertPool
from rsrouter.router.base import Routed, constants_of, vote_digest, vote_model
from rsrouter.router.stored import MOST_STAGES
from rsrouter.router.trunk import HeadedTrunk
from rsrouter.sampling.engine import VoteModel


@dataclass(frozen=True)
class Voter:
    """Who is asked.

    Attributes:
        expert: name of the expert whose frozen network looks at the noisy image.
        sigma: standard deviation of the noise; None: the expert's own.
        head: name of the head on the expert's features that casts the vote; None: the expert's logits.
        others: experts that look at the same noisy image; their features and logits come before the expert's own in
            the head's input.
        grid: how the experts' feature maps are pooled for the head (`Trunk`): 1 as for their own last layer, 2 to four cells.
        whole: the head is a whole network: it sees the noisy image itself, normalised as the expert's input is, and no features.
        confidence: a noisy copy votes for a class only where the softmax gives it at least this probability (`reject_unsure`);
            the other copies vote for asking the next voter (behind the last one, nobody). 0: every copy votes for a class.
    """

    expert: str
    sigma: float | None = None
    head: str | None = None
    others: tuple[str, ...] = ()
    grid: int = 1
    whole: bool = False
    confidence: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.confidence, Real):  # numpy's numbers too
            object.__setattr__(self, "confidence", float(self.confidence))


def reject_unsure(logits: Tensor, confidence: float) -> Tensor:
    """Logits `(B, C)` with one more, `(B, C + 1)`: the largest exactly where no class has a softmax probability of at least
    `confidence` (the reject option of Chow 1970). Float32; NaN stays NaN.

    >>> reject_unsure(torch.tensor([[2.0, 0.0], [0.5, 0.0]]), 0.7).argmax(1).tolist()
    [0, 2]
    """
    logits = logits.float()
    return torch.cat([logits, logits.logsumexp(1, keepdim=True) + log(confidence)], 1)


class _Votes(nn.Module):
    """A network whose outputs are picked, possibly more than once, one per stage; each with the stage's `confidence`, if any."""

    def __init__(self, inner: nn.Module, picks: Sequence[int], single: bool, confidences: Sequence[float]) -> None:
        super().__init__()
        self.inner, self.picks, self.single, self.confidences = inner, tuple(picks), single, tuple(confidences)

    def extra_repr(self) -> str:
        return f"picks={self.picks}, single={self.single}, confidences={self.confidences}"

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out = self.inner(x)
        picked = [out if self.single else out[k] for k in self.picks]
        # what is not logits goes on as it is: the engine says what it wanted
        fits = [isinstance(o, Tensor) and o.dim() == 2 and o.shape[1] > 1 for o in picked]
        return tuple(reject_unsure(o, c) if c and fit else o for o, c, fit in zip(picked, self.confidences, fits, strict=True))


def least_confidence(module: nn.Module, place: int) -> float:
    """The `confidence` of the stage at `place` among those on a network that `bind_chain` made; 0 where there is none."""
    return module.confidences[place] if isinstance(module, _Votes) else 0.0


def check_thresholds(thresholds: Sequence[float], voters: int | None = None, *, lead: bool = False) -> tuple[float, ...]:
    """Thresholds as floats; InputError unless each is in (1/2, 1) and there is one per voter but the last,
    or one for it too: it then defers to nobody.

    With `lead` a threshold may be the lead, in logits, that a deterministic expert answers from.
    """
    try:
        values = tuple(float(t) for t in thresholds)
    except (TypeError, ValueError):
        values = (float("nan"),)
    if not all(0.5 < t < 1.0 or (0.0 < t < float("inf") and lead) for t in values):
        raise InputError(
            "A cascade's thresholds are out of range",
            expected="a sequence of numbers, each in (1/2, 1)" + (", or above 0 for a deterministic expert" if lead else ""),
            received=repr(thresholds),
            remedy="0.55 is a reasonable start; tune on validation images",
        )
    if voters is not None and len(values) not in (voters - 1, voters):
        raise InputError(
            "A cascade needs a threshold for each expert but the last",
            expected=f"{voters - 1} thresholds, or {voters} where the last expert may leave an input to the core",
            received=f"{len(values)}",
            remedy="give one tau per expert that may defer",
        )
    return values


def check_head_names(names: Iterable[str]) -> None:
    """Raises InputError for a name that torch takes for no module: empty, with a dot, or one of `ModuleDict`'s own.

    >>> check_head_names(["own", "level0_u0_1"])
    """
    taken = nn.ModuleDict()
    if odd := [n for n in names if not isinstance(n, str) or not n or "." in n or hasattr(taken, n)]:
        raise InputError(
            "A head cannot have this name",
            expected="a name without a dot, and none that nn.ModuleDict has itself",
            received=str(odd),
            remedy="for example 'own', or 'head_0_5' instead of 'head_0.5'",
        )


def check_voters(voters: Sequence[Voter], pool: ExpertPool, heads: Mapping[str, nn.Module] | nn.ModuleDict) -> None:
    """Raises InputError for an unknown expert or head, an unusable sigma or confidence, or the same voter twice in a row."""
    unknown = sorted({name for v in voters for name in (v.expert, *v.others)} - set(pool.names))
    if not voters or unknown:
        raise InputError(
            "The cascade's experts do not fit the pool",
            expected=f"names out of {list(pool.names)}",
            received=str([v.expert for v in voters]),
            remedy="name experts of the pool, in the order in which they are asked",
        )
    if len(voters) > MOST_STAGES:
        raise InputError(
            "The chain is too long",
            expected=f"at most {MOST_STAGES} voters",
            received=str(len(voters)),
            remedy="leave out those that hardly ever answer: each one costs votes and a share of alpha",
        )
    if any(len({v.expert, *v.others}) != 1 + len(v.others) or (v.others and v.head is None) for v in voters):
        raise InputError(
            "A voter cannot read these experts",
            expected="different experts, and a head that reads them",
            received=str([v for v in voters if v.others]),
            remedy="give the voter a head, or leave out others",
        )
    if any(isinstance(v.grid, bool) or not isinstance(v.grid, int) or v.grid < 1 or (v.grid > 1 and not v.head) for v in voters):
        raise InputError(
            "A voter cannot read features like this",
            expected="grid: a whole number of at least 1, and 1 without a head",
            received=str([v.grid for v in voters]),
            remedy="give the voter a head, or leave out grid",
        )
    if any(v.whole and (v.head is None or v.others or v.grid != 1) for v in voters):
        raise InputError(
            "A whole network reads no features",
            expected="whole=True with a head, without others or grid",
            received=str([v for v in voters if v.whole]),
            remedy="name the network as head, and leave out others and grid",
        )
    if odd := [v.confidence for v in voters if not (isinstance(v.confidence, float) and 0.0 <= v.confidence < 1.0)]:
        raise InputError(
            "A voter's confidence is out of range",
            expected="a number from 0 up to, but not including, 1",
            received=repr(odd),
            remedy="0.4 is a reasonable start; 0 counts every vote; choose on validation images",
        )
    if any(a == b for a, b in pairwise(voters)):
        raise InputError(
            "A cascade asks the same expert twice in a row",
            expected="another expert in between",
            received=str([v.expert for v in voters]),
            remedy="drop one of the two: the second vote is the same as the first",
        )
    missing = sorted({v.head for v in voters if v.head is not None} - set(heads.keys()))
    if missing:
        raise InputError(
            "A voter's head is missing",
            expected=f"one of {sorted(heads.keys())}",
            received=str(missing),
            remedy="pass every head by name",
        )
    check_head_names(v.head for v in voters if v.head is not None)
    for voter in voters:
        if voter.sigma is not None:
            check_sigma(voter.sigma, f"the voter on {voter.expert!r}")


def bind_chain(
    pool: ExpertPool,
    voters: Sequence[Voter],
    thresholds: Sequence[float],
    heads: Mapping[str, nn.Module] | nn.ModuleDict | None = None,
) -> Routed:
    """Tree and networks of `voters` in a row.

    Raises:
        InputError: voters, thresholds or heads that do not fit.
    """
    heads = {} if heads is None else heads
    check_voters(voters, pool, heads)
    thresholds = check_thresholds(thresholds, len(voters), lead=True)
    for voter, tau in zip(voters, thresholds, strict=False):
        if pool[voter.expert].lipschitz is None:
            check_thresholds([tau])
    if len(thresholds) < len(voters) and voters[-1].confidence:
        raise InputError(
            "The last voter cannot defer: no voter comes after it",
            expected="confidence 0 for a voter that always answers",
            received=f"{voters[-1].confidence:g} for the voter on {voters[-1].expert!r}",
            remedy="give it confidence 0, add a voter behind it, or, over a pool with a core, give it a threshold too",
        )
    if odd := [
        v.expert for v in voters if pool[v.expert].lipschitz is not None and (v.sigma or v.head or v.others or v.confidence)
    ]:
        raise InputError(
            "A deterministic expert cannot vote",
            expected="a voter without sigma, head, others and confidence",
            received=f"some of them for {', '.join(odd)}",
            remedy="it is one forward pass without noise; leave them out",
        )
    groups: dict[tuple[str, float, tuple[str, ...], int, str | None], list[int]] = {}
    for position, voter in enumerate(voters):
        sigma = pool[voter.expert].sigma if voter.sigma is None else float(voter.sigma)
        own = voter.head if voter.whole else None
        groups.setdefault((voter.expert, sigma, voter.others, voter.grid, own), []).append(position)
    stages: dict[int, Stage] = {}
    models = []
    for (name, sigma, others, grid, own), positions in groups.items():
        expert = pool[name]
        confidences = [float(voters[p].confidence) for p in positions]
        cells = "" if grid == 1 else f"/{grid}x{grid}"
        network = "+".join((name, *others)) + cells if own is None else f"{own} from {name}"
        if own is None and all(voters[p].head is None for p in positions):
            network += "" if sigma == expert.sigma and not any(confidences) else f" itself@{sigma:g}"
        else:
            network += f"@{sigma:g}"  # an expert's bare name is the expert's alone
        # the expert itself keeps that name where heads vote in the same pass
        alone = own is None and any(voters[p].head is not None for p in positions)
        bases = [f"{name} itself@{sigma:g}" if alone and voters[p].head is None else network for p in positions]
        titles = [base if (k := bases[:i].count(base)) == 0 else f"{base}:{k + 1}" for i, base in enumerate(bases)]
        for title, position in zip(titles, positions, strict=True):
            stages[position] = expert_stage(title, sigma, pool.num_classes, network=network, expert=name, **constants_of(expert))
        wanted = [voters[p].head for p in positions]
        if own is not None:
            models.append(_own_network(expert, heads[own], network, sigma, titles, confidences))
            continue
        models.append(_network(expert, [pool[o] for o in others], network, sigma, grid, titles, wanted, heads, confidences))
    for p, voter in enumerate(voters):
        if voter.confidence:
            onward = stages[p + 1].name if p + 1 < len(voters) else INVALID_TARGET
            stages[p] = replace(stages[p], leads_to=(*range(pool.num_classes), onward, INVALID_TARGET))
    return Routed(cascade_tree([stages[p] for p in range(len(voters))], thresholds), tuple(models))


def _network(
    expert: Expert,
    others: Sequence[Expert],
    network: str,
    sigma: float,
    grid: int,
    titles: Sequence[str],
    wanted: Sequence[str | None],
    heads: Mapping[str, nn.Module] | nn.ModuleDict,
    confidences: Sequence[float],
) -> VoteModel:
    """One forward pass that casts the votes of every stage on the same experts at one noise level."""
    if list(wanted) == [None] and sigma == expert.sigma and not any(confidences):
        return vote_model(expert)
    used = list(dict.fromkeys(h for h in wanted if h is not None))
    if not used:
        module: nn.Module = _Votes(expert.network(), [0] * len(wanted), True, confidences)
    else:
        picks = [0 if h is None else 1 + used.index(h) for h in wanted]
        module = _Votes(HeadedTrunk(expert, [heads[h] for h in used], others=others, grid=grid), picks, False, confidences)
    told = {"heads": [unique_digest(heads[h]) for h in used], "picks": [-1 if h is None else used.index(h) for h in wanted]}
    digest = vote_digest([expert, *others], sigma, grid=grid, **told, **_told(confidences))
    return VoteModel(network, module, sigma, tuple(titles), _widths(expert, confidences), digest)


def _own_network(
    expert: Expert, head: nn.Module, network: str, sigma: float, titles: Sequence[str], confidences: Sequence[float]
) -> VoteModel:
    """A whole network that votes on images normalised as the expert's."""
    module: nn.Module = expert.normalised(head)
    if len(titles) > 1 or any(confidences):
        module = _Votes(module, [0] * len(titles), True, confidences)
    told = {"whole": unique_digest(head), "picks": len(titles), **expert.surroundings}
    digest = vote_digest([], sigma, **told, **_told(confidences))
    return VoteModel(network, module, sigma, tuple(titles), _widths(expert, confidences), digest)


def _told(confidences: Sequence[float]) -> dict[str, list[float]]:
    """What a digest is told of them."""
    return {"confidences": list(confidences)} if any(confidences) else {}


def _widths(expert: Expert, confidences: Sequence[float]) -> tuple[int, ...]:
    """Logits of each stage: the classes, and one for an unsure vote where there are such."""
    return tuple(expert.num_classes + bool(c) for c in confidences)
