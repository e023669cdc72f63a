"""Features of a frozen trunk on noisy copies, from the streams that votes come from, and the votes of linear heads on them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rsrouter.core.errors import InputError
from rsrouter.core.requests import VoteRequest
from rsrouter.process import check_settings, fixed_kernels
from rsrouter.sampling.engine import Engine
from rsrouter.sampling.logits import votes_of
from rsrouter.sampling.noise import check_eight_bit, make_noise, stream_key
from rsrouter.sampling.rounds import Round, passes


@torch.inference_mode()
def noisy_outputs(engine: Engine, network: str, image: Tensor, identity: bytes, purpose: str, count: int) -> Tensor:
    """The first output of a network on the first `count` noisy copies of a stream: those on which `Engine.run` would count
    its votes, in the same batches.

    Args:
        engine: with the network; its `VoteModel.digest` and the engine's seed name the stream.
        network: which.
        image: `(C, H, W)` pixels in [0,1].
        identity: what names the image in its streams (`image_identity`).
        purpose: "select" or "estimate".
        count: how many copies.

    Returns:
        Float32 `(count, F)` on the CPU; a draw that is not a vote is a row of NaN.

    Raises:
        NetworkError: the network fails, or settings were changed meanwhile.
        InputError: an image that is not of 8 bits, for sound noise.
    """
    if engine.noise.startswith("sound"):
        check_eight_bit(image[None])
    runner, model = engine.runner(network), engine.models[network]
    request = VoteRequest(0, network, purpose, 0, count)
    key = stream_key(purpose, engine.seed, identity, *engine.streams[network])
    with fixed_kernels():
        images = image[None].to(runner.device, torch.float32)
    asked = Round(images, [0], [request], [key], model.sigma, model.widths, model.name, runner.batch)
    noise = make_noise(engine.noise, engine.shape, engine.device, engine.execution.stream)
    batches, parts = runner.batches([request]), list[Tensor]()
    with runner.execution.kernels(runner.device):
        for (_, rows, bad), outputs in passes(asked, batches, noise, runner.prepared):
            slot = rows if rows.dim() == 1 else rows[:, 2]
            found = outputs[0].float()
            if bad is not None:
                found = torch.where(bad[:, None], torch.nan, found)
            parts.append(found[slot == 0].to("cpu", copy=True))
        check_settings(network)
    runner.ran(len(batches))
    return torch.cat(parts)


@torch.inference_mode()
def linear_votes(features: Tensor, weight: Tensor, bias: Tensor, batch: int) -> Tensor:
    """How often a linear head votes for each class on cached features, in float32 on the CPU.

    A row with a feature that is NaN votes for no class, whatever the weights are.

    Args:
        features: `(N, F)`.
        weight, bias: `(K, F)` and `(K,)`.
        batch: rows of each product; the last one is filled up, so that each row has the company of a whole batch.

    Returns:
        int64 `(K + 1,)`, invalid votes last.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [float("nan"), 1.0]])
    >>> linear_votes(x, torch.eye(2), torch.zeros(2), batch=2).tolist()
    [1, 1, 1]
    """
    if features.shape[1:] != weight.shape[1:]:
        raise InputError(
            "A head does not fit the features",
            expected=f"weights of shape (K, {features.shape[1]})",
            received=str(tuple(weight.shape)),
            remedy="give the last layer of the same trunk",
        )
    counts = torch.zeros(len(weight) + 1, dtype=torch.int64)
    with fixed_kernels():
        for rows in torch.split(features, batch):
            block = F.pad(rows, (0, 0, 0, batch - len(rows)))
            votes = votes_of(F.linear(block, weight, bias))[: len(rows)]
            votes = torch.where(rows.isnan().any(1), len(weight), votes)
            counts += torch.bincount(votes, minlength=len(weight) + 1)
    return counts


__all__ = ["linear_votes", "noisy_outputs"]
