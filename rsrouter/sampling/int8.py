"""Convolutions and linear layers in eight-bit integers: another function than the float32 network, recorded as one.

Inputs of a layer become whole numbers of seven bits, on a range that was measured beforehand and is part of the record, and its
weights whole numbers of eight, with a scale for each output channel. Products and sums of whole numbers are exact, whatever their
order, so a row's bits do not depend on its batch. Seven bits, because processors without VNNI add pairs of products in 16 bits:
2 * 127 * 127 fits, 2 * 255 * 127 does not (`vpmaddubsw`). oneDNN's kernels make the sums, of so few products at a time that
float32 holds them; all else is single operations of float32, each rounded as IEEE 754 says. (Kernels may round a scale and a
shift differently for a few rows than for many: those of AMX do.) `quantise` compares the kernels with exact arithmetic, and rows
in batches of several sizes, and refuses a processor on which they differ.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from rsrouter.core.errors import InputError, NetworkError

#: The largest input, and the largest weight.
LEVELS = 127
#: Products that are summed at once: float32 holds every whole number up to 2^24.
MOST_SUMMANDS = 2**24 // LEVELS**2

#: Packed weights of a layer's parts by its `levels`, which the lanes of a network share.
_PACKED: MutableMapping[Tensor, list[Tensor]] = WeakIdKeyDictionary()

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
        fits &= (1 if layer.groups == 1 else layer.weight.shape[1]) * math.prod(layer.kernel_size) <= MOST_SUMMANDS
    else:
        fits = type(layer) is nn.Linear
    if not fits or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    weight = layer.weight
    return isinstance(weight, Tensor) and weight.dtype == torch.float32 and bool(weight.isfinite().all())


def layers_of(module: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """The layers that can be quantised, each under its first name."""
    return {name: layer for name, layer in module.named_modules() if quantisable(layer)}


def _input_of(work: Callable[[nn.Module, Tensor], None], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook of `work` on a layer's input, however it is passed."""
    work(layer, args[0] if args else next(iter(kwargs.values())))


@contextmanager
def watched_ranges(module: nn.Module, found: dict[str, tuple[float, float]]) -> Iterator[None]:
    """Widens `found` by the inputs of the module's layers, while it runs in there; 0 is in every range."""
    handles = []

    def widen(name: str, layer: nn.Module, x: Tensor) -> None:
        low, high = found.get(name, (0.0, 0.0))
        lowest, highest = (float(v) for v in x.detach().float().aminmax())
        found[name] = (min(low, lowest), max(high, highest))

    for name, layer in layers_of(module).items():
        handles.append(layer.register_forward_pre_hook(partial(_input_of, partial(widen, name)), with_kwargs=True))
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
        self.register_buffer("scales", (scales * self.step).float().view(shape[: weight.dim() - 1]))
        self.register_buffer("ones", torch.ones(len(weight)))
        self.register_buffer("zeros", torch.zeros(len(weight), dtype=torch.int32))
        bias = layer.bias
        self.register_buffer("shift", None if bias is None else bias.detach().clone().view(shape[: weight.dim() - 1]))
        self.convolution: dict[str, Any] | None = None
        if isinstance(layer, nn.Conv2d):
            keys = ("stride", "padding", "dilation")
            self.convolution = {**{k: list(getattr(layer, k)) for k in keys}, "groups": layer.groups}
        inputs, most = weight.shape[1], MOST_SUMMANDS // weight[0, 0].numel()
        self.parts = [slice(k, min(k + most, inputs)) for k in range(0, inputs, most)]

    def whole(self, x: Tensor) -> Tensor:
        """The inputs as whole numbers from 0 to `LEVELS`, uint8."""
        levels = torch.mul(x, self.per_step).round_().clamp_(-self.zero, LEVELS - self.zero).add_(self.zero)
        return levels.to(torch.uint8)

    def _packed(self) -> list[Tensor]:
        """The weights of each part as oneDNN's kernels read them, packed once: that takes longer than a batch."""
        if self.levels not in _PACKED:
            weights = [self.levels[:, part].contiguous() for part in self.parts]
            _PACKED[self.levels] = [
                torch.ops.onednn.qlinear_prepack(w, None)
                if self.convolution is None
                else torch.ops.onednn.qconv_prepack(w, self.ones, 1.0, self.zero, *self.convolution.values(), None)
                for w in weights
            ]
        return _PACKED[self.levels]

    def _sums(self, levels: Tensor, packed: Tensor) -> Tensor:
        """Sums of whole numbers, exact in float32."""
        given = (levels, 1.0, self.zero, packed, self.ones, self.zeros, None)
        tail: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
        made: Tensor = (
            torch.ops.onednn.qlinear_pointwise(*given, *tail)
            if self.convolution is None
            else torch.ops.onednn.qconv2d_pointwise(*given, *self.convolution.values(), *tail)
        )
        return made

    def multiply(self, levels: Tensor) -> Tensor:
        """The layer's output for whole inputs: oneDNN's sums of each part, added in their order, scaled and shifted."""
        total: Tensor | None = None
        for part, packed in zip(self.parts, self._packed(), strict=True):
            made = self._sums(levels if len(self.parts) == 1 else levels[:, part].contiguous(), packed)
            total = made if total is None else total.add_(made)
        assert total is not None
        total.mul_(self.scales)
        return total if self.shift is None else total.add_(self.shift)

    def exact(self, levels: Tensor) -> Tensor:
        """The same in float64, where whole numbers of this size are exact."""
        x, weight = levels.double() - self.zero, self.levels.double()
        y = functional.linear(x, weight) if self.convolution is None else functional.conv2d(x, weight, None, **self.convolution)
        y = y * self.scales.double()
        return y if self.shift is None else y + self.shift.double()

    def forward(self, input: Tensor) -> Tensor:
        x = input  # the name that torch's layers give it
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
        levels[0] = LEVELS  # every input at its largest: where kernels saturate, it shows
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

    def check(layer: nn.Module, x: Tensor) -> None:
        if layer not in called:
            called.add(layer)
            layer.check(x, names[layer])  # type: ignore[operator]

    handles = [layer.register_forward_pre_hook(partial(_input_of, check), with_kwargs=True) for layer in names]
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
