"""The function that is certified is the one that runs: preparing a network, and checking it can be certified."""

from __future__ import annotations

import copy
import math
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rsrouter.core.errors import InputError, NetworkError

#: Logits below this are rounding errors of larger numbers, as far as `check_network` can tell.
_SMALL = 1e-3

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Execution:
    """How networks run; changes bits, hence votes, hence belongs to every certificate's metadata.

    Attributes:
        batch: rows per forward pass; the last batch is padded to it. 0: `default_batch` for the input.
        dtype: `float32`, `bfloat16` or `float16`.
        fold: fold BatchNorm into the convolution before it, where the module can be traced.
        channels_last: memory layout of weights and inputs.
        compile: use torch.compile.
    """

    batch: int = 0
    dtype: str = "float32"
    fold: bool = True
    channels_last: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise InputError(
                "Unknown dtype", expected=f"one of {sorted(_DTYPES)}", received=repr(self.dtype), remedy="use float32"
            )
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 0:
            raise InputError(
                "The execution batch must be a whole number",
                expected="batch >= 1, or 0 for the default",
                received=repr(self.batch),
                remedy="leave it out",
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def default_batch(numel: int, device: torch.device) -> int:
    """Rows per forward pass when nothing was calibrated: a function of input size and device type alone.

    On a CPU about a megabyte of input, which keeps the activations of small networks in cache; on an
    accelerator about 32 MB. Deterministic, so that two runs never differ by a timing.
    """
    budget = 2**20 if device.type == "cpu" else 2**25
    rows = budget // (4 * numel)
    return next((size for size in (1000, 500, 250, 100, 50, 25) if rows >= size), 10)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A usable device; None means CPU.

    Raises:
        InputError: an unknown device, or one this machine does not have.
    """
    try:
        resolved = torch.device("cpu" if device is None else device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(
            "The device cannot be used",
            expected="'cpu', or an accelerator torch can see such as 'cuda:0'",
            received=repr(device),
            remedy=f"pick another device ({str(error).splitlines()[0]})",
        ) from error
    return resolved


def _fold_batchnorm(module: nn.Module) -> nn.Module | None:
    """A traced copy with every `conv -> batchnorm` pair folded; None where the module cannot be traced."""
    try:
        return _folded(module)
    except Exception:  # tracing runs user code: whatever it raises only means "do not fold"
        return None


def _folded(module: nn.Module) -> nn.Module:
    traced = fx.symbolic_trace(module)
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        conv, norm = modules[str(source.target)], modules[node.target]
        uses = sum(n.op == "call_module" and n.target == source.target for n in traced.graph.nodes)
        if type(conv) is not nn.Conv2d or uses > 1 or norm.running_mean is None:
            continue
        parent, _, leaf = str(source.target).rpartition(".")
        setattr(traced.get_submodule(parent), leaf, fuse_conv_bn_eval(conv, norm))
        modules[str(source.target)] = traced.get_submodule(str(source.target))
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


@torch.inference_mode()
def _same_function(folded: nn.Module, module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether two random images get the same outputs up to rounding. Tracing runs Python on stand-ins, so that a test
    such as `isinstance(x, Tensor)` may silently take the other branch."""
    x = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0))
    try:
        pairs = [tuple(o) if isinstance(o, tuple | list) else (o,) for o in (folded(x), module(x))]
        return len(pairs[0]) == len(pairs[1]) and all(
            a.shape == b.shape
            and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * (1 + float(torch.nan_to_num(b).abs().max())), equal_nan=True)
            for a, b in zip(*pairs, strict=True)
        )
    except Exception:  # whatever a wrongly traced module raises only means "do not fold"
        return False


def prepare(module: nn.Module, execution: Execution, device: torch.device, shape: tuple[int, ...] | None = None) -> nn.Module:
    """A private copy of `module`, in eval mode, as it will run; the original is not touched.

    Args:
        module: from images to logits.
        execution: how it is to run.
        device: where.
        shape: `(C, H, W)`; where given, a folded copy is used only if it computes the same function.
    """
    try:
        prepared = copy.deepcopy(module).eval().requires_grad_(False)
    except RuntimeError as error:  # tensors with a history, such as the weights of the old `nn.utils.weight_norm`
        raise NetworkError(
            "A network cannot be copied",
            expected="a module that copy.deepcopy accepts",
            received=str(error).splitlines()[0],
            remedy="call torch.nn.utils.remove_weight_norm, or use nn.utils.parametrizations",
        ) from error
    if execution.fold:
        folded = _fold_batchnorm(copy.deepcopy(prepared))
        if folded is not None and (shape is None or _same_function(folded, prepared, shape)):
            prepared = folded
    prepared = prepared.to(device=device, dtype=_DTYPES[execution.dtype])
    if execution.channels_last:
        prepared = prepared.to(memory_format=torch.channels_last)
    if execution.compile:
        prepared = torch.compile(prepared, dynamic=False)  # type: ignore[assignment]
    return prepared


