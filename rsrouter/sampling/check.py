"""Networks that cannot be certified are refused: before the first vote, and again while votes are drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rsrouter.core.errors import NetworkError
from rsrouter.sampling.execution import Execution, as_input

#: Logits below this are rounding errors of larger numbers, as far as `check_network` can tell.
_SMALL = 1e-3


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
