"""The README's Python snippets run one after the other, over fewer images and votes."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np

README = Path(__file__).resolve().parents[2] / "README.md"
#: What the test scales down.
SMALLER = {"range(200)": "range(40)", "predict(images, n=1000": "predict(images[:2], n=100"}


def test_snippets_run(tmp_path, monkeypatch, capsys, small_batches):
    """And the first prints what stands below it, to the last digits, which depend on the processor."""
    text = README.read_text(encoding="utf-8")
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) >= 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_cards").symlink_to(README.parent / "model_cards")
    namespace: dict[str, object] = {}
    for k, snippet in enumerate(snippets):
        exec(compile(snippet, str(README), "exec"), namespace)
        printed = capsys.readouterr().out
        assert printed.strip()
        if k == 0:
            shown = re.search(r"<!-- printed: the lines above -->\n```text\n(.*?)```", text, flags=re.DOTALL)
            assert shown is not None
            pairs = [[line.split() for line in block.splitlines()] for block in (printed, shown[1])]
            assert [word for word, _ in pairs[0]] == [word for word, _ in pairs[1]]
            assert np.allclose([float(r) for _, r in pairs[0]], [float(r) for _, r in pairs[1]], atol=0.02)
    assert (tmp_path / "my-router" / "config.json").is_file()


def test_the_first_screen_is_short():
    """One sentence, one picture, the two commands and the lines that certify come before anything else."""
    first = README.read_text(encoding="utf-8").split("\n")[:42]
    text = "\n".join(first)
    assert text.index("![") < text.index("$ python -m pytest") < text.index("from_pretrained") < text.index("<!-- /printed -->")
    picture = re.search(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert picture is not None
    assert (README.parent / picture[1]).is_file()
    assert "(missed)" not in README.read_text(encoding="utf-8")


def test_rows_of_studies_are_their_own_figures():
    readme = runpy.run_path(str(README.parent / ".docs" / "readme.py"))
    text = README.read_text(encoding="utf-8")
    assert readme["with_studies"](text) == text
    assert readme["with_studies"](re.sub(r"\d\d\.\d%", "99.9%", text)) != re.sub(r"\d\d\.\d%", "99.9%", text)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target


def test_shell_snippets_name_real_verbs():
    from typer.main import get_command

    from rsrouter.cli import app

    verbs = set(get_command(app).commands)
    used = set(re.findall(r"(?:^|&& |`)rsrouter ([a-z]+)", README.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {"demo", "wrap", "train", "certify", "report", "publish", "bench"} <= used
    assert used <= verbs
