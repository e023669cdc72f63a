"""The core of a router: an accurate network that answers where nothing is certified, in one forward pass without noise.

Compositional certification (ACES; Horvath et al. 2022, arXiv 2204.00487). Its answers carry no certificate: they count in
natural accuracy, which is a figure of its own, and in no certified one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rsrouter.core.types import ABSTAIN, Certificate
from rsrouter.experts.expert import Expert
from rsrouter.sampling.execution import resolve_device
from rsrouter.sampling.passes import Passes

#: By how much, relative to the largest logit, another class may lead a stored answer: float64 passes of two machines.
TIE = 1e-6


class Core:
    """A core network on any device.

    Args:
        expert: made with `core=True`.
    """

    def __init__(self, expert: Expert) -> None:
        self.expert = expert
        self._kept: tuple[str, Passes] | None = None

    @property
    def words(self) -> str:
        """What it is, for people."""
        return f"core {self.expert.name}: answers where nothing is certified, in one pass without noise; no certificate covers it"

    def __getstate__(self) -> dict[str, Any]:
        return {"expert": self.expert, "_kept": None}

    def logits(self, images: Tensor, device: str | None = None) -> NDArray[np.float64]:
        """`(N, num_classes)` logits of a float64 pass over `images (N, C, H, W)`.

        Raises:
            NetworkError: it cannot run in float64, is random, or looks at the rest of the batch.
        """
        if self._kept is None or self._kept[0] != str(device):
            e = self.expert
            passes = Passes(e.network(), e.name, (e.num_classes,), e.input_shape, resolve_device(device))
            self._kept = (str(device), passes)
        return self._kept[1].logits(images)[0]

    def answers(self, images: Tensor, device: str | None = None) -> NDArray[np.int64]:
        """Its class for each image; ABSTAIN (-1) where a logit is not finite. Nothing of it is certified."""
        z = self.logits(images, device)
        return np.where(np.isfinite(z).all(1), z.argmax(1), ABSTAIN).astype(np.int64)

    def differs(self, images: Tensor, answers: NDArray[np.int64], device: str | None = None) -> NDArray[np.bool_]:
        """`(N,)` whether stored answers are others than its own, ties of two machines' rounding aside."""
        z, own = self.logits(images, device), self.answers(images, device)
        picked = np.take_along_axis(z, np.maximum(answers, 0)[:, None], 1)[:, 0]
        with np.errstate(invalid="ignore"):
            tied = (answers != ABSTAIN) & (own != ABSTAIN) & (z.max(1) - picked <= TIE * np.abs(z).max(1))
        return np.asarray((answers != own) & ~tied)

    def fill(self, found: Mapping[int, Certificate], images: Tensor, device: str | None) -> dict[int, Certificate]:
        """Certificates by position in `images`, with its answer where they abstain."""
        rows = [i for i, c in found.items() if c.predict == ABSTAIN]
        own = dict(zip(rows, self.answers(images[rows], device).tolist(), strict=True)) if rows else {}
        return {i: replace(c, core=own[i]) if i in own else c for i, c in found.items()}


__all__ = ["TIE", "Core"]
