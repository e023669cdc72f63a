"""Routed classifiers whose vote probabilities have a closed form, and their true radii, told without the package.

Nothing here uses the package's own evaluation of a tree: `answer` walks the stages by exact probabilities, `true_radius`
bisects it. The package is used as its users use it: experts, routers, `certify`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import norm
from torch import Tensor, nn

from rsrouter import CascadeRouter, Certificate, Execution, Expert, ExpertPool, FlatRouter, RoutedSmooth, Terms
from rsrouter.core import Stage, Tree
from rsrouter.router import DeferralRouter, Routed, Router, Voter
from rsrouter.sampling.engine import VoteModel

Floats = NDArray[np.float64]

X = 0.5
EXECUTION = Execution(batch=500, fold=False)
#: Where every design's answer changes, as a distance from X; "tied" ones stand on their boundary.
CHANGE = 0.35


class Intervals(nn.Module):
    """Votes for the owner of the interval that the only pixel falls into; an owner beyond the last class votes NaN."""

    def __init__(self, cuts: Sequence[float], owner: Sequence[int], width: int) -> None:
        super().__init__()
        self.register_buffer("cuts", torch.tensor(list(cuts), dtype=torch.float64))
        table = np.zeros((len(owner), width))
        for row, who in zip(table, owner, strict=True):
            row[:] = np.nan if who == width else 0.0
            if who < width:
                row[who] = 1.0
        self.register_buffer("table", torch.tensor(table))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[torch.bucketize(x.flatten(1)[:, 0].double(), self.cuts.double())].float()


class Several(nn.Module):
    """One forward pass that votes in several stages."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part in self.parts)


@dataclass
class Vote:
    """One stage: intervals of the line and their owners; targets as in `rsrouter.core.Stage` (the invalid outcome before a
    threshold stage's deferral)."""

    name: str
    sigma: float
    cuts: Sequence[float]
    owner: Sequence[int]
    targets: Sequence[int | str]
    tau: float | None = None
    network: str = ""

    @property
    def width(self) -> int:
        return len(self.targets) - (self.tau is not None) - 1

    def module(self) -> Intervals:
        return Intervals(self.cuts, self.owner, self.width)

    def probabilities(self, x: Floats) -> Floats:
        """`(P, width + 1)`, invalid votes last."""
        z = (np.concatenate([[-np.inf], np.asarray(self.cuts), [np.inf]])[None, :] - x[:, None]) / self.sigma
        low, high = z[:, :-1], z[:, 1:]
        mass = np.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))
        p = np.zeros((len(x), self.width + 1))
        for interval, who in enumerate(self.owner):
            p[:, who] += mass[:, interval]
        return p


@dataclass
class Design:
    """A routed classifier and what decides its answers."""

    stages: dict[str, Vote]
    root: str
    smooth: RoutedSmooth

    def answer(self, x: Floats) -> NDArray[np.int64]:
        """The smoothed classifier's answer at points `(P,)`."""
        found = np.full(len(x), -9)

        def walk(name: str, rows: NDArray[np.int64]) -> None:
            stage = self.stages[name]
            p = stage.probabilities(x[rows])
            won = p.argmax(1)
            if stage.tau is not None:
                won = np.where(p.max(1) >= stage.tau, won, len(stage.targets) - 1)
            for k in np.unique(won):
                target = stage.targets[k]
                if isinstance(target, str):
                    walk(target, rows[won == k])
                else:
                    found[rows[won == k]] = target

        walk(self.root, np.arange(len(x)))
        return found

    def true_radius(self, c: int, most: float = 8.0) -> float:
        """Distance from X to the nearest point that is not answered `c`."""
        best = np.inf
        for sign in (-1.0, 1.0):
            steps = np.concatenate([np.linspace(0, 3, 3001), np.linspace(3, most, 1001)])
            wrong = np.flatnonzero(self.answer(X + sign * steps) != c)
            if not wrong.size:
                continue
            if wrong[0] == 0:
                return 0.0
            low, high = steps[wrong[0] - 1], steps[wrong[0]]
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (low, middle) if self.answer(np.array([X + sign * middle]))[0] != c else (middle, high)
            best = min(best, low)
        return float(best)

    def certify(self, terms: Terms, count: int) -> list[Certificate]:
        """`count` certificates of the one image, each on noise of its own."""
        return self.smooth.certify(torch.full((count, 1, 1, 1), X), terms, ids=range(count))

    def violations(self, certificates: Sequence[Certificate]) -> int:
        """How many certified balls hold a point with another answer."""
        true = {c: self.true_radius(c) for c in {c.predict for c in certificates} if c >= 0}
        return sum(c.predict >= 0 and c.radius > true[c.predict] + 1e-9 for c in certificates)


