"""A small residual network for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016), batch-normalised."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


class SmallResNet(nn.Module):
    """Residual network with a strided 5 x 5 stem, for images of about 28 x 28.

    Args:
        num_classes: width of the logits.
        in_channels: channels of the image.
        width: channels after the stem, which halves the resolution.
        blocks: `(channels, stride)` of each residual block.

    Shapes: `(B, in_channels, H, W)` to `(B, num_classes)`; `forward_features`,
    `forward_head` and `get_classifier` follow timm, so a router head can stand on the features.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        width: int = 32,
        blocks: Sequence[Sequence[int]] = ((64, 2), (64, 1)),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 5, 2, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages = []
        channels = width
        for out_channels, stride in blocks:
            stages.append(_Block(channels, out_channels, stride))
            channels = out_channels
        self.layers = nn.Sequential(*stages)
        self.num_features = channels
        self.fc = nn.Linear(channels, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map `(B, num_features, h, w)`."""
        features: Tensor = self.layers(F.relu(self.bn1(self.conv1(x))))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `(B, num_classes)` of a feature map, or with `pre_logits` its pooled features `(B, num_features)`."""
        pooled = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return pooled if pre_logits else self.fc(pooled)

    def get_classifier(self) -> nn.Module:
        """The last layer, as in timm."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
