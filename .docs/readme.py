"""Puts what commands print into README.md: `python .docs/readme.py [FILE]`, FILE being what `rsrouter demo` printed.

The README's first snippet is run, and its output written below it; every figure of the demo stands between the same marks. The
rows of the studies come from their `table.json`; `python .docs/readme.py --studies` writes these alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


#: Studies by name: the folder of each in `model_cards`.
STUDIES = {
    "Fashion-MNIST": "fashion-mnist-study",
    "CIFAR-10": "cifar10-study",
    "CIFAR-10, a denoiser and a classifier": "denoised-study",
}
#: How single experts are called in them.
EXPERTS = ("sigma_", "denoised_")
#: Columns of their table: a method of `table.json`; None: the single expert of the largest coverage.
METHODS = {"deferral": "deferral", "Dual RS": "flat, min rule (Dual RS)", "best single expert": None}


def studies() -> str:
    """A row for each study: coverage and least ratio of each method, from the study's own figures."""
    lines = [
        f"| study | images | {' | '.join(f'{m}: coverage, least ratio' for m in METHODS)} |",
        "|" + "---|" * (len(METHODS) + 2),
    ]
    for name, folder in STUDIES.items():
        study = json.loads((ROOT / "model_cards" / folder / "table.json").read_text(encoding="utf-8"))
        found = study["methods"]
        best = max((m for m in found if m.startswith(EXPERTS)), key=lambda m: found[m]["coverage"])
        cells = [found[method or best] for method in METHODS.values()]
        figures = [f"{100 * c['coverage']:.1f}%, {100 * c['least_ratio']:.1f}%" for c in cells]
        lines.append(f"| [{name}](model_cards/{folder}/README.md) | {study['images']:,} | {' | '.join(figures)} |")
    return "\n".join(lines)


def with_studies(text: str) -> str:
    """`text` with the rows of the studies between their marks."""
    pattern = r"(<!-- printed: studies -->\n\n).*?(\n\n<!-- /printed -->)"
    if not re.search(pattern, text, re.DOTALL):
        raise SystemExit("README.md has no block for the studies")
    return re.sub(pattern, lambda m: m[1] + studies() + m[2], text, count=1, flags=re.DOTALL)


def printed(text: str, what: str, output: str) -> str:
    """`text` with `output` between the marks of `what`."""
    pattern = rf"(<!-- printed: {re.escape(what)}[^\n]*-->\n```text\n).*?(```\n<!-- /printed -->)"
    if not re.search(pattern, text, re.DOTALL):
        raise SystemExit(f"README.md has no block for {what!r}")
    body = "\n".join(line.rstrip() for line in output.strip("\n").splitlines()) + "\n"
    return re.sub(pattern, lambda m: m[1] + body + m[2], text, count=1, flags=re.DOTALL)


def main() -> None:
    os.chdir(ROOT)
    text = with_studies(README.read_text(encoding="utf-8"))
    if sys.argv[1:] == ["--studies"]:
        README.write_text(text, encoding="utf-8")
        return
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippet is not None
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(snippet[1], "README.md", "exec"), {})
    text = printed(text, "the lines above", out.getvalue())
    if len(sys.argv) > 1:
        lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
        shown = [line for line in lines if not line.startswith(("report:", "note:"))]
        text = printed(text, "rsrouter demo", "\n".join(shown))
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
