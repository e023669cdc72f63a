"""Objectives of router training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def named_radius(copies: Sequence[Tensor], radius: Tensor, order: Tensor, which: str) -> Tensor:
    """Per row, the radius at the largest (`"strong"`) or smallest (`"weak"`) sigma named by some copy: Dual RS's w_r.

    Args:
        copies: `(B, K)` logits of each noisy copy.
        radius: `(B, K)` radii of the experts behind the logits.
        order: `(K,)` rank of each expert's sigma.
        which: `"strong"` or `"weak"`.
    """
    named = torch.stack([order[c.argmax(1)] for c in copies])
    rank = named.amax(0) if which == "strong" else named.amin(0)
    return radius.gather(1, order.argsort()[rank][:, None])[:, 0]


def consistency_loss(copies: Sequence[Tensor], weight: float, entropy: float) -> Tensor:
    """Per row, weight * KL(mean || copy) + entropy * H(mean) over noisy copies' logits (Jeong and Shin 2020)."""
    mean = torch.stack([F.softmax(c, 1) for c in copies]).mean(0).clamp(min=1e-20)
    kl = torch.stack([(mean * (mean.log() - F.log_softmax(c, 1))).sum(1) for c in copies]).mean(0)
    return weight * kl - entropy * (mean * mean.log()).sum(1)


@dataclass(frozen=True)
class RadiusUtility:
    """A smooth count of the radii that a smoothed vote certifies for the true class, each weighted (ours).

    The radius is `sigma * Phi^-1(p)` (Cohen et al. 2019) with `p` the mean probability of the true class over noisy copies, as in
    MACER (Zhai et al. 2020), which maximises it where an image is classified correctly. Here each radius of the user's grid
    counts by itself, through a sigmoid, so that an image out of reach of a radius pays nothing for it.

    Attributes:
        sigma: noise level of the vote.
        radii: of the grid.
        weights: of each radius, not negative.
        width: of the sigmoid, in units of the radius.
        slack: how far past a radius the sigmoid has its middle: confidence bounds need a margin.
    """

    sigma: float
    radii: tuple[float, ...]
    weights: tuple[float, ...]
    width: float
    slack: float

    def __call__(self, p: Tensor) -> Tensor:
        """Utility in (0, 1) of each probability, `(B,)` to `(B,)`; past what 10,000 votes or so can tell it is flat."""
        radius = self.sigma * torch.special.ndtri(p.double().clamp(5e-5, 1.0 - 5e-5))
        edges, weights = (torch.tensor(v, dtype=torch.float64) for v in (self.radii, self.weights))
        reached: Tensor = torch.sigmoid((radius[:, None] - edges - self.slack) / self.width) @ (weights / weights.sum())
        return reached.to(p.dtype)


def radius_weights(envelope: Sequence[float], radii: Sequence[float], tilt: float) -> tuple[float, ...]:
    """What each radius counts: inversely to the envelope there, as coverage counts it; 0 where no expert holds anything (all
    alike where none does anywhere).

    `tilt` multiplies the weight of radius 0, and less and less those up to a quarter of the largest radius.
    """
    far = max(max(radii), 1e-12)
    if not any(e > 0 for e in envelope):
        envelope = [1.0] * len(radii)
    return tuple(
        (1.0 + (tilt - 1.0) * max(0.0, 1.0 - 4.0 * r / far)) / e if e > 0 else 0.0 for e, r in zip(envelope, radii, strict=True)
    )
