"""The free choices behind a table, in words for cards and audits: its images and its seed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import log10

from rsrouter.core.terms import SEEDS
from rsrouter.results.about import TableMetadata

#: A derived seed has 56 bits: no public text gives more choice.
_DERIVED = log10(2**56)
#: Dates of a century.
_DATES = log10(36_525)
_CHARACTERS = log10(95)


def selection(about: TableMetadata) -> str:
    """Which images of the data set the job names.

    >>> from types import SimpleNamespace as About
    >>> selection(About(data={"images": 50}, num_images=3, indices=((0, 41, 20),), picked=False))
    'every 20th image from 0 on, 3 of 50'
    >>> selection(About(data={"images": 50}, num_images=3, indices=((0, 2, 1), (7, 8, 1)), picked=True))
    '3 of 50 images, picked by hand'
    """
    size = about.data.get("images")
    of = f"{about.num_images:,}" + (f" of {size:,}" if isinstance(size, int) else "")
    if about.picked:
        return f"{of} images, picked by hand"
    start, _, step = about.indices[0] if about.indices else (0, 0, 1)
    if size == about.num_images:
        return f"all {size:,} images"
    if abs(step) == 1 or about.num_images == 1:
        return f"{of} images, from image {start} on"
    return f"every {step}th image from {start} on, {of}"


@dataclass(frozen=True)
class Freedom:
    """How free the choice of a seed was.

    Attributes:
        digits: the decimal logarithm of how many seeds could have been tried, at most, with this classifier.
        text: the same in a sentence.
    """

    digits: float
    text: str


def seed_freedom(about: TableMetadata) -> Freedom:
    """How many digits of the seed could have been chosen.

    A derived seed follows from the classifier, so that another one takes another classifier (a retrained router, a weight
    changed in its last bit): whoever trains has that choice, and a public text that was fixed only afterwards takes it away.
    The text is a choice of its own, of as many digits as such texts have.
    """
    if not about.seed_derived:
        return Freedom(log10(SEEDS), "the seed was chosen by hand: 19 digits could have been tried")
    if about.heads is not None:
        return Freedom(
            _DERIVED,
            "the seed follows from the declaration, of which names, order, votes and alpha are free: up to "
            f"{_DERIVED:.0f} digits could have been tried, unless the declaration was shown before",
        )
    if not about.seed_from:
        return Freedom(0.0, "the seed follows from the classifier alone: another seed takes another router or expert")
    date = re.fullmatch(r"\d{4}-\d\d-\d\d", about.seed_from) is not None
    digits = _DATES if date else min(_DERIVED, len(about.seed_from) * _CHARACTERS)
    kind = "dates" if date else "texts of its length"
    return Freedom(
        digits,
        f"the seed follows from the classifier and the public text {about.seed_from!r}: {digits:.1f} digits of {kind}",
    )


__all__ = ["Freedom", "seed_freedom", "selection"]
