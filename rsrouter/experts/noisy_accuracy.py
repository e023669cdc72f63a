"""Does an expert work at its noise level? Noisy accuracy on a few labelled images, and which normalisation fits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor, nn

from rsrouter.core.errors import InputError
from rsrouter.experts.config import NORMALISATIONS
from rsrouter.experts.expert import Expert
from rsrouter.experts.preprocessing import around

#: a better normalisation is reported from this many standard errors of the paired difference ...
STANDARD_ERRORS = 3.0
#: ... and from this difference in accuracy on
DIFFERENCE = 0.03


@dataclass(frozen=True)
class NoisyCheck:
    """What a few noisy images say about an expert. A sanity check of the wrapping, not a certificate.

    Attributes:
        name, sigma: of the expert.
        images: how many were tried, one noisy copy each.
        accuracy: share classified right, as the expert is wrapped.
        alternatives: accuracy on the same noisy images under other normalisations, by name.
        better: the alternative that fits clearly better, None if none does.
        chance: 1 / number of classes.
    """

    name: str
    sigma: float
    images: int
    accuracy: float
    chance: float
    alternatives: dict[str, float] = field(default_factory=dict)
    better: str | None = None

    @property
    def near_chance(self) -> bool:
        """Whether the accuracy cannot be told from guessing (three standard errors)."""
        return self.accuracy <= self.chance + 3 * sqrt(self.chance * (1 - self.chance) / self.images)

    @property
    def warning(self) -> str | None:
        """What is wrong and what to do, None if nothing looks wrong."""
        if self.better is not None:
            return (
                f"expert {self.name!r} looks wrongly normalised, or has another sigma: accuracy {self.accuracy:.1%} under noise "
                f"{self.sigma:g}, but {self.alternatives[self.better]:.1%} with normalisation={self.better!r}. Check sigma, then "
                "use that normalisation if the paper agrees"
            )
        if self.near_chance:
            return (
                f"expert {self.name!r} guesses: accuracy {self.accuracy:.1%} under noise {self.sigma:g} with every "
                "normalisation tried. Check sigma, architecture and the order of the labels"
            )
        return None


@torch.inference_mode()
def check_expert(expert: Expert, images: Tensor, labels: Tensor, *, seed: int = 0, batch: int = 100) -> NoisyCheck:
    """Noisy accuracy at the expert's sigma as it is wrapped, and under every other known normalisation.

    Args:
        expert: of any kind; alternatives are tried for plain ones only.
        images: `(N, C, H, W)` in [0,1], a few hundred.
        labels: `(N,)` class indices.
        seed: of the noise; every normalisation sees the same noise.
        batch: images per forward pass.

    Raises:
        InputError: images or labels that do not fit the expert.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != expert.input_shape or len(images) == 0:
        raise InputError(
            f"The images do not fit expert {expert.name!r}",
            expected=f"(N, {', '.join(map(str, expert.input_shape))})",
            received=str(tuple(images.shape)),
            remedy="--input-size of the data, where the network sees images of another size; or resize the data: --size",
        )
    if tuple(labels.shape) != (len(images),) or int(labels.min()) < 0 or int(labels.max()) >= expert.num_classes:
        raise InputError(
            f"The labels do not fit expert {expert.name!r}",
            expected=f"{len(images)} labels in 0 to {expert.num_classes - 1}",
            received=f"shape {tuple(labels.shape)}, from {int(labels.min())} to {int(labels.max())}",
            remedy="check num_classes and the data",
        )
    module = copy.deepcopy(expert.module).eval()  # the expert's own module keeps its mode
    networks = {"": _normalised(expert, module, expert.mean, expert.std), **_alternatives(expert, module)}
    right = {name: torch.zeros(len(images), dtype=torch.bool) for name in networks}
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(images), batch):
        x, y = images[start : start + batch], labels[start : start + batch]
        noisy = x + expert.sigma * torch.randn(x.shape, generator=generator)
        for name, network in networks.items():
            right[name][start : start + batch] = network(noisy).argmax(1).cpu() == y.cpu()
    accuracy = {name: float(hits.float().mean()) for name, hits in right.items()}
    own = accuracy.pop("")
    better = None
    if accuracy:
        best = max(accuracy, key=lambda name: accuracy[name])
        won, lost = int((right[best] & ~right[""]).sum()), int((right[""] & ~right[best]).sum())
        # McNemar: only the images on which the two differ count
        if won - lost > STANDARD_ERRORS * sqrt(max(1, won + lost)) and accuracy[best] - own >= DIFFERENCE:
            better = best
    return NoisyCheck(expert.name, expert.sigma, len(images), own, 1 / expert.num_classes, accuracy, better)


def _normalised(
    expert: Expert, module: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> nn.Module:
    return around(module, mean, std, expert.resize, expert.order)


def _alternatives(expert: Expert, module: nn.Module) -> dict[str, nn.Module]:
    if expert.provenance is not None and expert.provenance.source == "composite":
        return {}
    networks: dict[str, nn.Module] = {}
    for name, values in NORMALISATIONS.items():
        if values is None:
            if expert.mean is not None:
                networks[name] = _normalised(expert, module)
        elif len(values[0]) == expert.input_shape[0] and values != (expert.mean, expert.std):
            networks[name] = _normalised(expert, module, *values)
    return networks
