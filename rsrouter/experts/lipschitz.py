"""Lipschitz constants of networks: computed from the weights of layers that are known, declared and tested for others.

A constant is about the function in exact arithmetic that the module stands for, on all inputs and in the L2 norm; the computed
logits are those of a float64 pass, which differ from that function's by at most `rounding`. For known layers both follow from
the weights (THEORY.md, section 6): a layer `y = W x + b` multiplies the constant by an upper bound of the norm of W, and adds
`gamma_n (a |x| + |b|)` to the rounding error, where a bounds the norm of the matrix of absolute values and
`gamma_n = n u / (1 - n u)`, u = 2^-53, for sums of n products in any order (Higham 2002, section 3.1), over [0,1] pixels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from math import prod, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rsrouter.core.errors import InputError, NetworkError
from rsrouter.experts.preprocessing import Normalise, Preprocessed, Reordered

#: A constant of all logits, or a table of constants of their differences.
Constants = float | tuple[tuple[float, ...], ...]

#: Relative room for a singular value decomposition and an FFT in float64, and for the arithmetic of the bounds.
_ROOM = 1e-9
_UNIT = 2.0**-53
#: More classes than this get one constant instead of a table.
MOST_PAIRS = 64
#: Rounding of a declared constant, where none is declared.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Lipschitz:
    """What is known of a network without noise.

    Attributes:
        constants: L2 Lipschitz constant of the logits, or a table of those of their differences.
        rounding: by how much each logit of a float64 pass may be wrong.
    """

    constants: Constants
    rounding: float


class GroupSort(nn.Module):
    """Sorts pairs of channels, `(a, b)` to `(min, max)`: 1-Lipschitz, and it keeps gradients' norms (Anil et al. 2019).

    >>> GroupSort()(torch.tensor([[3.0, 1.0, 2.0, 5.0]])).tolist()
    [[1.0, 3.0, 2.0, 5.0]]
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, 0::2], x[:, 1::2]
        return torch.stack([torch.minimum(a, b), torch.maximum(a, b)], 2).flatten(1, 2)


def up(value: float) -> float:
    """`value` rounded up to 7 digits, so that another library's last bits give the same constant.

    >>> up(1.00000001)
    1.000001
    """
    return float(Context(prec=7, rounding=ROUND_CEILING).create_decimal(repr(float(value))))


def spectral_norm(matrix: NDArray[np.float64]) -> float:
    """An upper bound of the largest singular value of `matrix (M, N)`, or of each of `(..., M, N)`.

    >>> round(spectral_norm(np.diag([3.0, 4.0])), 6)
    4.0
    """
    return float(np.linalg.svd(matrix, compute_uv=False).max(initial=0.0)) * (1.0 + _ROOM)


