"""Doubts about a choice on validation images, told before it is trusted."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rsrouter.training.chains import Goal
from rsrouter.training.simulated import SimulatedVotes

#: With fewer validation images a share of them is known to ten points at best.
FEW_IMAGES = 100
#: With fewer images a good expert may happen to answer no more of them than guessing would.
FEW_LABELS = 20


def doubts(goal: Goal, experts: Mapping[str, SimulatedVotes], labels: NDArray[np.int64], classes: int) -> list[str]:
    """A sentence for each: few validation images, radii that no expert reaches, experts that hardly ever answer the label.

    Args:
        goal: radii, and what the experts certify at them.
        experts: their votes on the validation images, by name.
        labels: `(N,)` of these images.
        classes: how many there are.

    >>> votes = SimulatedVotes(np.array([[90, 10]] * 200), np.array([[9, 1]] * 200), 100, 10, 0.5)
    >>> for line in doubts(Goal((0.0, 3.0), np.array([0.1, 0.0])), {"a": votes}, np.ones(200, np.int64), 2):
    ...     print(line)
    no expert certifies any validation image at radius 3: this radius counts for nothing in the choice
    the best expert, a, answers 0.0% of the validation images as they are labelled, no more than guessing would: are the \
labels numbered as the experts number their classes?
    """
    found, count = [], len(labels)
    if count < FEW_IMAGES:
        found.append(
            f"only {count} validation image{'s' if count > 1 else ''}: coverage and least ratio on so few say little; give "
            "some hundred"
        )
    if void := [f"{r:g}" for r, share in zip(goal.radii, goal.envelope, strict=True) if share == 0]:
        which = f"radius {void[0]}: this radius counts" if len(void) == 1 else f"radii {', '.join(void)}: these radii count"
        found.append(f"no expert certifies any validation image at {which} for nothing in the choice")
    right = {name: float(np.mean(votes.selection.argmax(1) == labels)) for name, votes in experts.items()}
    return found + wrong_labels(right, count, classes, "validation")


def wrong_labels(right: Mapping[str, float], count: int, classes: int, which: str) -> list[str]:
    """A sentence where the share `right` of `count` images that each expert answers as labelled is that of guessing.

    >>> wrong_labels({"a": 0.4, "b": 0.9}, 100, 2, "training"), wrong_labels({"a": 0.0}, 5, 2, "training")
    ([], [])
    """
    best = max(right, key=lambda name: right[name])
    if count < FEW_LABELS or right[best] > min(1.5 / classes, 1.0 / classes + 0.05):
        return []
    return [
        f"the best expert, {best}, answers {100 * right[best]:.1f}% of the {which} images as they are labelled, no more than "
        "guessing would: are the labels numbered as the experts number their classes?"
    ]


def overlap(images: Tensor, validation: Tensor) -> str | None:
    """A sentence where some of `validation (M, C, H, W)` are among `images (N, C, H, W)`, to the bit.

    >>> import torch
    >>> overlap(torch.eye(3)[:, None, None], torch.eye(3)[1:, None, None])
    '2 of 2 validation images are training images too: what is chosen on them looks better than it is'
    """

    def digest(image: Tensor) -> bytes:
        content: Any = image.detach().cpu().contiguous().numpy()
        return blake2b(content, digest_size=16).digest()

    seen = {digest(image) for image in images}
    both = sum(digest(image) in seen for image in validation)
    if not both:
        return None
    are = "is a training image" if both == 1 else "are training images"
    return f"{both} of {len(validation)} validation images {are} too: what is chosen on them looks better than it is"
