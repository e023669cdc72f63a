"""Noise as keyed streams: vote i of a stream is the same whatever else is computed, and where.

There are two kinds of stream (`STREAMS`), which an execution names and a table records:

`chunks`, the one of a CPU: a sequence of noise tensors, cut into chunks of `CHUNK` votes. Each chunk has a generator of its
own, keyed by sha256 of the stream's key and the chunk's number. Raw bits come from numpy's Philox (128-bit key; raw streams
are stable across releases, NEP 19), since torch's CPU generator keeps 32 bits of its seed.

`counters`, the one of an accelerator: every value is computed from its own counter (`rsrouter.sampling.philox`), a whole
batch in one kernel. It is the same noise on every device, to the bit, and on a CPU slower to make than `chunks`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from functools import lru_cache
from math import pi
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from rsrouter.core.errors import InputError
from rsrouter.sampling import kernels
from rsrouter.sampling.philox import normals, uniform60

#: Votes per chunk of a noise stream; part of the stream's definition.
CHUNK = 100
#: Kinds of stream, with what a table records of each.
STREAMS: dict[str, dict[str, Any]] = {"chunks": {"chunk": CHUNK}, "counters": {"philox": "4x32-10"}}


def stream_key(*parts: object) -> bytes:
    """sha256 over the parts, each with its length in front so that no two lists collide."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def _chunk_key(key: bytes, chunk: int) -> int:
    return int.from_bytes(hashlib.sha256(key + chunk.to_bytes(8, "little")).digest()[:16], "little")


def _raw_bits(key: bytes, chunk: int, words: int) -> NDArray[np.uint64]:
    return np.random.Philox(key=_chunk_key(key, chunk)).random_raw(words)


class NoiseStream(ABC):
    """Adds noise to images, from streams of chunks.

    Args:
        shape: `(C, H, W)` of one image.
        device: where noise is made and added.
        keep: how many chunks to remember. One is enough for streams that are read once, whose requests may end
            inside a chunk; more pays where images share a stream.
    """

    name: str

    def __init__(self, shape: tuple[int, ...], device: torch.device, keep: int = 1) -> None:
        self.shape, self.device, self.keep = tuple(shape), device, keep
        self._kept: OrderedDict[tuple[bytes, int, float], Tensor] = OrderedDict()

    def fresh(self) -> NoiseStream:
        """Another of its kind, which remembers chunks of its own: one for each thread."""
        return type(self)(self.shape, self.device, self.keep)

    def add(self, image: Tensor, sigma: float, key: bytes, start: int, out: Tensor) -> Tensor | None:
        """Writes `image + sigma * noise[start : start + len(out)]` into `out (M, C, H, W)`.

        Returns:
            None, or `(M,)` booleans marking draws that must count as invalid votes.
        """
        done, count, bad = 0, len(out), []
        while done < count:
            chunk, offset = divmod(start + done, CHUNK)
            take = min(CHUNK - offset, count - done)
            bad.append(self._apply(image, sigma, self._chunk(key, chunk, sigma)[offset : offset + take], out[done : done + take]))
            done += take
        marked = [b for b in bad if b is not None]
        return torch.cat(marked) if marked else None

    def _chunk(self, key: bytes, chunk: int, sigma: float) -> Tensor:
        """The chunk's noise `(CHUNK, C, H, W)`, remembered if it was among the last `keep`."""
        name = (key, chunk, sigma)
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        while len(self._kept) >= self.keep:
            self._kept.popitem(last=False)
        self._kept[name] = self._make(key, chunk, sigma)
        return self._kept[name]

    @abstractmethod
    def _make(self, key: bytes, chunk: int, sigma: float) -> Tensor: ...

    @abstractmethod
    def _apply(self, image: Tensor, sigma: float, noise: Tensor, out: Tensor) -> Tensor | None: ...


