"""How the command line starts and ends: help that imports little, usage errors as JSON, interruptions, pipes that close."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from typer.main import get_command

from rsrouter import read_table
from rsrouter.cli import app
from rsrouter.cli.verbs import VERBS
from rsrouter.demo.bundled import ASSETS

ROUTER = str(ASSETS / "router")
LOADED = (
    "import sys; from rsrouter.cli import main; sys.argv = ['rsrouter', *sys.argv[1:]]\n"
    "try: main()\nexcept SystemExit: pass\n"
    "print(sorted(sys.modules), file=sys.stderr)"
)


def shell(*words: object, **settings) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rsrouter", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


def test_help_of_the_program_imports_no_verb_and_no_numbers():
    done = subprocess.run([sys.executable, "-c", LOADED, "--help"], capture_output=True, text=True, check=True)
    modules = set(re.findall(r"'([\w.]+)'", done.stderr))
    assert not modules & {"torch", "scipy", "numpy", "tqdm", "rich.markdown", "rsrouter.cli.train", "rsrouter.cli.certify"}
    assert all(f"  {name} " in done.stdout for name in VERBS)


def test_help_of_a_verb_imports_nothing_that_computes_draws_or_converts():
    run = (
        "import sys; from typer.testing import CliRunner; from rsrouter.cli import app\n"
        f"for verb in {[*VERBS]}:\n"
        "    done = CliRunner().invoke(app, [verb, '--help']); assert done.exit_code == 0, done.output\n"
        "    assert f' {verb} ' in done.output.splitlines()[0] and '--help' in done.output\n"
        "print(sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    modules = set(re.findall(r"'([\w.]+)'", done.stderr))
    assert modules >= {"rsrouter.cli.certify", "rsrouter.cli.train"}
    heavy = {
        "torch",
        "numpy",
        "scipy",
        "timm",
        "torchvision",
        "pyarrow",
        "matplotlib",
        "transformers",
        "diffusers",
        "PIL",
        "jinja2",
    }
    assert not modules & {*heavy, "pydantic", "huggingface_hub", "tqdm", "rich.markdown", "rsrouter.smooth"}


def test_options_of_a_verb_stand_under_their_panels(call):
    _, out, _ = call("certify", "--help")
    titles = [line for line in out.splitlines() if line.endswith(":") and not line.startswith((" ", "Usage"))]
    assert titles == ["Arguments:", "Options:", "Votes:", "Images:", "Workers:", "Execution:", "Output:"]
    votes, images = (out.index(f"\n{panel}:\n") for panel in ("Votes", "Images"))
    assert votes < out.index("  --alpha ") < images < out.index("  --count ")


def test_every_verb_is_where_the_table_says():
    commands = get_command(app).commands
    for name in VERBS:
        assert commands[name].name == name
    with pytest.raises(KeyError):
        commands["magic"]


@pytest.mark.parametrize("width", [50, 80])
def test_help_fits_a_narrow_terminal(width):
    done = shell("--help", env={**os.environ, "COLUMNS": str(width), "NO_COLOR": "1"})
    assert max(map(len, done.stdout.splitlines())) <= width
    assert "\x1b" not in done.stdout


def test_wrong_usage_answers_in_json_when_asked(call):
    for words in (("plan", "--format", "json", "--colour", "red"), ("magic", "--format=json"), ("certify", "--format", "json")):
        status, out, err = call(*words)
        assert status == 2
        assert json.loads(out)["error"]["kind"] == "UsageError"
        assert "--help" in err


def test_remedies_speak_of_options(call, tmp_path):
    (tmp_path / "a").mkdir()
    status, out, _ = call("convert", tmp_path / "a", "--sigma", 1, "--out", tmp_path / "b", "--format", "json")
    assert status == 2
    assert not re.search(r"\b\w+=(?:\s|$|\()", json.loads(out)["error"]["remedy"])


def test_an_interrupted_job_says_how_it_goes_on(tmp_path):
    words = ["certify", ROUTER, "--data", "demo", "--n", "100000", "--out", str(tmp_path / "t.tsv")]
    process = subprocess.Popen(
        [sys.executable, "-m", "rsrouter", *words],
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts background jobs with the signal ignored, and what they start inherits that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "t.tsv").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert "Traceback" not in err


def test_a_pipe_that_closes_is_no_error():
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m rsrouter plan --sigma 0.5 --simulate | true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1)
    assert not done.stderr


def test_a_run_is_filled_and_reported(call, tmp_path):
    """Router and every expert, each at the radii it can reach, from the bundled images."""
    words = ("certify", ROUTER, "--data", "demo", "--count", 2, "--n", 300, "--radii", "0:1:0.25", "--experts")
    status, out, err = call(*words, "--out", tmp_path / "run", "--format", "json")
    assert status == 0, err
    assert len(json.loads(out)["standings"]) == 2
    assert sorted(p.name for p in (tmp_path / "run" / "experts").glob("*.tsv")) == [
        f"sigma_{s}.tsv" for s in ("0.25", "0.5", "1")
    ]
    assert not (tmp_path / "run" / "router" / "README.md").exists()
    plan = read_table(tmp_path / "run" / "experts" / "sigma_0.25.tsv").about.plan
    assert max(plan.radii) < 1
    assert call(*words, "--out", tmp_path / "run")[0] == 0  # nothing is drawn again
    status, out, err = call("report", tmp_path / "run", "--data", "demo", "--out", tmp_path / "report")
    assert status == 0, err
    assert "best single expert" in out
    assert call(*words, "--out", tmp_path / "run" / "other.tsv")[0] == 2
