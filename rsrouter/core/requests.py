"""Vote requests: what a policy asks of an engine."""

from __future__ import annotations

from dataclasses import dataclass

#: Purposes: selection votes choose, estimation votes bound, prediction votes answer a query.
SELECT, ESTIMATE, PREDICT = "select", "estimate", "predict"
#: One forward pass without noise, answered by logits `(k,)` for every stage of the network instead of votes.
PASS = "pass"


@dataclass(frozen=True, slots=True)
class VoteRequest:
    """Votes `start` to `start + count` of one network's stream on one image.

    Attributes:
        image: position of the image in the call.
        network: name of the network to run.
        purpose: which stream: select, estimate, predict, label, train, tune, audit.
        start: index of the first vote in the stream.
        count: how many votes.
    """

    image: int
    network: str
    purpose: str
    start: int
    count: int
