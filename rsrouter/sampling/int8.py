"""Convolutions and linear layers in eight-bit integers: another function than the float32 network, recorded as one.

Inputs of a layer become whole numbers of seven bits, on a range that was measured beforehand and is part of the record, and its
weights whole numbers of eight, with a scale for each output channel. Products and sums of whole numbers are exact, whatever their
order, so a row's bits do not depend on its batch. Seven bits, because processors without VNNI add pairs of products in 16 bits:
2 * 127 * 127 fits, 2 * 255 * 127 does not (`vpmaddubsw`). oneDNN's kernels multiply; what is done before them, and after those of
linear layers, are single operations of float32, each rounded as IEEE 754 says: with AMX those kernels round scale and shift
otherwise in a few rows than in many. `quantise` compares the kernels with exact arithmetic, and rows in batches of several sizes,
and refuses a processor on which they differ.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from rsrouter.core.errors import InputError, NetworkError

#: The largest input, and the largest weight.
LEVELS = 127

#: Packed weights by the tensor of whole ones, which the lanes of a network share.
_PACKED: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()

_AGAIN = "measure them: rsrouter calibrate ROUTER --dtype int8 --data DATA --out execution.json"


@dataclass(frozen=True)
class Ranges:
    """Ranges of layers' inputs, as they are stored: for each network, by the fingerprint of its tensors, layer and range.

    >>> ranges = Ranges.of({"a1": {"0": (-1.0, 2.0)}})
    >>> Ranges.from_dict(ranges.to_dict()) == ranges, bool(Ranges())
    (True, False)
    """

    networks: tuple[tuple[str, tuple[tuple[str, float, float], ...]], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.networks)

    @classmethod
    def of(cls, found: Mapping[str, Mapping[str, tuple[float, float]]]) -> Ranges:
        """Ranges by network and layer, in a fixed order."""
        return cls(tuple((n, tuple((at, *found[n][at]) for at in sorted(found[n]))) for n in sorted(found)))

    def to_dict(self) -> dict[str, dict[str, list[float]]]:
        """JSON-ready; `from_dict` reads it back."""
        return {network: {layer: [low, high] for layer, low, high in layers} for network, layers in self.networks}

    @classmethod
    def from_dict(cls, content: Any, where: str = "these ranges") -> Ranges:
        """The ranges of `to_dict`.

        Raises:
            InputError: anything else: a range that is not understood changes bits.
        """

        def fits(pair: Any) -> bool:
            numbers = isinstance(pair, list) and len(pair) == 2 and all(type(v) is float and math.isfinite(v) for v in pair)
            return numbers and pair[0] <= 0.0 <= pair[1] and pair[0] < pair[1]

        good = isinstance(content, dict) and all(isinstance(layers, dict) and layers for layers in content.values())
        if not good or not all(fits(pair) for layers in content.values() for pair in layers.values()):
            raise InputError(
                "Ranges of an int8 execution cannot be read",
                expected="for each network its layers, and two finite numbers around 0 for each",
                received=where,
                remedy=_AGAIN,
            )
        return cls.of({n: {at: (pair[0], pair[1]) for at, pair in layers.items()} for n, layers in content.items()})

    def layers(self, network: str, name: str) -> dict[str, tuple[float, float]]:
        """By layer the range of its inputs, of the network with that fingerprint.

        Raises:
            InputError: the network called `name` was not measured.
        """
        for known, layers in self.networks:
            if known == network:
                return {layer: (low, high) for layer, low, high in layers}
        raise InputError(
            f"Network {name!r} has no int8 ranges in this execution",
            expected=f"ranges of a network with fingerprint {network}",
            received=f"those of {len(self.networks)} others: {', '.join(known for known, _ in self.networks)}"[:300],
            remedy=_AGAIN,
        )


def fingerprint(module: nn.Module) -> str:
    """16 hexadecimal digits for a network's tensors, by value, as it is before anything is folded.

    >>> torch.manual_seed(0) and fingerprint(nn.Linear(2, 2)) == fingerprint(nn.Linear(2, 2))
    False
    """
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            value = tensor.detach().cpu().contiguous()
            found.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return found.hexdigest()[:16]


def quantisable(layer: nn.Module) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """Whether a layer is a Conv2d with zero padding, or a Linear, and its call the class's forward and nothing else."""
    if type(layer) is nn.Conv2d:
        fits = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    else:
        fits = type(layer) is nn.Linear
    if not fits or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    weight = layer.weight
    return isinstance(weight, Tensor) and weight.dtype == torch.float32 and bool(weight.isfinite().all())


