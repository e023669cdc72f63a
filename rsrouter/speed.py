"""How many votes fit into a time on this machine: for services with a latency budget, and `rsrouter doctor`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rsrouter.clock import seconds
from rsrouter.core.requests import PREDICT, VoteRequest
from rsrouter.inputs import check_count
from rsrouter.sampling.engine import image_identity
from rsrouter.smooth import RoutedSmooth, Smooth


@dataclass(frozen=True)
class Speed:
    """What `measure_speed` found; the worst case, in which every network is asked.

    Attributes:
        fixed: seconds of a query before its first vote.
        per_vote: seconds of one vote of every network.
        networks: how many networks that is.
    """

    fixed: float
    per_vote: float
    networks: int

    @property
    def votes_per_second(self) -> float:
        """Forward passes a second, of all networks together."""
        return self.networks / self.per_vote

    def seconds(self, n: int) -> float:
        """Of a query with `n` votes per stage."""
        return self.fixed + n * self.per_vote

    def votes(self, seconds: float) -> int:
        """Votes per stage that fit into `seconds`; 0 where none do."""
        return max(0, int((seconds - self.fixed) / self.per_vote))


def measure_speed(smoothed: Smooth | RoutedSmooth, *, device: str | None = None, n: int = 200, repeats: int = 3) -> Speed:
    """Times `n` and `4 n` votes of every network on one image, after a round that prepares the networks for `predict`.

    The median of `repeats` rounds. A machine that is busier later is slower later.

    Raises:
        InputError: an unusable device, or n below 1. NetworkError: a network that cannot be certified.
    """
    check_count("n", n)
    image = torch.full((1, *smoothed.shape), 0.5)
    networks = smoothed.tree.voting

    def once(count: int) -> float:
        requests = [VoteRequest(0, name, PREDICT, 0, count) for name in networks]
        # an engine each time: it checks that no weight changed, as every query does
        return seconds(lambda: smoothed.engine(0, device).run(image, [image_identity(image[0])], requests))

    once(n)
    low, high = (sorted(once(count) for _ in range(repeats))[repeats // 2] for count in (n, 4 * n))
    per_vote = max(high - low, 0.25 * high) / (3 * n)
    return Speed(max(low - n * per_vote, 0.0), per_vote, len(networks))