class GaussianNoise(NoiseStream):
    """Standard normal float32 noise, the field's own (see `SoundNoise` for what rounding can do)."""

    name = "gaussian"

    def _make(self, key: bytes, chunk: int, sigma: float) -> Tensor:
        size = CHUNK * int(np.prod(self.shape))
        half = (size + 1) // 2
        bits = torch.from_numpy(_raw_bits(key, chunk, half).view(np.int32)).view(2, half)
        # uniform on {1/2, 1, 2, ..., 2^24 - 1} / 2^24: 24 random bits, 0 moved up so that the logarithm is finite (adding
        # 1/2 everywhere would not do: above 2^23 float32 has no halves)
        radius = (bits[0] >> 8).to(torch.float32).add_(2.0**23).clamp_(min=0.5).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
        angle = bits[1].to(torch.float32).mul_(pi / 2**31)
        noise = torch.empty(2, half)
        torch.mul(radius, torch.cos(angle), out=noise[0])
        torch.mul(radius, angle.sin_(), out=noise[1])
        return noise.view(-1)[:size].view(CHUNK, *self.shape).to(self.device)

    def _apply(self, image: Tensor, sigma: float, noise: Tensor, out: Tensor) -> None:
        torch.add(image, noise, alpha=sigma, out=out)


class SoundNoise(NoiseStream):
    """Exact arithmetic for 8-bit images (Voracek and Hein, ICLR 2023).

    The image is k / 255. Rounding Gaussian noise to the same grid commutes with adding the image, so the
    smoothed classifier of `f(clamp(round(255 z)) / 255)` is certified: noise is drawn as an integer
    by comparing 60 uniform bits with Phi((2i + 1) / (510 sigma)), added in int32, clamped to
    [-255 k, 255 (k + 1)] with k = max(1, floor(6 sigma)), and divided once, so a grid point has one bit
    pattern whatever image it came from. Draws too close to a threshold to be decided in float64 are
    reported as invalid votes.
    """

    name = "sound"

    def _make(self, key: bytes, chunk: int, sigma: float) -> Tensor:
        size = CHUNK * int(np.prod(self.shape))
        uniform = torch.from_numpy((_raw_bits(key, chunk, size) >> np.uint64(64 - _BITS)).view(np.int64)).to(self.device)
        return grid_steps(uniform, sigma).view(CHUNK, *self.shape)

    def _apply(self, image: Tensor, sigma: float, noise: Tensor, out: Tensor) -> Tensor:
        return add_steps(image, sigma, noise, out)


#: Uniform bits that decide a step of sound noise.
_BITS = 60
#: Thresholds are uncertain by this many units of 2^-60 (float64's Phi errs by about 2^-52).
_DOUBT = 4096


@lru_cache(maxsize=8)
def _thresholds(sigma: float, device: torch.device) -> tuple[Tensor, int]:
    k = max(1, int(np.floor(6 * sigma)))
    reach = 255 * (2 * k + 1)
    i = np.arange(-reach, reach, dtype=np.float64)
    phi = special.ndtr((2 * i + 1) / (510.0 * sigma))
    cut = np.floor(phi * 2.0**_BITS).astype(np.int64)
    return torch.from_numpy(cut).to(device), reach


