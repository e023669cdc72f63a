"""Recipes of `expert_training.py`: what a run is told, what a loss reads, and the seven losses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsrouter.training.heads import HeadGoal
from rsrouter.training.whole import ChainUtility, WholeRecipe


@dataclass(frozen=True)
class Settings:
    """One run: a recipe, what it trains, and for how long. Radii, steps and sigma are in units of pixels in [0,1].

    `copies` noisy copies an image; `steps` of an attack of `step` each, kept within `radius`; `weight` of the recipe's own
    loss; `entropy` of the consistency loss; `ramp` epochs over which `radius` and `weight` grow; `radii` whose mean
    certified accuracy chooses the best state; `estimate` votes an image for that, every `every` epochs. `draws` noisy copies an
    image for the teacher's smoothed predictions. Of `utility`: the share of votes `tau` from which the network answers, with the
    teacher behind it, and the certified accuracy at radius 0(.25)2, `envelope`, that radii count inversely to.

    Raises:
        ValueError: `utility` without a teacher or an envelope.
    """

    name: str
    recipe: str
    sigma: float
    epochs: int = 40
    architecture: str = "small_cnn"
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: str | None = None
    teacher: str | None = None
    copies: int = 2
    steps: int = 0
    step: float = 0.5
    radius: float = 1.0
    weight: float = 1.0
    entropy: float = 0.5
    ramp: float = 1.0
    batch: int = 256
    lr: float = 0.1
    decay: float = 2e-4
    average: float = 0.999
    shift: int = 0
    flip: bool = False
    seed: int = 0
    every: int = 4
    estimate: int = 256
    radii: tuple[float, ...] = ()
    draws: int = 64
    tau: float = 0.55
    envelope: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.recipe == "utility" and not (self.teacher and self.envelope):
            raise ValueError(f"{self.name}: the recipe 'utility' needs a teacher, the expert behind, and an envelope")


@dataclass
class Batch:
    """What a recipe's loss reads: clean images `x`, labels `y`, the teacher's probabilities `soft` at `soft_sigma`, how far
    `ramp` got."""

    x: Tensor
    y: Tensor
    soft: Tensor | None
    ramp: float
    generator: torch.Generator
    soft_sigma: float = 0.0

    def noise(self, s: Settings, copies: int | None = None) -> Tensor:
        """Gaussian noise `(copies * B, C, H, W)` at the run's sigma."""
        shape = ((copies or s.copies) * len(self.x), *self.x.shape[1:])
        return torch.randn(shape, generator=self.generator) * s.sigma

    def copies(self, s: Settings) -> Tensor:
        """The images, `copies` times."""
        return self.x.repeat(s.copies, 1, 1, 1)


class Network(nn.Module):
    """Normalisation (after the noise, as the package does) and a network; bfloat16 where `autocast`."""

    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module, mean: Sequence[float], std: Sequence[float], autocast: bool = False) -> None:
        super().__init__()
        self.module, self.autocast = module.to(memory_format=torch.channels_last), autocast  # type: ignore[call-overload]
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, noisy: Tensor) -> Tensor:
        x = ((noisy - self.mean) / self.std).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            out: Tensor = self.module(x)
        return out.float()

    def attack(
        self, start: Tensor, loss: Callable[[Tensor], Tensor], steps: int, step: float, within: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """The points after each of `steps` normalised gradient ascents on `loss`, in evaluation mode; the first is `start`."""
        self.eval()
        self.requires_grad_(False)
        points = [start]
        for _ in range(steps):
            now = points[-1].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(now), now)
            length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            points.append(within(now.detach() + step * gradient / (length + 1e-8)).detach())
        self.requires_grad_(True)
        self.train()
        return points


def mean_probabilities(logits: Tensor, copies: int) -> Tensor:
    """Mean softmax `(B, C)` of `copies` stacked copies."""
    return F.softmax(logits, 1).view(copies, -1, logits.shape[1]).mean(0)