class OwnRouter(Router):
    """A router of one's own, over any stages."""

    kind = "own"

    def __init__(self, stages: dict[str, Vote], root: str) -> None:
        self.stages, self.root = stages, root

    def bind(self, pool: ExpertPool) -> Routed:
        stages = [
            Stage(
                s.name, s.sigma, "plurality" if s.tau is None else "threshold", s.tau, tuple(s.targets), None, s.network or s.name
            )
            for s in self.stages.values()
        ]
        models = []
        for network in dict.fromkeys(s.network for s in stages):
            members = [s for s in self.stages.values() if (s.network or s.name) == network]
            module = members[0].module() if len(members) == 1 else Several([m.module() for m in members])
            names, widths = tuple(m.name for m in members), tuple(m.width for m in members)
            models.append(VoteModel(network, module, members[0].sigma, names, widths, f"digest of {network}"))
        return Routed(Tree.of(stages, self.root), tuple(models))

    def to_config(self) -> dict[str, Any]:
        return {"kind": self.kind}


def of_stages(stages: dict[str, Vote], root: str) -> Design:
    """Any stages, bound to a pool that takes no part."""
    pool = ExpertPool([Expert(Intervals([0.0], [0, 1], 2), sigma=1.0, num_classes=2, input_shape=(1, 1, 1), name="none")])
    return Design(stages, root, RoutedSmooth(pool, OwnRouter(stages, root), execution=EXECUTION))


def half(name: str, sigma: float, at: float, targets: Sequence[int | str], tau: float | None = None, network: str = "") -> Vote:
    """Outcome 0 left of `X + at`, else outcome 1."""
    return Vote(name, sigma, [X + at], [0, 1], targets, tau, network)


def expert(vote: Vote, classes: int = 2) -> Expert:
    module = Intervals(vote.cuts, vote.owner, classes)
    return Expert(module, sigma=vote.sigma, num_classes=classes, input_shape=(1, 1, 1), name=vote.name)


def _routed(votes: Sequence[Vote], root: str, router: Router, members: Sequence[Vote], classes: int = 2) -> Design:
    pool = ExpertPool([expert(m, classes) for m in members])
    return Design({v.name: v for v in votes}, root, RoutedSmooth(pool, router, execution=EXECUTION))


def tied() -> Design:
    """One expert exactly on its boundary: the true radius is 0."""
    vote = half("e", 0.5, 0.0, [0, 1, -1])
    return _routed([vote], "e", CascadeRouter([], ["e"]), [vote])


def ten_tied() -> Design:
    """Ten outcomes, nearly tied everywhere."""
    n = 80
    cuts = X + 0.05 * (np.arange(n) - n / 2) + 0.013
    vote = Vote("e", 0.5, cuts.tolist(), [k % 10 for k in range(n + 1)], [*range(10), -1])
    return _routed([vote], "e", CascadeRouter([], ["e"]), [vote], 10)


def flat() -> Design:
    """Router and the other expert change where the answer changes: both bounds must hold."""
    a, b = half("a", 0.5, 5.0, [0, 1, -1]), half("b", 0.5, CHANGE, [0, 1, -1])
    r = half("router", 1.0, CHANGE, ["a", "b", -1])
    return _routed([r, a, b], "router", FlatRouter(r.module(), sigma=1.0, experts=["a", "b"]), [a, b])


