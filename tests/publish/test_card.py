"""The card: its metadata, its numbers, and the lines it tells people to run."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from rsrouter import AdaptivePlan, CascadeRouter, ExpertPool, InputError, RoutedSmooth, Smooth, Terms, load_expert
from rsrouter.experts import Diffusion, denoised
from rsrouter.experts.denoiser_files import load_denoiser
from rsrouter.experts.registry import build_architecture
from rsrouter.jobs import certify_table
from rsrouter.publish import publish, write_card
from rsrouter.publish.card import render_card, text_of
from rsrouter.publish.commands import certify_command
from rsrouter.publish.licences import check_licence
from rsrouter.report import certified_accuracy
from tests.helpers import small_router as small
from tests.helpers.hub_server import HubServer

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
    said = io.StringIO()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(said):
        exec(compile(snippet, "README.md", "exec"), {})
    assert len(said.getvalue().splitlines()) == 2
    assert all(re.match(r"class \d within L2 radius|abstains after", line) for line in said.getvalue().splitlines())


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
    text = re.sub(r"--threads \d+", "--threads THREADS", text)
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
    command = certify_command(table, "org/router").split()
    start, count, every = (int(command[command.index(option) + 1]) for option in ("--start", "--count", "--every"))
    assert list(range(start, min(12, start + count), every)) == table.idx.tolist()
    assert "3 of 12 images, one in 3, from number 2 on" in render_card(router, "org/router", [table]).text


def test_the_commands_import_what_registers_the_networks(pool: ExpertPool, tmp_path: Path) -> None:
    router = small.routed(pool)
    table = certify_table(router, small.images(), tmp_path / "t.tsv", small.PLAN)
    text = render_card(router, "org/router", [table], imports=["my_nets"]).text
    commands = [line for line in text.splitlines() if line.startswith(("rsrouter certify", "rsrouter audit"))]
    assert len(commands) == 2
    assert all("--import my_nets" in line for line in commands)
    assert "--import" not in render_card(router, "org/router", [table]).text


@pytest.mark.parametrize(
    "text",
    ["a|b", "mit\n# Trusted", "<script>x</script>", "[safe](http://evil)", "http://evil/x", "`x` | `y`", "![i](x)", "**bold**"],
)
def test_text_of_others_stays_text(pool: ExpertPool, tmp_path: Path, text: str) -> None:
    shown = text_of(text)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)[<>\[\]|]", shown.replace("`", "")) or shown.startswith("`")
    expert = pool[0].with_settings(provenance=pool[0].provenance.model_copy(update={"licence": text}))
    card = render_card(RoutedSmooth(ExpertPool([expert, pool[1]]), CascadeRouter((0.6,))), "org/router").text
    (row,) = [line for line in card.splitlines() if line.startswith("| sigma_0.25 ")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 7
    assert "<script" not in card.replace("\\<", "")
    assert "\n# Trusted" not in card


def test_the_card_names_parts_and_papers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name, module in (("unet", build_architecture("small_unet", None)), ("net", build_architecture("small_resnet", 3))):
        save_file(module.state_dict(), tmp_path / f"{name}.safetensors")
    denoiser = load_denoiser(tmp_path / "unet.safetensors", architecture="small_unet")
    settings = {"architecture": "small_resnet", "num_classes": 3, "input_shape": (1, 8, 8), "normalisation": "none"}
    classifier = load_expert(tmp_path / "net.safetensors", sigma=0.25, licence="cc-by-nc-4.0", **settings)
    diffusion = Diffusion()
    experts = [denoised(denoiser, classifier, sigma=s, diffusion=diffusion, name=f"d_{s:g}") for s in (0.25, 0.5)]
    card = render_card(RoutedSmooth(ExpertPool(experts), CascadeRouter((0.6,))), "org/router", licence="cc-by-nc-4.0").text
    assert "over 2 frozen" in card
    assert f"denoiser, t = {diffusion.step_for(0.5)[0]} of 1000 (linear schedule, epsilon, first step" in card
    assert len([line for line in card.splitlines() if "| classifier |" in line]) == 2
    assert "Carlini et al. 2023" in card
    assert "@inproceedings{carlini2023" in card
    assert "Salman" not in card
    assert "**Not for commercial use**: d_0.25 (cc-by-nc-4.0), d_0.5 (cc-by-nc-4.0)" in card
    with pytest.raises(InputError, match="licence promises more") as caught:
        check_licence("apache-2.0", experts)
    assert "--licence cc-by-nc-4.0" in caught.value.remedy
    for licence in ("other", "cc-by-nc-sa-4.0"):
        check_licence(licence, experts)


@pytest.mark.parametrize("licence", ["made up", "", "Apache-2.0", "mit\nbase_model: x", None])
def test_a_licence_is_an_identifier(licence: Any) -> None:
    with pytest.raises(InputError, match="not a licence identifier"):
        check_licence(licence, [])
    for known in ("apache-2.0", "openrail++", "cc-by-nc-sa-4.0"):
        check_licence(known, [])


@pytest.mark.parametrize("written", ["CC-BY-NC-4.0", "non-commercial, research only"])
def test_the_licence_that_is_advised_is_accepted(pool: ExpertPool, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"sigma_0.25": written}
    monkeypatch.setattr("rsrouter.publish.licences.restricted", lambda experts: told)
    with pytest.raises(InputError, match="promises more") as caught:
        check_licence("apache-2.0", pool)
    for advised in re.findall(r"--licence ([^\s,]+)", caught.value.remedy):
        check_licence(advised, pool)


def test_a_card_over_an_expert_that_reaches_no_radius(pool: ExpertPool, tmp_path: Path) -> None:
    """An adaptive plan whose radii all lie beyond an expert keeps none: the card still gives its command."""
    terms = Terms(AdaptivePlan(100, [0.0, 0.5], n0=10), alpha=0.001)
    tables = [
        certify_table(RoutedSmooth(pool, CascadeRouter((0.6,))), small.images(4), tmp_path / "routed.tsv", terms),
        certify_table(Smooth(pool[0]), small.images(4), tmp_path / "alone.tsv", Terms(terms.plan.within(0.1), alpha=0.001)),
    ]
    assert tables[1].described().plan.radii == ()
    card = render_card(RoutedSmooth(pool, CascadeRouter((0.6,))), "org/router", tables)
    assert "--radii 0.0 " in card.text


def test_experts_rows_and_standings(pool: ExpertPool, tmp_path: Path) -> None:
    router = small.routed(pool)
    tables = [certify_table(router, small.images(), tmp_path / "r.tsv", small.PLAN)]
    tables += [certify_table(Smooth(e), small.images(), tmp_path / f"{e.name}.tsv", small.PLAN) for e in pool]
    card = render_card(router, "org/router", tables)
    assert card.summary is not None
    assert [s.role for s in card.summary.standings] == ["routed", "expert"]
    for standing in card.summary.standings:
        assert f"{100 * standing.least:.1f}% of the experts' envelope" in card.text
    assert "rsrouter certify org/router --expert sigma_0.5 " in card.text


def test_what_a_killed_card_leaves_is_removed_by_its_rerun(pool: ExpertPool, tmp_path: Path) -> None:
    small.run_folder(small.routed(pool), tmp_path / "run")
    left = tmp_path / ".card.abc123.part"
    left.mkdir()
    (left / "config.json").write_text("{")
    write_card(tmp_path / "run", tmp_path / "card", "org/router")
    assert not left.exists()
    assert (tmp_path / "card" / "README.md").is_file()
