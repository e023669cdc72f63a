"""Training a head on cached noisy features: cross-entropy and the consistency regulariser, seconds on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsrouter.experts.registry import build_architecture
from rsrouter.router.checkpoint import current, unit_key
from rsrouter.router.trunk import ResidualHead
from rsrouter.training.losses import consistency_loss


@dataclass(frozen=True)
class HeadRecipe:
    """Hyper-parameters of a head's training.

    Attributes:
        hidden: width of the hidden layer.
        steps: of AdamW, with a one-cycle schedule.
        batch, lr, weight_decay: as usual.
        consistency: weight of KL(mean prediction || each copy).
        entropy: weight of the entropy of the mean prediction.
    """

    hidden: int = 64
    steps: int = 1000
    batch: int = 256
    lr: float = 3e-3
    weight_decay: float = 0.01
    consistency: float = 5.0
    entropy: float = 0.5


_PARENTS: ContextVar[Mapping[str, nn.Module] | None] = ContextVar("rsrouter_parent_heads", default=None)


@contextmanager
def starting_from(heads: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the `with` block `train_head` starts from one of `heads` where one has the shape."""
    token = _PARENTS.set(dict(heads))
    try:
        yield
    finally:
        _PARENTS.reset(token)


def _parent(like: ResidualHead, consistency: float) -> ResidualHead | None:
    """The parent's head of the same shape: that of the same consistency weight (by its name), else the first by name."""
    shapes = [t.shape for t in like.state_dict().values()]
    named = sorted((_PARENTS.get() or {}).items())
    fits = {n: h for n, h in named if isinstance(h, ResidualHead) and [t.shape for t in h.state_dict().values()] == shapes}
    ending = f"_{consistency:g}".replace(".", "_")
    return next((h for n, h in fits.items() if n.endswith(ending)), next(iter(fits.values()), None))


def train_head(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    recipe: HeadRecipe,
    seed: int,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> ResidualHead:
    """A class head on a frozen trunk at one noise level.

    Inside `starting_from` it goes on from a parent's head; inside a run with a checkpoint a finished head is read back.

    Args:
        features: `(N, copies, F + classes)` of noisy copies (`noisy_features`), two copies or more.
        labels: `(N,)` class indices.
        num_classes: number of classes.
        recipe: hyper-parameters.
        seed: of initialisation and order.
        log: called with the loss now and then.
    """
    generator = torch.Generator().manual_seed(seed)
    n, copies, width = features.shape
    mean = features.float().mean((0, 1))
    scale = features.float().std((0, 1)) + 1e-3
    head = cast(ResidualHead, build_architecture("residual_head", num_classes, {"in_features": width, "hidden": recipe.hidden}))
    first, last = cast(nn.Linear, head.layers[0]), cast(nn.Linear, head.layers[2])
    with torch.no_grad():
        first.weight.copy_(torch.randn(first.weight.shape, generator=generator) / width**0.5)
        first.bias.zero_()
        parent = _parent(head, recipe.consistency)
        if parent is not None:  # its first layer holds the standardisation of its own data: take ours out of it
            head.load_state_dict(parent.state_dict())
            first.bias.add_(first.weight @ mean)
            first.weight.mul_(scale)
    store = current()
    start = b"".join(t.numpy().tobytes() for t in head.state_dict().values())
    name = unit_key("head", features.shape, features.numpy().tobytes(), labels.numpy().tobytes(), recipe, seed, start)
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
        one = torch.randint(copies, (recipe.batch,), generator=generator)
        other = (one + torch.randint(1, copies, (recipe.batch,), generator=generator)) % copies
        logits = [forward(features[rows, which].float()) for which in (one, other)]
        task = torch.stack([F.cross_entropy(each, labels[rows], reduction="none") for each in logits]).mean(0)
        loss = (task + consistency_loss(logits, recipe.consistency, recipe.entropy)).mean()
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
