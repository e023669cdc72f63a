"""Training experts by the methods that lead at some radius, resumable at any moment: what the trainers of both data sets share.

Recipes (sources beside their functions in `noise_recipes.py`): `gaussian`, `consistency`, `smoothadv`, `smoothmix`, `macer`,
`cat-rs`, `utility`. A run may start from the weights of another (`start`) and may learn from another's smoothed predictions
(`teacher`). Killed at any time, a run goes on from its last state (saved each minute) when it is started again. Forward passes
are bfloat16 where the processor has it; what is measured is always float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import io
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from noise_recipes import RECIPES, Batch, Network, Settings
from safetensors.torch import load_file, save
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional as F

from rsrouter.experts.registry import build_architecture
from rsrouter.files import write_atomically
from rsrouter.training.whole import update_average

GRID = np.arange(0, 2.01, 0.25)
#: the radii that count for a noise level unless a job says otherwise: those that no lower noise level reaches as well
RADII = {0.25: (0, 0.25, 0.5, 0.75), 0.5: (0.75, 1, 1.25, 1.5, 1.75), 1.0: (1.5, 1.75, 2)}


@dataclass(frozen=True)
class Task:
    """What is classified: where its images come from, and how an expert's config describes them.

    Attributes:
        rows: the training images, in words.
        input_shape: `(C, H, W)`.
        mean, std: normalisation per channel, after the noise.
        read: from `--data` to training images `(N, C, H, W)` float32 in [0,1], their labels `(N,)`, and images and labels on
            which the best state is chosen.
        config: further fields of an expert's `config.json`.
    """

    rows: str
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: Callable[[str], tuple[Tensor, Tensor, Tensor, Tensor]]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


def augment(images: Tensor, generator: torch.Generator, shift: int, flip: bool) -> Tensor:
    """Random horizontal flips, and one shift of the whole batch by up to `shift` pixels."""
    if flip:
        turned = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(turned[:, None, None, None], images.flip(3), images)
    dy, dx = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
    return F.pad(images, (shift,) * 4)[:, :, dy : dy + images.shape[2], dx : dx + images.shape[3]]


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself (else autocast is slower than float32)."""
    info = Path("/proc/cpuinfo")
    return info.exists() and any(flag in info.read_text().split() for flag in ("amx_bf16", "avx512_bf16"))


@torch.inference_mode()
def estimated_radii(net: Network, x: Tensor, y: Tensor, sigma: float, votes: int, seed: int = 1) -> np.ndarray:
    """Radius of each image by `votes` votes without confidence, -1 where wrong: to choose by, never to report as certified.

    Where every vote is right, the margins' mean over their standard deviation stands in for the quantile of the unseen
    share (some points too high past 3 sigma: margins have a longer tail than a normal law); no radius exceeds what
    100,000 votes certify (3.81 sigma).
    """
    net.eval()
    generator = torch.Generator().manual_seed(seed)
    right, total, square = torch.zeros(len(x)), torch.zeros(len(x)), torch.zeros(len(x))
    for _ in range(votes):
        logits = net(x + torch.randn(x.shape, generator=generator) * sigma)
        own = logits.gather(1, y[:, None])[:, 0]
        margin = own - logits.scatter(1, y[:, None], -torch.inf).amax(1)
        right, total, square = right + (margin > 0), total + margin, square + margin.square()
    mean = (total / votes).numpy()
    spread = np.sqrt(np.maximum(square.numpy() / votes - mean**2, 1e-12))
    share = (right / votes).numpy()
    z = norm.ppf(np.clip(share, 1e-9, 1 - 0.7 / votes))
    z = np.where(share == 1, np.maximum(z, mean / spread), z)
    net.train()
    return np.where(share > 0.5, sigma * np.minimum(z, 3.81), -1.0)


@torch.inference_mode()
def smoothed_probabilities(net: Network, x: Tensor, sigma: float, draws: int = 64) -> Tensor:
    """Mean softmax `(N, C)` over `draws` noisy copies: a teacher's soft labels."""
    net.eval()
    generator = torch.Generator().manual_seed(2)
    out = []
    for chunk in x.split(1000):
        out.append(
            sum(F.softmax(net(chunk + torch.randn(chunk.shape, generator=generator) * sigma), 1) for _ in range(draws)) / draws
        )
    return torch.cat(out)  # type: ignore[arg-type]


