"""From frozen experts to a certified, routed classifier, offline: pool, router, certificates, answers, report.

python examples/quickstart.py --out quickstart            # about a minute on two cores
python examples/quickstart.py --out quickstart --quick    # seconds
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rsrouter import AdaptivePlan, Recipe, RoutedSmooth, train_router, write_report
from rsrouter.demo import CLASSES, load_pool, load_slice
from rsrouter.jobs import certify_table

RADII = np.arange(0.0, 1.01, 0.25)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="a new folder")
    parser.add_argument("--quick", action="store_true", help="fewer images and votes")
    chosen = parser.parse_args(arguments)
    train_images, test_images, n = (40, 3, 400) if chosen.quick else (500, 40, 10_000)
    recipe = Recipe("dual-rs", epochs=6, consistency=40.0) if chosen.quick else "dual-rs-head"

    # three frozen experts, one per noise level; the router's training images were in no expert's training set
    pool = load_pool()
    images, labels = load_slice("train").batch(range(train_images))
    train_router(pool, "flat", images, labels, radii=RADII, recipe=recipe, seed=0, out=chosen.out / "router", label_n=50)

    # anyone can load it again: every expert is verified against its pin
    routed = RoutedSmooth.from_pretrained(chosen.out / "router")
    test = load_slice("test")
    rows = range(test_images)
    table = certify_table(routed, test, chosen.out / "certificates.tsv", AdaptivePlan(n, RADII), indices=rows, name="routed")
    for i in rows[:3]:
        answer = CLASSES[table.predict[i]] if table.predict[i] >= 0 else "no class"
        print(f"image {i}: {answer}, radius {table.radius[i]:.3f}, decided by {table.expert[i]}, limited by {table.bound_by[i]}")

    # what a deployed classifier says: fresh noise, -1 where the votes do not decide
    print("answers:", routed.predict(test.batch(rows[:3])[0], n=400).tolist())
    page = write_report(table, chosen.out / "report", images={i: test.image(i) for i in rows}, classes=CLASSES)
    print(f"report: {page}")


if __name__ == "__main__":
    main()
