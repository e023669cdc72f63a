"""Two more base classifiers of published randomized-smoothing checkpoints: LeNet for MNIST and DenseNet-40 for CIFAR.

Parameter names are those of the checkpoints of MACER (`conv1, conv2, fc1, fc2`; Zhai et al. 2020), of consistency regularisation
and SmoothMix (the same LeNet, and `features.block{i}.layer{j}.brc_{k}`; Jeong and Shin 2020, Jeong et al. 2021), so that their
files load with nothing renamed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LeNet(nn.Module):
    """LeNet with 20 and 50 channels.

    Args:
        num_classes: width of the logits.

    Shapes: `(B, 1, 28, 28)` to `(B, num_classes)`; `forward_features`, `forward_head` and `get_classifier` follow timm.

    >>> LeNet(10)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    num_features = 500

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features `(B, 500)`."""
        for layer in (self.conv1, self.conv2):
            x = F.max_pool2d(F.relu(layer(x)), 2)
        return F.relu(self.fc1(torch.flatten(x, 1)))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `(B, num_classes)`, or with `pre_logits` the features themselves."""
        return features if pre_logits else self.fc2(features)

    def get_classifier(self) -> nn.Module:
        """The last layer, as in timm."""
        return self.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _brc(in_channels: int, channels: int, kernel: int) -> nn.Sequential:
    """Batch norm, ReLU, convolution."""
    block = nn.Sequential()
    block.add_module("norm", nn.BatchNorm2d(in_channels))
    block.add_module("relu", nn.ReLU())
    block.add_module("conv", nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False))
    return block


class _DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.brc_1 = _brc(channels, 4 * growth, 1)
        self.brc_2 = _brc(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.brc_2(self.brc_1(x))], 1)


class DenseNet40(nn.Module):
    """DenseNet-BC of 40 layers for 32 x 32 images (Huang et al. 2017), three blocks of six layers, no compression.

    Args:
        num_classes: width of the logits.
        growth: channels that each layer adds.

    Shapes: `(B, 3, 32, 32)` to `(B, num_classes)`; `forward_features`, `forward_head` and `get_classifier` follow timm.

    >>> DenseNet40(10, growth=4).eval()(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(self, num_classes: int = 10, growth: int = 12) -> None:
        super().__init__()
        channels = 2 * growth
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, channels, 3, padding=1, bias=False))
        for number in (1, 2, 3):
            block = nn.Sequential()
            for i in range(6):
                block.add_module(f"layer{i + 1}", _DenseLayer(channels, growth))
                channels += growth
            self.features.add_module(f"block{number}", block)
            if number < 3:
                self.features.add_module(f"trans{number}", nn.AvgPool2d(2))
        self.features.add_module("norm_last", nn.BatchNorm2d(channels))
        self.num_features = channels
        self.classifier = nn.Linear(channels, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Pooled features, `(B, num_features)`."""
        return torch.flatten(F.adaptive_avg_pool2d(F.relu(self.features(x)), 1), 1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `(B, num_classes)`, or with `pre_logits` the features themselves."""
        return features if pre_logits else self.classifier(features)

    def get_classifier(self) -> nn.Module:
        """The last layer, as in timm."""
        return self.classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
