"""Training a voter's own network: it starts as an expert and is trained whole, for the radii that its chain is to certify.

Heads on frozen features can only weigh what the expert still sees. Here every weight moves, at the voter's noise level, and
the objective is the tree certificate of the chain itself: a stage that answers from `tau` on, and behind it an expert whose
radius on every training image is known.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rsrouter.core.errors import InputError
from rsrouter.experts.expert import Expert
from rsrouter.router.chain import reject_unsure
from rsrouter.sampling.execution import Execution, prepare
from rsrouter.sampling.noise import stream_key
from rsrouter.training.flat_network import trainable
from rsrouter.training.heads import HeadGoal
from rsrouter.training.losses import radius_weights
from rsrouter.training.resume import ResumeStore, unit_key


@dataclass(frozen=True)
class WholeRecipe:
    """How a voter's own network is trained.

    Attributes:
        start: the expert it starts as, by name; None: the one of the least sigma that is not below the voter's.
        behind: the expert that answers where it does not, by name; None: that of the smallest sigma.
        tau: share of votes from which it answers; 0: it stands last, and nobody answers behind it.
        steps, batch, lr, weight_decay: of AdamW, with a one-cycle schedule; `batch` images a step.
        group: noisy copies of each of them.
        cross_entropy: weight of the cross-entropy of every copy beside the utility.
        tilt: how much more radius 0 counts (`radius_weights`).
        sharpness: what logits are multiplied by before the softmax whose mean stands for the share of votes.
        width: of each radius's sigmoid, as a share of the largest radius; a fifth of it is the margin for confidence bounds.
        average: decay of the moving average of the weights, which is what is kept.
    """

    start: str | None = None
    behind: str | None = None
    tau: float = 0.55
    steps: int = 1500
    batch: int = 64
    group: int = 8
    lr: float = 1e-3
    weight_decay: float = 0.01
    cross_entropy: float = 0.03
    tilt: float = 1.0
    sharpness: float = 4.0
    width: float = 0.125
    average: float = 0.995

    def __post_init__(self) -> None:
        if not (self.tau == 0 or 0.5 < self.tau < 1) or self.group < 2 or min(self.steps, self.batch) < 1:
            raise InputError(
                "A voter's own network cannot be trained like this",
                expected="tau in (1/2, 1) or 0, group of at least 2, steps and batch of at least 1",
                received=f"tau {self.tau}, group {self.group}, steps {self.steps}, batch {self.batch}",
                remedy="change the recipe",
            )

    @property
    def label(self) -> str:
        """What tells networks of one noise level apart, as part of a module's name."""
        parts = [f"w{self.cross_entropy:g}", f"from{self.tau:g}" if self.tau else "last"]
        parts += [f"t{self.tilt:g}"] if self.tilt != 1 else []
        parts += [f"{self.start}"] if self.start else []
        return "_".join(parts).replace(".", "_")


class ChainUtility:
    """A smooth count of the radii that a threshold stage and the expert behind it certify together, each weighted.

    The radius is the tree certificate of `rsrouter.core.certificates` at the mean probabilities of a few noisy copies:
    `min(e_wrong, max(e_defer, behind))` with `e_wrong = sigma * (z_tau - max z_wrong)` and
    `e_defer = sigma * (z_true - z_tau)`, `z = Phi^-1(p)`. Without a threshold it is `sigma * z_true` (Cohen et al. 2019).

    Args:
        goal: noise level, radii and envelope.
        recipe: threshold, tilt and width.
    """

    def __init__(self, goal: HeadGoal, recipe: WholeRecipe) -> None:
        self.sigma, self.width = goal.sigma, recipe.width * max(goal.radii)
        self.edges = torch.tensor(goal.radii) + self.width / 5.0
        weights = torch.tensor(radius_weights(goal.envelope, goal.radii, recipe.tilt))
        self.weights = weights / weights.sum()
        self.z_tau = math.sqrt(2.0) * float(torch.erfinv(torch.tensor(2.0 * recipe.tau - 1.0))) if recipe.tau else None

    def radius(self, p: Tensor, target: Tensor, behind: Tensor) -> Tensor:
        """`(B,)` from probabilities `(B, C)`, true classes and the radii behind `(B,)`; negative where it does not hold."""
        z = torch.special.ndtri(p.clamp(5e-5, 1.0 - 5e-5))
        own = z.gather(1, target[:, None])[:, 0]
        if self.z_tau is None:
            alone: Tensor = self.sigma * own
            return alone
        wrong = z.scatter(1, target[:, None], -torch.inf).amax(1)
        return torch.minimum(self.sigma * (self.z_tau - wrong), torch.maximum(self.sigma * (own - self.z_tau), behind))

    def __call__(self, p: Tensor, target: Tensor, behind: Tensor) -> Tensor:
        """`(B,)` utilities in (0, 1)."""
        radius = self.radius(p, target, behind)
        reached: Tensor = torch.sigmoid((radius[:, None] - self.edges) / self.width) @ self.weights
        return reached


def update_average(average: dict[str, Tensor], module: nn.Module, decay: float, done: int) -> None:
    """Moves a moving average of a module's weights on by one step; the decay grows to `decay` over the first steps.

    Args:
        average: by name of the module's state, changed in place; whole numbers (counters) are copied.
        module: after the step.
        decay: of the average, below 1.
        done: steps so far, this one included.
    """
    share = 1.0 - min(decay, (1 + done) / (10 + done))
    for key, value in module.state_dict().items():
        if value.dtype.is_floating_point:
            average[key].lerp_(value, share)
        else:
            average[key].copy_(value)


