"""The trainer of the bundled experts: goes on exactly where it was killed, its attacks stay in bounds, its recipes learn."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rsrouter import ExpertPool, load_expert
from rsrouter.experts.small_cnn import SmallCNN

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_fashion_experts.py"
SMALL = {"channels": (4, 8), "hidden": 16}


def load():
    sys.path.insert(0, str(SCRIPT.parent))  # its recipes lie beside it
    spec = importlib.util.spec_from_file_location("example_train_fashion_experts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load()
trainer, TASK = sys.modules["expert_training"], script.TASK
in_ball, MEAN, STD = sys.modules["noise_recipes"].in_ball, TASK.mean, TASK.std


def pictures(n, seed=0):
    """Four of ten classes, each a bright bar in a row of its own (mirror images and small shifts keep them apart)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    x = torch.rand((n, 1, 28, 28), generator=generator) * 0.1
    for i, k in enumerate(y.tolist()):
        x[i, 0, 3 + 6 * k : 6 + 6 * k] = 0.9
    return x, y


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("gaussian", {"copies": 1}),
        ("consistency", {}),
        ("smoothadv", {"steps": 1}),
        ("smoothmix", {"steps": 2}),
        ("macer", {"copies": 4}),
        ("cat-rs", {"copies": 2, "steps": 1}),
        ("utility", {"copies": 4, "weight": 0.1, "envelope": (0.9, 0.8), "teacher": "teacher"}),
    ],
)
def test_each_recipe_learns(recipe, options, tmp_path):
    x, y = pictures(320)
    unlike, truth = pictures(40, seed=9)
    if recipe in ("cat-rs", "utility"):
        folder = tmp_path / "teacher"
        folder.mkdir()
        (folder / "config.json").write_text('{"sigma": 0.25}')
        trainer.dump(tmp_path / "soft_teacher_320_64.pt", nn.functional.one_hot(y, 10).float() * 0.9 + 0.01)
        options = options | {"teacher": "teacher"}
    s = trainer.Settings("job", recipe, 0.25, epochs=6, kwargs=SMALL, batch=32, average=0.9, estimate=32, every=6, **options)
    run = trainer.Run(TASK, s, tmp_path)
    run.train(x, y, unlike, truth)
    assert (tmp_path / "job" / "finished").exists()
    radii = trainer.estimated_radii(run.network(weights_of="job"), unlike, truth, 0.25, 64)
    assert np.mean(radii >= 0.25) > 0.9  # chance is 0.1 at radius 0


@pytest.mark.parametrize("left", [{"teacher": "teacher"}, {"envelope": (0.9, 0.8)}])
def test_utility_asks_for_what_it_needs(left):
    with pytest.raises(ValueError, match="needs a teacher, the expert behind, and an envelope"):
        trainer.Settings("job", "utility", 0.25, **left)


def test_a_teacher_is_asked_at_its_own_noise_and_once(tmp_path):
    x, y = pictures(64)
    first = trainer.Settings("teacher", "gaussian", 0.5, epochs=1, kwargs=SMALL, batch=32, estimate=4, every=1)
    trainer.Run(TASK, first, tmp_path).train(x, y, x, y)
    settings = trainer.Settings("job", "utility", 0.25, teacher="teacher", envelope=(0.9,), kwargs=SMALL, draws=3)
    soft, sigma = trainer.Run(TASK, settings, tmp_path).soft_labels(x)
    assert sigma == 0.5
    assert soft.sum(1) == pytest.approx(torch.ones(64), abs=1e-5)
    more, _ = trainer.Run(TASK, dataclasses.replace(settings, draws=5), tmp_path).soft_labels(x)
    assert not torch.equal(soft, more)  # kept for each number of draws
    assert torch.equal(soft, trainer.Run(TASK, settings, tmp_path).soft_labels(x)[0])


def test_goes_on_exactly_where_it_stopped(tmp_path):
    x, y = pictures(128)
    settings = trainer.Settings("job", "smoothmix", 0.5, epochs=2, kwargs=SMALL, batch=32, steps=1, estimate=8, every=1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer.Run(TASK, settings, whole).train(x, y, x, y)
    for _ in range(3):  # three steps at a time: the second stop lies inside an epoch, after one was finished
        trainer.Run(TASK, settings, parts).train(x, y, x, y, stop_after=3)
    one, other = (torch.load(f / "job" / "state.pt", weights_only=True) for f in (whole, parts))
    assert one["done"] == other["done"] == 8
    for part in ("module", "average"):
        assert all(torch.equal(one[part][k], other[part][k]) for k in one[part])
    first, second = (load_file(f / "job" / "model.safetensors") for f in (whole, parts))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_killed_queue_goes_on(tmp_path, monkeypatch):
    x, y = pictures(600)
    data, out = tmp_path / "data", tmp_path / "runs"
    data.mkdir()
    out.mkdir()
    images = np.zeros((60_000, 784), np.uint8)
    images[:600] = (x.reshape(600, -1).numpy() * 255).astype(np.uint8)
    labels = np.resize(y.numpy().astype(np.uint8), 60_000)
    (data / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes(), 1))
    (data / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes(), 1))
    job = {"name": "job", "recipe": "gaussian", "sigma": 0.25, "epochs": 500, "kwargs": SMALL, "copies": 1, "batch": 64}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    words = ["queue", "--data", str(data), "--out", str(out), "--save_seconds", "0", "--jobs", str(tmp_path / "jobs.json")]

    def steps_done():
        state = out / "job" / "state.pt"
        return torch.load(state, weights_only=True)["done"] if state.exists() else 0

    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(SCRIPT), *words], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not steps_done() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = steps_done()
    assert reached

    class Stopped(Exception): ...

    def two_steps(run, *data):
        train(run, *data, stop_after=2)
        raise Stopped

    train = trainer.Run.train
    monkeypatch.setattr(trainer.Run, "train", two_steps)  # the lock of the killed process is gone
    with pytest.raises(Stopped):
        script.main(words)
    assert f"goes on at step {reached} of" in (out / "job" / "log.txt").read_text()
    assert steps_done() == reached + 2


