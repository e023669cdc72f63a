"""The card: its metadata, its numbers, and the lines it tells people to run."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import small_router as small
from hub_server import HubServer
from huggingface_hub import ModelCard

from rsrouter import CascadeRouter, ExpertPool, InputError, RoutedSmooth
from rsrouter.jobs import certify_table
from rsrouter.publish import publish, write_card
from rsrouter.publish.card import render_card
from rsrouter.report import certified_accuracy

GOLDEN = Path(__file__).with_name("golden_card.txt")


@pytest.fixture
def pool(hub: HubServer, tmp_path: Path) -> ExpertPool:
    return small.put_experts(hub, tmp_path)


@pytest.fixture
def run(pool: ExpertPool, tmp_path: Path) -> Path:
    small.run_folder(small.routed(pool), tmp_path / "run")
    return tmp_path / "run"


def test_the_metadata_validate_and_name_the_experts(hub: HubServer, run: Path) -> None:
    card = ModelCard(publish(run, "org/router", dry_run=True).card)
    card.validate()
    assert any("validate-yaml" in path for _, path in hub.requests)
    data = card.data
    assert data.base_model == ["lab/sigma-0.25", "lab/sigma-0.5"]
    assert data.base_model_relation == "adapter"
    assert data.library_name == "rsrouter"
    assert data.pipeline_tag == "image-classification"
    assert data.license == "apache-2.0"
    assert {r.metric_args["alpha"] for r in data.eval_results} == {0.001}


def test_every_number_is_the_tables(pool: ExpertPool, tmp_path: Path) -> None:
    router = small.routed(pool)
    table = small.run_folder(router, tmp_path / "run")
    card = render_card(router, "org/router", [table])
    assert card.summary is not None
    told = {r.metric_args["radius"]: r.metric_value for r in card.data.eval_results or []}
    radii = sorted(told)
    accuracy = certified_accuracy(table, radii)
    assert [told[r] for r in radii] == [round(100 * float(a), 1) for a in accuracy.accuracy]
    row = next(line for line in card.text.splitlines() if line.startswith("| routed |"))
    for value, low, high in zip(accuracy.accuracy, accuracy.low, accuracy.high, strict=True):
        assert f"{100 * value:.1f} ({100 * low:.1f}-{100 * high:.1f})" in row
    assert f"| {100 * table.abstained.mean():.1f} |" in row
    for part in (
        "What is not certified",
        "What alpha means",
        "alpha = 0.001",
        "rsrouter certify org/router",
        "rsrouter audit org/router",
    ):
        assert part in card.text


def test_the_snippet_runs(hub: HubServer, run: Path) -> None:
    publish(run, "org/router")
    text = hub.files("org/router")["README.md"].decode()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippet.strip().splitlines()) == 3
    names = {"images": small.pixels(small.images(3))}
    with contextlib.redirect_stderr(io.StringIO()):
        exec(compile(snippet, "README.md", "exec"), names)
    assert [c.predict for c in names["certificates"]] == [0, 1, 2]


def test_the_commands_are_commands(run: Path) -> None:
    """Every line of the card's shell block is accepted by the program's own parser."""
    from typer.main import get_command

    from rsrouter.cli import app

    text = publish(run, "org/router", dry_run=True).card
    (block,) = re.findall(r"```bash\n(.*?)```", text, re.S)
    root = get_command(app)
    lines = block.strip().splitlines()
    assert [line.split()[1] for line in lines] == ["certify", "audit"]
    for line in lines:
        words = line.split()[1:]
        command = root.get_command(None, words[0])
        context = command.make_context(words[0], words[1:])
        assert context.params["source"] == "org/router"


def test_the_whole_card(pool: ExpertPool, tmp_path: Path) -> None:
    """Against a card that somebody read; what changes between machines is blanked."""
    router = small.routed(pool)
    table = small.run_folder(router, tmp_path / "run")
    text = render_card(router, "org/router", [table], figure="certificates/curve.svg").text
    text = re.sub(r"`[0-9a-f]{12}`", "`COMMIT`", text)
    text = re.sub(r"seed \d+", "seed SEED", text)
    text = re.sub(r"Made with rsrouter \S+", "Made with rsrouter VERSION", text)
    # votes of this machine: the layout is compared, not the digits
    text = re.sub(r"[\d,]+ votes an image", "VOTES votes an image", text)
    text = re.sub(r"(?m)^\| routed \|.*", lambda row: re.sub(r"\d+\.\d+", "#", row.group()), text)
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_a_cascade_without_certificates(pool: ExpertPool) -> None:
    card = render_card(RoutedSmooth(pool, CascadeRouter((0.6,))), "org/cascade", title="A <b>cascade</b>")
    assert "nothing is claimed" in card.text
    assert "Multiscale" in card.text
    assert "<b>" not in card.text
    assert "model-index" not in card.text


def test_a_card_for_experts_that_are_not_on_the_hub(tmp_path: Path) -> None:
    pool = ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)])
    small.run_folder(small.routed(pool), tmp_path / "run")
    path = write_card(tmp_path / "run", tmp_path / "card", "org/router")
    text = path.read_text()
    assert "huggingface.co/" not in text.partition("## Certified accuracy")[0]
    assert "pinned by sha256" in text
    assert str(tmp_path) not in text
    assert (tmp_path / "card" / "certificates" / "certificates.tsv").read_bytes() == (
        tmp_path / "run" / "certificates.tsv"
    ).read_bytes()
    with pytest.raises(InputError, match="not empty"):
        write_card(tmp_path / "run", tmp_path / "card", "org/router")


def test_the_command_names_the_certified_images(pool: ExpertPool, tmp_path: Path) -> None:
    router = small.routed(pool)
    table = certify_table(router, small.images(), tmp_path / "part.tsv", small.PLAN, indices=range(2, 9, 3))
    assert " --start 2 --count 9 --every 3 " in render_card(router, "org/router", [table]).text
    assert list(range(2, min(12, 2 + 9), 3)) == table.idx.tolist()
