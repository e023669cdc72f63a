"""Writes a Space as a folder: `python examples/space/make.py OUT`, then `hf upload ORG/NAME OUT --repo-type space`.

The package itself goes along, so that requirements.txt names only what any index has.
"""

from __future__ import annotations

import argparse
import shutil
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def requirements() -> list[str]:
    """What the package and this page need, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["space"]]


def write(out: Path, router: Path = ROOT / "rsrouter" / "demo" / "assets" / "router") -> Path:
    """The Space in the new folder `out`, serving the router of a folder by default."""
    shutil.copytree(HERE, out, ignore=shutil.ignore_patterns("__pycache__", "make.py", "requirements.txt"))
    shutil.copytree(ROOT / "rsrouter", out / "rsrouter", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(router, out / "router", ignore=shutil.ignore_patterns("certificates", "README.md"))
    (out / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument(
        "--router", type=Path, default=ROOT / "rsrouter" / "demo" / "assets" / "router", help="folder of the router to serve"
    )
    given = parser.parse_args()
    print(write(given.out, given.router))
