"""Whether a network still computes what it computed when it was wrapped.

Weights are pinned by their digest; what a library makes of them is not. So a few logits are kept: those of a fixed batch, in
float32 on a CPU. Half of its rows is noise, half is smooth, in [0,1], the same on every machine and under every version of
every library.

Two machines, or two versions, give logits that differ by the rounding of float32. How much that is depends on the network, so it
is measured when the logits are taken: against float64, which rounds at 1e-16. Sums in another order err about as much as the
first order did. Between kernels for SSE4.1, AVX2 and AVX-512 networks of 20 to 110 layers moved by 1e-7 to 9e-6 of the largest
logit; `TOLERANCE` times the measured error, and at least `LEAST`, is allowed. A transformer whose GELU becomes its tanh form
moves by 1e-4, another normalisation, resize or epsilon by 1e-3 and more.
"""

from __future__ import annotations

import copy
import hashlib
import math
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from rsrouter.core.errors import IntegrityError, NetworkError
from rsrouter.process import fixed_kernels
from rsrouter.stored import Stored

ROWS = 4
#: so many logits of each row are kept
WIDTH = 64
TOLERANCE = 60.0
LEAST = 3e-5
#: what is allowed where a network cannot run in float64
UNMEASURED = 1e-3
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "diffusers", "open_clip_torch", "numpy")


class Probe(Stored):
    """Logits of the probe batch.

    Attributes:
        logits: `ROWS` rows of at most `WIDTH` logits; None for one that is not finite.
        error: largest difference to float64, as a share of the largest logit; None: not measured.
        versions: of the libraries that computed them.
    """

    logits: Annotated[tuple[tuple[float | None, ...], ...], Field(min_length=1, max_length=64)]
    error: Annotated[float, Field(ge=0)] | None = None
    versions: Annotated[dict[str, str], Field(default_factory=dict)]

    @field_validator("logits")
    @classmethod
    def _rows(cls, rows: tuple[tuple[float | None, ...], ...]) -> tuple[tuple[float | None, ...], ...]:
        if len({len(row) for row in rows}) != 1:
            raise ValueError("rows of different lengths")
        return rows


def versions() -> dict[str, str]:
    """Versions of the installed libraries that networks are built from."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def probe_batch(shape: tuple[int, ...]) -> Tensor:
    """The batch `(ROWS, C, H, W)`, float32 in [0,1]: rows of 8-bit noise, then of a few waves.

    >>> batch = probe_batch((1, 4, 4))
    >>> tuple(batch.shape), round(float(batch[0, 0, 0, 0]) * 255)
    ((4, 1, 4, 4), 94)
    """
    channels, height, width = shape
    count = ROWS // 2 * channels
    data = hashlib.shake_256(b"rsrouter probe").digest(count * height * width)  # no generator: theirs change with versions
    noise = np.frombuffer(data, np.uint8).reshape(ROWS // 2, channels, height, width) / 255
    phases = np.frombuffer(hashlib.shake_256(b"rsrouter waves").digest(4 * count), np.uint8).reshape(-1, 4) / 255
    y, x = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    waves = [
        0.5 + 0.25 * np.sin(2 * np.pi * (p * x + (1 - p) * y + q)) + 0.25 * np.cos(2 * np.pi * (2 * r * x - y + s))
        for p, q, r, s in phases
    ]
    smooth = np.stack(waves).reshape(ROWS // 2, channels, height, width)
    return torch.from_numpy(np.concatenate([noise, smooth]).astype(np.float32))


@torch.inference_mode()
def _logits(network: nn.Module, batch: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`(ROWS, K)` float64, in evaluation mode, whatever the process has set."""
    if dtype != torch.float32 or any(m.training for m in network.modules()):
        network = copy.deepcopy(network).eval().to(dtype)
    with fixed_kernels():
        logits: Tensor = network(batch.to(dtype)).double()[:, :WIDTH]
    return logits


