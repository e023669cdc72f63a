"""The checks of `rsrouter doctor`: device, versions, caches, the Hub, and what would be slow on this machine."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rsrouter._version import __version__
from rsrouter.clock import seconds
from rsrouter.core.errors import RSRouterError
from rsrouter.experts import build_architecture
from rsrouter.sampling.execution import Execution, default_batch, prepare, resolve_device
from rsrouter.smooth import Smooth
from rsrouter.speed import measure_speed

#: Levels of advice. `BAD` is broken, `SLOW` works, `NOTE` is worth knowing, `GOOD` says that there is nothing to do.
BAD, SLOW, NOTE, GOOD = "broken", "slow", "note", "good"
_NEEDED = ("torch", "torchvision", "timm", "huggingface-hub", "safetensors", "numpy", "scipy", "pyarrow", "matplotlib")
#: extra of the package: what it is for
_OPTIONAL = {"ray": "ray", "gradio": "space", "fastapi": "serve", "datasets": "data", "diffusers": "diffusers"}
#: what the field certifies: name, architecture, classes, shape, rows of one timed pass
_FIELD = (("CIFAR ResNet-110", "cifar_resnet110", 10, (3, 32, 32), 4), ("ImageNet ResNet-50", "resnet50", 1000, (3, 224, 224), 1))
#: votes of published certificates, and images of their usual tables (every 20th of CIFAR-10's test set)
_VOTES, _IMAGES = 100_000, 500


@dataclass(frozen=True)
class Advice:
    """One finding.

    Attributes:
        level: one of `BAD`, `SLOW`, `NOTE`, `GOOD`.
        what: what was found.
        do: what to do about it; empty where there is nothing to do.
    """

    level: str
    what: str
    do: str = ""


@dataclass
class Report:
    """Sections of `key: value` lines (text), and advice."""

    sections: dict[str, dict[str, str]] = field(default_factory=dict)
    advice: list[Advice] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing is broken."""
        return all(a.level != BAD for a in self.advice)

    def add(self, level: str, what: str, do: str = "") -> None:
        """Adds one finding."""
        self.advice.append(Advice(level, what, do))


def examine(device: str = "cpu", *, measure: bool = True, network: bool = True) -> Report:
    """Looks at this machine; some seconds with `measure`, at most three with `network`.

    Args:
        device: where networks would run.
        measure: time votes, and bf16 against float32.
        network: ask the Hub whether it is there.

    Raises:
        InputError: a device that cannot be used.
    """
    where = resolve_device(device)
    report = Report()
    _versions(report)
    _machine(report, where)
    _caches(report)
    _hub(report, network)
    if measure:
        _speed(report, where)
    _experts(report)
    if not report.advice:
        report.add(GOOD, "nothing to do")
    order = (BAD, SLOW, NOTE, GOOD)
    report.advice.sort(key=lambda a: order.index(a.level))
    return report