def cascade() -> Design:
    """Two thresholds that defer at `CHANGE`, then an expert that changes there."""
    sigmas, taus = (1.0, 0.7, 0.5), (0.6, 0.75)
    votes = [
        half("a", sigmas[0], CHANGE + sigmas[0] * norm.ppf(taus[0]), [0, 1, -1, "b"], taus[0]),
        half("b", sigmas[1], CHANGE + sigmas[1] * norm.ppf(taus[1]), [0, 1, -1, "c"], taus[1]),
        half("c", sigmas[2], CHANGE, [0, 1, -1]),
    ]
    return _routed(votes, "a", CascadeRouter(list(taus), ["a", "b", "c"]), votes)


def wrong_class() -> Design:
    """A threshold stage that defers at X and answers the wrong class from `CHANGE` on."""
    tau = 0.7
    a, b = half("a", 1.0, CHANGE - norm.ppf(tau), [0, 1, -1, "b"], tau), half("b", 0.5, 5.0, [0, 1, -1])
    return _routed([a, b], "a", CascadeRouter([tau], ["a", "b"]), [a, b])


class Head(nn.Module):
    """Class 0 left of `at`, read from the first feature."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.register_buffer("at", torch.tensor([float(at)]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.at - x[:, :1], x[:, :1] - self.at], 1)


class Backbone(nn.Module):
    """An expert with features, as timm's models have them."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.head = Head(at)

    def forward_features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def forward_head(self, f: Tensor, pre_logits: bool = False) -> Tensor:
        return f if pre_logits else self.head(f)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def shared_network() -> Design:
    """Two stages on one network and one stream of votes, an expert's stage between them: dependent bounds."""
    tau, sigma = 0.65, 0.8
    first, second = CHANGE + sigma * norm.ppf(tau), CHANGE + 0.5 * norm.ppf(0.8)
    e, e2 = (
        Expert(Backbone(X + CHANGE), sigma=s, num_classes=2, input_shape=(1, 1, 1), name=n)
        for n, s in (("e", sigma), ("e2", 0.5))
    )
    votes = [
        half("e", sigma, first, [0, 1, -1, "e2"], tau, "e"),
        half("e2", 0.5, second, [0, 1, -1, "e:2"], 0.8),
        half("e:2", sigma, CHANGE, [0, 1, -1], None, "e"),
    ]
    heads = {"h": Head(X + first), "h2": Head(X + second)}
    router = DeferralRouter([Voter("e", None, "h"), Voter("e2", None, "h2"), Voter("e")], [tau, 0.8], heads)
    return Design({v.name: v for v in votes}, "e", RoutedSmooth(ExpertPool([e, e2]), router, execution=EXECUTION))


