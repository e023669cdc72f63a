"""A small convolutional network for small images whose objects lie where they always lie (LeNet's layout, batch-normalised)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SmallCNN(nn.Module):
    """Two strided convolutions and a hidden layer: LeNet-5's layout (LeCun et al. 1998) without pooling, about five times
    as fast as `SmallResNet`.

    Args:
        num_classes: width of the logits.
        in_channels: channels of the image.
        channels: of the two convolutions, each of which halves the resolution.
        kernels: their (odd) sizes.
        hidden: width of the layer before the logits.
        size: height and width of the images, in pixels; a multiple of four.

    Shapes: `(B, in_channels, size, size)` to `(B, num_classes)`; `forward_features` gives `(B, channels[1], size / 4, size / 4)`.
    It, `forward_head` and `get_classifier` follow timm, so a router head can stand on the features.

    >>> import torch
    >>> SmallCNN()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        channels: tuple[int, int] = (16, 32),
        kernels: tuple[int, int] = (5, 3),
        hidden: int = 100,
        size: int = 28,
    ) -> None:
        super().__init__()
        first, second = channels
        self.conv1 = nn.Conv2d(in_channels, first, kernels[0], 2, kernels[0] // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, kernels[1], 2, kernels[1] // 2, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.fc1 = nn.Linear(second * (size // 4) ** 2, hidden, bias=False)
        self.bn3 = nn.BatchNorm1d(hidden)
        self.num_features = hidden
        self.fc = nn.Linear(hidden, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map `(B, channels[1], size / 4, size / 4)`."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `(B, num_classes)` of a feature map, or with `pre_logits` the hidden layer `(B, hidden)`."""
        inner = F.relu(self.bn3(self.fc1(x.flatten(1))))
        return inner if pre_logits else self.fc(inner)

    def get_classifier(self) -> nn.Module:
        """The last layer, as in timm."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
