r"""Choose the router that ships with the package: a network of its own first, the bundled experts behind it.

    python examples/train_fashion_experts.py queue --data DIR --out RUNS --jobs examples/fashion_jobs.json
    python examples/train_fashion_experts.py export --out RUNS --to rsrouter/demo/assets/experts gauss_0.25=sigma_0.25 \
        catrs_0.5=sigma_0.50 consistency_1.0=sigma_1.00
    python examples/train_demo_router.py --network RUNS/catrs_0.65 --sigmas 0.6 0.65 \
        --copies 400 --floor 0.9 --out rsrouter/demo/assets/router

The network started as the expert of sigma 0.5 and was trained whole, by CAT-RS at a noise level that reaches radius 2, on the
experts' own training images (the last job of `fashion_jobs.json`). Who is asked, at which noise level, in which order and
from which share of votes on is chosen here on the bundled validation images, which nothing was trained on; with `--more` also
on images of the bundled slice `train`, which neither the experts nor the networks of `examples/train_fashion_experts.py` have
read. The router keeps the network in float16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from routing_study import chain_arguments, choose_chain

from rsrouter.demo import load_pool, load_slice
from rsrouter.sampling import Execution


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chain_arguments(parser, "sigma_0.5")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=20_000, help="votes of the certification that is chosen for")
    parser.add_argument("--more", type=int, default=0, help="further validation images, from the slice that trains flat routers")
    parser.add_argument("--dtype", default="float32", help="in which the networks run, here and where the router certifies")
    args = parser.parse_args()
    torch.set_num_threads(1)
    slices = [load_slice("validation").batch(range(args.images)), load_slice("train").batch(range(args.more))]
    images, labels = (torch.cat([torch.as_tensor(part) for part in parts]) for parts in zip(*slices, strict=True))
    choose_chain(
        load_pool(),
        args.network,
        args.like,
        args.sigmas,
        (images, labels),
        args.out,
        copies=args.copies,
        sure_copies=args.sure_copies,
        stages=args.stages,
        confidences=args.confidences,
        plan_n=args.n,
        floor=args.floor,
        execution=Execution(dtype=args.dtype),
    )


if __name__ == "__main__":
    main()
