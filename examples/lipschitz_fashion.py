"""Trains a 1-Lipschitz network on Fashion-MNIST in a few CPU minutes: an expert that needs no votes.

    python examples/lipschitz_fashion.py --data /usr/share/datasets/fashion-mnist --out lipschitz-fashion

The dense layers are kept orthonormal by Bjorck and Bowie's iteration (Anil, Lucas and Grosse 2019, arXiv 1811.05381), with
GroupSort between them; the loss is cross-entropy on scaled logits, whose scale trades accuracy for margins. What is written is
plain: the constant that certificates rest on is computed from the stored weights, not from what training meant to keep.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rsrouter import Expert
from rsrouter.data import load_data
from rsrouter.experts.lipschitz import GroupSort

WIDTHS = (784, 256, 256, 256, 10)


def network(widths: tuple[int, ...] = WIDTHS) -> nn.Sequential:
    """Dense layers with GroupSort between them, from `(B, 1, 28, 28)` pixels to logits."""
    layers: list[nn.Module] = [nn.Flatten()]
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), GroupSort()]
    return nn.Sequential(*layers[:-1])


def orthonormal(weight: Tensor, steps: int) -> Tensor:
    """The rows (or columns) of `weight` made orthonormal, about: `W <- 3/2 W - 1/2 W W^T W`."""
    w = weight / torch.linalg.matrix_norm(weight.detach(), 2).clamp_min(1e-12) if steps > 10 else weight
    if w.shape[0] > w.shape[1]:
        return orthonormal(weight.T, steps).T
    for _ in range(steps):
        w = 1.5 * w - 0.5 * (w @ w.T) @ w
    return w


def forward(net: nn.Sequential, x: Tensor, steps: int) -> Tensor:
    for layer in net:
        x = nn.functional.linear(x, orthonormal(layer.weight, steps), layer.bias) if isinstance(layer, nn.Linear) else layer(x)
    return x


def train(images: Tensor, labels: Tensor, *, epochs: int, scale: float, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = network()
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
    batch = 256
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, pct_start=0.2, total_steps=epochs * (len(images) // batch))
    for epoch in range(epochs):
        start, right = time.time(), 0
        for rows in torch.randperm(len(images))[: len(images) // batch * batch].split(batch):
            x = images[rows]
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
            logits = forward(net, x, 3)
            loss = nn.functional.cross_entropy(scale * logits, labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            right += int((logits.argmax(1) == labels[rows]).sum())
            with torch.no_grad():  # close to the manifold, where few steps suffice
                for layer in net:
                    if isinstance(layer, nn.Linear):
                        layer.weight.copy_(orthonormal(layer.weight, 3))
        print(f"epoch {epoch + 1}: {right / len(images):.3f} right, {time.time() - start:.0f} s", flush=True)
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(orthonormal(layer.weight.double(), 20).float())
    return net.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with the four idx files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--count", type=int, default=60_000, help="training images; fewer are faster")
    parser.add_argument("--scale", type=float, default=8.0, help="of the logits in the loss; smaller gives larger margins")
    arguments = parser.parse_args()
    data = load_data(arguments.data, split="train")
    images, labels = data.batch(range(min(arguments.count, len(data))))
    net = train(images, labels, epochs=arguments.epochs, scale=arguments.scale)
    expert = Expert(net, lipschitz="compute", num_classes=10, input_shape=(1, 28, 28))
    print(expert, expert.lipschitz)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, arguments.out / "lipschitz.safetensors")


if __name__ == "__main__":
    main()