def _answers(network: nn.Module, batch: Tensor, who: str) -> Tensor:
    """`_logits`, or NetworkError with what the network raised instead."""
    try:
        logits = _logits(network, batch)
        if logits.ndim == 2:
            return logits
        received = f"shape {tuple(logits.shape)}"
    except Exception as error:  # a forward pass may raise anything
        received = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:300]}"
    raise NetworkError(
        f"The network of {who} gives no logits",
        expected=f"logits (B, K) for images {tuple(batch.shape)}",
        received=received,
        remedy="check input_shape, and that every part is there: a denoiser that takes a time step needs its diffusion settings",
    )


def _scale(logits: Tensor) -> float:
    return float(torch.nan_to_num(logits, nan=0, posinf=0, neginf=0).abs().max()) or 1.0


def take_probe(network: nn.Module, shape: tuple[int, ...], who: str = "this expert") -> Probe | None:
    """The logits of the probe batch now.

    Args:
        network: pixels in [0,1], `(B, C, H, W)`, to logits `(B, K)`.
        shape: `(C, H, W)`.
        who: names it in an error.

    Returns:
        None where the network does not answer the same twice (it draws numbers of its own).

    Raises:
        NetworkError: it gives no logits for such images.

    >>> probe = take_probe(nn.Flatten(), (1, 2, 2))
    >>> len(probe.logits), len(probe.logits[0]), probe.error < 1e-6
    (4, 4, True)
    """
    batch = probe_batch(shape)
    logits = _answers(network, batch, who)
    if not torch.equal(torch.nan_to_num(logits), torch.nan_to_num(_logits(network, batch))):
        return None
    try:
        exact = _logits(network, batch, torch.float64)
        error: float | None = float(torch.nan_to_num(exact - logits, posinf=0, neginf=0).abs().max()) / _scale(logits)
    except Exception:  # a module that makes float32 tensors of its own
        error = None
    rows = tuple(tuple(float(f"{v:.8g}") if math.isfinite(v) else None for v in row) for row in logits.tolist())
    return Probe(logits=rows, error=None if error is None else float(f"{error:.2g}"), versions=versions())


def allowed(probe: Probe) -> float:
    """The largest difference of a logit that is put down to rounding, as a share of the largest logit."""
    return UNMEASURED if probe.error is None else max(LEAST, TOLERANCE * probe.error)


def check_probe(network: nn.Module, shape: tuple[int, ...], probe: Probe, who: str) -> None:
    """Compares the logits of now with those of a probe.

    Raises:
        IntegrityError: others, beyond rounding; it names the libraries whose versions differ.
        NetworkError: it gives no logits.

    >>> probe = take_probe(nn.Sequential(nn.Flatten(), nn.GELU()), (1, 2, 2))
    >>> check_probe(nn.Sequential(nn.Flatten(), nn.GELU()), (1, 2, 2), probe, "it")
    >>> check_probe(nn.Sequential(nn.Flatten(), nn.GELU("tanh")), (1, 2, 2), probe, "it")
    Traceback (most recent call last):
    rsrouter.core.errors.IntegrityError: ...
    """
    now = _answers(network, probe_batch(shape), who)
    then = torch.tensor([[math.nan if v is None else v for v in row] for row in probe.logits], dtype=torch.float64)
    now = torch.where(now.isfinite(), now, math.nan)
    if now.shape == then.shape and torch.equal(now.isnan(), then.isnan()):
        difference = float(torch.nan_to_num(now - then).abs().max()) / _scale(then)
        if difference <= allowed(probe):
            return
        received = f"logits that differ by {difference:.2g} of the largest"
    else:
        received = f"shape {tuple(now.shape)}" if now.shape != then.shape else "other logits are not finite"
    installed = versions()
    moved = [
        f"{name} {old} then, {installed.get(name, 'not installed')} now"
        for name, old in sorted(probe.versions.items())
        if installed.get(name) != old and name != "numpy"
    ]
    raise IntegrityError(
        f"The network of {who} no longer computes what it computed when it was wrapped",
        expected=f"its stored logits, within {allowed(probe):.2g} of the largest",
        received=received,
        remedy=f"install the versions it was wrapped with ({'; '.join(moved)}), or wrap it again and certify anew"
        if moved
        else "the versions are the same: was an architecture registered under this name changed? Wrap it again and certify anew",
    )
