"""Networks that cannot be certified are refused: before the first vote, and again while votes are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rsrouter.core.errors import NetworkError
from rsrouter.sampling.execution import Execution, as_input

#: Logits below this are rounding errors of larger numbers, as far as `check_network` can tell.
_SMALL = 1e-3
#: How far logits may move with a row's company, relative to the largest one, and still be rounding.
_ROUNDING = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}


@dataclass(frozen=True)
class Checked:
    """What a network did when it was checked, to be asked again later.

    Attributes:
        packs: a row's logits have the same bits in any position and company. Otherwise they only agree to rounding, and
            batches must not mix requests.
        gap: by how much they moved, relative to the largest logit.
        rows: `(batch, C, H, W)`, the input.
        logits: the float32 logits of each head.
    """

    packs: bool
    gap: float
    rows: Tensor
    logits: tuple[Tensor, ...]


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


def _logits(module: nn.Module, x: Tensor, execution: Execution, widths: tuple[int, ...], name: str) -> tuple[Tensor, ...]:
    return tuple(h.float() for h in heads(module(as_input(x, execution)), widths, name, len(x)))


def _differ(a: tuple[Tensor, ...], b: tuple[Tensor, ...], scales: list[float]) -> float:
    """The largest relative difference; NaN equals NaN."""
    gaps = [
        torch.where((u == v) | (u.isnan() & v.isnan()), 0.0, (u - v).abs().nan_to_num(nan=torch.inf))
        for u, v in zip(a, b, strict=True)
    ]
    return max(float(gap.max()) / scale for gap, scale in zip(gaps, scales, strict=True))


@torch.inference_mode()
def check_network(
    module: nn.Module,
    name: str,
    widths: tuple[int, ...],
    shape: tuple[int, ...],
    batch: int,
    execution: Execution,
    device: torch.device,
) -> Checked:
    """Refuses networks that cannot be certified; says whether rows of a batch may be packed freely.

    Runs the network on a batch, again on the same batch, and on one that has half of its rows in other places
    among other neighbours.

    Raises:
        NetworkError: wrong shape, different logits on the same input (dropout), or logits that depend on the
            rest of the batch (batch statistics).
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((batch, *shape), generator=generator).to(device)
    first = _logits(module, x, execution, widths, name)
    again = _logits(module, x, execution, widths, name)
    # each head by its own size: probabilities of a thousand classes are small, and still decide
    scales = [max(float(torch.where(torch.isfinite(h), h, 0.0).abs().max()), _SMALL) for h in first]
    if (moved := _differ(first, again, scales)) > 0.0:
        raise NetworkError(
            f"Network {name!r} is random at test time",
            expected="the same logits for the same input",
            received=f"logits that differ by {moved:.2g} (relative)",
            remedy="remove dropout and other randomness from the forward pass in eval mode",
        )
    order = torch.randperm(batch, generator=generator).to(device)
    kept = order[: (batch + 1) // 2]
    # other company: brighter and of more contrast, so that neither its mean nor its spread is that of the first batch
    other = torch.rand((batch, *shape), generator=generator).to(device) * 3.0
    places = torch.randperm(batch, generator=generator).to(device)[: len(kept)]
    other[places] = x[kept]
    elsewhere = tuple(h[places] for h in _logits(module, other, execution, widths, name))
    gap = _differ(tuple(h[kept] for h in first), elsewhere, scales)
    if gap > _ROUNDING[execution.dtype]:
        raise NetworkError(
            f"The votes of network {name!r} depend on the rest of the batch",
            expected="logits of a row alone",
            received=f"logits that change by {gap:.2g} (relative) with their neighbours",
            remedy="use running statistics (track_running_stats=True) in normalisation layers",
        )
    return Checked(gap == 0.0, gap, x, first)


@torch.inference_mode()
def check_again(checked: Checked, module: nn.Module, name: str, widths: tuple[int, ...], execution: Execution) -> None:
    """Refuses a network that no longer gives the bits it gave when it was checked.

    Raises:
        NetworkError: it keeps a state that votes change (a counter, running statistics, a cache).
    """
    now = _logits(module, checked.rows, execution, widths, name)
    if (moved := _differ(checked.logits, now, [1.0] * len(now))) > 0.0:
        raise NetworkError(
            f"The logits of network {name!r} changed while it was voting",
            expected="the bits it gave before the first vote, on the same input",
            received=f"logits that moved by {moved:.2g}",
            remedy="remove state from its forward pass, and start again: its votes so far belong to no fixed classifier",
        )
