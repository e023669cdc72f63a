"""Noise as keyed streams: vote i of a stream is the same whatever else is computed, and where.

A stream is an endless sequence of noise tensors, cut into chunks of `CHUNK` votes. Each chunk has its own
counter-based generator, keyed by sha256 of the stream's key and the chunk's number, so any part of a stream
can be produced without the parts before it.

torch's CPU generator keeps only 32 bits of its seed, too few for millions of independent chunks. The CPU
stream therefore takes raw bits from numpy's Philox (128-bit key; raw streams are stable across releases,
NEP 19) and applies the Box-Muller transform; CUDA uses torch's own Philox generator (64-bit key).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from math import pi

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from rsrouter.core.errors import InputError

#: Votes per chunk of a noise stream; part of the stream's definition.
CHUNK = 100


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
    """Adds noise to images.

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
        if self.device.type != "cpu":
            generator = torch.Generator(self.device).manual_seed(_chunk_key(key, chunk) & (2**64 - 1))
            return torch.randn((CHUNK, *self.shape), generator=generator, device=self.device)
        half = (size + 1) // 2
        bits = torch.from_numpy(_raw_bits(key, chunk, half).view(np.int32)).view(2, half)
        # uniform on {1/2, 1, 2, ..., 2^24 - 1} / 2^24: 24 random bits, 0 moved up so that the logarithm is finite (adding
        # 1/2 everywhere would not do: above 2^23 float32 has no halves)
        radius = (bits[0] >> 8).to(torch.float32).add_(2.0**23).clamp_(min=0.5).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
        angle = bits[1].to(torch.float32).mul_(pi / 2**31)
        noise = torch.empty(2, half)
        torch.mul(radius, torch.cos(angle), out=noise[0])
        torch.mul(radius, angle.sin_(), out=noise[1])
        return noise.view(-1)[:size].view(CHUNK, *self.shape)

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
    _BITS = 60
    #: thresholds are uncertain by this many units of 2^-60 (float64's Phi errs by about 2^-52)
    _DOUBT = 4096

    def _thresholds(self, sigma: float) -> tuple[Tensor, int]:
        k = max(1, int(np.floor(6 * sigma)))
        reach = 255 * (2 * k + 1)
        i = np.arange(-reach, reach, dtype=np.float64)
        phi = special.ndtr((2 * i + 1) / (510.0 * sigma))
        cut = np.floor(phi * 2.0**self._BITS).astype(np.int64)
        return torch.from_numpy(cut).to(self.device), reach

    def _make(self, key: bytes, chunk: int, sigma: float) -> Tensor:
        size = CHUNK * int(np.prod(self.shape))
        if self.device.type == "cpu":
            uniform = torch.from_numpy((_raw_bits(key, chunk, size) >> np.uint64(64 - self._BITS)).view(np.int64))
        else:
            generator = torch.Generator(self.device).manual_seed(_chunk_key(key, chunk) & (2**64 - 1))
            uniform = torch.randint(0, 2**self._BITS, (size,), generator=generator, device=self.device)
        cut, reach = self._thresholds(sigma)
        low = torch.bucketize(uniform - self._DOUBT, cut, out_int32=True)
        high = torch.bucketize(uniform + self._DOUBT, cut, out_int32=True)
        # an undecided draw is marked by a value no draw can have
        noise = torch.where(low == high, low - reach, torch.full_like(low, np.iinfo(np.int32).min // 2))
        return noise.view(CHUNK, *self.shape)

    def _apply(self, image: Tensor, sigma: float, noise: Tensor, out: Tensor) -> Tensor:
        k = max(1, int(np.floor(6 * sigma)))
        grid = torch.round(image * 255.0).to(torch.int32)
        bad = (noise < -(2**24)).flatten(1).any(1)
        total = (grid + noise).clamp_(-255 * k, 255 * (k + 1))
        torch.div(total.to(torch.float32), 255.0, out=out)
        return bad


_STREAMS: dict[str, type[NoiseStream]] = {"gaussian": GaussianNoise, "sound": SoundNoise}
#: With this suffix all images of a run share one stream: cheaper, each certificate as valid as ever, but no longer
#: independent of the others, so nothing may be concluded about the table as a whole. Never shared across purposes.
SHARED = "-shared"
NOISES = (*_STREAMS, *(name + SHARED for name in _STREAMS))
#: Memory for remembered chunks of a shared stream.
_KEEP_BYTES = 2**26


def make_noise(name: str, shape: tuple[int, ...], device: torch.device) -> NoiseStream:
    """A noise stream by name, one of `NOISES`.

    Raises:
        InputError: unknown name.
    """
    if name not in NOISES:
        raise InputError("Unknown noise", expected=f"one of {NOISES}", received=repr(name), remedy="use 'gaussian'")
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