def layers_of(module: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """The layers that can be quantised, each under its first name."""
    return {name: layer for name, layer in module.named_modules() if quantisable(layer)}


@contextmanager
def watched_ranges(module: nn.Module, found: dict[str, tuple[float, float]]) -> Iterator[None]:
    """Widens `found` by the inputs of the module's layers, while it runs in there; 0 is in every range."""
    handles = []

    def widen(name: str, args: tuple[Any, ...]) -> None:
        low, high = found.get(name, (0.0, 0.0))
        lowest, highest = (float(v) for v in args[0].detach().float().aminmax())
        found[name] = (min(low, lowest), max(high, highest))

    for name, layer in layers_of(module).items():
        handles.append(layer.register_forward_pre_hook(lambda _, args, name=name: widen(name, args)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Int8Layer(nn.Module):
    """A convolution or linear layer in whole numbers; takes and returns float32, and rows that are not finite as NaN.

    Args:
        layer: of float32.
        low, high: range of its inputs; what is beyond is cut off.
    """

    levels: Tensor
    scales: Tensor
    ones: Tensor
    zeros: Tensor
    shift: Tensor | None

    def __init__(self, layer: nn.Conv2d | nn.Linear, low: float, high: float) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scales = weight.flatten(1).abs().amax(1).double().clamp_min(1e-30) / LEVELS
        shape = (-1, *[1] * (weight.dim() - 1))
        self.step = (high - low) / LEVELS
        self.per_step = float(torch.tensor(1.0 / self.step, dtype=torch.float32))
        self.zero = round(-low / self.step)
        self.register_buffer("levels", torch.round(weight.double() / scales.view(shape)).clamp(-LEVELS, LEVELS).to(torch.int8))
        # of a convolution the weights' scales, of a linear layer those of its sums
        self.register_buffer("scales", (scales if isinstance(layer, nn.Conv2d) else scales * self.step).float())
        self.register_buffer("ones", torch.ones(len(weight)))
        self.register_buffer("zeros", torch.zeros(len(weight), dtype=torch.int32))
        self.register_buffer("shift", None if layer.bias is None else layer.bias.detach().clone())
        self.convolution: dict[str, Any] | None = None
        if isinstance(layer, nn.Conv2d):
            keys = ("stride", "padding", "dilation")
            self.convolution = {**{k: list(getattr(layer, k)) for k in keys}, "groups": layer.groups}

    def whole(self, x: Tensor) -> Tensor:
        """The inputs as whole numbers from 0 to `LEVELS`, uint8."""
        levels = torch.mul(x, self.per_step).round_().clamp_(-self.zero, LEVELS - self.zero).add_(self.zero)
        return levels.to(torch.uint8)

    def packed(self, where: Sequence[Any]) -> Tensor:
        """The weights as oneDNN's kernels read them, packed once: that takes longer than a batch."""
        if self.levels not in _PACKED:
            _PACKED[self.levels] = (
                torch.ops.onednn.qlinear_prepack(self.levels, None)
                if self.convolution is None
                else torch.ops.onednn.qconv_prepack(self.levels, self.scales, self.step, self.zero, *where, None)
            )
        made: Tensor = _PACKED[self.levels]
        return made

    def multiply(self, levels: Tensor) -> Tensor:
        """What oneDNN makes of whole inputs; of a linear layer their sums alone, which are then scaled and shifted."""
        tail: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
        if self.convolution is None:
            weights = self.packed(())
            made: Tensor = torch.ops.onednn.qlinear_pointwise(levels, 1.0, self.zero, weights, self.ones, self.zeros, None, *tail)
            made.mul_(self.scales)
            return made if self.shift is None else made.add_(self.shift)
        where = (*(self.convolution[k] for k in ("stride", "padding", "dilation")), self.convolution["groups"])
        weights = self.packed(where)
        made = torch.ops.onednn.qconv2d_pointwise(
            levels, self.step, self.zero, weights, self.scales, self.zeros, self.shift, *where, *tail
        )
        return made

    def exact(self, levels: Tensor) -> Tensor:
        """The same in float64, where whole numbers of this size are exact."""
        x, weight = levels.double() - self.zero, self.levels.double()
        plain = self.convolution is None
        y = functional.linear(x, weight) if self.convolution is None else functional.conv2d(x, weight, None, **self.convolution)
        shape = (1, -1) if plain else (1, -1, 1, 1)
        y = y * (self.scales.double() * (1.0 if plain else self.step)).view(shape)
        return y if self.shift is None else y + self.shift.double().view(shape)

    def forward(self, x: Tensor) -> Tensor:
        rows = x if self.convolution is not None else x.reshape(-1, x.shape[-1])
        y = self.multiply(self.whole(rows))
        # a sum is finite only where every summand is
        fine = rows.sum(tuple(range(1, rows.dim()))).isfinite()
        if not bool(fine.all()):
            y[~fine] = torch.nan
        if self.convolution is None:
            return y.reshape(*x.shape[:-1], -1)
        return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()

    def check(self, x: Tensor, name: str) -> None:
        """Refuses kernels that do not multiply whole numbers exactly, or do it otherwise in another batch.

        Raises:
            NetworkError: what differs.
        """
        levels = self.whole(x if self.convolution is not None else x.reshape(-1, x.shape[-1]))
        levels[0] = LEVELS  # the largest sums there are
        found = self.multiply(levels)
        for rows in sorted({*(2**k for k in range(len(levels).bit_length())), len(levels) // 2, len(levels) - 1} - {0}):
            if not torch.equal(found[:rows], self.multiply(levels[:rows].clone())):
                raise NetworkError(
                    f"The integer kernels of this processor give layer {name!r} other bits in batches of another size",
                    expected=f"{rows} rows as they are among {len(levels)}",
                    received="other bits",
                    remedy="run in float32 on this machine",
                )
        few = self.exact(levels[:2])
        wrong = float((found[:2].double() - few).abs().max())
        if not wrong <= 1e-5 * float(few.abs().max()) + 1e-30:
            raise NetworkError(
                f"The integer kernels of this processor do not multiply exactly in layer {name!r}",
                expected="sums of whole numbers, to the rounding of float32",
                received=f"up to {wrong:.2g} of {float(few.abs().max()):.2g} away",
                remedy="run in float32 on this machine",
            )


@torch.inference_mode()
def quantise(module: nn.Module, ranges: Mapping[str, tuple[float, float]], x: Tensor, name: str) -> nn.Module:
    """The module with every layer that has a range in whole numbers, in place; the others stay float32.

    Args:
        module: prepared in float32.
        ranges: of the layers' inputs.
        x: a batch that it takes, on which each layer's kernels are checked.
        name: of the network, for errors.

    Raises:
        InputError: a range of a layer that there is none of. NetworkError: kernels that are not exact, or that depend on the
            batch; a network that reads its layers' weights itself.
    """
    layers = layers_of(module)
    if unknown := sorted(set(ranges) - set(layers)):
        raise InputError(
            f"The int8 ranges of network {name!r} are of other layers",
            expected=f"layers of {sorted(layers)[:5]} ...",
            received=f"{unknown[:5]}",
            remedy=_AGAIN,
        )
    made: dict[nn.Module, Int8Layer] = {layers[at]: Int8Layer(layers[at], *ranges[at]) for at in ranges}
    names: dict[nn.Module, str] = {made[layers[at]]: at for at in ranges}
    if module in made:
        module = made[module]
    for parent in list(module.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and child in made:
                parent._modules[key] = made[child]
    called: set[nn.Module] = set()

    def check(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if layer not in called:
            called.add(layer)
            layer.check(args[0], names[layer])  # type: ignore[operator]

    handles = [layer.register_forward_pre_hook(check) for layer in names]
    try:
        module(x)
    except AttributeError as error:
        raise NetworkError(
            f"Network {name!r} cannot run in int8",
            expected="layers that are called, not read",
            received=str(error).splitlines()[0],
            remedy="run it in float32: its code reads the weights of a layer",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return module


__all__ = ["LEVELS", "Int8Layer", "Ranges", "fingerprint", "layers_of", "quantisable", "quantise", "watched_ranges"]