def as_input(x: Tensor, execution: Execution) -> Tensor:
    """The batch in the dtype and memory layout of the execution."""
    return x.to(
        dtype=_DTYPES[execution.dtype], memory_format=torch.channels_last if execution.channels_last else torch.contiguous_format
    )


def heads(output: Any, widths: tuple[int, ...], name: str, rows: int) -> tuple[Tensor, ...]:
    """The network's output as one logits tensor per stage, its shapes checked.

    Raises:
        NetworkError: not tensors, or of another shape than `(rows, width)`.
    """
    outputs = tuple(output) if isinstance(output, tuple | list) else (output,)
    shapes = [tuple(o.shape) if isinstance(o, Tensor) else type(o).__name__ for o in outputs]
    if shapes != [(rows, w) for w in widths]:
        raise NetworkError(
            f"Network {name!r} returns the wrong shape",
            expected=f"logits of shape {[(rows, w) for w in widths]}",
            received=str(shapes),
            remedy="check num_classes, and that the module returns logits per image",
        )
    return outputs


@torch.inference_mode()
def check_network(
    module: nn.Module,
    name: str,
    widths: tuple[int, ...],
    shape: tuple[int, ...],
    batch: int,
    execution: Execution,
    device: torch.device,
) -> bool:
    """Whether rows of a batch may be packed freely; refuses networks that cannot be certified.

    Runs the network on a batch, again on the same batch, and on one that has half of its rows in other places
    among other neighbours.

    Returns:
        True if a row's logits have the same bits in any position and company; False if they only agree to
        rounding, so that batches must not mix requests.

    Raises:
        NetworkError: wrong shape, different logits on the same input (dropout), or logits that depend on the
            rest of the batch (batch statistics).
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((batch, *shape), generator=generator).to(device)
    first = [h.float() for h in heads(module(as_input(x, execution)), widths, name, batch)]
    again = [h.float() for h in heads(module(as_input(x, execution)), widths, name, batch)]
    # each head by its own size: probabilities of a thousand classes are small, and still decide
    scales = [max(float(torch.where(torch.isfinite(h), h, 0.0).abs().max()), _SMALL) for h in first]

    def differ(a: list[Tensor], b: list[Tensor]) -> float:
        gaps = [
            torch.where((u == v) | (u.isnan() & v.isnan()), 0.0, (u - v).abs().nan_to_num(nan=torch.inf))
            for u, v in zip(a, b, strict=True)
        ]
        return max(float(gap.max()) / scale for gap, scale in zip(gaps, scales, strict=True))

    if differ(first, again) > 0.0:
        raise NetworkError(
            f"Network {name!r} is random at test time",
            expected="the same logits for the same input",
            received=f"logits that differ by {differ(first, again):.2g} (relative)",
            remedy="remove dropout and other randomness from the forward pass in eval mode",
        )
    order = torch.randperm(batch, generator=generator).to(device)
    kept = order[: (batch + 1) // 2]
    other = torch.rand((batch, *shape), generator=generator).to(device) * 3.0 - 1.0
    places = torch.randperm(batch, generator=generator).to(device)[: len(kept)]
    other[places] = x[kept]
    moved = [h.float()[places] for h in heads(module(as_input(other, execution)), widths, name, batch)]
    gap = differ([h[kept] for h in first], moved)
    tolerance = 1e-3 if execution.dtype == "float32" else 5e-2
    if gap > tolerance:
        raise NetworkError(
            f"The votes of network {name!r} depend on the rest of the batch",
            expected="logits of a row alone",
            received=f"logits that change by {gap:.2g} (relative) with their neighbours",
            remedy="use running statistics (track_running_stats=True) in normalisation layers",
        )
    return gap == 0.0


def warn_halved(name: str, batch: int) -> None:
    """Tells the user that memory ran out and the execution batch, part of the recorded function, is now smaller."""
    warnings.warn(f"network {name!r} ran out of memory; its execution batch is now {batch} rows", RuntimeWarning, stacklevel=3)


def calibrate(module: nn.Module, shape: tuple[int, ...], device: torch.device, execution: Execution, *, repeats: int = 3) -> int:
    """The execution batch with most rows a second on this machine, out of a few, by a second or so of forward passes.

    The result belongs into an `Execution` that is stored with the router: it decides bits, so it must not be found
    anew, by another timing, in every run.
    """
    prepared = prepare(module, execution, device)
    base = default_batch(math.prod(shape), device)
    best, fastest = base, 0.0
    for batch in sorted({max(1, int(base * factor)) for factor in (0.25, 0.5, 1, 2, 4)}):
        x = as_input(torch.rand((batch, *shape), generator=torch.Generator().manual_seed(0)).to(device), execution)
        try:
            with torch.inference_mode():
                float(prepared(x).sum())
                speeds = []
                for _ in range(repeats):
                    start, rows = time.perf_counter(), 0
                    while rows < 2 * base:
                        out = prepared(x)
                        rows += batch
                    float(out.sum())
                    speeds.append(rows / (time.perf_counter() - start))
        except torch.OutOfMemoryError:
            break
        if max(speeds) > fastest:
            best, fastest = batch, max(speeds)
    return best
