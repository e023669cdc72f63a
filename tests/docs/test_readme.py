"""The README's Python snippets run one after the other, over fewer images and votes."""

from __future__ import annotations

import re
from pathlib import Path

#: What the test scales down.
SMALLER = {"range(300)": "range(40)", "AdaptivePlan(10_000, radii)": "AdaptivePlan(1_000, radii)"}
README = Path(__file__).resolve().parents[2] / "README.md"


def test_snippets_run(tmp_path, monkeypatch, capsys, small_batches):
    text = README.read_text(encoding="utf-8")
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
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
