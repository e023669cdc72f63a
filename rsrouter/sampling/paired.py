"""Two executions of one network on the same noisy copies: on how many they vote differently."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rsrouter.core.errors import InputError
from rsrouter.core.recompute import Votes
from rsrouter.core.requests import VoteRequest
from rsrouter.core.tree import Tree
from rsrouter.process import fixed_kernels
from rsrouter.sampling.engine import Engine, image_identity
from rsrouter.sampling.logits import forward, heads, votes_of
from rsrouter.sampling.noise import chunk_noise, stream_key

#: Purpose of the streams of paired draws; no other votes come from them.
TRANSFER = "transfer"


@torch.inference_mode()
def disagreements(
    first: Engine, second: Engine, images: Tensor, identity: Sequence[bytes], requests: Sequence[VoteRequest]
) -> list[dict[str, int]]:
    """How many of the requested noisy copies the two engines' networks vote differently on, an invalid vote being an outcome.

    Args:
        first, second: engines of the same networks, noise and seed.
        images: `(N, C, H, W)`.
        identity: per image the bytes that name it in its noise streams.
        requests: from the first vote on, and of whole batches of both engines, so that every row runs in the company that it has
            where votes are drawn.

    Returns:
        Per request a mapping of every stage of its network to a number.

    Raises:
        InputError: parts of batches; engines of other networks or noise.
    """
    if (first.seed, first.noise, first.streams) != (second.seed, second.noise, second.streams):
        raise InputError(
            "Paired draws need the same networks, noise and seed",
            expected=f"seed {first.seed}, {first.noise} noise",
            received=f"seed {second.seed}, {second.noise} noise, or other networks",
            remedy="make both engines from one classifier",
        )
    found = []
    # one stream for both, whatever each would draw from alone
    noise = chunk_noise(first.noise, first.shape, torch.device("cpu"))
    for request in requests:
        model, runners = first.models[request.network], [e.runner(request.network) for e in (first, second)]
        block = int(np.lcm(runners[0].batch, runners[1].batch))
        if request.start or request.count % block:
            raise InputError(
                "Paired draws come in whole batches",
                expected=f"votes from 0 on, a multiple of {block}",
                received=repr(request),
                remedy="round the number of votes up",
            )
        shared = first.noise.endswith("-shared")
        owner = b"" if shared else identity[request.image]
        key = stream_key(TRANSFER, first.seed, owner, *first.streams[request.network])
        image = images[request.image].to("cpu", torch.float32)
        apart = dict.fromkeys(model.stages, 0)
        for start in range(0, request.count, block):
            x = torch.empty((block, *first.shape))
            with fixed_kernels():
                marked = noise.add(image, model.sigma, key, start, x)
            votes = []
            for runner in runners:
                parts = []
                with runner.execution.kernels(runner.device):
                    for rows in torch.split(x, runner.batch):
                        output = forward(runner.prepared.module, runner.prepared.input(rows.to(runner.device)), model.name)
                        logits = heads(output, model.widths, model.name, runner.batch)
                        parts.append([votes_of(z.float()).cpu() for z in logits])
                votes.append([torch.cat([part[k] for part in parts]) for k in range(len(model.widths))])
            for k, stage in enumerate(model.stages):
                differs = votes[0][k] != votes[1][k]
                if marked is not None:  # draws that noise leaves undecided: they may differ
                    differs |= marked.cpu()
                apart[stage] += int(differs.sum())
        found.append(apart)
    return found


def pairs_of(
    tree: Tree, counts: Votes, engines: Sequence[Engine], image: Tensor, name: object, count: int
) -> dict[str, list[int]]:
    """`{stage: [disagreements, pairs]}` of the networks that voted on an image."""
    networks = dict.fromkeys(tree.stages[s].network for s in counts.get("estimate", {}))
    requests = [VoteRequest(0, network, TRANSFER, 0, count) for network in networks]
    found = disagreements(engines[0], engines[1], image[None], [image_identity(image, name)], requests)
    return {stage: [apart, count] for part in found for stage, apart in part.items()}


__all__ = ["TRANSFER", "disagreements", "pairs_of"]
