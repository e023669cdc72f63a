"""Training one classifier under Gaussian noise with the consistency regulariser, resumable: what the scripts of other data share.

Gaussian noise augmentation (Cohen et al. 2019) and the consistency regulariser of Jeong and Shin (NeurIPS 2020) on two noisy
copies. A run saves its state after each epoch and continues from it when started again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F


def augment(images: Tensor, generator: torch.Generator, shift: int = 2) -> Tensor:
    """Random horizontal flips and shifts by up to `shift` pixels."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (shift,) * 4)
    dy, dx = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
    return padded[:, :, dy : dy + images.shape[2], dx : dx + images.shape[3]]


def consistency_loss(logits: list[Tensor], weight: float, entropy: float = 0.5) -> Tensor:
    """Jeong and Shin (2020), equation 8: KL(mean || each copy) plus the entropy of the mean."""
    probabilities = [F.softmax(each, 1) for each in logits]
    mean = (sum(probabilities) / len(probabilities)).clamp(min=1e-20)  # type: ignore[union-attr]
    kl = sum((mean * (mean.log() - F.log_softmax(each, 1))).sum(1) for each in logits) / len(logits)
    return (weight * kl + entropy * -(mean * mean.log()).sum(1)).mean()  # type: ignore[union-attr]


def fit(
    model: nn.Module,
    x_all: Tensor,
    y_all: Tensor,
    *,
    sigma: float,
    weight: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    folder: Path,
    epochs: int = 30,
    batch: int = 256,
    lr: float = 0.1,
    seed: int = 0,
    shift: int = 2,
    autocast: bool = False,
) -> dict[str, Tensor]:
    """Train one expert; returns the averaged weights.

    Args:
        model: from normalised images to logits.
        x_all, y_all: images `(N, C, H, W)` float32 or uint8 and labels `(N,)`.
        sigma: noise level of both copies.
        weight: of the consistency loss.
        mean, std: normalisation, applied after the noise.
        folder: where the state is saved after each epoch, and found again.
        epochs, batch, lr, seed: SGD with a one-cycle schedule.
        shift: largest shift in pixels.
        autocast: bfloat16 forward passes, twice as fast where the processor has them.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    centre, scale = torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)
    model = model.to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999), use_buffers=True
    )
    steps = len(x_all) // batch
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps * epochs, pct_start=0.2)
    folder.mkdir(parents=True, exist_ok=True)
    state_file, first = folder / "training_state.pt", 0
    parts = {"model": model, "average": average, "optimiser": optimiser, "schedule": schedule}
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])  # type: ignore[attr-defined]
        generator.set_state(state["generator"])
        first = state["epoch"]
    for epoch in range(first, epochs):
        model.train()
        start, total = time.time(), 0.0
        for rows in torch.randperm(len(x_all), generator=generator)[: steps * batch].view(steps, batch):
            x, y = augment(x_all[rows], generator, shift), y_all[rows]
            x = x.float() / 255 if x.dtype == torch.uint8 else x
            copies = torch.cat([x, x])
            noisy = copies + torch.randn(copies.shape, generator=generator) * sigma
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(((noisy - centre) / scale).to(memory_format=torch.channels_last))
            logits = list(out.float().chunk(2))
            loss = sum(F.cross_entropy(each, y) for each in logits) / 2 + consistency_loss(logits, weight)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            average.update_parameters(model)
            total += float(loss.detach())
        state = {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]
        torch.save({**state, "generator": generator.get_state(), "epoch": epoch + 1}, state_file)
        print(f"sigma {sigma} epoch {epoch + 1}/{epochs} loss {total / steps:.4f} {time.time() - start:.0f} s", flush=True)
    return {name: value.contiguous() for name, value in average.module.state_dict().items()}


def save_expert(folder: Path, weights: dict[str, Tensor], config: dict[str, object]) -> None:
    """`model.safetensors` and `config.json`, which `rsrouter wrap` reads."""
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
