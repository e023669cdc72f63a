"""Logits and the votes that they cast: running a network, reading what it returns, and telling rounding from another function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rsrouter.core.errors import DeviceError, NetworkError, RSRouterError

#: One tensor for each head of a network.
Outputs = tuple[Tensor, ...]

#: How far a gap between two logits may move, relative to itself and to a usual gap between the first two, and be rounding.
_ROUNDING = {"float32": 1e-3, "tf32": 2e-2, "bfloat16": 5e-2, "float16": 5e-2, "int8": 5e-2}
#: The share of rows whose vote may move: those that rounding decides.
_FLIPS = {"float32": 0.01, "tf32": 0.05, "bfloat16": 0.1, "float16": 0.1, "int8": 0.1}

_REMEDIES = {
    "view size is not compatible": "use .reshape instead of .view in its forward pass",
    "required rank": "pass Execution(channels_last=False)",
    "nvidia driver": "create tensors on x.device; call no .cuda() in its forward pass",
    "cuda": "create tensors on x.device; call no .cuda() in its forward pass",
    "guard failed": "export it with a dynamic batch dimension, or pass Execution(batch=...) with the size it was exported for",
    "double": "keep weights and constants in float32, in buffers (register_buffer)",
    "dtype": "keep weights and constants in the dtype of the input, in buffers (register_buffer)",
    "same device": "keep tensors in buffers (register_buffer), so that they move with the module",
    "inference": "compute no gradients in its forward pass",
    "does not require grad": "compute no gradients in its forward pass",
}
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


#: Words of an accelerator that no longer answers, or whose memory is damaged; nothing more can be run on it by this process.
_LOST = (
    *("cuda error", "cudnn_status_internal", "cublas_status_execution_failed", "device-side assert"),
    "unspecified launch failure",
)


def lost_device(error: BaseException, device: object) -> DeviceError | None:
    """The error of an accelerator that stopped working, if `error` is one: rows that are written stay, and another device, or
    a new process, draws the votes that are missing."""
    said = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
    if isinstance(error, torch.OutOfMemoryError) or not (
        isinstance(error, torch.AcceleratorError) or any(words in said.lower() for words in _LOST)
    ):
        return None
    return DeviceError(
        f"The device {device} stopped working",
        expected="a device that stays",
        received=said.splitlines()[0],
        remedy="finished rows are kept: look at `nvidia-smi`, then run the same command again, on another card if need be",
    )


def out_of_memory(name: str, rows: int, error: BaseException) -> NetworkError:
    """The error of a network that does not fit into memory with `rows` rows."""
    return NetworkError(
        f"Network {name!r} ran out of memory",
        expected=f"room for {rows} {'row' if rows == 1 else 'rows'} per forward pass, which this run is recorded with",
        received=(str(error) or type(error).__name__).splitlines()[0],
        remedy="free memory and run again, or start a new table with a smaller batch (Execution(batch=...), --execution-batch)",
    )


def forward(module: nn.Module, x: Tensor, name: str) -> Any:
    """What the network returns for a batch.

    Raises:
        NetworkError: whatever it raises, with its cause; errors of this package and of full memory pass.
    """
    try:
        return module(x)
    except (RSRouterError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if (gone := lost_device(error, x.device)) is not None and x.device.type != "cpu":
            raise gone from error
        said = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        if isinstance(error, MemoryError) or any(words in said.lower() for words in _OUT_OF_MEMORY):
            raise torch.OutOfMemoryError(said) from error
        remedies = [remedy for words, remedy in _REMEDIES.items() if words in said.lower()]
        lines = said.splitlines()
        raise NetworkError(
            f"The forward pass of network {name!r} failed",
            expected=f"logits for a batch of shape {tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')} on {x.device}",
            received=lines[0] if len(lines) < 3 else f"{lines[0]} ... {lines[-1]}",
            remedy=remedies[0] if remedies else "call the module on such a batch, in eval mode, and mend what it raises",
        ) from error


def outputs(output: Any) -> Outputs:
    """Float32 copies of the tensors that a network returned: it may write into its own again."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    parts = output if isinstance(output, tuple | list) else (output,)
    real = [o.real if o.is_complex() else o for o in parts if isinstance(o, Tensor)]
    return tuple(o.detach().float().clone() for o in real)


def heads(output: Any, widths: tuple[int, ...], name: str, rows: int) -> Outputs:
    """The network's output as one logits tensor per stage, its shapes checked.

    Raises:
        NetworkError: not tensors of real numbers, or of another shape than `(rows, width)`.
    """
    found = tuple(output) if isinstance(output, tuple | list) else (output,)
    shapes = [tuple(o.shape) if isinstance(o, Tensor) and o.layout == torch.strided else type(o).__name__ for o in found]
    wanted = [(rows, w) for w in widths]
    if shapes != wanted or any(o.is_complex() for o in found):
        remedy = "check num_classes, and that the module returns logits per image"
        if len(found) == 1 and not isinstance(output, Tensor):
            remedy = "wrap the module so that it returns the tensor of logits (`return output.logits`, `output[0]`)"
        elif widths == (2,) and shapes in ([(rows, 1)], [(rows,)]):
            remedy = "one logit z votes as two classes: return torch.cat([torch.zeros_like(z), z], 1), z of shape (n, 1)"
        kinds = "" if shapes != wanted else f" of {found[0].dtype}"
        raise NetworkError(
            f"Network {name!r} returns the wrong shape",
            expected=f"logits of shape {wanted}",
            received=f"{shapes}{kinds}",
            remedy=remedy,
        )
    return found


