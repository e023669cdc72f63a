"""ImageNet-shaped work end to end: a timm ResNet-50 (random weights) on a folder of photographs' sizes, at 224 x 224."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = """
import json, resource, sys, time
# one thread's seconds of work, which other processes of this machine do not stretch as they do a clock's
time.perf_counter = time.process_time
import torch
import timm
from rsrouter import Expert, FixedPlan, Smooth, Terms, load_data
from rsrouter.jobs import certify_table, estimate_table

torch.set_num_threads(1)
torch.manual_seed(0)
folder, out, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
data = load_data(folder, size=224)
module = timm.create_model("resnet50", pretrained=False)
expert = Expert(module, sigma=0.5, num_classes=1000, input_shape=(3, 224, 224), name="resnet50")
job = dict(terms=Terms(FixedPlan(20, 80), alpha=0.01), indices=range(count))
estimate = estimate_table(Smooth(expert), data, sample=2, seconds=20.0, **job)
start = time.process_time()
table = certify_table(Smooth(expert), data, out, block=2, **job)
print(json.dumps({
    "rows": len(table),
    "estimated": estimate.costs[0].seconds,
    "measured": time.process_time() - start,
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "votes_per_second": estimate.votes_per_second,
    "preprocessing": table.metadata["data"]["preprocessing"],
}))
"""


@pytest.mark.slow
def test_resnet50_at_224(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(6):
        folder = tmp_path / "images" / f"n{i % 3:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (25, 33, 3), dtype=np.uint8))
        noise.resize((500, 375) if i % 2 else (375, 500)).save(folder / f"{i}.JPEG")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "images"), str(tmp_path / "t.tsv"), "6"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(told)
    assert told["rows"] == 6
    assert told["preprocessing"]["resize"] == 256
    # weights, one batch's activations, two images; nothing that grows with the data set
    assert told["peak_mb"] < 2000
    assert abs(told["estimated"] / told["measured"] - 1) < 0.2
