"""What large tables cost: seconds of `rsrouter report` and `rsrouter merge`, every row computed again from its votes.

    python examples/bench_tables.py [--rows 200000] [--table model_cards/demo/certificates/certificates.tsv]

The rows are those of TABLE over and over, each with a few votes moved at random and all other cells computed from them, so
that hardly any two are alike. Wall-clock time of the commands, start included; nothing here draws a vote from a network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from rsrouter.core.recompute import recompute_all
from rsrouter.results import read_table
from rsrouter.results.rows import COLUMNS, Row

SHARDS = 4


def rows_of(source: Path, count: int) -> list[str]:
    """Lines of `count` rows that follow from their votes."""
    table = read_table(source, check="counts")
    about, rng = table.described(), np.random.default_rng(0)
    lines: list[str] = []
    while len(lines) < count:
        votes: list[dict[str, dict[str, Any]]] = []
        for i in range(len(table)):
            row = {purpose: {name: list(v) for name, v in stages.items()} for purpose, stages in table.counts(i).items()}
            for counts in row["estimate"].values():
                a, b = rng.integers(len(counts) - 1, size=2)
                moved = min(int(rng.integers(0, 4)), counts[a])
                counts[a], counts[b] = counts[a] - moved, counts[b] + moved
            votes.append(row)
        found = recompute_all(about.tree.tree, about.plan, about.split, votes, rule=about.rule, sides=about.sides)
        for i in range(len(table)):
            if i not in found.faults and len(lines) < count:
                certificate, label = found.certificate(i), int(table.label[i])
                row_made = Row.from_certificate(
                    certificate, idx=len(lines), label=label, seconds=1.0, rule=str(table.rule[i]), seed=table.seed[i]
                )
                lines.append(row_made.to_line())
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--table", type=Path, default=Path("model_cards/demo/certificates/certificates.tsv"))
    args = parser.parse_args()
    lines = rows_of(args.table, args.rows)
    metadata = json.loads(args.table.with_suffix(".json").read_text())
    metadata |= {"num_images": len(lines), "indices": [[0, len(lines), 1]]}
    metadata["data"]["images"] = len(lines)
    with tempfile.TemporaryDirectory() as folder:

        def write(name: str, kept: list[str], **more: Any) -> Path:
            path = Path(folder) / f"{name}.tsv"
            path.write_text("\t".join(COLUMNS) + "\n" + "".join(kept))
            path.with_suffix(".json").write_text(json.dumps(metadata | more))
            return path

        whole = write("certificates", lines)
        shards = [write(f"shard{k}", lines[k::SHARDS], shard={"index": k, "count": SHARDS}) for k in range(SHARDS)]
        commands = {
            "report": ["report", str(whole), "--out", f"{folder}/report"],
            "merge": ["merge", *map(str, shards), "--out", f"{folder}/merged.tsv"],
        }
        for verb, arguments in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "rsrouter", *arguments], check=True, stdout=subprocess.DEVNULL)
            print(f"{verb}: {time.perf_counter() - start:.1f} s for {len(lines):,} rows", flush=True)


if __name__ == "__main__":
    main()
