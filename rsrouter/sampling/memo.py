"""Votes drawn once and used by several certifications of the same images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from rsrouter.core.requests import PASS, VoteRequest
from rsrouter.sampling.engine import Engine
from rsrouter.sampling.noise import stream_key


class VoteMemo:
    """Remembers votes, so that classifiers that ask the same networks about the same images share them.

    A vote depends on seed, image, network, execution and its number in the stream alone, so a remembered vote is
    the vote that would have been drawn. Each certificate stays as valid as ever; certificates that share votes are
    not independent of each other, which is what a paired comparison wants. Give it to `Smooth.memo` or
    `RoutedSmooth.memo`, and the same `seed` to every `certify`. It grows by about a kilobyte per image and network.
    """

    def __init__(self) -> None:
        self._votes: dict[bytes, tuple[NDArray[Any], ...]] = {}
        self.asked, self.drawn = 0, 0

    def __len__(self) -> int:
        return len(self._votes)

    def run(
        self, engine: Engine, images: Tensor, identity: Sequence[bytes], requests: Sequence[VoteRequest]
    ) -> list[dict[str, NDArray[Any]]]:
        """As `Engine.run`, but draws only what is not remembered."""
        settings = repr((engine.seed, engine.noise, str(engine.device), engine.execution))
        keys = []
        for r in requests:
            # images that share their noise still have votes of their own
            owner = identity[r.image]
            keys.append(stream_key(settings, owner, *engine.streams[r.network], r.purpose, r.start, r.count))
        missing = {key: i for i, key in enumerate(keys) if key not in self._votes}
        new = list(missing.values())
        for i, counts in zip(new, engine.run(images, identity, [requests[i] for i in new]), strict=True):
            self._votes[keys[i]] = tuple(counts[s] for s in engine.models[requests[i].network].stages)
        self.asked += sum(r.count for r in requests if r.purpose != PASS)
        self.drawn += sum(requests[i].count for i in new if requests[i].purpose != PASS)
        return [
            {s: v.copy() for s, v in zip(engine.models[r.network].stages, self._votes[key], strict=True)}
            for r, key in zip(requests, keys, strict=True)
        ]
