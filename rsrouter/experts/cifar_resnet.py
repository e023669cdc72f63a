"""The CIFAR ResNet family: the base model of nearly every published randomized-smoothing checkpoint.

He et al. 2016 (arXiv 1512.03385, section 4.2). Parameter names are those of the checkpoints of Cohen et al.,
SmoothAdv, MACER, Consistency, SmoothMix and CAT-RS: `conv1, bn1, layer{1-3}.{i}.{conv1,bn1,conv2,bn2,downsample.0,
downsample.1}, fc`, so that their files load with nothing renamed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: depths registered as `cifar_resnet<depth>`; any 6n + 2 can be built
DEPTHS = (20, 32, 44, 56, 110)


class _BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut, projected by a 1 x 1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


class CifarResNet(nn.Module):
    """Residual network for 32 x 32 images.

    Args:
        num_classes: width of the logits.
        depth: 6n + 2 layers.
        width: multiplies the 16, 32 and 64 channels (MACER's option; 1 in all published checkpoints).

    Shapes: `(B, 3, 32, 32)` to `(B, num_classes)`; `forward_features` gives `(B, 64 * width)`. It, `forward_head` and
    `get_classifier` follow timm, so a router head can stand on the features.

    Raises:
        ValueError: a depth that is not 6n + 2.
    """

    def __init__(self, num_classes: int = 10, depth: int = 110, width: int = 1) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has 6n + 2 layers, not {depth}")
        n = (depth - 2) // 6
        self.depth = depth
        self.conv1 = nn.Conv2d(3, 16 * width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16 * width)
        self.layer1 = self._layer(16 * width, 16 * width, n, 1)
        self.layer2 = self._layer(16 * width, 32 * width, n, 2)
        self.layer3 = self._layer(32 * width, 64 * width, n, 2)
        self.num_features = 64 * width
        self.fc = nn.Linear(self.num_features, num_classes)

    @staticmethod
    def _layer(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = _BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(_BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Pooled features, `(B, num_features)`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `(B, num_classes)` of pooled features, or with `pre_logits` the features themselves."""
        out: Tensor = features if pre_logits else self.fc(features)
        return out

    def get_classifier(self) -> nn.Module:
        """The last layer, as in timm."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