def grid_steps(uniform: Tensor, sigma: float) -> Tensor:
    """Gaussian noise in whole steps of 1/255, int32, of uniform values of 60 bits; undecided draws are a number that none has."""
    cut, reach = _thresholds(sigma, uniform.device)
    low = torch.bucketize(uniform - _DOUBT, cut, out_int32=True)
    high = torch.bucketize(uniform + _DOUBT, cut, out_int32=True)
    return torch.where(low == high, low - reach, torch.full_like(low, np.iinfo(np.int32).min // 2))


def add_steps(image: Tensor, sigma: float, noise: Tensor, out: Tensor) -> Tensor:
    """Writes images of whole steps plus `noise` into `out (M, C, H, W)`; says which rows hold an undecided draw."""
    k = max(1, int(np.floor(6 * sigma)))
    grid = torch.round(image * 255.0).to(torch.int32)
    bad = (noise < -(2**24)).flatten(1).any(1)
    total = (grid + noise).clamp_(-255 * k, 255 * (k + 1))
    if out.dtype == torch.float32:
        torch.div(total.to(torch.float32), 255.0, out=out)
    else:
        out.copy_(total.to(torch.float32) / 255.0)
    return bad


class CounterNoise:
    """Noise of a whole batch at once, every value from its own counter; the same bits on every device.

    Args:
        shape: `(C, H, W)` of one image.
        device: where.
        name: `"gaussian"` or `"sound"`.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, name: str) -> None:
        self.shape, self.device, self.name = tuple(shape), device, name

    def fresh(self) -> CounterNoise:
        """Itself: it keeps nothing."""
        return self

    def fill(self, images: Tensor, names: Tensor, whose: Tensor, rows: Tensor, sigma: float, out: Tensor) -> Tensor | None:
        """Writes noisy copies into `out (B, C, H, W)`, in its dtype and layout. Nothing is read to the host.

        Args:
            images: `(N, H * W * C)` float32, the channels of a pixel together (`flat`).
            names: `(R, 4)` int64, `stream_words` of each request's key.
            whose: `(R,)` int64, the image of each request.
            rows: `(B, 3)` int64: request, or R for a row of zeros; vote; where its vote is counted.
            sigma: standard deviation of the noise.
            out: the batch, dense.

        Returns:
            None, or `(B,)` booleans marking draws that must count as invalid votes.
        """
        last = out.is_contiguous(memory_format=torch.channels_last)
        if self.name == "gaussian" and kernels.usable(out.device):
            kernels.add_noise(images, names, whose, rows, sigma, out, last)
            return None
        real = (rows[:, 0] < len(names)).view(-1, 1, 1, 1)
        request, numel = rows[:, 0].clamp_max(len(names) - 1), images.shape[1]
        chosen = unflat(images[whose[request]], self.shape)
        if self.name == "gaussian":
            noise = unflat(normals(names[request], rows[:, 1], numel), self.shape)
            out.copy_(torch.where(real, chosen + noise * sigma, 0.0))
            return None
        steps = unflat(grid_steps(uniform60(names[request], rows[:, 1], numel), sigma), self.shape)
        marked = add_steps(chosen, sigma, steps, out)
        out.masked_fill_(~real, 0.0)
        return marked & real.view(-1)


def flat(images: Tensor) -> Tensor:
    """`(N, C, H, W)` as `(N, H * W * C)`, the channels of a pixel together: the order of `counters`."""
    return images.permute(0, 2, 3, 1).reshape(len(images), -1)


def unflat(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `flat`, a view.

    >>> x = torch.rand(2, 3, 4, 5)
    >>> torch.equal(unflat(flat(x), (3, 4, 5)), x)
    True
    """
    channels, height, width = shape
    return values.view(len(values), height, width, channels).permute(0, 3, 1, 2)


_STREAMS: dict[str, type[NoiseStream]] = {"gaussian": GaussianNoise, "sound": SoundNoise}
#: With this suffix all images of a run share one stream: cheaper, each certificate as valid as ever, but no longer
#: independent of the others, so nothing may be concluded about the table as a whole. Never shared across purposes.
SHARED = "-shared"
NOISES = (*_STREAMS, *(name + SHARED for name in _STREAMS))
#: Memory for remembered chunks of a shared stream.
_KEEP_BYTES = 2**26


def make_noise(name: str, shape: tuple[int, ...], device: torch.device, stream: str = "chunks") -> NoiseStream | CounterNoise:
    """A noise stream by name, one of `NOISES`, of a kind of `STREAMS`.

    Raises:
        InputError: unknown name.
    """
    if name not in NOISES:
        raise InputError("Unknown noise", expected=f"one of {NOISES}", received=repr(name), remedy="use 'gaussian'")
    if stream == "counters":
        return CounterNoise(shape, device, name.removesuffix(SHARED))
    return chunk_noise(name, shape, device)


def chunk_noise(name: str, shape: tuple[int, ...], device: torch.device) -> NoiseStream:
    """The stream of chunks of that name."""
    keep = max(1, _KEEP_BYTES // (4 * CHUNK * int(np.prod(shape)))) if name.endswith(SHARED) else 1
    return _STREAMS[name.removesuffix(SHARED)](shape, device, keep)


def check_eight_bit(images: Tensor) -> None:
    """Raises InputError unless every pixel is a multiple of 1/255 (what `noise="sound"` certifies)."""
    off = (images * 255.0 - torch.round(images * 255.0)).abs().max()
    if not float(off) <= 1e-4:  # of a step; float32 is off by 3e-5 at most
        raise InputError(
            "Sound noise needs 8-bit images",
            expected="pixels k / 255",
            received=f"a pixel {float(off) / 255:.2g} off the grid",
            remedy="load the images as uint8 and divide by 255, or use noise='gaussian'",
        )
