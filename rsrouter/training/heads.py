"""Training a head on cached noisy features, for the radii it is to certify; seconds on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsrouter.core.errors import InputError
from rsrouter.experts.registry import build_architecture
from rsrouter.router.trunk import ResidualHead
from rsrouter.training.losses import RadiusUtility, consistency_loss, radius_weights
from rsrouter.training.resume import ResumeStore, unit_key


@dataclass(frozen=True)
class HeadRecipe:
    """Hyper-parameters of a head's training.

    Attributes:
        objective: `"utility"`: the radii that the vote certifies, each weighted by what it counts (`RadiusUtility`), and
            `cross_entropy` times the cross-entropy; small weights hold farther, large ones answer better. `"consistency"`:
            cross-entropy and the consistency regulariser (Jeong and Shin 2020), of which small weights answer better.
        hidden: width of the hidden layer.
        steps: of AdamW, with a one-cycle schedule.
        batch, lr, weight_decay: as usual.
        cross_entropy: see `objective`.
        tilt: how much more radius 0 counts (`radius_weights`).
        width: of each radius's sigmoid, as a share of the largest radius; a fifth of it is the margin for confidence bounds.
        group: noisy copies of an image in a step of `"utility"`, as far as there are so many.
        consistency: weight of KL(mean prediction || each copy) of `"consistency"`.
        entropy: weight of the entropy of the mean prediction there.
    """

    objective: str = "utility"
    hidden: int = 64
    steps: int = 1000
    batch: int = 256
    lr: float = 3e-3
    weight_decay: float = 0.01
    cross_entropy: float = 0.1
    tilt: float = 1.0
    width: float = 0.125
    group: int = 8
    consistency: float = 5.0
    entropy: float = 0.5

    @property
    def label(self) -> str:
        """What tells heads of one noise level apart, as part of a module's name."""
        if self.objective == "consistency":
            return f"c{self.consistency:g}".replace(".", "_")
        return f"u{self.cross_entropy:g}".replace(".", "_") + ("" if self.tilt == 1.0 else f"t{self.tilt:g}".replace(".", "_"))


@torch.no_grad()
def as_stored(head: nn.Module) -> nn.Module:
    """`head`, its parameters rounded to numbers of float16 in place: `save_pretrained` then keeps them in half the space, and
    what votes are drawn from is what is stored. Parameters that float16 cannot hold stay as they are."""
    for parameter in head.parameters():
        rounded = parameter.half().to(parameter.dtype)
        if torch.isfinite(rounded).all():
            parameter.copy_(rounded)
    return head


@dataclass(frozen=True)
class HeadGoal:
    """What a head trained for `"utility"` is to certify.

    Attributes:
        sigma: noise level of its votes.
        radii: the radii the user cares about.
        envelope: certified accuracy of the best expert at each of them.
    """

    sigma: float
    radii: tuple[float, ...]
    envelope: tuple[float, ...]

    def utility(self, recipe: HeadRecipe) -> RadiusUtility:
        """The objective under a recipe."""
        width = recipe.width * max(self.radii)
        return RadiusUtility(self.sigma, self.radii, radius_weights(self.envelope, self.radii, recipe.tilt), width, width / 5.0)


def _start_of(parents: Mapping[str, nn.Module], like: ResidualHead, label: str) -> ResidualHead | None:
    """The parent's head of the same shape: that of the same recipe (by its name), else the first by name."""
    shapes = [t.shape for t in like.state_dict().values()]
    named = sorted(parents.items())
    fits = {n: h for n, h in named if isinstance(h, ResidualHead) and [t.shape for t in h.state_dict().values()] == shapes}
    return next((h for n, h in fits.items() if n.endswith(f"_{label}")), next(iter(fits.values()), None))


_Step = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor, torch.Generator], Tensor]


def _objective(recipe: HeadRecipe, goal: HeadGoal | None, copies: int, num_classes: int) -> _Step:
    """The loss of one step: of `forward` on some copies of some rows of the features."""
    if recipe.objective not in ("utility", "consistency") or copies < 2:
        raise InputError(
            "A head cannot be trained like this",
            expected="objective 'utility' or 'consistency', and two noisy copies or more",
            received=f"objective {recipe.objective!r}, {copies} copies",
            remedy="change the recipe",
        )
    if recipe.objective == "consistency":
        return _consistency_step(recipe, copies)
    if goal is None or not max(goal.radii, default=0.0) > 0:
        raise InputError(
            "The objective 'utility' needs radii",
            expected="a goal with a radius above 0",
            received=repr(goal),
            remedy="ask for larger radii, or use the objective 'consistency'",
        )
    return _utility_step(recipe, goal.utility(recipe), copies, num_classes)