def train_whole(
    expert: Expert,
    images: Tensor,
    labels: Tensor,
    behind: Tensor,
    *,
    recipe: WholeRecipe,
    goal: HeadGoal,
    seed: int,
    log: Callable[[dict[str, Any]], None],
    store: ResumeStore,
) -> nn.Module:
    """A network with the expert's architecture, started at its weights; the expert is not touched.

    Args:
        expert: where it starts, and whose normalisation its images get.
        images, labels: `(N, C, H, W)` pixels in [0,1] and `(N,)` classes.
        behind: `(N,)` how far the expert behind holds the true class; 0 where it does not.
        recipe: hyper-parameters.
        goal: noise level, radii and envelope.
        seed: of order and noise.
        log: called with the loss now and then.
        store: the state is kept there now and then, and read back.
    """
    module = trainable(copy.deepcopy(expert.module).cpu()).train()
    seen: nn.Module = expert.normalised(module)
    utility, classes = ChainUtility(goal, recipe), expert.num_classes
    average: dict[str, Tensor] = {k: v.clone() for k, v in module.state_dict().items()}
    optimiser = torch.optim.AdamW(module.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=recipe.steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(seed)
    content = [t.contiguous().numpy().tobytes() for t in (images, labels, behind)]
    name = unit_key("whole", expert.digest, *content, recipe, goal, seed)
    done, total, lines, found = 0, 0.0, list[dict[str, Any]](), store.get(name)
    if found is not None:
        module.load_state_dict(found["module"])
        optimiser.load_state_dict(found["optimiser"])
        schedule.load_state_dict(found["schedule"])
        generator.set_state(found["generator"])
        average, done, total, lines = (found[k] for k in ("average", "done", "total", "lines"))
        for line in lines:
            log(line)
    while done < recipe.steps:
        rows = torch.randint(len(images), (recipe.batch,), generator=generator)
        x = images[rows].repeat_interleave(recipe.group, 0)
        logits = seen(x + goal.sigma * torch.randn(x.shape, generator=generator))
        p = F.softmax(recipe.sharpness * logits, 1).view(recipe.batch, recipe.group, classes).mean(1)
        task = F.cross_entropy(logits, labels[rows].repeat_interleave(recipe.group))
        loss = recipe.cross_entropy * task - utility(p, labels[rows], behind[rows]).mean()
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        done, total = done + 1, total + float(loss.detach())
        update_average(average, module, recipe.average, done)
        if done % 100 == 0 or done == recipe.steps:
            lines.append({"step": done, "loss": total / (done % 100 or 100)})
            total = 0.0
            log(lines[-1])
        if store.due(name) or (done == recipe.steps and store.folder is not None):
            state: dict[str, Any] = {
                "module": module.state_dict(),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
            }
            state |= {"generator": generator.get_state(), "average": average, "done": done, "total": total, "lines": lines}
            store.put(name, state)
    module.load_state_dict(average)
    return module.eval().requires_grad_(False)


@torch.inference_mode()
def whole_votes(
    expert: Expert,
    module: nn.Module,
    sigma: float,
    images: Tensor,
    copies: int,
    *,
    seed: int,
    purpose: str,
    store: ResumeStore | None = None,
    confidences: Sequence[float] = (0.0,),
    dtype: str = "float32",
) -> NDArray[np.int64]:
    """`(M, N, C)` votes of a network on `copies` noisy copies of each image, the noise keyed by purpose and seed.

    Args:
        expert: whose normalisation its images get.
        module: normalised images to logits.
        sigma: of the noise.
        images: `(N, C, H, W)` pixels in [0,1].
        copies: votes per image.
        seed, purpose: key the noise.
        store: the votes are kept there, and read back.
        dtype: `bfloat16`: the network runs in it, as a certification in it does; anything else: float32.
        confidences: the M ways to count the same copies: only where the softmax gives a class this probability (`reject_unsure`).
    """
    store, content = store or ResumeStore(), images.contiguous().numpy().tobytes()
    weights = [t.contiguous().numpy().tobytes() for t in module.state_dict().values()]
    half = dtype == "bfloat16"
    name = unit_key("whole votes", expert.digest, *weights, sigma, content, copies, seed, purpose, *confidences, half)
    found = store.get(name)
    if found is not None:
        kept: NDArray[np.int64] = found.numpy()
        return kept
    seen: Callable[[Tensor], Tensor] = expert.normalised(module)
    if half:
        seen = prepare(expert.normalised(module), Execution(dtype=dtype), torch.device("cpu"), images.shape[1:])
    key = stream_key(purpose, seed, "whole", repr(float(sigma)), images.shape[0], images[:1].numpy().tobytes())
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    votes = torch.zeros(len(confidences), len(images), expert.num_classes + 1, dtype=torch.int64)
    for _ in range(copies):
        for rows in torch.split(torch.arange(len(images)), 500):
            x = images[rows]
            logits = seen(x + sigma * torch.randn(x.shape, generator=generator)).float()
            for counted, confidence in zip(votes, confidences, strict=True):
                counted[rows, votes_at(logits, confidence)] += 1
    votes = votes[:, :, :-1].contiguous()
    store.put(name, votes, small=True)
    return votes.numpy()


def votes_at(logits: Tensor, confidence: float) -> Tensor:
    """What each row of `(B, C)` votes for; C where no class is as probable as `confidence`."""
    return (reject_unsure(logits, confidence) if confidence else logits).argmax(1)
