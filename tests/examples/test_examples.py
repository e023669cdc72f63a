"""Every example of the folder runs in its quick form, offline; the service refuses what it should, in one shape."""

from __future__ import annotations

import importlib.util
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsrouter import ExpertPool, RoutedSmooth, Smooth, read_table
from rsrouter.speed import Speed, measure_speed
from tests.helpers import small_router as small

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_quickstart(tmp_path, capsys):
    load("quickstart").main(["--quick", "--out", str(tmp_path / "q")])
    out = capsys.readouterr().out
    assert len(re.findall(r"image \d: .*radius \d\.\d+", out)) == 3
    assert (tmp_path / "q" / "report" / "index.html").is_file()
    assert len(read_table(tmp_path / "q" / "certificates.tsv")) == 3
    assert RoutedSmooth.from_pretrained(tmp_path / "q" / "router").router.kind == "flat"


def test_cohen_checkpoint(tmp_path, capsys):
    example = load("cohen_checkpoint")
    example.main(["--quick", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "warning" not in out
    accuracy = [float(v) for v in re.findall(r"([\d.]+)% right under its own noise", out)]
    assert len(accuracy) == 3
    assert min(accuracy) > 50
    written = torch.load(tmp_path / "models" / "noise_0.25" / "checkpoint.pth.tar", weights_only=True)
    assert {"epoch", "arch", "state_dict"} <= set(written)
    assert all(name.startswith("1.module.") for name in written["state_dict"])
    assert len(read_table(tmp_path / "routed.tsv")) == 2
    with pytest.raises(SystemExit) as stopped:
        example.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2


def test_timm_multi_sigma_says_that_weights_are_random(capsys):
    load("timm_multi_sigma").main(["--quick"])
    out = capsys.readouterr().out
    assert "RANDOM" in out
    assert out.count("right under noise of") == 3
    assert len(re.findall(r"image \d: (class|abstains)", out)) == 3


@pytest.fixture(scope="module")
def serve():
    for package in ("fastapi", "uvicorn", "multipart", "httpx"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'rsrouter[serve]'")
    return load("serve_fastapi")


@pytest.fixture(scope="module")
def client(serve):
    from fastapi.testclient import TestClient

    routed = small.routed(ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)]))
    with TestClient(serve.create_app(routed, classes=("left", "middle", "right"), budget_ms=5000, most_votes=1000)) as client:
        yield client


def post(client, content: bytes, **fields: object):
    return client.post("/predict", files={"image": ("i.png", content, "image/png")}, data={k: str(v) for k, v in fields.items()})


def png(serve, i: int = 0) -> bytes:
    return serve.as_png(small.images().image(i))


def test_it_serves_over_http(serve, capsys):
    serve.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[:3]] == ["200"] * 3
    assert ": 422 " in lines[3]
    assert ": 422 " in lines[4]


def test_an_answer_and_an_abstention(client, serve):
    found = post(client, png(serve)).json()
    assert (found["class"], found["name"], found["abstained"]) == (0, "left", False)
    assert found["votes_per_stage"] == 1000
    assert found["alpha"] == 0.001
    grey = io.BytesIO()
    Image.fromarray(np.full((4, 4), 128, np.uint8)).save(grey, "PNG")
    found = post(client, grey.getvalue()).json()
    assert found["class"] is None
    assert found["abstained"]
    health = client.get("/health").json()
    assert health["input_shape"] == [1, 4, 4]
    assert health["votes_per_second"] > 0


def test_noise_is_fresh_for_each_request(client, serve, monkeypatch):
    seeds = []
    original = RoutedSmooth.engine
    monkeypatch.setattr(RoutedSmooth, "engine", lambda self, seed, *given: seeds.append(seed) or original(self, seed, *given))
    for _ in range(3):
        assert post(client, png(serve)).status_code == 200
    assert len(set(seeds)) == 3


def picture(size: tuple[int, int], mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


BAD = {
    "not a picture": (b"hello", {}, 422, "not a picture"),
    "nothing": (b"", {}, 422, "not a picture"),
    "cut off": (None, {}, 422, "not a picture"),
    "size": (picture((5, 4), "L"), {}, 422, "does not fit"),
    "mode": (picture((4, 4), "RGB"), {}, 422, "does not fit"),
    "too many pixels": (picture((5000, 4000), "1"), {}, 413, "too large"),
    "too many bytes": (bytes(8_000_001), {}, 413, "too large"),
    "budget of nothing": (picture((4, 4), "L"), {"budget_ms": 0.001}, 422, "budget"),
    "negative budget": (picture((4, 4), "L"), {"budget_ms": -5}, 422, "budget"),
    "budget that is none": (picture((4, 4), "L"), {"budget_ms": "nan"}, 422, "budget"),
    "budget that is text": (picture((4, 4), "L"), {"budget_ms": "soon"}, 422, "budget_ms"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_requests_get_one_shape_of_answer(client, serve, kind):
    content, fields, status, message = BAD[kind]
    answer = post(client, png(serve)[:60] if content is None else content, **fields)
    assert answer.status_code == status
    body = answer.json()
    assert set(body) == {"error", "expected", "received", "remedy"}
    assert message in body["error"]
    assert body["expected"]
    assert body["received"]
    assert "Traceback" not in answer.text


def test_a_missing_field_is_said_the_same_way(client):
    answer = client.post("/predict")
    assert answer.status_code == 422
    assert set(answer.json()) == {"error", "expected", "received", "remedy"}


def test_a_busy_service_says_so(serve):
    budget = serve.Budget(Speed(0.01, 0.001, 1), least=40, most=1000)
    assert budget.votes(10.0) == 1000
    assert budget.votes(0.2) == 150  # 80% of 200 ms, less 10
    assert budget.votes(0.06) == 0
    assert 0 < budget.votes(budget.needed() + 1e-9) <= 41
    budget.learn(100, 0.33)  # three times slower than measured
    assert budget.slowdown == pytest.approx(3.0)
    assert budget.votes(0.6) == 150
    for _ in range(50):
        budget.learn(100, 0.05)
    assert budget.slowdown == 1.0  # faster requests stopped early: the worst case is still what was measured


def test_speed():
    one = small.expert(0.5)
    speed = measure_speed(Smooth(one), n=50, repeats=1)
    assert speed.networks == 1
    assert speed.per_vote > 0
    assert speed.votes(speed.seconds(70) + 1e-9) == 70
    assert speed.votes(0.0) == 0


def test_the_folders_readme_lists_every_example():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in sorted(FOLDER.glob("*.py")):
        assert f"]({path.name})" in text, f"{path.name} is not listed"
