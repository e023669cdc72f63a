"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import rsrouter

NAMES = sorted(m.name for m in pkgutil.walk_packages(rsrouter.__path__, "rsrouter.") if not m.name.endswith("__main__"))
#: Modules of optional packages, which an environment of tests need not have.
OPTIONAL = {"rsrouter.jobs.ray_workers"}


@pytest.mark.parametrize("name", [n for n in NAMES if n not in OPTIONAL])
def test_examples(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


def test_there_are_examples() -> None:
    examples = [
        e
        for n in NAMES
        if n not in OPTIONAL
        for t in doctest.DocTestFinder().find(importlib.import_module(n))
        for e in t.examples
    ]
    assert len(examples) > 100


def test_modules_say_what_they_are() -> None:
    """No module's docstring opens like a question."""
    root = Path(rsrouter.__file__).parent
    opening = {p.relative_to(root): p.read_text(encoding="utf-8")[3:].split(" ", 1)[0] for p in root.rglob("*.py")}
    assert not [path for path, word in opening.items() if word in {"What", "Which"}]
