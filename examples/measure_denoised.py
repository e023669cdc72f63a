"""Peak memory and time of wrapping and loading experts of one large denoiser and one classifier, at several sigmas.

    python examples/measure_denoised.py [--out FOLDER] [--sigma 0.25,0.5,1]

Writes a UNet of diffusers of about 300 MB with random weights and a small classifier, then runs `rsrouter wrap` and
`ExpertPool.load` in processes of their own. The two networks are held once whatever the number of sigmas.

The figures of one run stand in the guide on denoisers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from rsrouter.experts import build_architecture

_RUN = """
import json, resource, sys, time
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
import torch, diffusers, rsrouter, rsrouter.cli
from rsrouter import ExpertPool
diffusers.UNet2DModel
before, start = peak(), time.perf_counter()
{work}
print(json.dumps({{"seconds": time.perf_counter() - start, "libraries": before, "peak": peak()}}), file=sys.stderr)
"""
_WRAP = """
sys.argv = {words!r}
try:
    rsrouter.cli.main()
except SystemExit as exit:
    assert not exit.code, exit.code
"""
_LOAD = """
pool = ExpertPool.load({pool!r})
assert len({{id(e.module.denoiser) for e in pool}}) == 1
"""


def write(folder: Path) -> tuple[Path, Path, float]:
    """A UNet, a classifier, and the size of the first in MB."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 512, 512),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "unet")
    net = folder / "classifier"
    net.mkdir()
    save_file(build_architecture("cifar_resnet20", 10).state_dict(), net / "model.safetensors")
    told = {"architecture": "cifar_resnet20", "num_classes": 10, "normalisation": "cifar10", "input_shape": [3, 32, 32]}
    (net / "config.json").write_text(json.dumps(told))
    return folder / "unet", net, sum(p.numel() * p.element_size() for p in unet.parameters()) / 1e6


def measured(work: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", _RUN.format(work=work)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stderr.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sigma", default="0.25,0.5,1")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or Path(scratch)
        unet, net, size = write(folder)
        print(f"UNet of {size:.0f} MB", flush=True)
        for sigmas in dict.fromkeys([args.sigma.split(",")[0], args.sigma]):
            pool = folder / f"{sigmas}.json"
            words = ["rsrouter", "wrap", "--denoiser", str(unet), "--classifier", str(net), "--sigma", sigmas, "--out", str(pool)]
            for what, work in (("wrap", _WRAP.format(words=words)), ("load", _LOAD.format(pool=str(pool)))):
                found = measured(work)
                print(
                    f"{what}, sigma {sigmas}: {found['seconds']:.1f} s, peak {found['peak']:.0f} MB"
                    f" ({found['peak'] - found['libraries']:.0f} MB above the libraries)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
