"""From checkpoints to a pinned pool: `rsrouter wrap`. Spec files are read by `rsrouter.experts.spec`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsrouter.experts.label_order import map_labels
from rsrouter.experts.noisy_accuracy import NoisyCheck, check_expert
from rsrouter.experts.pool import ExpertPool
from rsrouter.experts.probe import take_probe
from rsrouter.experts.spec import Spec, experts_of_spec
from rsrouter.hub import Hub


@dataclass(frozen=True)
class Wrapped:
    """A pool and what was measured while wrapping it.

    Attributes:
        pool: pinned.
        checks: one per expert, in the pool's order, and of the core (without noise); empty where no labelled images were given.
    """

    pool: ExpertPool
    checks: tuple[NoisyCheck, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What looks wrong; empty if nothing does."""
        return tuple(c.warning for c in self.checks if c.warning)


def wrap(
    spec: Spec,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    hub: Hub | None = None,
    label_map: Mapping[str, Any] | None = None,
) -> Wrapped:
    """A pinned pool from a spec; revisions become commit hashes, files are hashed, and nothing is guessed.

    Args:
        spec: path of a spec, its content, or the list of its experts.
        images, labels: `(N, C, H, W)` in [0,1] and `(N,)`, a few hundred; each expert's noisy accuracy is measured on
            them, and a wrong normalisation is reported.
        folder: where relative paths count from; default the spec's folder, else the working directory.
        seed: of the noise in that check.
        hub: how the Hub is read (token, cache, offline).
        label_map: arguments of `map_labels` (`{}`: equal names in the order of the first expert); None: experts that disagree
            about names or order are refused.

    Raises:
        InputError: unknown keys, or something that decides the votes is missing.
        CheckpointError, HubError, IntegrityError: as `load_expert`.
    """
    experts = experts_of_spec(spec, folder=folder, hub=hub)
    pool = ExpertPool(experts if label_map is None else map_labels(experts, **label_map))
    for expert in pool.members:
        expert.probe = expert.probe or take_probe(expert.network(), expert.input_shape, f"expert {expert.name!r}")
    if images is None or labels is None:
        return Wrapped(pool)
    return Wrapped(pool, tuple(check_expert(e, images, torch.as_tensor(labels), seed=seed) for e in pool.members))
