"""A certified table carried over to another execution, against certifying anew there: certified accuracy, votes, time.

    rsrouter demo --out demo
    python examples/study_transfer.py demo --out study-transfer

The demo's router is certified in float32 by the demo's plan, on the first images of the demo's table. `transfer_table` then draws
pairs on the same noisy copies and moves every bound (THEORY.md, section 7); what it certifies is the classifier in bfloat16, at
alpha = 0.002 instead of 0.001. Beside it stands a new certification in bfloat16. Started again, it goes on with the tables that
are there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from rsrouter import Execution, RoutedSmooth, Terms, read_table
from rsrouter.core.types import ABSTAIN
from rsrouter.demo import load_slice
from rsrouter.jobs import certify_table, transfer_table
from rsrouter.report.curves import average_certified_radius, certified_accuracy
from rsrouter.results import Table
from rsrouter.sampling.calibrate import measure_ranges

RADII = np.arange(0.0, 2.01, 0.25)


def pairs(table: Table) -> float:
    """Paired draws an image, over its networks."""
    return float(np.mean([sum(pair[1] for pair in table.counts(i).get("moved", {}).values()) for i in range(len(table))]))


def apart(table: Table) -> float:
    """Share of the pairs that voted differently."""
    found = np.array([pair for i in range(len(table)) for pair in table.counts(i).get("moved", {}).values()])
    return float(found[:, 0].sum() / found[:, 1].sum())


def line(name: str, table: Table, votes: float, note: str = "") -> str:
    cells = " | ".join(f"{100 * a:.0f}" for a in certified_accuracy(table, RADII).accuracy)
    acr, alpha = average_certified_radius(table), table.described().alpha
    return f"| {name} | {alpha:g} | {cells} | {acr:.3f} | {votes:,.0f} | {table.time.mean():.2f} | {note} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of `rsrouter demo`, or of another run on the bundled test slice")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--votes", type=int, nargs="+", default=[1000, 4000], help="paired draws for each network and image")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--dtype", default="bfloat16", help="of the target: bfloat16, int8 (on a CPU), float32 (with --compile)")
    parser.add_argument("--compile", action="store_true", help="through torch.compile as well")
    args = parser.parse_args(arguments)
    demo = read_table(args.run / "certificates.tsv")
    about, indices = demo.described(), demo.idx[: args.images].tolist()
    smoothed, data = RoutedSmooth.from_pretrained(args.run / "router"), load_slice("test")
    smoothed = smoothed.with_execution(replace(Execution.from_dict(about.execution), dtype="float32"))
    if args.dtype == "int8":  # ranges of layers, from images that are not certified
        target = measure_ranges(smoothed.routed.models, load_slice("train").batch(range(64))[0], base=smoothed.execution)
    else:
        target = replace(smoothed.execution, dtype=args.dtype, compile=args.compile)
    args.out.mkdir(parents=True, exist_ok=True)
    terms = Terms(about.plan, about.terms.alpha, about.rule, about.sides)

    def told(what: str, make: Callable[[], Table]) -> Table:
        print(what, flush=True)
        return make()

    own = args.out / "float32.tsv"
    old = told("certify", lambda: certify_table(smoothed, data, own, terms, indices=indices, name="float32"))
    same = demo.take(np.arange(len(indices))).counts_text == old.counts_text
    print(f"{int(same.sum())} of {len(old)} rows have the votes of the demo's table", flush=True)
    new = args.dtype + (", compiled" if args.compile else "")
    lines = [
        f"| certificates | alpha | {' | '.join(f'r = {r:g}' for r in RADII)} | ACR | votes | seconds | |",
        "|" + "---|" * (len(RADII) + 6),
        line("float32", old, old.n_drawn.mean()),
    ]
    for votes in args.votes:
        out = args.out / f"transfer_{votes}.tsv"
        moved = told(f"transfer, {votes}", lambda o=out, v=votes: transfer_table(  # type: ignore[misc]
            smoothed, data, own, o, target, votes=v
        ))  # fmt: skip
        kept = f"{int((moved.predict != ABSTAIN).sum())} of {int((old.predict != ABSTAIN).sum())} still certified; "
        lines.append(line(f"{new}, transferred", moved, pairs(moved), f"{kept}{100 * apart(moved):.2f}% of the pairs differ"))
    # a fresh seed: the same noise in two executions would make the comparison look closer than it is
    anew = told("certify anew", lambda: certify_table(
        smoothed.with_execution(target), data, args.out / "anew.tsv", terms, seed_from="anew", indices=indices,
        name="anew",
    ))  # fmt: skip
    lines.append(line(f"{new}, certified anew", anew, anew.n_drawn.mean()))
    text = "\n".join(lines)
    (args.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