class Unsure(nn.Module):
    """Class 0 left of `low`, class 1 right of `high`; in between both are alike."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.register_buffer("ends", torch.tensor([low, high]))

    def forward(self, x: Tensor) -> Tensor:
        seen = x.flatten(1)[:, :1]
        return torch.cat([4.0 * (seen < self.ends[0]), 4.0 * (seen > self.ends[1])], 1)


def unsure() -> Design:
    """A threshold stage whose votes count where the softmax is above .8: it defers at `CHANGE`, mostly to unsure votes, to an
    expert that changes there."""
    tau, sigma = 0.65, 0.8
    low = X + CHANGE + sigma * norm.ppf(tau)
    votes = [
        Vote("a itself@0.8", sigma, [low, low + 1.0], [0, 2, 1], [0, 1, "b", -1, "b"], tau),
        half("b", 0.5, CHANGE, [0, 1, -1]),
    ]
    a = Expert(Unsure(low, low + 1.0), sigma=sigma, num_classes=2, input_shape=(1, 1, 1), name="a")
    router = DeferralRouter([Voter("a", confidence=0.8), Voter("b")], [tau])
    smooth = RoutedSmooth(ExpertPool([a, expert(votes[1])]), router, execution=EXECUTION)
    return Design({v.name: v for v in votes}, "a itself@0.8", smooth)


def nested() -> Design:
    """Plurality over plurality over plurality, all changing at `CHANGE`; a sibling that never answers the class."""
    votes = [
        half("r", 1.0, CHANGE, ["m", "w", -1]),
        half("m", 0.8, 5.0, ["a", "a2", -1]),
        half("w", 0.8, CHANGE, ["b", 1, -1]),
        half("a", 0.5, 5.0, [0, 1, -1]),
        half("a2", 0.5, 5.0, [0, 1, -1]),
        half("b", 0.6, CHANGE, [0, 1, -1]),
    ]
    return of_stages({v.name: v for v in votes}, "r")


def ladder(length: int) -> Design:
    """Plurality stages in a row: each answers class 0 up to `CHANGE`, then leads on; the last one changes there too. So one
    bound that fails, anywhere on the path, is a violation."""
    votes = [half(f"s{k}", 1.0 - 0.1 * k, CHANGE, [0, f"s{k + 1}", -1]) for k in range(length - 1)]
    votes.append(half(f"s{length - 1}", 0.5, CHANGE, [0, 1, -1]))
    return of_stages({v.name: v for v in votes}, "s0")


def folded_tie() -> Design:
    """One expert on its boundary, whose outcomes own two pieces of the line each."""
    vote = Vote("e", 0.5, [X - 0.6, X, X + 0.6], [1, 0, 1, 0], [0, 1, -1])
    return _routed([vote], "e", CascadeRouter([], ["e"]), [vote])


def alone(sigma: float) -> Design:
    """One expert that changes at `CHANGE`."""
    vote = half("e", sigma, CHANGE, [0, 1, -1])
    return _routed([vote], "e", CascadeRouter([], ["e"]), [vote])


DESIGNS: dict[str, Callable[[], Design]] = {
    "tied": tied,
    "ten tied": ten_tied,
    "flat": flat,
    "cascade": cascade,
    "wrong class": wrong_class,
    "shared network": shared_network,
    "unsure": unsure,
    "nested": nested,
    "ladder of 4": lambda: ladder(4),
    "folded tie": folded_tie,
    "expert": lambda: alone(0.4),
    "sharp expert": lambda: alone(0.25),
}


def random_design(rng: np.random.Generator) -> tuple[Design, float]:
    """1 to 5 stages of random kinds whose decisions mostly change at one distance, which is returned as well."""
    n, change = int(rng.integers(1, 6)), float(rng.uniform(0.1, 0.5))
    names, stages = [f"s{k}" for k in range(n)], dict[str, Vote]()
    for k in reversed(range(n)):
        later = names[k + 1 :]
        near: int | str = str(rng.choice(later)) if later and rng.random() < 0.8 else 0
        far: int | str = str(rng.choice(later)) if later and rng.random() < 0.5 else int(rng.choice([1, -1]))
        if later and later[0] not in [t for v in stages.values() for t in v.targets]:
            near = later[0]
        sigma, network = float(rng.uniform(0.4, 1.0)), names[k]
        if later and rng.random() < 0.25:
            sigma, network = stages[later[0]].sigma, stages[later[0]].network
        at, kind, tau = change if rng.random() < 0.8 else 9.0, rng.random(), float(rng.choice([0.55, 0.7, 0.9]))
        if kind < 0.5:
            stages[names[k]] = half(names[k], sigma, at, [near, far, -1], None, network)
        elif kind < 0.75:  # leads near until it defers
            stages[names[k]] = half(names[k], sigma, at + sigma * norm.ppf(tau), [near, 1, -1, far], tau, network)
        else:  # defers to near until outcome 1 reaches tau
            stages[names[k]] = half(names[k], sigma, at - sigma * norm.ppf(tau), [0, far, -1, near], tau, network)
    kept, todo = set[str](), ["s0"]
    while todo:
        name = todo.pop()
        if name not in kept:
            kept.add(name)
            todo += [t for t in stages[name].targets if isinstance(t, str)]
    return of_stages({name: stages[name] for name in names if name in kept}, "s0"), change
