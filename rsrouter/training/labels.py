"""Labels for the router: how far each expert holds the true class of each training image."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsrouter.core.bounds import binom_lower, check_whole
from rsrouter.core.certificates import vote_radius
from rsrouter.core.certify import VoteRequest
from rsrouter.experts.pool import ExpertPool
from rsrouter.inputs import check_images, check_labels
from rsrouter.router.base import vote_model
from rsrouter.sampling.engine import Engine, image_identity
from rsrouter.sampling.execution import Execution
from rsrouter.training.resume import ResumeStore, unit_key

LABEL = "label"


class Labels(NamedTuple):
    """Routing labels of N images and K experts (columns in the pool's order).

    Attributes:
        radius: `(N, K)` float64, the radius within which expert k holds the true class, 0 where it does not.
        predict: `(N, K)` int64, the class of most votes.
    """

    radius: NDArray[np.float64]
    predict: NDArray[np.int64]


def label_engine(pool: ExpertPool, *, seed: int = 0, device: str | None = None, execution: Execution | None = None) -> Engine:
    """The engine of `label_votes`, for callers that draw in many calls."""
    for expert in pool:
        expert.check_unchanged()
    return Engine([vote_model(e) for e in pool], pool.input_shape, seed=seed, device=device, execution=execution)


def label_votes(
    pool: ExpertPool,
    images: Tensor,
    *,
    n: int = 100,
    seed: int = 0,
    device: str | None = None,
    purpose: str = LABEL,
    execution: Execution | None = None,
    progress: Callable[[int], None] | None = None,
    block: int = 64,
    engine: Engine | None = None,
    store: ResumeStore | None = None,
) -> NDArray[np.int64]:
    """Votes of every expert on every image: `(N, K, classes + 1)`, invalid votes last.

    Args:
        pool: the experts.
        images: `(N, C, H, W)` pixels in [0,1].
        n: votes per expert and image.
        seed, purpose: key the noise; no other purpose sees the same noise.
        progress: called with the number of votes drawn since the last call.
        block: images between two looks at `store`.
        engine: a `label_engine` of this pool and seed; its networks are then not prepared again.
        store: votes are kept there block by block, and read back instead of drawn.

    Raises:
        InputError: images that do not fit the pool. NetworkError: an expert that was changed after it was wrapped.
    """
    check_whole("n", n, 1)
    x = check_images(images, pool.input_shape)
    engine = engine or label_engine(pool, seed=seed, device=device, execution=execution)
    votes = np.zeros((len(x), len(pool), pool.num_classes + 1), dtype=np.int64)
    store = store or ResumeStore()
    job = (pool.names, pool.sigmas, [e.digest for e in pool], n, engine.seed, purpose, repr(engine.execution), str(engine.device))
    for start in range(0, len(x), block):
        part = x[start : start + block]
        key = unit_key("votes", *job, part.cpu().contiguous().numpy().tobytes())
        kept = store.get(key)
        if kept is not None:
            votes[start : start + len(part)] = kept.numpy()
            continue
        requests = [VoteRequest(i, name, purpose, 0, n) for name in pool.names for i in range(len(part))]
        counts = engine.run(part, [image_identity(image) for image in part], requests)
        for request, count in zip(requests, counts, strict=True):
            votes[start + request.image, pool.names.index(request.network)] = count[request.network]
        store.put(key, torch.from_numpy(votes[start : start + len(part)].copy()), small=True)
        if progress is not None:
            progress(len(requests) * n)
    return votes


def radii_from_votes(votes: NDArray[np.int64], labels: NDArray[np.int64], sigmas: tuple[float, ...], alpha: float) -> Labels:
    """Routing labels from vote counts `(N, K, classes + 1)`, as Dual RS takes them (section 4).

    The true class is known beforehand, so one set of votes gives a valid bound on its probability; a label is
    a training target all the same, not a certificate.

    >>> radii_from_votes(np.array([[[100, 0, 0]]]), np.array([0]), (1.0,), 1e-3).radius.round(2)
    array([[1.5]])
    """
    held, n = _held(votes, labels)
    return _labels(votes, binom_lower(held, n, alpha), sigmas)


def target_radii(
    votes: NDArray[np.int64], labels: NDArray[np.int64], sigmas: tuple[float, ...], *, plan_n: int = 10_000, alpha: float = 1e-3
) -> Labels:
    """Training targets from few votes: the radius that the same share of votes would certify at `plan_n` votes.

    With 100 votes a Clopper-Pearson bound stops at 1.5 sigma, so an expert of small sigma would never seem to hold
    as far as it does; the share is therefore estimated (Jeffreys, `(k + 1/2) / (n + 1)`) and carried over. No bound,
    and never a certificate. Arguments as `radii_from_votes`.

    >>> target_radii(np.array([[[100, 0, 0]]]), np.array([0]), (1.0,)).radius.round(2)
    array([[3.2]])
    """
    held, n = _held(votes, labels)
    share = np.where(held == n, 1.0, (held + 0.5) / (n + 1.0))
    return _labels(votes, binom_lower(np.rint(share * plan_n).astype(np.int64), plan_n, alpha), sigmas)


def _held(votes: NDArray[np.int64], labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`(N, K)` votes for the true class, and all votes."""
    return np.take_along_axis(votes, labels[:, None, None], axis=2)[:, :, 0], votes.sum(axis=2)


def _labels(votes: NDArray[np.int64], lower: NDArray[np.float64], sigmas: tuple[float, ...]) -> Labels:
    radius = np.stack([vote_radius(sigma, lower[:, k]) for k, sigma in enumerate(sigmas)], axis=1)
    return Labels(radius, votes[:, :, :-1].argmax(axis=2))


def label_images(
    pool: ExpertPool,
    images: Tensor,
    labels: Tensor,
    *,
    n: int = 100,
    alpha: float = 1e-3,
    seed: int = 0,
    device: str | None = None,
    execution: Execution | None = None,
    progress: Callable[[int], None] | None = None,
) -> Labels:
    """Radius and prediction of every expert on every image (Dual RS, section 4: N = 100 votes).

    Args:
        pool: the experts.
        images: `(N, C, H, W)` pixels in [0,1].
        labels: `(N,)` class indices.
        n: votes per expert and image.
        alpha: failure probability of each lower bound.
        seed: keys the noise, which no certificate ever sees.

    Returns:
        `Labels(radius (N, K), predict (N, K))`.

    Raises:
        InputError: images or labels that do not fit the pool.
    """
    target = check_labels(labels, len(images), pool.num_classes)
    votes = label_votes(pool, images, n=n, seed=seed, device=device, execution=execution, progress=progress)
    return radii_from_votes(votes, target.numpy(), pool.sigmas, alpha)
