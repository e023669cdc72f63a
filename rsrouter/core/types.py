"""Plain data that crosses every boundary; numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: The prediction that says "no certified class".
ABSTAIN = -1

#: Two-sided or one-sided confidence bounds; fixed before any vote is drawn.
SIDES = ("two", "one")

#: `tree` uses every stage that can pay; `min` is Dual RS's rule (router and chosen expert only).
RULES = ("tree", "min")


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is certified for one image.

    With probability at least `1 - alpha` over the certification noise, the smoothed (routed) classifier
    answers `predict` on every input within L2 distance `radius` (in [0,1]-pixel units) of the image.

    Attributes:
        predict: class index, or `ABSTAIN` (-1).
        radius: certified L2 radius, 0.0 when abstaining.
        expert: name of the expert on the selected path; None for a single smoothed classifier without one.
        n_drawn: votes drawn for this image over all stages, selection included.
        counts: estimation votes of every sampled stage: one entry per class (or expert), where a voter has a confidence one for
            votes that are not sure enough, then the count of invalid votes (NaN or Inf logits) last.
        bound_by: name of the stage whose votes limit the radius.
        selection: selection votes, the same layout as `counts`; they fix `predict` and enter no bound.
        r_router: radius within which the routing decisions surely stay on the selected path (inf without routing). In a chain it
            is 0 behind the first stage, which may give the same answer itself: that has no upper bound.
        r_expert: radius of the answering stage alone; of a flat router `min(r_router, r_expert)` is Dual RS's min rule.
        earlier: cumulative votes at looks before the last, only where one of them gave a bound that the last look
            does not reach: `"stage@votes"` to the same layout as `counts`. With it the radius is a function of
            the stored votes (`rsrouter.core.recompute`).
        logits: of each deterministic stage, from its one forward pass; they cost no votes.
        core: what an uncertified core network answers where `predict` is `ABSTAIN`; -1 where there is none. Nothing is certified
            about it, at no radius.
    """

    predict: int
    radius: float
    expert: str | None
    n_drawn: int
    counts: Mapping[str, tuple[int, ...]]
    bound_by: str
    selection: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    r_router: float = float("inf")
    r_expert: float = 0.0
    earlier: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    logits: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    core: int = ABSTAIN

    def __str__(self) -> str:
        if self.predict == ABSTAIN:
            answered = "" if self.core == ABSTAIN else f"; the core answers class {self.core}, uncertified"
            return f"abstains after {self.n_drawn:,} votes{answered}"
        by = f" by {self.expert}" if self.expert else ""
        # rounded down: what is shown is certified
        return f"class {self.predict} within L2 radius {int(self.radius * 1e4) / 1e4:.4f}{by}, {self.n_drawn:,} votes"
