"""Bring your own checkpoints: from the `checkpoint.pth.tar` files of Cohen et al. 2019 (and the many papers that kept their
format) to one routed, certified classifier. Nothing is trained; the thresholds of a cascade are chosen on validation images.

    python examples/cohen_checkpoint.py --out cohen --data test.npz --validation validation.npz --normalisation cifar10 \\
        0.25=models/noise_0.25/checkpoint.pth.tar 0.50=models/noise_0.50/checkpoint.pth.tar
    python examples/cohen_checkpoint.py --out cohen --quick   # offline: writes such files from the bundled experts first

A checkpoint says neither its sigma nor its normalisation, and a wrong one still gives (poor) certificates; so both are asked
for, and the accuracy under noise is measured at once. The architecture stands in the file (`arch`), or is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rsrouter import FixedPlan, Smooth, load_data, train_router, wrap, write_report
from rsrouter.demo import load_pool, load_slice
from rsrouter.jobs import certify_table

RADII = np.arange(0.0, 1.01, 0.25)


def write_cohen_checkpoints(folder: Path) -> list[tuple[float, Path]]:
    """The bundled experts in the format of Cohen's `train.py`: a pickled container, names prefixed by a normalisation
    layer (`0.`) and DataParallel (`1.module.`), no sigma, no normalisation."""
    made = []
    for expert in load_pool():
        path = folder / f"noise_{expert.sigma:.2f}" / "checkpoint.pth.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {f"1.module.{name}": value for name, value in expert.module.state_dict().items()}
        torch.save({"epoch": 90, "arch": "small_cnn", "state_dict": state, "optimizer": {"state": {}}}, path)
        made.append((expert.sigma, path))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="*", metavar="SIGMA=FILE", help="one per noise level")
    parser.add_argument("--out", type=Path, default=Path("cohen"), help="a new folder")
    parser.add_argument("--data", help="images to certify: npz, parquet, a folder of images, hf-hub:org/name@revision")
    parser.add_argument("--validation", help="images to choose thresholds on; no expert should have seen them")
    parser.add_argument("--normalisation", help="cifar10, imagenet, ..., none")
    parser.add_argument("--architecture", help="where the file does not say: cifar_resnet110, resnet50, ...")
    parser.add_argument("--quick", action="store_true", help="offline, on checkpoints made from the bundled experts")
    chosen = parser.parse_args(arguments)
    settings: dict[str, Any] = {"normalisation": chosen.normalisation, "architecture": chosen.architecture}
    if chosen.quick:
        sources = write_cohen_checkpoints(chosen.out / "models")
        settings |= {"normalisation": "fashion_mnist", "input_shape": [1, 28, 28]}
        validation, test = load_slice("validation"), load_slice("test")
        held, choosing, tested, n = 40, 12, 2, 500
    else:
        if not (chosen.checkpoint and chosen.data and chosen.validation and chosen.normalisation):
            parser.error("give SIGMA=FILE for each checkpoint, --data, --validation and --normalisation; or --quick")
        sources = [(float(sigma), Path(path)) for sigma, _, path in (c.partition("=") for c in chosen.checkpoint)]
        validation, test = load_data(chosen.validation), load_data(chosen.data)
        held = choosing = min(500, len(validation))
        tested, n = len(test), 100_000
    given = {key: value for key, value in settings.items() if value is not None}

    # wrap: pinned by sha256, read by the unpickler that only knows tensors, and measured under its own noise
    x, y = validation.batch(range(held))
    spec = [{"source": str(path), "sigma": sigma, "name": f"sigma_{sigma:g}", **given} for sigma, path in sources]
    wrapped = wrap(spec, images=x, labels=y)
    for check in wrapped.checks:
        print(f"{check.name}: {100 * check.accuracy:.1f}% right under its own noise")
    for warning in wrapped.warnings:
        print(f"warning: {warning}")
    wrapped.pool.save(chosen.out / "pool.json")

    # a cascade over the frozen experts: large sigma first, and the images choose where it hands over
    x, y = x[:choosing], y[:choosing]
    routed = train_router(
        wrapped.pool, "cascade", x, y, radii=RADII, seed=0, out=chosen.out / "router", validation=(x, y), plan_n=n
    )

    # Cohen's own rule (n0 = 100, a fixed n), so that the tables can stand beside published ones
    plan, rows = FixedPlan(100, n), range(tested)
    tables = [certify_table(routed, test, chosen.out / "routed.tsv", plan, indices=rows, name="routed")]
    for expert in wrapped.pool:
        out = chosen.out / f"{expert.name}.tsv"
        tables.append(certify_table(Smooth(expert), test, out, plan, indices=rows, name=expert.name))
    print("\n".join((chosen.out / "routed.tsv").read_text().splitlines()[:5]))
    print(f"report: {write_report(tables, chosen.out / 'report', radii=RADII)}")


if __name__ == "__main__":
    main()