def in_ball(centre: Tensor, radius: float) -> Callable[[Tensor], Tensor]:
    """Projection to the L2 ball around each image and to pixels in [0,1]."""
    return lambda x: (centre + (x - centre).flatten(1).renorm(2, 0, radius).view_as(x)).clamp(0, 1)


def consistency_loss(logits: Tensor, copies: int, weight: float, entropy: float) -> Tensor:
    """Jeong and Shin (2020), equation 8: KL(mean || each copy) plus the entropy of the mean."""
    mean = mean_probabilities(logits, copies).clamp(min=1e-20)
    each = F.log_softmax(logits, 1).view(copies, *mean.shape)
    return (weight * (mean * (mean.log() - each)).sum(2).mean(0) - entropy * (mean * mean.log()).sum(1)).mean()


def gaussian(net: Network, b: Batch, s: Settings) -> Tensor:
    """Cohen et al. (ICML 2019)."""
    return F.cross_entropy(net(b.copies(s) + b.noise(s)), b.y.repeat(s.copies))


def consistency(net: Network, b: Batch, s: Settings) -> Tensor:
    """Jeong and Shin (NeurIPS 2020)."""
    logits = net(b.copies(s) + b.noise(s))
    return F.cross_entropy(logits, b.y.repeat(s.copies)) + consistency_loss(logits, s.copies, s.weight * b.ramp, s.entropy)


def smoothadv(net: Network, b: Batch, s: Settings) -> Tensor:
    """Salman et al. (NeurIPS 2019): cross-entropy at images that fool the mean of the copies; `weight` adds consistency."""
    noise = b.noise(s)

    def loss(x: Tensor) -> Tensor:
        return F.nll_loss(mean_probabilities(net(x.repeat(s.copies, 1, 1, 1) + noise), s.copies).clamp(1e-20).log(), b.y)

    worst = net.attack(b.x, loss, s.steps, s.step * b.ramp, in_ball(b.x, max(s.radius * b.ramp, 1e-6)))[-1]
    logits = net(worst.repeat(s.copies, 1, 1, 1) + noise)
    total = F.cross_entropy(logits, b.y.repeat(s.copies))
    return total if s.weight == 0 else total + consistency_loss(logits, s.copies, s.weight, s.entropy)


def smoothmix(net: Network, b: Batch, s: Settings) -> Tensor:
    """Jeong et al. (NeurIPS 2021): mixes images with unrestricted adversarial ones, whose label is uniform.

    The clean side is the first step of the attack, within `radius` (0: the image itself).
    """
    noise = b.noise(s)

    def loss(x: Tensor) -> Tensor:
        return F.nll_loss(mean_probabilities(net(x.repeat(s.copies, 1, 1, 1) + noise), s.copies).clamp(1e-20).log(), b.y)

    points = net.attack(b.x, loss, s.steps, s.step, lambda x: x.clamp(0, 1))
    near = in_ball(b.x, max(s.radius * b.ramp, 1e-6))(points[1]) if s.radius else b.x
    logits = net(near.repeat(s.copies, 1, 1, 1) + noise)
    clean = mean_probabilities(logits, s.copies)
    share = torch.rand(len(b.x), 1, generator=b.generator) / 2
    mixed = (1 - share[:, :, None, None]) * near + share[:, :, None, None] * points[-1]
    wanted = ((1 - share) * clean + share / clean.shape[1]).clamp(min=1e-20)
    out = F.log_softmax(net(mixed.repeat(s.copies, 1, 1, 1) + noise), 1).view(s.copies, *clean.shape)
    kl = (wanted * (wanted.log() - out)).sum(2).mean(0)
    right = (clean.argmax(1) == b.y).float()
    return F.cross_entropy(logits, b.y.repeat(s.copies)) + s.weight * b.ramp * (right * kl).mean()