def dump(path: Path, value: object) -> None:
    """`torch.save`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomically(path, buffer.getvalue())


class Run:
    """One job in its folder: `state.pt` (goes on from here), `model.safetensors` and `config.json` (the best state so far,
    which `rsrouter wrap` reads), `log.txt`, and `finished` at the end.
    """

    def __init__(self, task: Task, settings: Settings, out: Path, save_seconds: float = 60.0) -> None:
        self.task, self.s, self.out, self.folder, self.save_seconds = task, settings, out, out / settings.name, save_seconds
        self.folder.mkdir(parents=True, exist_ok=True)

    def log(self, text: str) -> None:
        with (self.folder / "log.txt").open("a") as file:
            file.write(text + "\n")
        print(f"{self.s.name}: {text}", flush=True)

    def network(self, autocast: bool = False, weights_of: str | None = None) -> Network:
        """The job's architecture, with the weights of job (or expert folder) `weights_of`."""
        if weights_of is None:
            return Network(build_architecture(self.s.architecture, 10, self.s.kwargs), self.task.mean, self.task.std, autocast)
        folder = Path(weights_of) if "/" in weights_of else self.out / weights_of
        config = json.loads((folder / "config.json").read_text())
        module = build_architecture(config["architecture"], 10, config["kwargs"])
        module.load_state_dict(load_file(folder / "model.safetensors"))
        return Network(module, self.task.mean, self.task.std, autocast)

    def soft_labels(self, x: Tensor) -> tuple[Tensor | None, float]:
        """The teacher's smoothed probabilities `(N, C)` of the training images, kept beside the runs, and its sigma; None
        without a teacher.
        """
        if self.s.teacher is None:
            return None, 0.0
        folder = Path(self.s.teacher) if "/" in self.s.teacher else self.out / self.s.teacher
        sigma = json.loads((folder / "config.json").read_text())["sigma"]
        stored = self.out / f"soft_{folder.name}_{len(x)}_{self.s.draws}.pt"
        if not stored.exists():
            teacher = self.network(has_bfloat16(), self.s.teacher)
            dump(stored, smoothed_probabilities(teacher, x, sigma, self.s.draws))
        soft: Tensor = torch.load(stored, weights_only=True)
        return soft, sigma

    def keep(self, weights: dict[str, Tensor], note: dict[str, Any]) -> None:
        """Writes the expert: what `export` copies."""
        s = self.s
        training = {"data": self.task.rows, **dataclasses.asdict(s), **note}
        training["start"], training["teacher"] = (n and Path(n).name for n in (s.start, s.teacher))
        config = {"name": s.name, "architecture": s.architecture, "kwargs": s.kwargs, "sigma": s.sigma, "num_classes": 10}
        config |= {"input_shape": list(self.task.input_shape), "mean": list(self.task.mean), "std": list(self.task.std)}
        config |= self.task.config
        write_atomically(self.folder / "model.safetensors", save({k: v.contiguous() for k, v in weights.items()}))
        write_atomically(self.folder / "config.json", (json.dumps(config | {"training": training}, indent=2) + "\n").encode())

    def train(self, x_all: Tensor, y_all: Tensor, x_choice: Tensor, y_choice: Tensor, stop_after: int | None = None) -> None:
        """Trains to the end, or for `stop_after` more steps."""
        s = self.s
        torch.manual_seed(s.seed)
        net = self.network(has_bfloat16(), s.start)
        module = net.module
        average = {k: v.clone() for k, v in module.state_dict().items()}
        optimiser = torch.optim.SGD(module.parameters(), lr=s.lr, momentum=0.9, nesterov=True, weight_decay=s.decay)
        generator = torch.Generator().manual_seed(s.seed)
        steps = len(x_all) // s.batch
        done, best, seconds, losses = 0, -1.0, 0.0, 0.0
        state_file = self.folder / "state.pt"
        if state_file.exists():
            state = torch.load(state_file, weights_only=True)
            module.load_state_dict(state["module"])
            optimiser.load_state_dict(state["optimiser"])
            generator.set_state(state["generator"])
            average, done, best, seconds, losses = (state[k] for k in ("average", "done", "best", "seconds", "losses"))
        soft_all, soft_sigma = self.soft_labels(x_all)
        radii = s.radii or RADII.get(s.sigma, tuple(GRID[3.6 * s.sigma > GRID]))
        self.log(
            f"{'goes on at' if done else 'starts at'} step {done} of {s.epochs * steps}: {' '.join(sys.argv)}; {s}; "
            f"{platform.processor() or platform.machine()}, bfloat16 {net.autocast}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, {sum(p.numel() for p in module.parameters())} weights, radii {radii}"
        )

        def write_state() -> None:
            state = {"module": module.state_dict(), "optimiser": optimiser.state_dict(), "generator": generator.get_state()}
            dump(state_file, state | {"average": average, "done": done, "best": best, "seconds": seconds, "losses": losses})

        net.train()
        saved, clock, cpu = time.time(), time.time(), time.process_time()
        first, total = done, s.epochs * steps
        end = total if stop_after is None else min(total, done + stop_after)
        while done < end:
            epoch, at = divmod(done, steps)
            if at == 0 or done == first:
                order = torch.randperm(len(x_all), generator=torch.Generator().manual_seed(1000 * s.seed + epoch))
            rows = order[at * s.batch : (at + 1) * s.batch]
            progress = done / total
            rate = min(progress / 0.15, 0.5 * (1 + math.cos(math.pi * max(progress - 0.15, 0) / 0.85)))
            for group in optimiser.param_groups:
                group["lr"] = s.lr * max(rate, 1e-3)
            x = augment(x_all[rows], generator, s.shift, s.flip)
            ramp = min(1.0, (done + 1) / (s.ramp * steps)) if s.ramp else 1.0
            batch = Batch(x, y_all[rows], None if soft_all is None else soft_all[rows], ramp, generator, soft_sigma)
            loss = RECIPES[s.recipe](net, batch, s)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 5.0)
            optimiser.step()
            done, losses = done + 1, losses + float(loss.detach())
            update_average(average, module, s.average, done)
            if done % steps == 0:
                epoch = done // steps
                seconds, cpu = seconds + time.process_time() - cpu, time.process_time()
                speed = (done - first) * s.batch / (time.time() - clock)
                text = f"epoch {epoch}/{s.epochs} loss {losses / steps:.4f}, {speed:.0f} images/s, {seconds:.0f} CPU s"
                losses = 0.0
                if epoch % s.every == 0 or epoch == s.epochs:
                    measured = self.network()
                    measured.module.load_state_dict(average)
                    radius = estimated_radii(measured, x_choice, y_choice, s.sigma, s.estimate)
                    value = float(np.mean([np.mean(radius >= r) for r in radii]))
                    text += f"; estimate {value:.4f}: " + " ".join(f"{100 * np.mean(radius >= r):.1f}" for r in GRID)
                    if value > best:
                        best = value
                        self.keep(average, {"chosen_at_epoch": epoch, "cpu_seconds": round(seconds)})
                self.log(text)
            if time.time() - saved > self.save_seconds or done == end:
                seconds, cpu = seconds + time.process_time() - cpu, time.process_time()
                write_state()
                saved = time.time()
        if done == total:
            (self.folder / "finished").touch()


