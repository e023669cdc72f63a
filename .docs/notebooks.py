"""Tutorials: scripts with cells (`# %%`, as editors and jupytext read them), executed into notebooks and pages with output."""

from __future__ import annotations

import base64
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ESCAPES = r"\x1b\[[0-9;]*m"
PICTURES = {"image/svg+xml": "svg", "image/png": "png"}


def cells(text: str) -> list[tuple[str, str]]:
    """`("markdown" or "code", source)` of a script with cells; a line `# !command` is a shell command of a code cell."""
    found = []
    for head, body in re.findall(r"^# %%([^\n]*)\n(.*?)(?=^# %%|\Z)", text, flags=re.DOTALL | re.MULTILINE):
        body = body.strip("\n")
        if "[markdown]" in head:
            found.append(("markdown", re.sub(r"^# ?", "", body, flags=re.MULTILINE)))
        else:
            found.append(("code", re.sub(r"^# (?=!|    )", "", body, flags=re.MULTILINE)))
    return found


def is_shell(cell: Any) -> bool:
    """Whether a cell holds shell commands."""
    return bool(cell.cell_type == "code" and cell.source.startswith("!"))


def execute(script: Path) -> Any:
    """The notebook with its outputs, run in a folder of its own; an error in a cell ends the build."""
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    notebook = nbformat.v4.new_notebook(cells=[make[kind](text) for kind, text in cells(script.read_text(encoding="utf-8"))])
    root = str(script.resolve().parents[2])
    os.environ.update(PYTHONPATH=os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), COLUMNS="88", RSROUTER_ROOT=root)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sources = [cell.source for cell in notebook.cells]
    for cell in notebook.cells:  # run by bash, where the first command that fails ends the build
        if is_shell(cell):
            cell.source = "%%bash\nset -eo pipefail\n" + re.sub(r"^!", "", cell.source, flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    for k, (cell, source) in enumerate(zip(notebook.cells, sources, strict=True)):
        cell.source = source
        cell.id = f"cell-{k}"  # the same in every build
        cell.metadata.clear()
    return notebook


def render(script: Path, out: Path) -> None:
    """Writes `out/NAME.md`, its pictures, and the notebook itself to download."""
    notebook, name = execute(script), script.stem
    out.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, out / f"{name}.ipynb", version=nbformat.NO_CONVERT)
    page = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            page.append(cell.source)
            continue
        shell = is_shell(cell)
        source = re.sub(r"^!", "", cell.source, flags=re.MULTILINE) if shell else cell.source
        page.append(f"```{'sh' if shell else 'python'}\n{source}\n```")
        outputs = cell.get("outputs", [])
        printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout").strip("\n")
        page += [f"```text\n{re.sub(ESCAPES, '', printed)}\n```"] if printed else []
        page += [_output(output, f"{name}-{len(page)}-{k}", out) for k, output in enumerate(outputs)]
    page.insert(1, f"[This page as a notebook]({name}.ipynb){{ download }}")
    (out / f"{name}.md").write_text("\n\n".join(part for part in page if part) + "\n", encoding="utf-8")


def _output(output: Any, name: str, out: Path) -> str:
    data = output.get("data", {})
    for kind, ending in PICTURES.items():
        if kind in data:
            content = data[kind].encode() if ending == "svg" else base64.b64decode(data[kind])
            (out / f"{name}.{ending}").write_bytes(content)
            return f'<div class="figure" markdown>\n![output]({name}.{ending})\n</div>'
    text = data.get("text/plain", "")
    return f"```text\n{text}\n```" if text else ""
