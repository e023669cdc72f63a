"""Study 5: routing between experts that are one diffusion denoiser and one classifier, as Carlini et al. 2023 make them.

    python examples/study_denoised.py denoiser --work WORK --data DATA
    python examples/study_denoised.py classifier --work WORK --data DATA
    rsrouter wrap --denoiser WORK/denoiser --classifier WORK/classifier --sigma 0.25,0.5,1 --out WORK/pool.json
    python examples/study_denoised.py train --work WORK --data DATA
    python examples/study_denoised.py certify --work WORK --data DATA --first 500 --images 500 [--part 0/2]
    python examples/study_denoised.py table --work WORK --out model_cards/denoised-study

DATA is CIFAR-10 as `train_cifar_experts.py` reads it, and its rows are split as there. The denoiser is a `UNet2DModel` of
diffusers of 13,643 weights, so small that a CPU certifies with it; it is written as a pipeline of diffusers with its scheduler,
which is all that `wrap` reads of it. The classifier, a residual network of 290,000 weights, sees denoised images of all three
noise levels. All three experts are these same two files. Every verb continues where it was stopped.

Heads are trained on 12,000 of the experts' own images, the flat router on 1,500 that nothing has seen, every choice is made on
300 images from training row 48,000 on, and test images are only certified, from row 500 on: an earlier router was
certified on those before.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from noise_training import augment, save_expert
from routing_study import BEST, REFERENCE, certify_all, command_line, methods, study_tables, train_all, write_study
from study_cifar10 import part_of
from torch import Tensor, nn
from torch.nn import functional as F
from train_cifar_experts import MEAN, STD, read_cifar

from rsrouter import ExpertPool
from rsrouter.data import from_arrays
from rsrouter.experts import Diffusion
from rsrouter.experts.small_resnet import SmallResNet
from rsrouter.sampling import Execution
from rsrouter.training.deferral import DeferralRecipe
from rsrouter.training.heads import HeadRecipe

SEED = 20261128
SIGMAS = (0.25, 0.5, 1.0)
N, SHARDS, BATCH = 10_000, 20, 128
DIFFUSION = Diffusion()
#: Noise levels that the denoiser is trained for.
RANGE = (0.2, 1.2)
UNET = {
    "sample_size": 32,
    "block_out_channels": (8, 8, 8),
    "layers_per_block": 0,
    "norm_num_groups": 1,
    "add_attention": False,
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
}
NETWORK = {"in_channels": 3, "width": 32, "blocks": [[64, 2], [128, 2]]}
RECIPE = DeferralRecipe(
    copies=4,
    tune_copies=200,
    levels=(1.15,),
    heads=(
        HeadRecipe(steps=2000, cross_entropy=0.1),
        HeadRecipe(steps=2000, cross_entropy=0.03),
        HeadRecipe(steps=2000, cross_entropy=0.005),
        HeadRecipe("consistency", steps=2000, consistency=5.0),
    ),
    trunks=1,
)
#: What every radius must hold on validation images, relative to the experts' envelope.
FLOOR = 0.85
METHODS = ("flat", "cascade", "deferral")


def denoise(unet: nn.Module, z: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    """The experts' one step: noisy pixels `(B, C, H, W)` to denoised ones, each image at its own time step."""
    abar = abar[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * (2 * z - 1)
    x_0 = (x_t - (1 - abar).sqrt() * unet(x_t, t).sample) / abar.sqrt()
    return (x_0.clamp(-1, 1) + 1) / 2


def fit(
    model: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    state_file: Path,
    *,
    steps: int,
    lr: float,
    seed: int,
) -> nn.Module:
    """AdamW with a one-cycle schedule; the averaged weights. Saves its state every 100 steps and continues from it.

    Args:
        model: trained in place.
        loss_of: one step's loss, its randomness from the generator.
        state_file: where the state is kept.
        steps, lr, seed: as usual.
    """
    generator = torch.Generator().manual_seed(seed)
    # the mean of all steps at first, later of about the last 200
    average = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda mean, new, steps: mean + (new - mean) * max(0.005, 9 / (10 + float(steps))), use_buffers=True
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    parts: dict[str, Any] = {"model": model, "average": average, "optimiser": optimiser, "schedule": schedule}
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        first = state["step"]
    total, start = 0.0, time.process_time()
    for step in range(first + 1, steps + 1):
        model.train()
        loss = loss_of(generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        average.update_parameters(model)
        total += float(loss.detach())
        if step % 100 == 0 or step == steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            scratch = state_file.with_suffix(".new")
            torch.save({**state, "generator": generator.get_state(), "step": step}, scratch)
            scratch.replace(state_file)
            print(f"{state_file.stem} {step}/{steps} loss {total / 100:.4f} {time.process_time() - start:.0f} s", flush=True)
            total = 0.0
    return average.module.eval()


def batches(data: str) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    """Batches of the experts' training images, flipped and shifted, and their labels."""
    images, labels = (torch.from_numpy(part) for part in read_cifar(data, "experts"))

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        return augment(images[rows], generator, 4).float() / 255, labels[rows]

    return draw


def denoiser(args: argparse.Namespace) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(SEED)
    unet = UNet2DModel(**UNET).to(memory_format=torch.channels_last)
    draw, abar = batches(args.data), DIFFUSION.alphas_cumprod().float()
    low, high = (DIFFUSION.step_for(sigma)[0] for sigma in RANGE)

    def loss_of(generator: torch.Generator) -> Tensor:
        x, t = 2 * draw(generator)[0] - 1, torch.randint(low, high + 1, (BATCH,), generator=generator)
        scale, noise = abar[t].view(-1, 1, 1, 1), torch.randn(x.shape, generator=generator)
        noisy = (scale.sqrt() * x + (1 - scale).sqrt() * noise).to(memory_format=torch.channels_last)
        # the error of x_0 is the error of the noise times sqrt((1 - abar) / abar): weigh it half way between
        weight = ((1 - scale) / scale).sqrt().flatten()
        return ((unet(noisy, t).sample - noise).square().mean((1, 2, 3)) * weight).mean()

    best = fit(unet, loss_of, args.work / "denoiser.pt", steps=args.steps or 1500, lr=6e-3, seed=SEED)
    unet.load_state_dict(best.state_dict())
    DDPMPipeline(unet.to(memory_format=torch.contiguous_format), DDPMScheduler()).save_pretrained(args.work / "denoiser")


def classifier(args: argparse.Namespace) -> None:
    from diffusers import UNet2DModel

    torch.manual_seed(SEED)
    unet = UNet2DModel.from_pretrained(args.work / "denoiser" / "unet").eval().to(memory_format=torch.channels_last)
    model = SmallResNet(10, **NETWORK).to(memory_format=torch.channels_last)
    draw, abar = batches(args.data), DIFFUSION.alphas_cumprod().float()
    centre, scale = (torch.tensor(v).view(1, -1, 1, 1) for v in (MEAN, STD))
    sigmas, times = torch.tensor(SIGMAS), torch.tensor([DIFFUSION.step_for(sigma)[0] for sigma in SIGMAS])

    def seen(x: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
        z = x + sigmas[level].view(-1, 1, 1, 1) * torch.randn(x.shape, generator=generator)
        with torch.no_grad():
            return (denoise(unet, z.to(memory_format=torch.channels_last), times[level], abar) - centre) / scale

    def loss_of(generator: torch.Generator) -> Tensor:
        x, y = draw(generator)
        return F.cross_entropy(model(seen(x, torch.randint(3, (BATCH,), generator=generator), generator)), y)

    best = fit(model, loss_of, args.work / "classifier.pt", steps=args.steps or 2000, lr=4e-3, seed=SEED + 1)
    config = {
        "architecture": "small_resnet",
        "kwargs": NETWORK,
        "num_classes": 10,
        "input_shape": [3, 32, 32],
        "mean": list(MEAN),
        "std": list(STD),
    }
    (args.work / "classifier").mkdir(exist_ok=True)
    save_expert(args.work / "classifier", {name: value.contiguous() for name, value in best.state_dict().items()}, config)
    x, y = part_of(args.data, "validation")
    generator = torch.Generator().manual_seed(SEED)
    found = {}
    with torch.inference_mode():
        for level, sigma in enumerate(SIGMAS):
            answers = [best(seen(part, torch.full((len(part),), level), generator)).argmax(1) for part in x.split(100)]
            found[sigma] = round(float((torch.cat(answers) == y).float().mean()), 3)
    print("accuracy on one noisy copy of each validation image", json.dumps(found), flush=True)


def train(args: argparse.Namespace) -> None:
    parts = {name: part_of(args.data, name) for name in ("train", "experts", "validation")}
    counts = {"train": 1500, "experts": 12_000, "validation": 300}
    unseen, heads, validation = ((parts[name][0][:n], parts[name][1][:n]) for name, n in counts.items())
    pool = ExpertPool.load(args.work / "pool.json")
    execution = Execution(dtype=args.dtype)
    train_all(pool, args.work, unseen, heads, validation, RECIPE, execution, args.only or METHODS, floor=FLOOR, label_copies=50)


def certify(args: argparse.Namespace) -> None:
    images, labels = read_cifar(args.data, "test")
    first, of = (int(v) for v in args.part.split("/"))
    rows = slice(args.first, args.first + args.images)
    pool, execution = ExpertPool.load(args.work / "pool.json"), Execution(dtype=args.dtype)
    certify_all(
        methods(pool, args.work, execution, args.methods, own=False, card=args.card),
        from_arrays(images[rows].copy(), labels[rows], name=f"CIFAR-10 test set from row {args.first}"),
        args.work / "tables",
        seed=SEED,
        count=args.images,
        part=(first, of),
        n=min(args.n, N),
        shards=SHARDS,
        kept=args.card and args.card / "tables",
    )


def table(args: argparse.Namespace) -> None:
    pool = ExpertPool.load(args.work / "pool.json")
    tables = study_tables(list(methods(pool, args.work, Execution(), own=False, card=args.card)), args, SHARDS)
    references = (REFERENCE, "Multiscale-like cascade (.55)", "cascade, tuned")
    title = "CIFAR-10, one denoiser and one classifier"
    write_study(tables, pool.names, references, BEST, args.out, title, args.report)


def arguments(name: str, verb: argparse.ArgumentParser) -> None:
    if name != "table":
        verb.add_argument("--data", required=True)
    if name in ("denoiser", "classifier"):
        verb.add_argument("--steps", type=int, default=0)
    if name == "certify":
        verb.add_argument("--images", type=int, default=500)
        verb.add_argument("--first", type=int, default=500, help="first test row; other rows need a WORK of their own")


if __name__ == "__main__":
    verbs = {"denoiser": denoiser, "classifier": classifier, "train": train, "certify": certify, "table": table}
    command_line(__doc__, verbs, arguments)
