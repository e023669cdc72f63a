"""One timm model as several experts, one per sigma, routed by a cascade. The weights are held, moved and run once.

    python examples/timm_multi_sigma.py --weights hf-hub:timm/resnet18.a1_in1k --data images/ --sigma 0.05,0.1,0.2
    python examples/timm_multi_sigma.py --weights my.safetensors --model resnet18 --normalisation cifar10 \\
        --input-shape 3,32,32 --data test.npz
    python examples/timm_multi_sigma.py --quick    # offline, RANDOM weights: shows the way, certifies nothing worth having

Worth it for a model that was trained over a range of sigmas (or one that stands behind a denoiser). A model that has only seen
clean images answers alike whatever it is shown at larger sigmas; the accuracy under noise printed first tells.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rsrouter import AdaptivePlan, CascadeRouter, Expert, ExpertPool, RoutedSmooth, build_architecture, load_data, load_expert
from rsrouter.core.terms import Terms
from rsrouter.demo import load_slice
from rsrouter.experts import at_sigmas, check_expert

RADII = np.arange(0.0, 1.01, 0.25)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="hf-hub:timm/NAME, or a weight file with --model and --normalisation")
    parser.add_argument("--model", help="timm's name of the architecture, where the weights do not say")
    parser.add_argument("--normalisation", help="cifar10, imagenet, none, ..., where the weights do not say")
    parser.add_argument("--input-shape", help="C,H,W, where the weights do not say")
    parser.add_argument("--sigma", default="0.12,0.25,0.5", help="noise levels")
    parser.add_argument("--data", help="npz, parquet, a folder of images, hf-hub:org/name@revision")
    parser.add_argument("--images", type=int, default=20, help="how many to certify")
    parser.add_argument("--quick", action="store_true", help="random weights on bundled images")
    chosen = parser.parse_args(arguments)
    sigmas = [float(part) for part in chosen.sigma.split(",")]
    if chosen.quick:
        torch.manual_seed(0)
        name = chosen.model or "test_resnet"  # timm's own tiny model for tests
        module = build_architecture(name, 10, {"in_chans": 1})
        model = Expert(module, sigma=sigmas[0], num_classes=10, input_shape=(1, 28, 28), name=name)
        data, count, n = load_slice("test"), 3, 500
        print(f"{name} with RANDOM weights: whatever it answers is not knowledge of the images")
    elif chosen.weights and chosen.data:
        said: dict[str, Any] = {"architecture": chosen.model, "normalisation": chosen.normalisation}
        if chosen.input_shape:
            said["input_shape"] = [int(v) for v in chosen.input_shape.split(",")]
        model = load_expert(chosen.weights, sigma=sigmas[0], **{k: v for k, v in said.items() if v is not None})
        shape = model.input_shape
        # files of arrays hold the size they hold; a folder's images are resized and cropped to the model's
        data = load_data(chosen.data) if chosen.data.endswith(".npz") else load_data(chosen.data, size=shape[-1])
        count, n = min(chosen.images, len(data)), 10_000
    else:
        parser.error("give --weights and --data, or --quick")

    experts = at_sigmas(model, sigmas)
    images, labels = data.batch(range(max(count, min(50, len(data)))))
    for expert in experts:
        found = check_expert(expert, images, labels)
        print(f"{expert.name}: {100 * found.accuracy:.1f}% right under noise of {expert.sigma:g}")

    # large sigma first; an image goes on to the next smaller one where no class reaches 55% of the votes
    routed = RoutedSmooth(ExpertPool(experts), CascadeRouter((0.55,) * (len(experts) - 1)))
    plan = AdaptivePlan(n, [r for r in RADII if r <= 2 * max(sigmas)])
    for i, c in enumerate(routed.certify(images[:count], Terms(plan, alpha=1e-3))):
        answer = f"class {c.predict} within {c.radius:.3f}" if c.predict >= 0 else "abstains"
        print(f"image {i}: {answer} ({c.n_drawn:,} votes, decided by {c.expert})")


if __name__ == "__main__":
    main()
