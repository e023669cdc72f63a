"""Checkpoints as the papers' repositories write them: layers, wrappers and containers, rebuilt without this package."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class NormalizeLayer(nn.Module):
    """Mean and std as plain attributes, so that they are not in the state dict."""

    def __init__(self, means: tuple[float, ...], sds: tuple[float, ...]) -> None:
        super().__init__()
        self.means, self.sds = torch.tensor(means), torch.tensor(sds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.means[:, None, None]) / self.sds[:, None, None]


class _Block(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class PaperResNet(nn.Module):
    """The CIFAR ResNet of those repositories: ReLU modules in place, AvgPool2d(8), view."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(*(_Block(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(_Block(16, 32, 2), *(_Block(32, 32, 1) for _ in range(n - 1)))
        self.layer3 = nn.Sequential(_Block(32, 64, 2), *(_Block(64, 64, 1) for _ in range(n - 1)))
        self.avgpool = nn.AvgPool2d(8)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.avgpool(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.view(x.size(0), -1))


def scramble(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics and affine parameters, so that a BatchNorm that was not loaded shows."""
    generator = torch.Generator().manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor, low in ((m.running_mean, -0.2), (m.running_var, 0.5), (m.weight.data, 0.5), (m.bias.data, -0.2)):
                tensor.uniform_(low, low + 0.5, generator=generator)
        elif isinstance(m, nn.Conv2d | nn.Linear):
            m.weight.data.normal_(0, (2 / m.weight[0].numel()) ** 0.5, generator=generator)
    return module.eval()


def save_like_cohen(model: nn.Module, path: Path, arch: str, **options: object) -> Path:
    """`{epoch, arch, state_dict, optimizer}` of `code/train.py`; the optimizer has momentum buffers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    content = {"epoch": 90, "arch": arch, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, path, **options)
    return path
