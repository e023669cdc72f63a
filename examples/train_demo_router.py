r"""Choose the router that ships with the package: a network of its own first, the bundled experts behind it.

    python examples/train_fashion_experts.py queue --data DIR --out RUNS --jobs examples/fashion_jobs.json
    python examples/train_fashion_experts.py export --out RUNS --to rsrouter/demo/assets/experts gauss_0.25=sigma_0.25 \
        catrs_0.5=sigma_0.50 consistency_1.0=sigma_1.00
    python examples/train_demo_router.py --network RUNS/catrs_0.65 --sigmas 0.6 0.65 \
        --copies 400 --floor 0.9 --out rsrouter/demo/assets/router

The network started as the expert of sigma 0.5 and was trained whole, by CAT-RS at a noise level that reaches radius 2, on the
experts' own training images (the last job of `fashion_jobs.json`). Who is asked, at which noise level, in which order and
from which share of votes on is chosen here on the bundled validation images, which nothing was trained on. The router keeps
the network in float16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from rsrouter.demo import load_pool, load_slice
from rsrouter.experts import build_architecture
from rsrouter.router.chain import Voter
from rsrouter.sampling import Execution
from rsrouter.training import DeferralRecipe, train_router

RADII = tuple(float(r) for r in np.arange(0.0, 2.01, 0.25))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", type=Path, nargs="+", required=True, help="runs of train_fashion_experts.py")
    parser.add_argument("--sigmas", type=float, nargs="+", required=True, help="noise levels at which each may be asked")
    parser.add_argument("--confidences", type=float, nargs="*", default=[], help="softmax that a vote for a class may need")
    parser.add_argument("--like", default="sigma_0.5", help="the expert it started as")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=500, help="votes per validation image and network")
    parser.add_argument("--images", type=int, default=1000, help="validation images")
    parser.add_argument("--n", type=int, default=20_000, help="votes of the certification that is chosen for")
    parser.add_argument("--floor", type=float, default=0.915, help="least ratio to the experts' envelope wanted")
    parser.add_argument("--dtype", default="float32", help="in which the networks run, here and where the router certifies")
    args = parser.parse_args()
    torch.set_num_threads(1)
    networks, notes = [], []
    for folder in args.network:
        config = json.loads((folder / "config.json").read_text())
        network = build_architecture(config["architecture"], config["num_classes"], config["kwargs"])
        network.load_state_dict(load_file(folder / "model.safetensors"))
        head = "own" if len(args.network) == 1 else folder.name.replace(".", "_")
        networks += [(Voter(args.like, sigma, head, whole=True), network.eval()) for sigma in args.sigmas]
        notes.append(config["training"])
    images, labels = load_slice("validation").batch(range(args.images))
    x, y = load_slice("train").batch(range(2))  # no head is trained
    train_router(
        load_pool(),
        "deferral",
        x,
        torch.as_tensor(y),
        radii=RADII,
        validation=(images, torch.as_tensor(labels)),
        recipe=DeferralRecipe(heads=(), tune_copies=args.copies, confidences=tuple(args.confidences)),
        networks=networks,
        plan_n=args.n,
        execution=Execution(dtype=args.dtype),
        floor=args.floor,
        out=args.out,
        notes={"network": notes[0] if len(notes) == 1 else notes},
        show=True,
    )
    print((args.out / "training.jsonl").read_text())


if __name__ == "__main__":
    main()