def test_attack_stays_in_the_ball_and_raises_the_loss():
    torch.manual_seed(0)
    net = trainer.Network(SmallCNN(**SMALL), MEAN, STD)
    x, y = pictures(8)
    net.eval()
    loss = lambda z: nn.functional.cross_entropy(net(z), y, reduction="sum")  # noqa: E731
    within = in_ball(x, 0.5)
    points = net.attack(x, loss, 3, 0.4, within)
    assert len(points) == 4
    net.eval()
    for point in points[1:]:
        assert (point - x).flatten(1).norm(dim=1).max() <= 0.5 + 1e-5
        assert point.min() >= 0
        assert point.max() <= 1
    assert loss(points[-1]) > loss(x)


def test_estimated_radii_of_a_linear_classifier():
    """For two linear logits the smoothed classifier's radius is the distance to the plane, whatever sigma."""
    torch.manual_seed(1234)  # not the noise's seed: the two would be one stream of bits
    linear = nn.Linear(784, 2, bias=False)
    net = trainer.Network(nn.Sequential(nn.Flatten(), linear), MEAN, STD)
    weight = (linear.weight[0] - linear.weight[1]).detach()
    direction = (weight / weight.norm()).view(1, 1, 28, 28)
    base = torch.full((1, 1, 28, 28), MEAN[0])
    distances = torch.tensor([-0.3, 0.2, 0.4, 2.5])
    x = base + distances[:, None, None, None] * direction
    radii = trainer.estimated_radii(net, x, torch.zeros(4, dtype=torch.long), 0.5, 4000)
    assert radii[0] == -1
    assert radii[1:] == pytest.approx([0.2, 0.4, 1.905], abs=0.05)  # the last: what 100,000 votes can certify at most
    # all votes right, but not by so much: the margins' mean over their spread stands in
    far = base + 1.7 * direction
    assert trainer.estimated_radii(net, far, torch.zeros(1, dtype=torch.long), 0.5, 64)[0] == pytest.approx(1.7, abs=0.25)


def test_exported_folders_are_wrapped(tmp_path):
    x, y = pictures(64)
    for name, sigma in (("a", 0.25), ("b", 0.5)):
        s = trainer.Settings(name, "gaussian", sigma, epochs=1, kwargs=SMALL, batch=32, estimate=4, every=1)
        trainer.Run(TASK, s, tmp_path / "runs").train(x, y, x, y)
    script.main(["export", "--out", str(tmp_path / "runs"), "--to", str(tmp_path / "experts"), "--half", "a", "b"])
    half = load_file(tmp_path / "experts" / "a" / "model.safetensors")
    assert half["fc.weight"].dtype == torch.float16
    pool = ExpertPool([load_expert(tmp_path / "experts" / name) for name in ("a", "b")])
    assert pool.names == ("a", "b")
    assert [expert.sigma for expert in pool] == [0.25, 0.5]
    run = trainer.Run(TASK, trainer.Settings("a", "gaussian", 0.25), tmp_path / "runs")
    module = run.network(weights_of="a").module.eval()
    with torch.inference_mode():
        normal = (x - MEAN[0]) / STD[0]
        assert pool[0].module(normal) == pytest.approx(module(normal), abs=0.05)  # float16 keeps three digits


@pytest.mark.parametrize("file", ["fashion_jobs.json", "fashion_study_jobs.json"])
def test_the_jobs_are_read_and_wait_for_one_another(file):
    jobs = trainer.read_jobs(SCRIPT.parent / file)
    names = [job.name for job in jobs]
    assert all(job.recipe in sys.modules["noise_recipes"].RECIPES for job in jobs)
    assert all(job.start is None or job.start in names[: names.index(job.name)] for job in jobs)


def test_slices_are_cut(tmp_path):
    for split, count in (("train", 60_000), ("t10k", 1_000)):
        images = np.resize(np.arange(784, dtype=np.uint8), (count, 784))
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes(), 1))
        labels = np.resize(np.arange(10, dtype=np.uint8), count)
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes(), 1))
    script.main(["slices", "--data", str(tmp_path), "--to", str(tmp_path / "images")])
    cut = np.load(tmp_path / "images" / "validation.npz")
    assert cut["images"].shape == (1000, 1, 28, 28)
    assert (cut["index"][0], cut["labels"][3]) == (58_000, 3)
    assert (cut["images"][7].ravel() == images[0]).all()