def macer(net: Network, b: Batch, s: Settings, beta: float = 16.0, margin: float = 8.0) -> Tensor:
    """Zhai et al. (ICLR 2020): cross-entropy of the mean, and a hinge on the soft radius of images that are right."""
    logits = net(b.copies(s) + b.noise(s))
    total = F.nll_loss(mean_probabilities(logits, s.copies).clamp(1e-20).log(), b.y)
    soft = mean_probabilities(logits * beta, s.copies).clamp(1e-4, 1 - 1e-4)
    top, index = soft.topk(2, 1)
    gap = math.sqrt(2) * (torch.erfinv(2 * top[:, 0] - 1) - torch.erfinv(2 * top[:, 1] - 1))
    counts = (index[:, 0] == b.y) & (gap.detach() < margin)
    return total + s.weight * b.ramp * s.sigma / 2 * ((margin - gap) * counts).sum() / len(b.y)


def cat_rs(net: Network, b: Batch, s: Settings) -> Tensor:
    """Jeong, Kim and Shin (AAAI 2023): cross-entropy of the easiest copies, as many as the image is sure of; for images
    that are sure of all, the worst copy's divergence from the teacher (without one: from the copies' mean) under noise
    moved within `radius`, its moments kept.
    """
    m, noise = s.copies, b.noise(s)
    logits = net(b.copies(s) + noise)
    soft_m = (mean_probabilities(logits.detach(), m) if b.soft is None else b.soft).repeat(m, 1)
    each = F.cross_entropy(logits, b.y.repeat(m), reduction="none").view(m, -1)
    sure = (logits.view(m, len(b.y), -1).argmax(2) == b.y).float().mean(0)
    kept = torch.binomial(torch.full_like(sure, m), sure.detach(), generator=b.generator).clamp(min=1)
    low = (each.sort(0).values * (torch.arange(m)[:, None] < kept)).sum(0) / m

    mean0 = noise.mean((1, 2, 3), keepdim=True)
    size0 = noise.square().mean((1, 2, 3), keepdim=True).sqrt()

    def within(moved: Tensor) -> Tensor:
        moved = noise + (moved - noise).flatten(1).renorm(2, 0, max(s.radius * b.ramp, 1e-6)).view_as(noise)
        size = moved.square().mean((1, 2, 3), keepdim=True).sqrt()
        return mean0 + (moved - moved.mean((1, 2, 3), keepdim=True)) / size * size0

    def divergence(out: Tensor) -> Tensor:
        return (torch.xlogy(soft_m, soft_m) - soft_m * F.log_softmax(out, 1)).sum(1)

    images = b.copies(s)
    worst = net.attack(noise, lambda e: divergence(net(images + e)).sum(), s.steps, s.step * b.ramp, within)[-1]
    high = divergence(net(images + worst)).view(m, -1).amax(0)
    return (low + s.weight * high * (kept == m)).mean()


def utility(net: Network, b: Batch, s: Settings) -> Tensor:
    """The package's smooth count of the radii that this network and the expert behind it certify together (`ChainUtility`), at
    the mean probabilities of the copies; `weight` of the cross-entropy beside it.
    """
    assert b.soft is not None  # Settings asks for a teacher
    logits, how = net(b.copies(s) + b.noise(s)), WholeRecipe(tau=s.tau)
    radii = tuple(0.25 * i for i in range(len(s.envelope)))
    count = ChainUtility(HeadGoal(s.sigma, radii, tuple(s.envelope)), how)
    behind = b.soft_sigma * torch.special.ndtri(b.soft.gather(1, b.y[:, None])[:, 0].clamp(5e-5, 1 - 5e-5))
    reached = count(mean_probabilities(how.sharpness * logits, s.copies), b.y, behind)
    return s.weight * F.cross_entropy(logits, b.y.repeat(s.copies)) - reached.mean()


RECIPES: dict[str, Callable[[Network, Batch, Settings], Tensor]] = {
    "gaussian": gaussian,
    "consistency": consistency,
    "smoothadv": smoothadv,
    "smoothmix": smoothmix,
    "macer": macer,
    "cat-rs": cat_rs,
    "utility": utility,
}