def _utility_step(recipe: HeadRecipe, utility: RadiusUtility, copies: int, num_classes: int) -> _Step:
    group = min(recipe.group, copies)

    def step(
        forward: Callable[[Tensor], Tensor], features: Tensor, labels: Tensor, rows: Tensor, generator: torch.Generator
    ) -> Tensor:
        which = torch.randperm(copies, generator=generator)[:group]
        x = features[rows[:, None], which].float()
        logits, target = forward(x.flatten(0, 1)), labels[rows]
        own = F.softmax(logits, 1).view(len(rows), group, num_classes).mean(1)[torch.arange(len(rows)), target]
        task = F.cross_entropy(logits, target.repeat_interleave(group))
        return recipe.cross_entropy * task - utility(own).mean()

    return step


def _consistency_step(recipe: HeadRecipe, copies: int) -> _Step:
    def step(
        forward: Callable[[Tensor], Tensor], features: Tensor, labels: Tensor, rows: Tensor, generator: torch.Generator
    ) -> Tensor:
        one = torch.randint(copies, (recipe.batch,), generator=generator)
        other = (one + torch.randint(1, copies, (recipe.batch,), generator=generator)) % copies
        logits = [forward(features[rows, which].float()) for which in (one, other)]
        task = torch.stack([F.cross_entropy(each, labels[rows], reduction="none") for each in logits]).mean(0)
        return (task + consistency_loss(logits, recipe.consistency, recipe.entropy)).mean()

    return step


def train_head(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    recipe: HeadRecipe,
    goal: HeadGoal | None = None,
    seed: int,
    log: Callable[[dict[str, Any]], None] | None = None,
    store: ResumeStore | None = None,
    parents: Mapping[str, nn.Module] | None = None,
) -> ResidualHead:
    """A class head on a frozen trunk at one noise level.

    Args:
        features: `(N, copies, F + classes)` of noisy copies (`noisy_features`), two copies or more.
        labels: `(N,)` class indices.
        num_classes: number of classes.
        recipe: hyper-parameters.
        goal: what a head of the objective `"utility"` is to certify.
        seed: of initialisation and order.
        log: called with the loss now and then.
        store: a finished head is kept there, and read back.
        parents: heads by name; it starts from one of the same shape.

    Raises:
        InputError: an unknown objective, `"utility"` without a goal that asks for a radius, or a single copy.
    """
    step_of = _objective(recipe, goal, features.shape[1], num_classes)
    generator = torch.Generator().manual_seed(seed)
    n, _, width = features.shape
    mean = features.float().mean((0, 1))
    scale = features.float().std((0, 1)) + 1e-3
    head = cast(ResidualHead, build_architecture("residual_head", num_classes, {"in_features": width, "hidden": recipe.hidden}))
    first, last = cast(nn.Linear, head.layers[0]), cast(nn.Linear, head.layers[2])
    with torch.no_grad():
        first.weight.copy_(torch.randn(first.weight.shape, generator=generator) / width**0.5)
        first.bias.zero_()
        parent = _start_of(parents or {}, head, recipe.label)
        if parent is not None:  # its first layer holds the standardisation of its own data: take ours out of it
            head.load_state_dict(parent.state_dict())
            first.bias.add_(first.weight @ mean)
            first.weight.mul_(scale)
    store = store or ResumeStore()
    start = b"".join(t.numpy().tobytes() for t in head.state_dict().values())
    name = unit_key("head", features.shape, features.numpy().tobytes(), labels.numpy().tobytes(), recipe, goal, seed, start)
    found = store.get(name)
    if found is not None:
        head.load_state_dict(found["head"])
        if log is not None:
            for line in found["log"]:
                log(line)
        head.eval().requires_grad_(False)
        return head
    parameters = [first.weight, first.bias, last.weight, last.bias]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=recipe.steps)

    def forward(x: Tensor) -> Tensor:
        out: Tensor = x[:, -num_classes:] + last(F.relu(first((x - mean) / scale)))
        return out

    head.train()
    total = 0.0
    lines: list[dict[str, Any]] = []
    for step in range(recipe.steps):
        rows = torch.randint(n, (recipe.batch,), generator=generator)
        loss = step_of(forward, features, labels, rows, generator)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        total += float(loss.detach())
        if (step + 1) % 200 == 0:
            lines.append({"step": step + 1, "loss": total / 200})
            if log is not None:
                log(lines[-1])
            total = 0.0
    with torch.no_grad():  # standardisation becomes part of the first layer
        first.bias.sub_(first.weight @ (mean / scale))
        first.weight.div_(scale)
    head.eval().requires_grad_(False)
    store.put(name, {"head": dict(head.state_dict()), "log": lines})
    return head
