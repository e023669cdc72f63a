"""Votes of many images as arrays, by purpose and stage: the form in which whole tables are computed again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

#: Votes of one image: purpose ("select", "estimate", "earlier") to stage to counts, and "logits" to deterministic stage to
#: numbers (None: not finite), as a results table stores them.
Votes = Mapping[str, Mapping[str, Sequence[Any]]]


@dataclass
class VoteColumns:
    """Votes of N images by purpose and key, the keys as a results table writes them.

    Attributes:
        count: N.
        counts: by purpose, then key, blocks of images `(M,)` and their counts `(M, L)`: one block for each L.
        others: by purpose, then key, image and values that are no whole numbers of 64 bits.

    >>> columns = VoteColumns.of([{"select": {"a": [9, 1]}}, {"select": {"a": [8, 2]}, "logits": {"b": [0.5, None]}}])
    >>> columns.counts["select"]["a"][0][1].tolist(), columns.others
    ([[9, 1], [8, 2]], {'logits': {'b': [(1, [0.5, None])]}})
    """

    count: int
    counts: dict[str, dict[str, list[tuple[Ints, Ints]]]] = field(default_factory=dict)
    others: dict[str, dict[str, list[tuple[int, Any]]]] = field(default_factory=dict)

    @classmethod
    def of(cls, votes: Sequence[Votes]) -> VoteColumns:
        """The columns of votes that are given image by image."""
        made = cls(len(votes))
        whole: dict[tuple[str, str, int], tuple[list[int], list[Sequence[int]]]] = {}
        for i, row in enumerate(votes):
            for purpose, stages in row.items():
                for key, values in stages.items():
                    if purpose != "logits" and all(isinstance(v, int | np.integer) and -(2**63) <= v < 2**63 for v in values):
                        images, counts = whole.setdefault((purpose, key, len(values)), ([], []))
                        images.append(i)
                        counts.append(values)
                    else:
                        made.others.setdefault(purpose, {}).setdefault(key, []).append((i, values))
        for (purpose, key, width), (images, counts) in whole.items():
            made.add(purpose, key, np.array(images, np.int64), np.array(counts, np.int64).reshape(-1, width))
        return made

    def add(self, purpose: str, key: str, images: Ints, counts: Ints) -> None:
        """Adds the counts `(M, L)` of some images `(M,)`."""
        self.counts.setdefault(purpose, {}).setdefault(key, []).append((images, counts))

    def keys(self, purpose: str) -> list[str]:
        """The keys under which anything is stored for this purpose, each once."""
        return list({**self.counts.get(purpose, {}), **self.others.get(purpose, {})})

    def images(self, purpose: str, key: str) -> Ints:
        """The images that have something stored there, `(M,)` in no particular order."""
        found = [images for images, _ in self.blocks(purpose, key)]
        found.append(np.array([i for i, _ in self.rest(purpose, key)], np.int64))
        return np.concatenate(found)

    def blocks(self, purpose: str, key: str) -> list[tuple[Ints, Ints]]:
        """The blocks of counts stored there."""
        return self.counts.get(purpose, {}).get(key, [])

    def rest(self, purpose: str, key: str) -> list[tuple[int, Any]]:
        """What is stored there and is no whole numbers, with its image."""
        return self.others.get(purpose, {}).get(key, [])

    def each(self, purpose: str, key: str) -> Iterator[tuple[int, Any]]:
        """Everything stored there, image by image."""
        for images, counts in self.blocks(purpose, key):
            yield from zip(images.tolist(), counts.tolist(), strict=True)
        yield from self.rest(purpose, key)


__all__ = ["Ints", "VoteColumns", "Votes"]
