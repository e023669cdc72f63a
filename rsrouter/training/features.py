"""Noisy features of frozen experts, drawn once: heads are trained, and chains are tuned, on these."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rsrouter.experts.expert import Expert
from rsrouter.experts.pool import ExpertPool
from rsrouter.experts.preprocessing import has_trunk
from rsrouter.experts.registry import TORCHVISION
from rsrouter.process import fixed_kernels
from rsrouter.router.trunk import FusedTrunk
from rsrouter.sampling.execution import Execution, default_batch, largest_input, prepare, resolve_device
from rsrouter.sampling.noise import stream_key
from rsrouter.training.resume import ResumeStore, unit_key


def with_features(pool: ExpertPool) -> list[Expert]:
    """The experts whose features heads can read, by sigma."""
    return [e for e in pool if has_trunk(e.module)]


def without_features(pool: ExpertPool) -> str:
    """Which experts expose no features, and what they would need to; empty where all do."""
    blind = [e for e in pool if not has_trunk(e.module)]
    if not blind:
        return ""
    needed = "forward_features(x), forward_head(x, pre_logits=True) and get_classifier(), as timm's models have"
    if any(e.provenance is not None and any(f.architecture.startswith(TORCHVISION) for f in e.provenance.files()) for e in blind):
        needed += "; timm has torchvision's ResNets under the same names: --architecture resnet18"
    names = ", ".join(f"{e.name} ({type(e.module).__name__})" for e in blind)
    return f"no features are exposed by {names}: heads need {needed}"


@torch.inference_mode()
def noisy_features(
    experts: Sequence[Expert],
    sigma: float,
    images: Tensor,
    copies: int,
    *,
    seed: int,
    purpose: str,
    grid: int = 1,
    device: str | None = None,
    execution: Execution | None = None,
    progress: Callable[[int], None] | None = None,
    store: ResumeStore | None = None,
) -> Tensor:
    """Features and logits of noisy copies: float16 `(N, copies, sum of F + classes)` on the CPU.

    The noise is a stream of its own, keyed by purpose, seed, expert, sigma and images: no certificate ever sees it.

    Args:
        experts: what looks at each noisy copy; the modules must expose their features (`FusedTrunk`).
        sigma: standard deviation of the noise, not necessarily the expert's.
        images: `(N, C, H, W)` pixels in [0,1].
        copies: noisy copies per image.
        seed, purpose: key the noise.
        grid: how feature maps are pooled (`Trunk`).
        device, execution: where and how the experts run.
        progress: called with the number of forward passes since the last call.
        store: finished parts are kept there, and read back instead of computed.

    Raises:
        InputError: an expert that does not expose its features.
    """
    where = resolve_device(device)
    execution = execution or Execution()
    trunk = prepare(FusedTrunk(experts, grid), execution, where, images.shape[1:], "experts")
    key = stream_key(
        purpose, seed, *(e.digest for e in experts), repr(float(sigma)), images.shape[0], images[:1].cpu().numpy().tobytes()
    )
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    batch = execution.batch or default_batch(largest_input(images.shape[1:], (e.module for e in experts)), where)
    rows = torch.arange(len(images)).repeat_interleave(copies)
    store = store or ResumeStore()
    content = images.detach().cpu().contiguous().numpy().tobytes()
    name = unit_key("features", key, copies, content, batch, repr(execution), str(where), *([] if grid == 1 else [grid]))
    parts: list[Tensor] = []
    done = saved = number = 0
    while (found := store.get(f"{name}-{number}")) is not None:
        parts.append(found["features"])
        generator.set_state(found["generator"])
        done, number = done + int(found["batches"]), number + 1
        saved = len(parts)
    batches = torch.split(rows, batch)
    since = 0
    store.due(f"{name}-{number}")
    for part in batches[done:]:
        noise = torch.randn((len(part), *images.shape[1:]), generator=generator)
        with fixed_kernels():
            everything, _ = trunk((images[part] + sigma * noise).to(where))
        parts.append(everything.to("cpu", torch.float16))
        since += 1
        if store.due(f"{name}-{number}"):
            whole = torch.cat(parts[saved:])
            store.put(f"{name}-{number}", {"features": whole, "generator": generator.get_state(), "batches": since})
            parts[saved:], since, number = [whole], 0, number + 1
            saved = len(parts)
            store.due(f"{name}-{number}")
        if progress is not None:
            progress(len(part) * len(experts))
    if since and store.folder is not None:
        store.put(
            f"{name}-{number}", {"features": torch.cat(parts[saved:]), "generator": generator.get_state(), "batches": since}
        )
    return torch.cat(parts).reshape(len(images), copies, -1)
