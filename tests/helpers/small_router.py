"""A router over two linear experts on 4 x 4 images of three classes: certifies in milliseconds.

Class k of an image is the column that is bright; column 3 is never. The experts' weights are made by hand, so that
they are right under noise, and differ between the two sigmas.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rsrouter import Expert, ExpertPool, FixedPlan, FlatRouter, RoutedSmooth, load_expert
from rsrouter.data import ImageData, from_arrays
from rsrouter.experts.describe import describe_module
from rsrouter.jobs import certify_table
from rsrouter.results import Table
from tests.helpers.hub_server import HubServer

SHAPE, CLASSES = (1, 4, 4), 3
PLAN = FixedPlan(50, 1000)


def images(count: int = 12, seed: int = 0) -> ImageData:
    """8-bit images with labels; every third one is dim, so that some abstain or have small radii."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    pixels = rng.integers(60, 120, (count, *SHAPE))
    for i, label in enumerate(labels):
        pixels[i, 0, :, label] += 12 if i % 4 == 3 else 90
    return from_arrays(pixels.astype(np.uint8), labels, name="bright columns")


def expert(sigma: float, *, tilt: float = 0.0) -> Expert:
    """Logit k is the brightness of column k."""
    linear = nn.Linear(16, CLASSES)
    weight = torch.zeros(CLASSES, 4, 4)
    for k in range(CLASSES):
        weight[k, :, k] = 1.0
    with torch.no_grad():
        linear.weight.copy_(weight.reshape(CLASSES, 16) + tilt * torch.linspace(-1, 1, 16))
        linear.bias.copy_(torch.tensor([0.0, tilt, 0.0]))
    module = nn.Sequential(nn.Flatten(), linear)
    return Expert(module, sigma=sigma, num_classes=CLASSES, input_shape=SHAPE, name=f"sigma_{sigma:g}")


def router_module() -> nn.Module:
    """Names the small-sigma expert for images with a bright first column."""
    linear = nn.Linear(16, 2)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[0] += torch.tensor([1.5, 0, 0, 0] * 4)
        linear.bias.copy_(torch.tensor([-3.0, 0.0]))
    return nn.Sequential(nn.Flatten(), linear)


def put_experts(hub: HubServer, folder: Path) -> ExpertPool:
    """Both experts, published on the loopback Hub and loaded from there."""
    loaded = []
    for sigma, tilt in ((0.25, 0.0), (0.5, 0.01)):
        name = f"lab/sigma-{sigma:g}"
        hub.put(name, expert_files(expert(sigma, tilt=tilt), folder))
        loaded.append(load_expert(f"hf-hub:{name}"))
    return ExpertPool(loaded)


def expert_files(made: Expert, folder: Path) -> dict[str, bytes]:
    """What the repository of an expert holds."""
    save_file(made.module.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "torch_layers",
        "kwargs": {"description": describe_module(made.module)},
        "sigma": made.sigma,
        "num_classes": CLASSES,
        "input_shape": SHAPE,
        "mean": None,
        "std": None,
        "licence": "mit",
    }
    return {"model.safetensors": (folder / "model.safetensors").read_bytes(), "config.json": json.dumps(config).encode()}


def routed(pool: ExpertPool) -> RoutedSmooth:
    """The router over `pool`."""
    return RoutedSmooth(pool, FlatRouter(router_module(), sigma=0.5))


def run_folder(router: RoutedSmooth, folder: Path, data: ImageData | None = None) -> Table:
    """A run as `rsrouter certify` leaves it: `router/`, `certificates.tsv` and its JSON; returns the table."""
    router.save_pretrained(folder / "router")
    return certify_table(router, data or images(), folder / "certificates.tsv", PLAN, data={"name": "bright-columns"})


def pixels(data: ImageData) -> Tensor:
    return torch.stack([data.image(i) for i in range(len(data))])