def read_jobs(path: Path) -> list[Settings]:
    """The queue, in its order."""
    return [Settings(**job) for job in json.loads(path.read_text())]


def work(task: Task, args: argparse.Namespace, jobs: Callable[[], list[Settings]]) -> None:
    """Runs the first job that is neither finished, nor held by another process, nor waiting for one; until none is left."""
    torch.set_num_threads(args.threads)
    data = task.read(args.data)
    while True:
        left = [s for s in jobs() if not (args.out / s.name / "finished").exists()]
        if not left:
            return
        for s in left:
            needs = [n for n in (s.start, s.teacher) if n is not None and "/" not in n]
            if not all((args.out / n / "finished").exists() for n in needs):
                continue
            run = Run(task, s, args.out, args.save_seconds)
            with (run.folder / "lock").open("w") as lock:  # the system drops the lock of a process that is killed
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue
                run.train(*data)
            break
        else:
            time.sleep(20)


def export(args: argparse.Namespace) -> None:
    """Copies the experts' weights and configs; `--half` stores float16."""
    for given in args.names:
        name, _, folder = given.partition("=")
        source, target = args.out / name, args.to / (folder or name)
        target.mkdir(parents=True, exist_ok=True)
        weights = load_file(source / "model.safetensors")
        if args.half:
            weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
        write_atomically(target / "model.safetensors", save(weights))
        config = json.loads((source / "config.json").read_text())
        if folder:
            del config["name"]  # it is then called by its sigma
        write_atomically(target / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        print(name, f"{(target / 'model.safetensors').stat().st_size / 1e6:.2f} MB")


def command_line(
    task: Task,
    doc: str | None,
    argv: list[str] | None = None,
    more: Callable[[Any], None] = lambda verbs: None,
) -> None:
    """The verbs `train`, `queue` and `export`, and what `more` adds to them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("train", help="one job, its settings as options")
    two = verbs.add_parser("queue", help="the jobs of a file, in order")
    for verb in (one, two):
        verb.add_argument("--data", required=True)
        verb.add_argument("--threads", type=int, default=1)
        verb.add_argument("--save_seconds", type=float, default=60.0)
    for field in dataclasses.fields(Settings):
        kind = {"int": int, "float": float, "bool": json.loads, "str": str, "str | None": str}.get(str(field.type), json.loads)
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        one.add_argument(f"--{field.name}", type=kind, required=needed, default=argparse.SUPPRESS)
    one.set_defaults(run=lambda a: work(task, a, lambda: [Settings(**{k: v for k, v in vars(a).items() if k in fields})]))
    fields = {field.name for field in dataclasses.fields(Settings)}
    two.add_argument("--jobs", type=Path, required=True)
    two.set_defaults(run=lambda a: work(task, a, lambda: read_jobs(a.jobs)))
    three = verbs.add_parser("export", help="copy experts out of their runs")
    three.add_argument("names", nargs="+")
    three.add_argument("--to", type=Path, required=True)
    three.add_argument("--half", action="store_true")
    three.set_defaults(run=export)
    for verb in (one, two, three):
        verb.add_argument("--out", type=Path, required=True)
    more(verbs)
    args = parser.parse_args(argv)
    args.run(args)