def _versions(report: Report) -> None:
    lines = {"rsrouter": __version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    for name in _NEEDED:
        try:
            lines[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            lines[name] = "missing"
            report.add(BAD, f"{name} is not installed", f"pip install {name}")
    for name, extra in _OPTIONAL.items():
        there = importlib.util.find_spec(name) is not None
        lines[name] = metadata.version(name) if there else f"not installed (optional: pip install 'rsrouter[{extra}]')"
    report.sections["versions"] = lines


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _memory() -> tuple[float, float] | None:
    """Total and available bytes (Linux); None elsewhere."""
    try:
        pairs = (line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        found = {key: 1024.0 * float(value.split()[0]) for key, value in pairs if key in ("MemTotal", "MemAvailable")}
        return found["MemTotal"], found["MemAvailable"]
    except (OSError, KeyError, ValueError):
        return None


def _machine(report: Report, where: torch.device) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    lines = {"device": str(where), "cores": str(cores), "threads": f"{threads} (torch)"}
    if value := os.environ.get("OMP_NUM_THREADS"):
        lines["OMP_NUM_THREADS"] = value
    if threads < cores and where.type == "cpu":
        report.add(SLOW, f"torch uses {threads} of {cores} cores", "raise OMP_NUM_THREADS, or run one process per shard")
    if threads > cores:
        report.add(SLOW, f"torch uses {threads} threads on {cores} cores", f"OMP_NUM_THREADS={cores}")
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        lines["load"] = f"{load:.1f}"
        if load > cores + 0.5:
            report.add(SLOW, f"the machine is busy: load {load:.1f} on {cores} cores", "everything below is slower for it")
    if (memory := _memory()) is not None:
        total, free = memory
        lines["memory"] = f"{_gigabytes(free)} of {_gigabytes(total)} free"
        if free < 1e9:
            report.add(SLOW, f"only {_gigabytes(free)} of memory are free", "smaller batches: Execution(batch=...)")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            lines[f"cuda:{i}"] = (
                f"{properties.name}, {_gigabytes(properties.total_memory)}, capability {properties.major}.{properties.minor}"
            )
        if where.type == "cpu":
            report.add(
                NOTE, "there is a GPU, and this looked at the CPU", "--device cuda; check it with rsrouter bench --device cuda"
            )
    else:
        lines["cuda"] = "no" if torch.version.cuda else "no (this torch is built without CUDA)"
        if not torch.version.cuda and shutil.which("nvidia-smi"):
            report.add(
                SLOW, "there is an NVIDIA driver, but this torch cannot use it", "install a CUDA build: pytorch.org/get-started"
            )
    report.sections["machine"] = lines


def _size(folder: Path) -> int:
    """Bytes on disk under a folder; links (snapshots of the Hub's cache) count once."""
    total = 0
    for base, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(base, name)).st_size
            except OSError:
                continue  # removed meanwhile
    return total


def _caches(report: Report) -> None:
    from huggingface_hub import constants

    lines = {}
    torch_home = Path(os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch")
    for name, folder in (("Hub", Path(constants.HF_HUB_CACHE)), ("torch", torch_home)):
        nearest = folder
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        free = shutil.disk_usage(nearest).free
        size = _gigabytes(_size(folder)) if folder.exists() else "empty"
        lines[name] = f"{folder}: {size}, {_gigabytes(free)} free"
        if not os.access(nearest, os.W_OK):
            report.add(BAD, f"the {name} cache cannot be written: {folder}", "set HF_HOME or TORCH_HOME to a folder of yours")
        if free < 2e9:
            report.add(NOTE, f"{_gigabytes(free)} left where the {name} cache is", "free some space: hf cache prune, hf cache rm")
    report.sections["caches"] = lines


def _hub(report: Report, network: bool) -> None:
    from huggingface_hub import constants, get_token

    offline = constants.is_offline_mode() if hasattr(constants, "is_offline_mode") else bool(constants.HF_HUB_OFFLINE)
    lines = {
        "endpoint": constants.ENDPOINT,
        "offline": "yes (HF_HUB_OFFLINE)" if offline else "no",
        "token": "yes" if get_token() else "no (only needed to publish, and for gated or private repositories)",
    }
    if offline:
        report.add(NOTE, "HF_HUB_OFFLINE is set: only cached commits load", "unset it to fetch or publish")
    elif network:
        lines["reachable"] = answer = _reach(constants.ENDPOINT)
        if not answer.startswith("yes"):
            report.add(
                NOTE,
                "the Hub was not reached",
                "pools on this machine and cached commits work without; else check network, proxy, HF_ENDPOINT",
            )
    report.sections["Hub"] = lines


def _reach(endpoint: str) -> str:
    import urllib.error
    import urllib.request

    start = time.perf_counter()
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=3):
            pass
    except urllib.error.HTTPError:
        pass  # an answer is an answer
    except (OSError, ValueError) as error:
        return f"no: {str(error)[:100]}"
    return f"yes, {1000 * (time.perf_counter() - start):.0f} ms"


def _timed(works: Mapping[str, Callable[[], object]], where: torch.device, rounds: int = 3) -> dict[str, float]:
    """The shortest time of each piece of work, in turn and after a first call: a busy machine must not favour one."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            times[name].append(seconds(work, where))
    return {name: min(found[1:]) for name, found in times.items()}


def _forward(module: torch.nn.Module, shape: tuple[int, ...], batch: int, dtype: str, where: torch.device) -> Callable[[], Any]:
    prepared = prepare(module, Execution(dtype=dtype), where, shape)
    x = prepared.input(torch.rand((batch, *shape), generator=torch.Generator().manual_seed(0)).to(where))

    @torch.inference_mode()
    def work() -> object:
        return prepared.module(x)

    return work


def duration(seconds: float) -> str:
    """A duration in words."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.{0 if seconds >= 100 * size else 1}f} {unit}"
    return f"{seconds:.1f} seconds" if seconds >= 0.1 else f"{1000 * seconds:.2g} ms"


def _speed(report: Report, where: torch.device) -> None:
    """Votes of the demo's network, bf16 against float32 there, and forward passes of the field's networks."""
    from rsrouter.experts import load_expert
    from rsrouter.experts.places import ASSETS

    expert = load_expert(ASSETS / "experts" / "sigma_0.50")
    speed = measure_speed(Smooth(expert), device=str(where), n=100, repeats=1)
    lines = {
        "demo expert": f"{speed.votes_per_second:,.0f} votes a second; {_VOTES:,} votes take {duration(speed.seconds(_VOTES))}"
    }
    batch = default_batch(28 * 28, where)
    dtypes = ("float32", "bfloat16")
    times = _timed({d: _forward(expert.network(), expert.input_shape, batch, d, where) for d in dtypes}, where)
    ratio = times["float32"] / times["bfloat16"]
    lines["bf16"] = f"{ratio:.2f} times the speed of float32 (forward passes of the demo's network)"
    if ratio >= 1.2:
        report.add(
            NOTE, f"bf16 is {ratio:.1f} times as fast here", "Execution(dtype='bfloat16'); it is part of the certified function"
        )
    elif ratio < 0.9:
        report.add(
            NOTE, f"bf16 is {1 / ratio:.1f} times slower than float32 here", "leave Execution(dtype='float32'), the default"
        )
    for name, architecture, classes, shape, rows in _FIELD:
        work = _forward(build_architecture(architecture, classes), shape, rows, "float32", where)
        seconds = _timed({name: work}, where, rounds=1)[name] / rows
        one, table = seconds * _VOTES, seconds * _VOTES * _IMAGES
        lines[name] = f"{1 / seconds:,.0f} forward passes a second; a certificate of {_VOTES:,} votes takes {duration(one)}"
        if table > 86_400:
            report.add(
                SLOW,
                f"{name}: {_IMAGES} certificates of {_VOTES:,} votes would take {duration(table)} on {where}",
                "adaptive plans (the default) draw fewer, --n 10000 a tenth; --shard i/N and rsrouter merge use several machines"
                + ("" if where.type != "cpu" else "; a GPU helps most"),
            )
    report.sections["speed (random or bundled weights)"] = lines


def _experts(report: Report) -> None:
    """Whether the bundled weights are the ones that were shipped."""
    from rsrouter.experts import load_expert
    from rsrouter.experts.places import ASSETS

    folder = ASSETS / "experts"
    try:
        found = [load_expert(path) for path in sorted(folder.iterdir()) if path.is_dir()]
        for expert in found:
            expert.digest  # noqa: B018  reads and checks the weights
        report.sections["bundled experts"] = {e.name: f"sigma {e.sigma:g}, {e.digest[:12]}" for e in found}
    except (RSRouterError, OSError) as error:
        report.sections["bundled experts"] = {"error": str(error)}
        report.add(BAD, "the bundled experts cannot be read", "install rsrouter again")
