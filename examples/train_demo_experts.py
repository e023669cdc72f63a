"""Train the demo's three Fashion-MNIST experts and cut the image slices that ship with them.

    python examples/train_demo_experts.py train --data DIR --sigma 0.25 --out EXPERTS
    python examples/train_demo_experts.py slices --data DIR --out FOLDER

DIR holds the four `*-ubyte.gz` files of Fashion-MNIST (Xiao et al. 2017, MIT licence); Debian's package
`dataset-fashion-mnist` puts them under `/usr/share/datasets/fashion-mnist`.

Each expert is trained with Gaussian noise augmentation (Cohen et al. 2019) and the consistency
regulariser of Jeong and Shin (NeurIPS 2020) on two noisy copies. The split keeps the router honest:

    official train rows     0 .. 51,999   the experts' training images
    official train rows 52,000 .. 57,999  router training slice     (no expert has seen them)
    official train rows 58,000 .. 58,999  validation slice          (every choice is made on these)
    official test rows       0 ..    999  test slice                (only ever certified)

A run saves its state after each epoch and continues from it when started again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rsrouter.experts.small_resnet import SmallResNet

EXPERT_ROWS = slice(0, 52_000)
SLICES = {
    "train": ("train", slice(52_000, 58_000)),
    "validation": ("train", slice(58_000, 59_000)),
    "test": ("t10k", slice(0, 1_000)),
}
MEAN, STD = (0.286,), (0.353,)
#: sigma -> consistency weight; at sigma 0.5 the validation slice preferred 1 to 5 (more room between oracle and envelope)
CONSISTENCY = {0.25: 2.0, 0.5: 1.0, 1.0: 5.0}


def read_idx(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images `(N, 1, 28, 28)` uint8 and labels `(N,)` of one split in the IDX format."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels.astype(np.int64)


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


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    images, labels = read_idx(args.data, "train")
    x_all = torch.from_numpy(images[EXPERT_ROWS].copy()).float().div_(255)
    y_all = torch.from_numpy(labels[EXPERT_ROWS].copy())
    weight = CONSISTENCY.get(args.sigma, 5.0) if args.consistency is None else args.consistency
    folder = args.out / f"sigma_{args.sigma:.2f}"
    settings = {"epochs": args.epochs, "batch": args.batch, "lr": args.lr, "seed": args.seed}
    weights = fit(SmallResNet(), x_all, y_all, sigma=args.sigma, weight=weight, mean=MEAN, std=STD, folder=folder, **settings)
    config = {
        "architecture": "small_resnet",
        "kwargs": {},
        "sigma": args.sigma,
        "num_classes": 10,
        "input_shape": [1, 28, 28],
        "mean": list(MEAN),
        "std": list(STD),
        "licence": "Apache-2.0",
        "training": {"data": "Fashion-MNIST, official training rows 0 to 51,999", "consistency": weight, **settings},
    }
    save_expert(folder, weights, config)


def slices(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (split, rows) in SLICES.items():
        images, labels = read_idx(args.data, split)
        np.savez_compressed(
            args.out / f"{name}.npz", images=images[rows], labels=labels[rows], index=np.arange(rows.start, rows.stop)
        )
        print(name, images[rows].shape, f"{(args.out / f'{name}.npz').stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("train", help="train one expert")
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--sigma", type=float, required=True)
    one.add_argument("--epochs", type=int, default=30)
    one.add_argument("--batch", type=int, default=256)
    one.add_argument("--lr", type=float, default=0.1)
    one.add_argument("--consistency", type=float, default=None)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--threads", type=int, default=1)
    one.set_defaults(run=train)
    two = verbs.add_parser("slices", help="cut the image slices")
    two.add_argument("--data", type=Path, required=True)
    two.add_argument("--out", type=Path, required=True)
    two.set_defaults(run=slices)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