def conv_norm(weight: NDArray[np.float64], shape: tuple[int, ...], stride: tuple[int, int], dilation: tuple[int, int]) -> float:
    """An upper bound of the norm of a zero-padded convolution, the smaller of two.

    On a torus of side `image + (kernel - 1)` on each side the convolution with stride 1 contains the padded one as a submatrix
    (rows and columns left out), and its norm is the largest spectral norm over the frequencies (Sedghi et al. 2019). And
    `|y|^2 = sum over patches |W p|^2 <= |W|^2 * overlap * |x|^2`, where `overlap` counts the patches that hold a pixel.

    Args:
        weight: `(out, in, kh, kw)`.
        shape: `(H, W)` of the input, padding included.
    """
    out, channels, kh, kw = weight.shape
    reach = [(k - 1) * d + 1 for k, d in zip((kh, kw), dilation, strict=True)]
    sides = [s + r - 1 for s, r in zip(shape, reach, strict=True)]
    spread = np.zeros((out, channels, *reach))
    spread[:, :, :: dilation[0], :: dilation[1]] = weight
    waves = np.fft.fft2(spread, s=sides).transpose(2, 3, 0, 1).reshape(-1, out, channels)
    rows = max(1, 4_000_000 // (out * channels))
    half = len(waves) // 2 + 1 if sides[0] == 1 else len(waves)
    torus = max(spectral_norm(waves[at : at + rows]) for at in range(0, half, rows))  # type: ignore[arg-type]
    overlap = [-(-r // s) if d == 1 else k for r, k, s, d in zip(reach, (kh, kw), stride, dilation, strict=True)]
    patches = spectral_norm(weight.reshape(out, -1)) * sqrt(prod(overlap)) * (1.0 + _ROOM)
    return min(torus, patches)


def _is_torchlip(kind: type[nn.Module], *names: str) -> bool:
    return kind.__module__.startswith("deel.torchlip.") and kind.__name__ in names


def _array(tensor: Tensor) -> NDArray[np.float64]:
    return np.asarray(tensor.detach().cpu().double().numpy())


class _Bound:
    """Constant, size of the signal and rounding error after each layer of a network."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.constant, self.error, self.size = 1.0, 0.0, sqrt(prod(shape))

    def affine(self, norm: float, absolute: float, bias: float, products: int) -> None:
        """`y = W x + b`: |W|, an upper bound of the norm of the matrix of absolute values, |b|, and the length of its sums."""
        gamma = products * _UNIT / (1.0 - products * _UNIT)
        self.error = (norm * self.error + gamma * (absolute * (self.size + self.error) + bias)) * (1.0 + _ROOM)
        self.size = (norm * self.size + bias) * (1.0 + _ROOM)
        self.constant *= norm * (1.0 + _ROOM)


def _layer(bound: _Bound, layer: nn.Module, x: Tensor, who: str) -> None:
    kind = type(layer)
    if kind in (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d, nn.ReLU, nn.PixelUnshuffle, GroupSort):
        return
    if _is_torchlip(kind, "InvertibleDownSampling"):
        return
    if _is_torchlip(kind, "GroupSort", "GroupSort2", "FullSort", "MaxMin"):
        factor = abs(float(layer._coefficient_lip))  # type: ignore[arg-type]
        return bound.affine(factor, factor, 0.0, 1)
    if kind is nn.Linear:
        weight = _array(layer.weight)  # type: ignore[arg-type]
        bias = 0.0 if layer.bias is None else float(np.linalg.norm(_array(layer.bias)))  # type: ignore[arg-type]
        return bound.affine(spectral_norm(weight), float(np.linalg.norm(weight)), bias, weight.shape[1] + 1)
    if kind is nn.Conv2d:
        assert isinstance(layer, nn.Conv2d)
        if layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and layer.groups == 1:
            weight = _array(layer.weight)
            padded = tuple(s + 2 * p for s, p in zip(x.shape[2:], layer.padding, strict=True))
            norm = conv_norm(weight, padded, layer.stride, layer.dilation)  # type: ignore[arg-type]
            # each pair of channels by Young's inequality, the pairs by their Frobenius norm
            absolute = float(np.linalg.norm(np.abs(weight).sum((2, 3))))
            places = prod(layer(x).shape[2:])
            bias = 0.0 if layer.bias is None else float(np.linalg.norm(_array(layer.bias))) * sqrt(places)
            return bound.affine(norm, absolute, bias, prod(weight.shape[1:]) + 1)
    if _is_torchlip(kind, "ScaledAdaptiveAvgPool2d"):  # sums over all places, divided by the root of their number
        factor = abs(float(layer._coefficient_lip)) * (1.0 + _ROOM)  # type: ignore[arg-type]
        return bound.affine(factor, factor, 0.0, prod(x.shape[2:]) + 2)
    scaled = _is_torchlip(kind, "ScaledAvgPool2d")
    if (kind is nn.AvgPool2d or scaled) and layer.padding == 0 and not layer.ceil_mode and layer.divisor_override is None:
        size, stride = (v if isinstance(v, tuple) else (v, v) for v in (layer.kernel_size, layer.stride))
        norm = sqrt(prod(-(-k // s) for k, s in zip(size, stride, strict=True)) / prod(size))
        if scaled:
            norm *= abs(float(layer._coefficient_lip) * float(layer.scalingFactor))
        return bound.affine(norm * (1.0 + _ROOM), norm * (1.0 + _ROOM), 0.0, prod(size) + 2)
    if kind is Reordered:
        repeats = sqrt(float(torch.bincount(layer.order).max()))  # type: ignore[arg-type]
        return bound.affine(repeats, repeats, 0.0, 1)
    if kind is Normalise:
        mean, std = _array(layer.mean).ravel(), _array(layer.std).ravel()  # type: ignore[arg-type]
        norm = 1.0 / float(std.min())
        shift = float(np.linalg.norm(mean / std)) * sqrt(prod(x.shape[2:]))
        return bound.affine(norm * (1.0 + _ROOM), norm * (1.0 + _ROOM), shift, 3)
    raise NetworkError(
        f"The Lipschitz constant of layer {who!r} cannot be computed",
        expected="a sequence of dense layers, convolutions with zero padding, average pooling, ReLU and GroupSort, or an "
        "exported one of deel-torchlip",
        received=f"{kind.__module__}.{kind.__qualname__}",
        remedy="declare it: Expert(module, lipschitz=L, ...), with a constant that you can prove",
    )


def _layers(module: nn.Module, who: str = "") -> list[tuple[str, nn.Module]]:
    """The layers of nested sequences, in order."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        raise NetworkError(
            f"The weights of layer {who or kind.__name__!r} are computed anew in every pass",
            expected="weights that are stored: another machine must get the same ones",
            received=f"parametrisations of {', '.join(sorted(module.parametrizations))}",  # type: ignore[arg-type]
            remedy="export the network first: model.eval().vanilla_export() of deel-torchlip, or "
            "torch.nn.utils.parametrize.remove_parametrizations",
        )
    if "forward" in vars(module) or any(getattr(module, hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks")):
        raise NetworkError(
            f"Layer {who or kind.__name__!r} was given hooks or another forward pass, which may compute anything",
            expected="a layer as its class defines it",
            received="forward hooks, or a function in the place of its forward pass",
            remedy="remove them, or declare the constant: Expert(module, lipschitz=L, ...)",
        )
    if kind in (nn.Sequential, Preprocessed) or _is_torchlip(kind, "Sequential"):
        return [leaf for name, child in module.named_children() for leaf in _layers(child, f"{who}.{name}".lstrip("."))]
    return [(who or kind.__name__, module)]


@torch.no_grad()
def compute(network: nn.Module, shape: tuple[int, ...]) -> Lipschitz:
    """Constants and rounding of a network of known layers, from its weights.

    Args:
        network: from `(B, *shape)` pixels in [0,1] to logits; a sequence.
        shape: `(C, H, W)`.

    Returns:
        The constants of the differences of any two logits, where the last layer is dense and has few of them.

    Raises:
        NetworkError: a layer that is not known.

    >>> compute(nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)), (1, 2, 2)).rounding < 1e-13
    True
    """
    layers = _layers(copy.deepcopy(network).cpu().double().eval())
    x, bound, before = torch.zeros((1, *shape), dtype=torch.float64), _Bound(shape), 1.0
    for name, layer in layers:
        before = bound.constant
        _layer(bound, layer, x, name)
        x = layer(x)
    if not (np.isfinite(bound.constant) and np.isfinite(bound.error)):
        raise NetworkError(
            "The network has weights that are not finite",
            expected="finite weights",
            received=f"constant {bound.constant}",
            remedy="load other weights",
        )
    constants: Constants = up(bound.constant)
    last = layers[-1][1]
    if isinstance(last, nn.Linear) and x.shape[1] <= MOST_PAIRS:
        weight = _array(last.weight)
        apart = np.linalg.norm(weight[:, None] - weight[None], axis=2) * before * (1.0 + _ROOM)
        pairs = np.minimum(apart, sqrt(2.0) * (1.0 + _ROOM) * bound.constant)
        pairs = np.maximum(pairs, 1e-300) * ~np.eye(len(pairs), dtype=bool)
        constants = tuple(tuple(up(float(v)) for v in row) for row in pairs)
    return Lipschitz(constants, up(2.0 * bound.error + 1e-300))


def check_constants(constants: object, rounding: object, k: int, who: str) -> tuple[Constants, float]:
    """Declared constants as they are stored.

    Raises:
        InputError: not a positive number, nor a symmetric `(k, k)` table of them; a rounding that cannot be.
    """
    try:
        table = np.asarray(constants, dtype=np.float64)
        error = ROUNDING if rounding is None else float(rounding)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        table, error = np.zeros(1), -1.0
    shaped = table.shape in ((), (k, k)) and not isinstance(constants, bool)
    apart = ~np.eye(k, dtype=bool) if table.ndim == 2 and shaped else True
    if not (shaped and np.all((np.isfinite(table) & (table > 0)) | ~np.asarray(apart)) and np.all(table == table.T)):
        raise InputError(
            f"The Lipschitz constant of {who} is not usable",
            expected=f"'compute', a finite number above 0, or a symmetric ({k}, {k}) table of them",
            received=repr(constants)[:200],
            remedy="give the L2 constant of the logits as a function of [0,1] pixels, normalisation included",
        )
    if not 0.0 <= error < np.inf:
        raise InputError(
            f"The rounding of {who} is not usable",
            expected="a finite number of at least 0, in logits",
            received=repr(rounding),
            remedy="say by how much a logit of a float64 pass may be wrong, or leave it out",
        )
    if not table.ndim:
        return float(table), error
    np.fill_diagonal(table, 0.0)
    return tuple(tuple(map(float, row)) for row in table), error


def pair_table(constants: Constants, k: int) -> NDArray[np.float64]:
    """`(k, k)` constants of differences of logits."""
    table = np.asarray(constants, dtype=np.float64)
    return np.full((k, k), sqrt(2.0) * float(table) * (1.0 + 1e-15)) if not table.ndim else table


def try_constants(network: nn.Module, shape: tuple[int, ...], k: int, found: Lipschitz, who: str, *, steps: int = 30) -> None:
    """Looks for a pair of inputs that violates declared constants: random pairs, near and far, and pairs that climb the ratio.

    A constant that passes is not proven by it.

    Raises:
        NetworkError: a pair violates it, a float64 pass is not possible, or float32 and float64 differ by more than the rounding
            allows.
    """
    try:
        double = copy.deepcopy(network).cpu().double().eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        x = torch.rand((24, *shape), generator=generator, dtype=torch.float64)
        step = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        size = 10.0 ** torch.linspace(-3, 0.5, len(x), dtype=torch.float64).view(-1, 1, 1, 1)
        # dark, gray and bright ones among them, and images against their negatives
        x[1::2] = 0.2 * (x[1::2] - 0.5) + torch.linspace(0, 1, len(x) // 2, dtype=torch.float64).view(-1, 1, 1, 1)
        y = x + step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * size
        y[:4] = 1.0 - x[:4]
        table = torch.from_numpy(pair_table(found.constants, k) + np.eye(k))
        single = copy.deepcopy(network).cpu().eval()
        with torch.no_grad():
            moved = float((single(x.float()).double() - double(x.float().double())).abs().max())
        if not moved * 2.0**-29 * 10.0 <= found.rounding:
            raise NetworkError(
                f"The rounding of {who} is larger than declared",
                expected=f"float32 and float64 logits within {found.rounding * 2.0**29 / 10.0:.3g}",
                received=f"a difference of {moved:.3g}",
                remedy="declare a larger rounding",
            )
        x, y = x.requires_grad_(True), y.requires_grad_(True)
        for _ in range(steps):
            with torch.enable_grad():
                apart = double(x) - double(y)
                gap = ((apart[:, :, None] - apart[:, None, :]).abs() - 4.0 * found.rounding).clamp_min(0.0)
                ratio = (gap / table).flatten(1).amax(1) / (x - y).flatten(1).norm(dim=1).clamp_min(1e-9)
                _refuse_pair(float(ratio.detach().max()), who)
                to_x, to_y = torch.autograd.grad(ratio.sum(), (x, y), allow_unused=True)
            with torch.no_grad():
                for at, towards in ((x, to_x), (y, to_y)):
                    if towards is not None:
                        norm = towards.flatten(1).norm(dim=1).clamp_min(1e-300).view(-1, 1, 1, 1)
                        at += 0.2 * (x - y).flatten(1).norm(dim=1).view(-1, 1, 1, 1) * towards / norm
    except RuntimeError as error:
        raise NetworkError(
            f"No float64 pass of {who} is possible",
            expected="a module that takes float64 on the CPU",
            received=str(error).splitlines()[0],
            remedy="create tensors with the dtype and the device of the input",
        ) from error


def _refuse_pair(ratio: float, who: str) -> None:
    if not ratio <= 1.0 + 1e-9:
        raise NetworkError(
            f"The declared Lipschitz constant of {who} does not hold",
            expected="logits that move by at most the constant times the distance",
            received=f"a pair of inputs where they move {ratio:.4g} times as far",
            remedy="declare a constant that is proven; lipschitz='compute' computes it for known layers",
        )


__all__ = ["Constants", "GroupSort", "Lipschitz", "check_constants", "compute", "conv_norm", "spectral_norm", "try_constants"]
