"""A forward pass as a CUDA graph: launched as one, and only where it is the same pass to the bit."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rsrouter.core.errors import RSRouterError
from rsrouter.sampling.execution import Prepared
from rsrouter.sampling.logits import Outputs, lost_device, moved, outputs

#: Passes before a capture, in which libraries choose and allocate what they need.
WARM_UP = 3


class Replayed:
    """A captured forward pass of a fixed number of rows; other numbers run as they are.

    Args:
        prepared: the network.
        shape: `(B, C, H, W)` of a batch.
        device: a CUDA device.
    """

    def __init__(self, prepared: Prepared, shape: tuple[int, ...], device: torch.device) -> None:
        self.module = prepared.module
        self.input = prepared.input(torch.zeros(shape, device=device)).clone()
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.inference_mode(), torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.module(self.input)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self.graph):
            self.output = self.module(self.input)

    def __call__(self, x: Tensor) -> Any:
        """What the network returns, in tensors that the next call writes into."""
        if x.shape != self.input.shape:
            return self.module(x)
        self.input.copy_(x)
        self.graph.replay()
        return self.output


@torch.inference_mode()
def replayed(prepared: Prepared, rows: Tensor, logits: Outputs, device: torch.device, name: str) -> Prepared:
    """`prepared` with its passes replayed, or as it is where it cannot be captured or a replay gives other bits.

    Args:
        prepared: the network, checked.
        rows: `(B, C, H, W)`, a batch.
        logits: float32 logits of each head that it gave for them.
        device: a CUDA device.
        name: of the network, for the warning.

    Raises:
        DeviceError: the device stopped working. torch.OutOfMemoryError: no room for it.
    """
    try:
        captured = Replayed(prepared, tuple(rows.shape), device)
        found = [moved(logits, outputs(captured(prepared.input(rows)))) for _ in range(2)]
        if all(m.equal for m in found):
            return replace(prepared, module=captured)
        why = str(next(m for m in found if not m.equal))
    except (RSRouterError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what cannot be captured: values that are read, branches on them
        torch.cuda.synchronize(device)  # a device that is gone says so here
        if "captur" not in str(error).lower() and (gone := lost_device(error, device)) is not None:
            raise gone from error
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    warnings.warn(f"network {name!r} runs without CUDA graphs: {why}", RuntimeWarning, stacklevel=2)
    return replace(prepared, execution=replace(prepared.execution, graphs=False))


__all__ = ["Replayed", "replayed"]
