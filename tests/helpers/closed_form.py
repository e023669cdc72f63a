"""Smoothed votes with closed-form probabilities, networks with a known constant, random trees of both, and their true answers.

A stage's base model looks at `<u, x>` only and answers by the interval it falls into, so under Gaussian noise
its outcome probabilities are differences of normal cdfs at `(breaks - <u, x>) / sigma`. Two intervals are a
half-space (a linear base model).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from rsrouter.core import Stage, Tree

Array = NDArray[np.float64]


@dataclass
class Slab:
    """One stage's base model: which outcome owns which interval of `<direction, x>`."""

    direction: Array
    breaks: Array
    owner: NDArray[np.int64]
    sigma: float
    outcomes: int

    def votes(self, x: Array) -> NDArray[np.int64]:
        """The base model's vote at every (already noisy) point `x (P, d)`."""
        return self.owner[np.searchsorted(self.breaks, x @ self.direction)]

    def probabilities(self, x: Array) -> Array:
        """`(P, outcomes)`: exact vote probabilities at `x (P, d)`; `breaks` ascend."""
        z = (self.breaks[None, :] - (x @ self.direction)[:, None]) / self.sigma
        edges = np.concatenate([np.full((len(x), 1), -np.inf), z, np.full((len(x), 1), np.inf)], axis=1)
        low, high = edges[:, :-1], edges[:, 1:]
        # the mirrored form keeps relative accuracy in the upper tail
        mass = np.where(low > 0, special.ndtr(-low) - special.ndtr(-high), special.ndtr(high) - special.ndtr(low))
        out = np.zeros((len(x), self.outcomes))
        for interval, owner in enumerate(self.owner):
            out[:, owner] += mass[:, interval]
        return out


@dataclass
class Folded:
    """A deterministic stage's logits: `weight` times coordinates folded into [-1, 1] (a triangle wave, 1-Lipschitz)."""

    weight: Array
    bias: Array

    @property
    def direction(self) -> Array:
        """Where the first two logits part fastest."""
        step = self.weight[0] - self.weight[1]
        return np.asarray(step / np.linalg.norm(step))

    def probabilities(self, x: Array) -> Array:
        """`(P, k)` logits, in the place of probabilities."""
        return np.asarray(np.abs((x - 1.0) % 4.0 - 2.0) - 1.0) @ self.weight.T + self.bias

    def pairs(self) -> tuple[tuple[float, ...], ...]:
        """Constants of the differences of two logits, the smallest that hold."""
        return tuple(map(tuple, np.linalg.norm(self.weight[:, None] - self.weight[None], axis=2).tolist()))


def winners(stage: Stage, p: Array) -> NDArray[np.int64]:
    """Index into `leads_to` of the target that wins under exact probabilities, or logits, `p (P, L)`."""
    top = p.argmax(1)
    if not stage.votes:
        best = np.sort(p, axis=1)
        return top if stage.tau is None else np.where(best[:, -1] - best[:, -2] >= stage.tau, top, len(stage.leads_to) - 1)
    if stage.tau is None:
        return top
    return np.where(p[np.arange(len(p)), top] >= stage.tau, top, len(stage.leads_to) - 1)


def routed_answer(tree: Tree, models: dict[str, Slab | Folded], x: Array) -> NDArray[np.int64]:
    """g(x) for every point: descend the tree by exact probabilities."""
    answer = np.full(len(x), -9)

    def walk(name: str, rows: NDArray[np.int64]) -> None:
        stage = tree.stages[name]
        won = winners(stage, models[name].probabilities(x[rows]))
        for index, target in enumerate(stage.leads_to):
            here = rows[won == index]
            if here.size:
                if isinstance(target, str):
                    walk(target, here)
                else:
                    answer[here] = target

    walk(tree.root, np.arange(len(x)))
    return answer


def random_slab(rng: np.random.Generator, dim: int, outcomes: int, sigma: float) -> Slab:
    """A random base model; every outcome owns an interval."""
    direction = rng.normal(size=dim)
    direction /= np.linalg.norm(direction)
    extra = int(rng.integers(0, 3)) if outcomes > 2 or rng.random() < 0.5 else 0
    owner = np.concatenate([rng.permutation(outcomes), rng.integers(0, outcomes, extra)])
    spread = rng.choice([0.5, 1.0, 2.5]) * sigma
    breaks = np.sort(rng.normal(rng.normal() * spread, spread, len(owner) - 1))
    return Slab(direction, breaks, owner, sigma, outcomes)


