"""Training a head on cached noisy features: cross-entropy and the consistency regulariser, seconds on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsrouter.experts.registry import build_architecture
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
    parameters = [first.weight, first.bias, last.weight, last.bias]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=recipe.steps)

    def forward(x: Tensor) -> Tensor:
        out: Tensor = x[:, -num_classes:] + last(F.relu(first((x - mean) / scale)))
        return out

    head.train()
    total = 0.0
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
        if log is not None and (step + 1) % 200 == 0:
            log({"step": step + 1, "loss": total / 200})
            total = 0.0
    with torch.no_grad():  # standardisation becomes part of the first layer
        first.bias.sub_(first.weight @ (mean / scale))
        first.weight.div_(scale)
    head.eval().requires_grad_(False)
    return head
