"""What the site takes from the project itself: the theory page, the changelog, the demo's curve, the command line.

Mathematics is written as LaTeX and turned into MathML here, so neither the build nor a page fetches anything.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

import math_core
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
#: pages and files of the site that stand elsewhere in the project
INCLUDED = {
    "theory.md": "rsrouter/core/THEORY.md",
    "changelog.md": "CHANGELOG.md",
    "demo-curve.svg": "model_cards/demo/certificates/curve.svg",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not written by hand."""
    for name, source in INCLUDED.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    return files


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """LaTeX to MathML."""
    convert = math_core.LatexToMathML()

    def mathml(match: re.Match[str]) -> str:
        latex = html.unescape(match["latex"])
        try:
            return str(convert.convert_with_local_state(latex, displaystyle=match["tag"] == "div"))
        except math_core.LatexError as error:
            raise PluginError(f"{page.file.src_uri}: {latex!r}: {error}") from error

    pattern = r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>'
    return re.sub(pattern, mathml, content, flags=re.DOTALL)


def command_line() -> str:
    """The page of the command line, from what `rsrouter VERB --help` prints."""
    from typer.testing import CliRunner

    from rsrouter.cli import app

    app.rich_markup_mode = None  # plain text, one line for each option

    def help_of(*words: str) -> str:
        result = CliRunner().invoke(app, [*words, "--help"], prog_name="rsrouter", terminal_width=1000)
        if result.exit_code:
            raise PluginError(f"rsrouter {words} --help leaves with {result.exit_code}")
        return result.output

    verbs, *notes = help_of().partition("Commands:\n")[2].split("\n\n")
    lines = ["# Command line", "", "`rsrouter VERB --help` prints the same.", ""]
    for note in notes:
        lines += [" ".join(note.split()), ""]
    for line in verbs.splitlines():
        if found := re.match(r"  (\w\S*)  ", line):
            lines += _verb(found[1], help_of(found[1]))
    return "\n".join(lines) + "\n"


def _verb(name: str, text: str) -> list[str]:
    usage, *parts = re.split(r"\n\n", text.strip())
    about = [" ".join(part.split()) for part in parts if not re.match(r"(Arguments|Options):", part)]
    given = [line for part in parts if re.match(r"(Arguments|Options):", part) for line in part.splitlines()[1:]]
    examples: list[str] = []
    prose: list[str] = []
    for part in about:
        started = re.match(r"Examples?: ", part)
        if started or part.startswith("rsrouter "):
            examples.append(part[started.end() :] if started else part)
        else:
            prose.append(part)
    page = [f"## {name}", "", *prose, "", "```text", usage.removeprefix("Usage: "), "```", ""]
    if examples:
        page += ["```sh", *examples, "```", ""]
    page += ["| | | default |", "|---|---|---|"]
    for line in given:
        names, _, about_it = line.strip().partition("  ")
        if names == "--help":
            continue
        about_it, default = about_it.strip(), ""
        if found := re.search(r"\s+\[([^\[\]]*)\]$", about_it):
            about_it, default = about_it[: found.start()], found[1].removeprefix("default: ")
        page.append("| " + " | ".join((f"`{names}`".replace("|", "\\|"), about_it.replace("|", "\\|"), default)) + " |")
    return [*page, ""]
