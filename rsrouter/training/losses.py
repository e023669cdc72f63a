"""Objectives of router training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


def good_sets(radius: NDArray[np.float64], radii: Sequence[float]) -> Tensor:
    """`(N, len(radii), K)` floats: 1 where expert k holds the true class of image n to radius r (r = 0: at all)."""
    edges = np.maximum(np.asarray(sorted(radii), dtype=np.float64), np.nextafter(0.0, 1.0))
    return torch.from_numpy((radius[:, None, :] >= edges[None, :, None]).astype(np.float32))


def envelope_weights(good: Tensor) -> Tensor:
    """`(R,)` weights of mean 1, inverse to the share of images that the best single expert holds at each radius.

    Coverage divides by that envelope: an image lost at a radius that few images reach costs more. Where no expert holds anything
    the weight is 0.
    """
    best = good.mean(0).max(1).values
    weights = torch.where(best > 0, 1.0 / best.clamp(min=1e-6), torch.zeros_like(best))
    return weights / weights.mean().clamp(min=1e-12)


def utility_loss(logits: Tensor, good: Tensor, weights: Tensor | None = None) -> Tensor:
    """Per row, the mean over radii of -log P(vote names a good expert); `(B, K)` and `(B, R, K)` to `(B,)`.

    `weights (R,)` says how much each radius counts; None: all the same.
    """
    log_p = F.log_softmax(logits, 1)[:, None, :]
    decided = good.sum(2)
    matters: Tensor = ((decided > 0) & (decided < good.shape[2])).to(logits.dtype)
    if weights is not None:
        matters = matters * weights
    inside = torch.logsumexp(log_p.masked_fill(good == 0, -30.0), 2).clamp(max=0.0)
    return -(inside * matters).sum(1) / good.shape[1]


def dual_rs_loss(logits: Tensor, radius: Tensor) -> Tensor:
    """Per row, cross-entropy with soft labels proportional to exp(radius); `(B, K)` and `(B, K)` to `(B,)`."""
    return -(F.softmax(radius, 1) * F.log_softmax(logits, 1)).sum(1)


def consistency_loss(copies: Sequence[Tensor], weight: float, entropy: float) -> Tensor:
    """Per row, weight * KL(mean || copy) + entropy * H(mean) over noisy copies' logits (Jeong and Shin 2020)."""
    mean = torch.stack([F.softmax(c, 1) for c in copies]).mean(0).clamp(min=1e-20)
    kl = torch.stack([(mean * (mean.log() - F.log_softmax(c, 1))).sum(1) for c in copies]).mean(0)
    return weight * kl - entropy * (mean * mean.log()).sum(1)
