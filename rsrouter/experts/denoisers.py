"""Denoisers that stand before a classifier: DnCNN as in denoised smoothing, and a small UNet for diffusion."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DnCNN(nn.Module):
    """Residual denoiser of Zhang et al. 2017 in the variant of denoised smoothing (Salman et al. 2020, arXiv 2003.01908).

    Args:
        depth: number of convolutions.
        n_channels: hidden channels (64; the "wide" published ones use 128).
        image_channels: channels of the image.

    Shapes: noisy images `(B, C, H, W)` on [0,1] pixels to denoised ones, same shape. Keys: `dncnn.*`.
    """

    def __init__(self, depth: int = 17, n_channels: int = 64, image_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(image_channels, n_channels, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [
                nn.Conv2d(n_channels, n_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(n_channels, eps=1e-4),
                nn.ReLU(),
            ]
        layers.append(nn.Conv2d(n_channels, image_channels, 3, padding=1, bias=False))
        self.dncnn = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.dncnn(x)
        return x - residual


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding `(B, width)` of time steps `(B,)` (Ho et al. 2020)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], 1)


class _TimeBlock(nn.Module):
    """GroupNorm residual block whose activations are shifted by the time embedding."""

    def __init__(self, in_channels: int, channels: int, time_width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.time = nn.Linear(time_width, channels)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(t)[:, :, None, None]
        out: Tensor = self.conv2(F.silu(self.norm2(h))) + self.skip(x)
        return out


class SmallUNet(nn.Module):
    """A small noise-predicting UNet (Ho et al. 2020 without attention), enough for images of about 28 x 28.

    Args:
        image_channels: channels of the image.
        width: channels at full resolution, a multiple of 8; doubled at half and at quarter resolution.

    Shapes: `(x_t (B, C, H, W) on [-1,1], t (B,))` to the predicted noise `(B, C, H, W)`; H and W divisible by 4.
    """

    def __init__(self, image_channels: int = 1, width: int = 32) -> None:
        super().__init__()
        self.width, time_width = width, 4 * width
        self.embed = nn.Sequential(nn.Linear(width, time_width), nn.SiLU(), nn.Linear(time_width, time_width), nn.SiLU())
        self.stem = nn.Conv2d(image_channels, width, 3, padding=1)
        self.down1 = _TimeBlock(width, width, time_width)
        self.pool1 = nn.Conv2d(width, width, 3, 2, 1)
        self.down2 = _TimeBlock(width, 2 * width, time_width)
        self.pool2 = nn.Conv2d(2 * width, 2 * width, 3, 2, 1)
        self.middle = _TimeBlock(2 * width, 2 * width, time_width)
        self.up2 = _TimeBlock(4 * width, 2 * width, time_width)
        self.up1 = _TimeBlock(3 * width, width, time_width)
        self.out = nn.Conv2d(width, image_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.embed(timestep_embedding(t, self.width))
        a = self.down1(self.stem(x), time)
        b = self.down2(self.pool1(a), time)
        h = self.middle(self.pool2(b), time)
        h = self.up2(torch.cat([F.interpolate(h, scale_factor=2.0), b], 1), time)
        h = self.up1(torch.cat([F.interpolate(h, scale_factor=2.0), a], 1), time)
        noise: Tensor = self.out(F.silu(h))
        return noise
