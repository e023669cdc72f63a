"""Puts what commands print into README.md: `python .docs/readme.py [FILE]`, FILE being what `rsrouter demo` printed.

The README's first snippet is run, and its output written below it; every figure of the demo stands between the same marks.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def printed(text: str, what: str, output: str) -> str:
    """`text` with `output` between the marks of `what`."""
    pattern = rf"(<!-- printed: {re.escape(what)}[^\n]*-->\n```text\n).*?(```\n<!-- /printed -->)"
    if not re.search(pattern, text, re.DOTALL):
        raise SystemExit(f"README.md has no block for {what!r}")
    body = "\n".join(line.rstrip() for line in output.strip("\n").splitlines()) + "\n"
    return re.sub(pattern, lambda m: m[1] + body + m[2], text, count=1, flags=re.DOTALL)


def main() -> None:
    os.chdir(ROOT)
    text = README.read_text(encoding="utf-8")
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
