"""Builds the site: `python .docs/build.py [OUT]`, by default into site/. A warning is an error.

Pages lie in `.docs/pages`, tutorials in `.docs/tutorials` as scripts with cells, which are executed here. The theory, the
changelog, the demo's curve and the command line come from the project itself.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGES = HERE / "build"
#: Pages and files of the site that stand elsewhere in the project.
INCLUDED = {
    "theory.md": "rsrouter/core/THEORY.md",
    "changelog.md": "CHANGELOG.md",
    "demo-curve.svg": "model_cards/demo/certificates/curve.svg",
}


def main() -> None:
    """Assembles the pages and renders them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "site", help="a folder, which is replaced")
    parser.add_argument("--as-they-are", action="store_true", help="take tutorials as an earlier build executed them")
    given = parser.parse_args()
    kept = PAGES / "tutorials"
    if not given.as_they_are:
        shutil.rmtree(kept, ignore_errors=True)
    assemble()
    from notebooks import render

    for script in sorted((HERE / "tutorials").glob("*.py")):
        if not (kept / f"{script.stem}.md").is_file():
            print(f"executing {script.name}", flush=True)
            render(script, kept)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(HERE / "zensical.yml")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    status = subprocess.run(command, env=environment, cwd=HERE, check=False).returncode
    if status == 0:
        shutil.rmtree(given.out, ignore_errors=True)
        shutil.move(HERE / "site", given.out)
    sys.exit(status)


def assemble() -> None:
    """Every page that is not a tutorial."""
    for path in PAGES.glob("*"):
        if path.name != "tutorials":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(HERE / "pages", PAGES, dirs_exist_ok=True)
    for name, source in INCLUDED.items():
        shutil.copyfile(ROOT / source, PAGES / name)
    (PAGES / "reference" / "cli.md").write_text(command_line(), encoding="utf-8")


def command_line() -> str:
    """The page of the command line, from the verbs themselves."""
    from typer.main import get_command

    from rsrouter.cli import app
    from rsrouter.cli.verbs import VERBS

    root: Any = get_command(app)
    lines = ["# Command line", "", "`rsrouter VERB --help` prints the same.", ""]
    for note in str(root.epilog).split("\n\n"):
        lines += [note, ""]
    for name in VERBS:
        lines += _verb(name, root.commands[name])
    return "\n".join(lines) + "\n"


def _verb(name: str, command: Any) -> list[str]:
    context = command.make_context(f"rsrouter {name}", [], resilient_parsing=True)
    about = [" ".join(part.split()) for part in command.help.split("\n\n")]
    is_example = re.compile(r"(Examples?: )?rsrouter ")
    examples = [re.sub(r"^Examples?: ", "", part) for part in about if is_example.match(part)]
    page = [f"## {name}", "", *(f"{part}\n" for part in about if not is_example.match(part))]
    page += ["```text", " ".join(command.get_usage(context).split()[1:]), "```", ""]
    page += ["```sh", *examples, "```", ""] if examples else []
    page += ["| | | default |", "|---|---|---|"]
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is None or parameter.name == "help":
            continue
        about_it, default = record[1], ""
        if found := re.search(r"\s+\[([^\[\]]*)\]$", about_it):
            about_it, default = about_it[: found.start()], found[1].removeprefix("default: ")
        page.append("| " + " | ".join((f"`{record[0]}`", about_it.replace("|", "\\|"), default)) + " |")
    return [*page, ""]


if __name__ == "__main__":
    main()
