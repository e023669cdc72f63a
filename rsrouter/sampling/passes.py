"""One forward pass without noise, of networks whose Lipschitz constant is known: float64 logits."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsrouter.core.errors import NetworkError
from rsrouter.experts.identity import ModuleWatch
from rsrouter.sampling.logits import Outputs, forward, heads

#: Images in one forward pass.
ROWS = 64


class Passes:
    """A deterministic network on one device, in float64.

    The function that is certified is the one in exact arithmetic; float64 keeps the difference below the stage's `rounding`.

    Args:
        module: from images to logits, `(B, width)` or a tuple of them; it is copied.
        name: of the network, for errors.
        widths: number of logits of each stage.
        shape: `(C, H, W)`.
        device: where.

    Raises:
        NetworkError: it cannot run in float64, returns another shape, is random, or looks at the rest of the batch.
    """

    def __init__(
        self, module: nn.Module, name: str, widths: tuple[int, ...], shape: tuple[int, ...], device: torch.device
    ) -> None:
        self.name, self.widths, self.device = name, widths, device
        self.module = copy.deepcopy(module).eval().requires_grad_(False).to(device, torch.float64)
        self._watch = ModuleWatch(self.module)
        x = torch.rand((8, *shape), generator=torch.Generator().manual_seed(0)).to(device, torch.float64)
        whole, again = self._run(x), self._run(x)
        self._same(
            whole, again, "is random at test time", "remove dropout and other randomness from the forward pass in eval mode"
        )
        alone = [self._run(row[None]) for row in x]
        rows = tuple(torch.cat([part[k] for part in alone]) for k in range(len(widths)))
        self._same(whole, rows, "looks at the rest of the batch", "use running statistics in normalisation layers")

    @torch.inference_mode()
    def _run(self, x: Tensor) -> Outputs:
        return heads(forward(self.module, x, self.name), self.widths, self.name, len(x))

    def _same(self, first: Outputs, second: Outputs, what: str, remedy: str) -> None:
        for a, b in zip(first, second, strict=True):
            if not torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True):
                raise NetworkError(
                    f"Network {self.name!r} {what}",
                    expected="the same logits for the same image",
                    received=f"logits that differ by {float((a - b).abs().max()):.3g}",
                    remedy=remedy,
                )

    def logits(self, images: Tensor) -> list[NDArray[np.float64]]:
        """`(N, width)` logits of each stage."""
        parts: Sequence[Outputs] = [self._run(x.to(self.device, torch.float64)) for x in torch.split(images, ROWS)]
        return [np.concatenate([part[k].cpu().numpy() for part in parts]) for k in range(len(self.widths))]

    def check_again(self) -> None:
        """Raises NetworkError where a pass changed the module."""
        if not self._watch.unchanged():
            raise NetworkError(
                f"Network {self.name!r} changed while it ran",
                expected="the weights and buffers it had",
                received="others",
                remedy="a network may not keep anything of its last input",
            )


__all__ = ["Passes"]
