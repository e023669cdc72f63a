"""Small heads on an expert's frozen features: one forward pass casts the expert's votes and the head's."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from rsrouter.core.errors import InputError
from rsrouter.experts.expert import Expert
from rsrouter.experts.preprocessing import has_trunk
from rsrouter.experts.tensors import put_tensor
from rsrouter.stored import read_bytes


def has_grid(expert: Expert, grid: int) -> bool:
    """Whether the expert's features are a map `(B, F, h, w)` with at least `grid` cells each way."""
    if not has_trunk(expert.module):
        return False
    trunk = copy.deepcopy(Trunk(expert, grid)).cpu().float().eval()  # a mode that is set here is nobody else's
    try:
        with torch.inference_mode():
            trunk(torch.zeros(1, *expert.input_shape))
    except InputError:
        return False
    return True


def _cells(features: Tensor, pooled: Tensor, grid: int, name: str) -> Tensor:
    """`(B, F * grid ** 2)`: the feature map `(B, F, h, w)` averaged over cells."""
    if features.dim() != 4 or features.shape[1] != pooled.shape[1] or min(features.shape[2:]) < grid:
        raise InputError(
            f"Expert {name!r} has no feature map of that many cells",
            expected=f"forward_features to (B, {pooled.shape[1]}, h, w), h and w of at least {grid}",
            received=str(tuple(features.shape)),
            remedy="use grid=1",
        )
    return F.adaptive_avg_pool2d(features, grid).flatten(1)


def _fitting(features: Tensor, wanted: int | None) -> Tensor:
    """`features (B, F)` as they are; InputError where a head reads another width."""
    if wanted is not None and features.shape[1] != wanted:
        raise InputError(
            "A head does not fit the features it is to read",
            expected=f"{wanted} features and logits, as the head was made for",
            received=str(features.shape[1]),
            remedy="name the experts (and grid) that it was trained on",
        )
    return features


class Trunk(nn.Module):
    """Pixels in [0,1] to `(features (B, F), logits (B, C))` of a frozen expert.

    Args:
        expert: whose module is read.
        grid: 1: the features that the expert's own last layer reads; more: the mean of its feature map over each of
            `grid x grid` cells, `F = num_features * grid ** 2`, which keeps where in the image something was.

    Raises:
        InputError: the expert's module does not expose its features, or (when it is run) not as a map.
    """

    def __init__(self, expert: Expert, grid: int = 1) -> None:
        super().__init__()
        if not has_trunk(expert.module):
            raise InputError(
                f"Expert {expert.name!r} does not expose its features",
                expected="forward_features, forward_head(x, pre_logits=True) and get_classifier, as in timm",
                received=type(expert.module).__name__,
                remedy="use a router with a backbone of its own, or a cascade",
            )
        self.network: Any = expert.network()
        self._name, self._grid = expert.name, grid

    def extra_repr(self) -> str:
        return "" if self._grid == 1 else f"grid={self._grid}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.forward_features(x)
        pooled = self.network.forward_head(features, pre_logits=True)
        logits = self.network.get_classifier()(pooled)
        return pooled if self._grid == 1 else _cells(features, pooled, self._grid, self._name), logits