def random_folded(rng: np.random.Generator, dim: int, k: int) -> Folded:
    """Random logits."""
    return Folded(rng.normal(size=(k, dim)) * rng.choice([0.5, 1.0, 3.0]), rng.normal(size=k))


def random_tree(rng: np.random.Generator, dim: int, silent: float = 0.0) -> tuple[Tree, dict[str, Slab | Folded]]:
    """2 to 4 stages, plurality and threshold, 2 to 5 classes, shared children allowed; a share `silent` of them deterministic."""
    size, classes = int(rng.integers(2, 5)), int(rng.integers(2, 6))
    favourite = int(rng.integers(classes))
    agree = rng.choice([0.2, 0.5, 0.8])
    names = [f"s{k}" for k in range(size)]
    forced: dict[int, list[str]] = {}
    for k in range(1, size):
        forced.setdefault(int(rng.integers(0, k)), []).append(names[k])
    stages, models = [], dict[str, Slab | Folded]()
    for k, name in enumerate(names):
        threshold = rng.random() < 0.4
        must = forced.get(k, [])
        targets_wanted = max(int(rng.integers(2, 6)) + threshold, len(must), 2 + threshold)
        targets: list[int | str] = list(must)
        while len(targets) < targets_wanted:
            if k + 1 < size and rng.random() < 0.3:
                targets.append(names[int(rng.integers(k + 1, size))])
            elif rng.random() < 0.05:
                targets.append(-1)
            else:
                targets.append(favourite if rng.random() < agree else int(rng.integers(classes)))
        order = rng.permutation(len(targets))
        targets = [targets[i] for i in order]
        if silent and rng.random() < silent:
            folded = random_folded(rng, dim, len(targets) - threshold)
            targets.insert(len(targets) - threshold, -1)
            kind, lead = ("threshold", float(rng.uniform(0.05, 1.0))) if threshold else ("plurality", None)
            constants = folded.pairs() if rng.random() < 0.5 else float(np.linalg.norm(folded.weight, 2))
            stages.append(
                Stage(name, 0.0, kind, lead, tuple(targets), lipschitz=constants, rounding=float(rng.choice([0.0, 0.02])))
            )
            models[name] = folded
            continue
        sigma = float(rng.uniform(0.25, 1.0))
        outcomes = len(targets) - threshold
        tau = float(rng.uniform(0.501, 0.9)) if threshold else None
        stages.append(Stage(name, sigma, "threshold" if threshold else "plurality", tau, tuple(targets)))
        models[name] = random_slab(rng, dim, outcomes, sigma)
    return Tree.of(stages), models


def ball(rng: np.random.Generator, models: dict[str, Slab | Folded], dim: int, radius: float, *, dense: int) -> Array:
    """Points of the open ball around 0: a dense cloud, and the places where an adversary looks first."""
    if dim == 1:
        return np.linspace(-radius, radius, 2 * dense + 1)[:, None] * (1 - 1e-9)
    steepest = [m.direction for m in models.values()]
    corners = [s * a + t * b for a in steepest for b in steepest for s in (1, -1) for t in (0, 1, -1, 0.3, -0.3)]
    compass = np.concatenate([np.array(corners), rng.normal(size=(dense, dim))])
    norm = np.linalg.norm(compass, axis=1, keepdims=True)
    compass = compass[norm[:, 0] > 1e-9] / norm[norm[:, 0] > 1e-9]
    # most of them near the sphere, where the answer changes first
    lengths = radius * (1 - 1e-9) * np.array([1.0, 0.97, 0.8, 0.5])
    return (lengths[:, None, None] * compass[None]).reshape(-1, dim)


def true_radius_1d(tree: Tree, models: dict[str, Slab | Folded], c: int, most: float = 8.0, points: int = 4001) -> float:
    """Distance from 0 to the nearest input (dim 1) whose answer is not `c`: a scan, then bisection."""
    grid = np.linspace(0.0, most, points)
    best = most
    for sign in (1.0, -1.0):
        wrong = np.flatnonzero(routed_answer(tree, models, sign * grid[:, None]) != c)
        if wrong.size and grid[wrong[0]] <= best:
            low, high = (grid[wrong[0] - 1], grid[wrong[0]]) if wrong[0] else (0.0, 0.0)
            for _ in range(40):
                mid = 0.5 * (low + high)
                if routed_answer(tree, models, np.array([[sign * mid]]))[0] == c:
                    low = mid
                else:
                    high = mid
            best = min(best, high)
    return float(best)
