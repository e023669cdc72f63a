"""Train the three small CIFAR-10 experts of the second study.

    python examples/train_cifar_experts.py --data DIR_OR_HUB_NAME --sigma 0.25 --out EXPERTS

DATA is CIFAR-10 in the schema of the Hub's `uoft-cs/cifar10` (columns `img`, `label`): that name, or a folder with its
parquet files. Neither the images nor experts trained on them ship with this package (CIFAR-10 has no open licence).

Each expert is a residual network of 366,000 weights, trained with Gaussian noise (Cohen et al. 2019) and a light
consistency regulariser (Jeong and Shin 2020); about 25 minutes on one core that has bfloat16. The split:

    training rows      0 .. 41,999   the experts' training images
    training rows 42,000 .. 47,999   router training (no expert has seen them)
    training rows 48,000 .. 49,999   validation (every choice is made on these)
    test rows                        only ever certified
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from noise_training import fit, save_expert

from rsrouter.experts.small_resnet import SmallResNet

SPLITS = {
    "experts": ("train", slice(0, 42_000)),
    "train": ("train", slice(42_000, 48_000)),
    "validation": ("train", slice(48_000, 50_000)),
    "test": ("test", slice(0, 10_000)),
}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
KWARGS = {"in_channels": 3, "width": 32, "blocks": [[64, 2], [64, 1], [128, 2]]}
CONSISTENCY = {0.25: 1.0, 0.5: 2.0, 1.0: 3.0}


def read_cifar(data: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images `(N, 3, 32, 32)` uint8 and labels `(N,)` of one of `SPLITS`."""
    from datasets import load_dataset

    split, rows = SPLITS[name]
    table = load_dataset(data, split=split).select(range(rows.start, rows.stop))
    images = np.stack([np.asarray(image.convert("RGB")) for image in table["img"]])
    return images.transpose(0, 3, 1, 2), np.asarray(table["label"], dtype=np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sigma", type=float, required=True)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--consistency", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    images, labels = read_cifar(args.data, "experts")
    folder = args.out / f"sigma_{args.sigma:.2f}"
    weight = CONSISTENCY.get(args.sigma, 2.0) if args.consistency is None else args.consistency
    weights = fit(
        SmallResNet(10, **KWARGS),
        torch.from_numpy(np.ascontiguousarray(images)),
        torch.from_numpy(labels),
        sigma=args.sigma,
        weight=weight,
        mean=MEAN,
        std=STD,
        folder=folder,
        epochs=args.epochs,
        seed=args.seed,
        shift=4,
        autocast=True,
    )
    config = {
        "architecture": "small_resnet",
        "kwargs": KWARGS,
        "sigma": args.sigma,
        "num_classes": 10,
        "input_shape": [3, 32, 32],
        "mean": list(MEAN),
        "std": list(STD),
        "training": {
            "data": "CIFAR-10, training rows 0 to 41,999",
            "consistency": weight,
            "epochs": args.epochs,
            "seed": args.seed,
        },
    }
    save_expert(folder, weights, config)


if __name__ == "__main__":
    main()
