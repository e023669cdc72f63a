"""Attacks inside the certified ball: projected gradient descent on the routed classifier, averaged over noise."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rsrouter.core.tree import Tree
from rsrouter.process import usual_settings
from rsrouter.router.chain import least_confidence
from rsrouter.sampling.engine import VoteModel

#: Of the softmax that stands for votes which need a confidence.
_SHARPNESS = 8.0


def soft_answer(tree: Tree, shares: dict[str, Tensor], c: Tensor) -> Tensor:
    """A differentiable stand-in for "the routed classifier answers c": `(B,)` in [0, 1].

    Every decision is replaced by a weight: an outcome's vote share at a plurality stage, a steep sigmoid of share minus
    threshold at a threshold stage.

    Args:
        tree: the stages.
        shares: stage name to `(B, L)` vote shares (softmax averaged over noise, invalid votes left out).
        c: `(B,)` classes.
    """
    value: dict[str, Tensor] = {}
    for name in tree.order:
        stage, p = tree.stages[name], shares[name]
        if stage.tau is None:
            weights = p
        else:
            at = p
            if not stage.votes:  # by how much each logit leads the others
                z = p.clamp_min(1e-30).log()
                best = z.topk(2, 1).values
                at = z - torch.where(z == best[:, :1], best[:, 1:], best[:, :1])
            wins = torch.sigmoid((at - stage.tau) * 20.0)
            weights = torch.cat([wins, (1.0 - wins.sum(1, keepdim=True)).clamp_min(0.0)], 1)
        targets = stage.leads_to if stage.tau is not None else stage.leads_to[: p.shape[1]]
        # a threshold stage's last target is its deferral; votes count the valid outcomes only
        kept = [*range(p.shape[1]), *([len(targets) - 1] if stage.tau is not None else [])]
        total = torch.zeros_like(p[:, 0])
        for column, index in enumerate(kept):
            target = targets[index]
            hit = value[target] if isinstance(target, str) else (c == int(target)).to(p.dtype)
            total = total + weights[:, column] * hit
        value[name] = total
    return value[tree.root]


def vote_shares(models: Sequence[VoteModel], x: Tensor, samples: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Softmax outputs of every stage, averaged over `samples` noisy copies of `x (B, C, H, W)`: stage to `(B, L)`."""
    shares: dict[str, Tensor] = {}
    for model in models:
        noise = torch.randn((samples, *x.shape), generator=generator, device=x.device)
        noisy = (x[None] + model.sigma * noise).flatten(0, 1)
        output: Any = model.module(noisy)
        heads = output if isinstance(output, tuple | list) else (output,)
        for place, (stage, logits) in enumerate(zip(model.stages, heads, strict=True)):
            # where votes need a confidence, the softmax gives their rejection the same share everywhere: nearer to votes, then
            sharp = _SHARPNESS if least_confidence(model.module, place) else 1.0
            shares[stage] = (sharp * logits).softmax(1).view(samples, len(x), -1).mean(0)
    return shares


@usual_settings()
def attack(
    tree: Tree,
    models: Sequence[VoteModel],
    x: Tensor,
    c: Tensor,
    radius: Tensor,
    *,
    steps: int = 20,
    samples: int = 16,
    seed: int = 0,
    eight_bit: bool = False,
) -> Tensor:
    """Points strictly inside the balls at which the routed classifier is least sure of `c` (Salman et al. 2019, SmoothAdv's PGD).

    Args:
        tree, models: the routed classifier.
        x: `(B, C, H, W)` pixels in [0,1].
        c: `(B,)` certified classes.
        radius: `(B,)` certified radii.
        steps: gradient steps, each on fresh noise.
        samples: noisy copies per step.
        seed: of the attack's noise.
        eight_bit: keep to the grid of 8-bit pixels (what `noise="sound"` certifies).

    Returns:
        `(B, C, H, W)` points in [0,1], each less than `radius` from its image.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    # copies: what a user's module keeps of a forward pass, and its mode, stay as they are
    models = [replace(model, module=copy.deepcopy(model.module).eval()) for model in models]
    limit = (radius * (1.0 - 1e-4)).to(x.dtype).view(-1, 1, 1, 1)
    # a first push in a random direction: at the image itself gradients may vanish
    delta = _onto(torch.randn(x.shape, generator=generator, device=x.device), 0.1 * limit, exactly=True)
    for step in range(steps):
        at = (x + delta).clamp(0.0, 1.0).requires_grad_(True)
        value = soft_answer(tree, vote_shares(models, at, samples, generator), c)
        (gradient,) = torch.autograd.grad(torch.log(value + 1e-12).sum(), at)
        size = limit * (2.5 / steps if step < steps // 2 else 1.25 / steps)
        delta = _onto(at.detach() - x - _onto(gradient, size, exactly=True), limit)
    found = (x + delta).clamp(0.0, 1.0)  # towards x, since x lies in the box
    if eight_bit:
        found = (x * 255.0).round() + ((found - x) * 255.0).trunc()
        found = found.clamp(0.0, 255.0) / 255.0
    return found.detach()


def _onto(delta: Tensor, limit: Tensor, *, exactly: bool = False) -> Tensor:
    """Each row scaled to norm `limit`, or only where it is longer."""
    norm = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-20)
    scale = limit / norm
    scaled: Tensor = delta * (scale if exactly else scale.clamp_max(1.0))
    return scaled