class FusedTrunk(nn.Module):
    """Several frozen experts on one noisy image: pixels to `(everything (B, sum of F + C), logits (B, C))`.

    `everything` is features and logits of each expert, those of the first one last; `logits` are the first one's.
    """

    def __init__(self, experts: Sequence[Expert], grid: int = 1) -> None:
        super().__init__()
        self.trunks = nn.ModuleList(Trunk(e, grid) for e in reversed(experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [part for trunk in self.trunks for part in trunk(x)]
        return torch.cat(parts, 1), parts[-1]


class HeadedTrunk(nn.Module):
    """An expert and heads on it: pixels to `(expert logits, head logits, ...)`.

    Each head gets `torch.cat([features, logits], 1)`, the input that `MLPHead` is made for; with `others`, the
    features and logits of those experts on the same noisy image come before.
    """

    def __init__(
        self,
        expert: Expert,
        heads: Sequence[nn.Module],
        *,
        with_expert: bool = True,
        others: Sequence[Expert] = (),
        grid: int = 1,
    ) -> None:
        super().__init__()
        self.trunk, self.heads, self.with_expert = FusedTrunk([expert, *others], grid), nn.ModuleList(heads), with_expert

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        both, logits = self.trunk(x)
        outputs = tuple(head(_fitting(both, _width(head))) for head in self.heads)
        return (logits, *outputs) if self.with_expert else outputs


class Headed(nn.Module):
    """Pixels in [0,1] to the logits of another last layer on a frozen expert's features.

    Args:
        expert: whose features are read.
        weight, bias: `(K, F)` and `(K,)` of the layer.
    """

    def __init__(self, expert: Expert, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.trunk = Trunk(expert)
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.trunk(x)[0])
        return out


def read_head(head: object, features: int, who: str) -> tuple[Tensor, Tensor]:
    """Weight `(K, F)` and bias `(K,)` of a last layer, float32 on the CPU; without a bias it is zeros.

    Args:
        head: `nn.Linear`, tensors called `weight` and `bias` (`fc.weight`, ... as well), or a safetensors file with them.
        features: F.
        who: names it in an error.

    Raises:
        InputError: something else, other shapes, numbers that are not finite or that float32 does not hold.
    """
    named: Mapping[str, Any]
    if isinstance(head, str | os.PathLike):
        try:
            named = load(read_bytes(head, who, remedy="a safetensors file with weight and bias"))
        except SafetensorError as error:
            raise _no_head(who, features, f"{head}: {error}") from error
    elif type(head) is nn.Linear:
        named = head.state_dict()
    elif isinstance(head, Mapping):
        named = head
    else:
        raise _no_head(who, features, type(head).__name__)
    parts = {key.rpartition(".")[2]: tensor.detach().to("cpu", copy=True) for key, tensor in named.items()}
    weight = parts.get("weight", torch.zeros(0))
    bias = parts.get("bias", torch.zeros(len(weight), dtype=weight.dtype))
    shapes = f"{ {key: tuple(tensor.shape) for key, tensor in parts.items()} }, {weight.dtype}"
    if not (set(parts) <= {"weight", "bias"} and len(parts) == len(named) and weight.dim() == 2 and len(weight) > 1):
        raise _no_head(who, features, shapes)
    if weight.shape[1] != features or bias.shape != weight.shape[:1]:
        raise _no_head(who, features, shapes)
    exact = (torch.float32, torch.float16, torch.bfloat16)
    if not all(t.dtype in exact and bool(t.isfinite().all()) for t in (weight, bias)):
        raise _no_head(who, features, f"{weight.dtype} and {bias.dtype}, or numbers that are not finite")
    return weight.float().contiguous(), bias.float().contiguous()


def _no_head(who: str, features: int, received: str) -> InputError:
    return InputError(
        f"{who[0].upper()}{who[1:]} is not a linear layer on these features",
        expected=f"nn.Linear({features}, K), or a safetensors file with its weight and bias, finite float32",
        received=received,
        remedy="give the last layer alone; head.float() where it is in float64",
    )


def head_digest(weight: Tensor, bias: Tensor) -> str:
    """sha256 of a head's weight and bias, as `read_head` gives them.

    >>> head_digest(torch.zeros(2, 3), torch.zeros(2))[:8]
    '31ae999b'
    """
    digest = hashlib.sha256(b"rsrouter-head")
    put_tensor(digest, "weight", weight)
    put_tensor(digest, "bias", bias)
    return digest.hexdigest()


def _width(head: nn.Module) -> int | None:
    """How many features and logits one of our heads reads; None for anyone else's."""
    first = head.layers[0] if isinstance(head, MLPHead | ResidualHead) else None
    return first.in_features if isinstance(first, nn.Linear) else None


class MLPHead(nn.Module):
    """Two-layer perceptron on an expert's features and logits: a router of a few kilobytes.

    Args:
        num_classes: number of outputs (for a router: of experts).
        in_features: width of features plus logits.
        hidden: width of the hidden layer; 0 for a linear head.
    """

    def __init__(self, num_classes: int, in_features: int, hidden: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_features
        if hidden:
            layers, width = [nn.Linear(in_features, hidden), nn.ReLU()], hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class ResidualHead(nn.Module):
    """The expert's logits plus a correction from its features; starts as the expert itself.

    Args:
        num_classes: number of classes, and of the last inputs, which are the expert's logits.
        in_features: width of features plus logits.
        hidden: width of the hidden layer.
    """

    def __init__(self, num_classes: int, in_features: int, hidden: int = 64) -> None:
        super().__init__()
        self.num_classes = num_classes
        last = nn.Linear(hidden, num_classes)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x[:, -self.num_classes :] + self.layers(x)
        return out
