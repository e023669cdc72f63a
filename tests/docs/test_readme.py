"""The README's Python snippets run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def test_snippets_run(tmp_path, monkeypatch, capsys):
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(snippets) >= 2
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), namespace)
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "my-router" / "config.json").is_file()


def test_shell_snippets_name_real_verbs():
    from typer.main import get_command

    from rsrouter.cli import app

    verbs = set(get_command(app).commands)
    used = set(re.findall(r"(?:^|&& |`)rsrouter ([a-z]+)", README.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {"demo", "wrap", "train", "certify", "report", "publish", "bench"} <= used
    assert used <= verbs
