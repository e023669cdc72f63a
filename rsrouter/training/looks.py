"""Votes that chains are chosen by: a first look at every validation image, and a second where nearly all votes agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsrouter.core.posterior import nearly_unanimous
from rsrouter.experts.expert import Expert
from rsrouter.experts.identity import module_digest
from rsrouter.experts.pool import ExpertPool
from rsrouter.sampling.execution import Execution
from rsrouter.training.record import TUNE_SURE, Training
from rsrouter.training.resume import ResumeStore, unit_key
from rsrouter.training.whole import votes_at, whole_votes

#: Images of which further copies are drawn at a time, and fewer of those whose features must be kept meanwhile.
SURE_BLOCK, FEATURE_BLOCK = 128, 16
#: From images `(B, C, H, W)`, copies of each and purpose of the noise to counts `(M, B, L)`, one array for each voter.
Look = Callable[[Tensor, int, str], Sequence[NDArray[np.int64]]]


def with_further(
    training: Training,
    votes: tuple[int, int],
    given: Sequence[NDArray[np.int64]],
    look: Look,
    passes: int = 1,
    block: int = SURE_BLOCK,
) -> NDArray[np.int64]:
    """Adds the votes of further copies of the validation images of which some counts say that nearly all
    votes agree, in place.

    Args:
        training: its validation images, and what counts the passes.
        votes: how many copies of an image there were, and how many further ones to draw.
        given: counts `(M, N, L)` of voters that see the same copies, each counted in M ways, where every vote counts first.
        look: draws them.
        passes: of single experts that a copy costs, for the progress of images that need no further copies.
        block: images that are drawn at a time.

    Returns:
        `(N,)` votes an image.
    """
    images, (copies, more) = training.held_out[0], votes
    totals = np.full(len(images), copies)
    if not more:
        return totals
    rows = np.flatnonzero(np.any([nearly_unanimous(counts[0], copies) for counts in given], axis=0))
    if training.votes is not None:
        training.votes((len(images) - len(rows)) * more * passes)
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        for counts, further in zip(given, look(images[torch.from_numpy(part)], more, TUNE_SURE), strict=True):
            counts[:, part] += further
    totals[rows] += more
    return totals


def expert_look(training: Training, alone: ExpertPool, images: Tensor, copies: int, purpose: str) -> list[NDArray[np.int64]]:
    """`Look` of one expert."""
    return [training.expert_votes(images, copies, purpose, alone).transpose(1, 0, 2)]


def head_look(
    training: Training,
    readers: Sequence[Expert],
    sigma: float,
    grid: int,
    heads: dict[str, nn.Module],
    confidences: Sequence[float],
    images: Tensor,
    copies: int,
    purpose: str,
) -> list[NDArray[np.int64]]:
    """`Look` of heads that read the same experts at the same noise level. Of further copies only the counts are stored: their
    features are thousands an image."""
    if purpose != TUNE_SURE:
        features = training.features(readers, sigma, images, copies, purpose, grid)
        return list(_head_votes(features, heads, readers[0].num_classes, confidences).values())
    drawn = (
        [e.digest for e in readers],
        [module_digest(head) for head in heads.values()],
        repr(training.execution),
        training.device,
    )
    content = images.detach().cpu().contiguous().numpy().tobytes()
    key = unit_key("further", *drawn, sigma, grid, tuple(confidences), copies, training.seed, content)
    if (kept := training.store.get(key)) is not None:
        return [counts.numpy() for counts in kept]
    features = replace(training, store=ResumeStore()).features(readers, sigma, images, copies, purpose, grid)
    votes = list(_head_votes(features, heads, readers[0].num_classes, confidences).values())
    training.store.put(key, [torch.from_numpy(counts) for counts in votes], small=True)
    return votes


def network_look(
    training: Training,
    expert: Expert,
    module: nn.Module,
    sigma: float,
    confidences: Sequence[float],
    images: Tensor,
    copies: int,
    purpose: str,
) -> list[NDArray[np.int64]]:
    """`Look` of a network of the router's own."""
    counts = whole_votes(
        *(expert, module, sigma, images, copies),
        seed=training.seed,
        purpose=purpose,
        store=training.store,
        confidences=confidences,
        dtype=(training.execution or Execution()).dtype,
    )
    if training.votes is not None:
        training.votes(len(images) * copies)
    return [counts.copy()]


def _head_votes(
    features: Tensor, heads: dict[str, nn.Module], classes: int, confidences: Sequence[float]
) -> dict[str, NDArray[np.int64]]:
    """`(M, N, classes)` votes of every head on cached features, counted at each of the M confidences."""
    votes = {name: np.zeros((len(confidences), len(features), classes), dtype=np.int64) for name in heads}
    with torch.inference_mode():
        for i, copies in enumerate(features):
            for name, head in heads.items():
                logits = head(copies.float())
                for k, confidence in enumerate(confidences):
                    votes[name][k, i] = np.bincount(votes_at(logits, confidence).numpy(), minlength=classes + 1)[:classes]
    return votes
