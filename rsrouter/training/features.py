"""Noisy features of frozen experts, drawn once: heads are trained, and chains are tuned, on these."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rsrouter.experts.base import Expert
from rsrouter.router.trunk import Trunk
from rsrouter.sampling.execution import Execution, as_input, default_batch, prepare, resolve_device
from rsrouter.sampling.noise import stream_key


@torch.inference_mode()
def noisy_features(
    expert: Expert, sigma: float, images: Tensor, copies: int, *, seed: int, purpose: str, device: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Features and logits of noisy copies: float16 `(N, copies, F + classes)` on the CPU.

    The noise is a stream of its own, keyed by purpose, seed, expert, sigma and images: no certificate ever sees it.

    Args:
        expert: its module must expose its features (`Trunk`).
        sigma: standard deviation of the noise, not necessarily the expert's.
        images: `(N, C, H, W)` pixels in [0,1].
        copies: noisy copies per image.
        seed, purpose: key the noise.
        device: where the expert runs.
        progress: called with the number of forward passes since the last call.

    Raises:
        InputError: an expert that does not expose its features.
    """
    where = resolve_device(device)
    execution = Execution()
    trunk = prepare(Trunk(expert).eval(), execution, where)
    key = stream_key(purpose, seed, expert.digest, repr(float(sigma)), images.shape[0], images[:1].cpu().numpy().tobytes())
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    batch = default_batch(images[0].numel(), where)
    rows = torch.arange(len(images)).repeat_interleave(copies)
    parts = []
    for part in rows.split(batch):
        noise = torch.randn((len(part), *images.shape[1:]), generator=generator)
        features, logits = trunk(as_input((images[part] + sigma * noise).to(where), execution))
        parts.append(torch.cat([features, logits], 1).to("cpu", torch.float16))
        if progress is not None:
            progress(len(part))
    return torch.cat(parts).reshape(len(images), copies, -1)