def votes_of(logits: Tensor) -> Tensor:
    """The vote of every row of `(B, C)`: the first of its largest logits, or C, which is invalid.

    A class at -inf is masked out. NaN, +inf, or nothing but -inf is not a vote.

    >>> inf, nan = float("inf"), float("nan")
    >>> votes_of(torch.tensor([[1.0, 2.0], [1.0, -inf], [nan, 1.0], [inf, 1.0], [-inf, -inf]])).tolist()
    [1, 0, 2, 2, 2]
    """
    valid = (logits < torch.inf).all(1) & (logits > -torch.inf).any(1)
    return torch.where(valid, logits.argmax(1), logits.shape[1])


@dataclass(frozen=True)
class Moved:
    """How far the logits of the same rows are from each other in two runs.

    Attributes:
        gap: the largest difference of any gap between a row's first logit and another one, relative to that gap and to a usual
            gap between the first two; what no scale or shift of the logits, and no masked class, makes small.
        excess: the same, relative to what rounding may do; above 1 it is more.
        flips: share of rows that vote for another class.
        pattern: NaN or infinity in one run alone.
        equal: the same bits.
    """

    gap: float
    excess: float
    flips: float
    pattern: bool
    equal: bool

    def is_rounding(self, dtype: str) -> bool:
        """Whether the two runs are one function, to the precision of `dtype`."""
        return self.equal or not (self.pattern or self.excess > 1.0 or self.flips > _FLIPS[dtype])

    def __str__(self) -> str:
        if self.equal:
            return "the same bits"
        how = "NaN or infinity in one of them" if self.pattern else f"gaps between logits that move by {self.gap:.2g} (relative)"
        return how + (f", {100 * self.flips:.3g}% of the votes for another class" if self.flips else "")


def moved(first: Outputs, second: Outputs, dtype: str = "float32") -> Moved:
    """Compares two runs of the same rows, head by head.

    Args:
        first, second: `(B, C)` logits of each head.
        dtype: that they were computed in, or `tf32` (`Execution.rounding`).

    >>> first = torch.tensor([[2.0, 1.0, -1e9], [1.0, 1.2, -1e9]])
    >>> moved((first,), (first * (1 + 1e-7),)).is_rounding("float32")
    True
    >>> print(moved((first,), (first + torch.tensor([0.5, 0.0, 0.0]),)))
    gaps between logits that move by 0.57 (relative), 50% of the votes for another class
    """
    parts = [Moved(0.0, 0.0, 0.0, False, True), *(_moved(a, b, dtype) for a, b in zip(first, second, strict=True))]
    return Moved(
        max(p.gap for p in parts),
        max(p.excess for p in parts),
        max(p.flips for p in parts),
        any(p.pattern for p in parts),
        all(p.equal for p in parts),
    )


def _moved(first: Tensor, second: Tensor, dtype: str) -> Moved:
    u, v = (t.detach().cpu().double().flatten(1) for t in (first, second))
    if torch.equal(u.nan_to_num(nan=7.0), v.nan_to_num(nan=7.0)) and torch.equal(u.isnan(), v.isnan()):
        return Moved(0.0, 0.0, 0.0, False, True)
    info = torch.finfo(getattr(torch, "float32" if dtype in ("tf32", "int8") else dtype))
    eps = 2.0**-10 if dtype == "tf32" else info.eps
    finite, both = u.isfinite(), u.isfinite() & v.isfinite()
    same = both | (u == v) | (u.isnan() & v.isnan())
    # a number next to the largest one that the dtype holds may be that or infinity
    overflows = torch.where(finite, u, v).nan_to_num(posinf=0.0, neginf=0.0).abs() > float(info.max) / 2
    pattern = bool((~(same | (overflows & (finite | v.isfinite())))).any())
    flips = float((votes_of(u) != votes_of(v)).double().mean())
    ranked = torch.where(both, u, -torch.inf)
    top = ranked.argmax(1, keepdim=True)
    gap_u, gap_v = u.gather(1, top) - u, v.gather(1, top) - v
    others = both & both.any(1, keepdim=True)
    others.scatter_(1, top, False)
    if not bool(others.any()):
        return Moved(0.0, 0.0, flips, pattern, False)
    margins = torch.where(others, gap_u, torch.inf).amin(1)
    usual = float(torch.quantile(margins[margins.isfinite()], 0.6))  # half of the rows of a check may be close ones
    scale = gap_u + usual
    difference = torch.where(others, (gap_u - gap_v).abs(), 0.0)
    allowed = _ROUNDING[dtype] * scale + 4 * eps * torch.maximum(u.abs(), u.gather(1, top).abs())
    relative, excess = (torch.where(difference > 0, difference / s, 0.0) for s in (scale, allowed))
    return Moved(float(relative[others].max()), float(excess[others].max()), flips, pattern, False)


def same_votes(first: Outputs, second: Outputs, dtype: str = "float32") -> bool:
    """Whether two runs of the same rows differ by rounding alone."""
    if [a.shape for a in first] != [b.shape for b in second]:
        return False
    return moved(first, second, dtype).is_rounding(dtype)
