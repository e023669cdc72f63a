"""What any router would certify on simulated votes, by the package's own policy; nothing here is a certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsrouter.core.bounds import AlphaSplit, Array
from rsrouter.core.certify import CertifyPolicy
from rsrouter.core.plans import FixedPlan
from rsrouter.core.requests import SELECT
from rsrouter.core.tree import Tree, expert_stage, flat_tree
from rsrouter.experts.pool import ExpertPool
from rsrouter.router.flat import STAGE, FlatRouter
from rsrouter.sampling.execution import Execution
from rsrouter.training.features import noisy_features
from rsrouter.training.simulate import SimulatedVotes, accuracy
from rsrouter.training.tune import TUNE, Goal, goal_of


def replay(
    tree: Tree, voters: Mapping[str, SimulatedVotes], alpha: float, *, rule: str = "tree"
) -> tuple[NDArray[np.int64], Array]:
    """Class (-1: none) and radius of every image if the stages' votes were `voters` (one entry per stage, equal n and n0)."""
    first = next(iter(voters.values()))
    count = len(first.counts)
    policy = CertifyPolicy(tree, FixedPlan(first.n0, first.n), AlphaSplit.even(alpha, tree.paths), count, rule=rule)
    on = {network: [s.name for s in tree.stages.values() if s.network == network] for network in tree.networks}

    def whole(row: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        return np.append(row, size - row.sum())  # votes for no class are invalid ones

    while live := [i for i in range(count) if not policy.done[i]]:
        requests = policy.next_requests(live)
        answers = []
        for r in requests:
            answers.append(
                {
                    s: whole((voters[s].selection if r.purpose == SELECT else voters[s].counts)[r.image], r.count)
                    for s in on[r.network]
                }
            )
        policy.update(requests, answers)
    return np.where(policy.radius > 0.0, policy.c, -1), np.where(policy.c >= 0, policy.radius, 0.0)


class FlatCurve:
    """Simulated certified accuracy of a flat router on held-out images, for the log and for choosing between kinds.

    Args:
        pool: the experts.
        router: the router that is being trained.
        images, labels: `(N, C, H, W)` held-out images and `(N,)` classes.
        votes: `(N, K, classes + 1)` few votes of every expert on them (`label_votes`).
        radii: the radii the user cares about.
        copies: noisy copies of each image for the router's votes.
        plan_n, n0, alpha: the certification that is simulated.
        device, execution: where and how the router's trunk runs.
    """

    def __init__(
        self,
        pool: ExpertPool,
        router: FlatRouter,
        images: Tensor,
        labels: Tensor,
        votes: NDArray[np.int64],
        radii: Sequence[float],
        *,
        copies: int = 50,
        plan_n: int = 10_000,
        n0: int = 100,
        alpha: float = 1e-3,
        seed: int = 0,
        device: str | None = None,
        execution: Execution | None = None,
    ) -> None:
        self.router, self.labels, self.copies, self.seed, self.alpha = router, labels.numpy(), copies, seed, alpha
        self.plan_n, self.n0, self.images = plan_n, n0, images
        rng = np.random.default_rng(seed)
        self.experts = {
            e.name: SimulatedVotes.draw(votes[:, k], e.sigma, plan_n, n0, rng, pool.num_classes) for k, e in enumerate(pool)
        }
        self.goal: Goal = goal_of(self.experts, self.labels, radii, alpha)
        names = router.order(pool)
        self.tree = flat_tree(STAGE, router.sigma, [expert_stage(n, pool[n].sigma, pool.num_classes) for n in names])
        self.width = len(names)
        self.features: Tensor | None = None
        if router.trunk is not None:
            running: dict[str, Any] = {"device": device, "execution": execution}
            self.features = noisy_features([pool[router.trunk]], router.sigma, images, copies, seed=seed, purpose=TUNE, **running)

    @torch.inference_mode()
    def router_votes(self, module: nn.Module) -> NDArray[np.int64]:
        """`(N, K)` votes of the router on the noisy copies, the same noise at every call."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = []
        for i, image in enumerate(self.images):
            if self.features is not None:
                x = self.features[i].float()
            else:
                x = image + self.router.sigma * torch.randn((self.copies, *image.shape), generator=generator)
            rows.append(np.bincount(module(x).argmax(1).numpy(), minlength=self.width))
        return np.stack(rows)

    def look(self, module: nn.Module) -> dict[str, Any]:
        """`validation` (accuracy at every radius), `coverage` and `score` of the router as it stands."""
        training = module.training
        module.eval()
        rng = np.random.default_rng(self.seed + 1)
        drawn = SimulatedVotes.draw(self.router_votes(module), self.router.sigma, self.plan_n, self.n0, rng)
        module.train(training)
        reached = accuracy(*replay(self.tree, {STAGE: drawn, **self.experts}, self.alpha), self.labels, self.goal.radii)
        return {
            "validation": reached.tolist(),
            "coverage": self.goal.coverage(reached),
            "score": self.goal.score(reached),
        }
