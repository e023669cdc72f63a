"""Two kernels for CUDA, in Triton: a batch of noisy copies, and the votes of a batch.

Each does what the torch operations beside it do (`rsrouter.sampling.philox`, `votes_of`), to the bit, in one launch. Where
Triton or its compiler is missing those run instead.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA comes without
    triton = None

#: Nothing fused and nothing flushed: each operation rounded as torch rounds it.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
#: Blocks of four values that one program makes.
BLOCKS = 256

if triton is not None:

    @triton.jit
    def box_muller(radius, angle):  # type: ignore[no-untyped-def]
        u = tl.maximum(radius.to(tl.float32), 0.5)
        bits = u.to(tl.int32, bitcast=True)
        mantissa = bits & 0x7FFFFF
        high = (mantissa > 0x3504F3).to(tl.int32)
        x = (mantissa | (0x3F800000 - (high << 23))).to(tl.float32, bitcast=True) - 1.0
        power = ((bits >> 23) - 127 + high - 32).to(tl.float32)
        square = x * x
        log = x * 7.0376836292e-2 + -1.1514610310e-1
        log = log * x + 1.1676998740e-1
        log = log * x + -1.2420140846e-1
        log = log * x + 1.4249322787e-1
        log = log * x + -1.6668057665e-1
        log = log * x + 2.0000714765e-1
        log = log * x + -2.4999993993e-1
        log = log * x + 3.3333331174e-1
        log = log * x * square + power * -2.12194440e-4 - square * 0.5 + x + power * 0.693359375
        length = tl.sqrt_rn(tl.maximum(log * -2.0, 0.0))
        quarter = (angle >> 30).to(tl.int32)
        x = ((angle & 0x3FFFFFFF).to(tl.int32) - 536870912).to(tl.float32) * 1.4629180792671596e-09
        square = x * x
        sine = square * -1.9515295891e-4 + 8.3321608736e-3
        sine = (sine * square + -1.6666654611e-1) * square * x + x
        cosine = square * 2.443315711809948e-5 + -1.388731625493765e-3
        cosine = (cosine * square + 4.166664568298827e-2) * square * square - square * 0.5 + 1.0
        odd = (quarter & 1) == 1
        first = tl.where(odd, sine, cosine)
        second = tl.where(odd, cosine, sine)
        first = tl.where((quarter == 1) | (quarter == 2), -first, first)
        second = tl.where(quarter >= 2, -second, second)
        return length * first, length * second

    @triton.jit
    def philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
        first = tl.full(c0.shape, 0xD2511F53, tl.uint32)
        second = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
        for _ in tl.static_range(10):
            a, b = c0, c2
            c0 = tl.umulhi(b, second) ^ c1 ^ k0
            c1 = b * second
            c2 = tl.umulhi(a, first) ^ c3 ^ k1
            c3 = a * first
            k0 += tl.full(c0.shape, 0x9E3779B9, tl.uint32)
            k1 += tl.full(c0.shape, 0xBB67AE85, tl.uint32)
        return c0, c1, c2, c3

    @triton.jit(do_not_specialize=["requests"])  # type: ignore[untyped-decorator]
    def noise_kernel(  # type: ignore[no-untyped-def]
        images, names, whose, rows, out, sigma, requests, numel, channels, area, LAST: tl.constexpr, SIZE: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        place = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        request = tl.load(rows + row * 3)
        vote = tl.load(rows + row * 3 + 1)
        real = request < requests
        request = tl.where(real, request, 0)
        zero = tl.zeros([SIZE], tl.uint32)
        k0 = zero + tl.load(names + request * 4).to(tl.uint32)
        k1 = zero + tl.load(names + request * 4 + 1).to(tl.uint32)
        c2 = zero + tl.load(names + request * 4 + 2).to(tl.uint32)
        c3 = zero + tl.load(names + request * 4 + 3).to(tl.uint32)
        a, b, c, d = philox(place.to(tl.uint32), zero + vote.to(tl.uint32), c2, c3, k0, k1)
        z0, z1 = box_muller(a, b)
        z2, z3 = box_muller(c, d)
        noise = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
        at = tl.program_id(1) * (4 * SIZE) + tl.arange(0, 4 * SIZE)
        inside = at < numel
        image = tl.load(images + tl.load(whose + request) * numel + at, mask=inside, other=0.0)
        value = tl.where(real, image + noise * sigma, 0.0)
        where = at
        if not LAST:
            where = (at % channels) * area + at // channels
        tl.store(out + row * numel + where, value.to(out.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["offset"])  # type: ignore[untyped-decorator]
    def count_kernel(  # type: ignore[no-untyped-def]
        logits, rows, marked, counts, width, stride, columns, offset, MARKED: tl.constexpr, SIZE: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, SIZE)
        x = tl.load(logits + row * stride + at, mask=at < width, other=-float("inf")).to(tl.float32)
        # NaN is neither below infinity nor above minus infinity
        wrong = tl.sum((~(x < float("inf"))).to(tl.int32), 0)
        some = tl.sum((x > -float("inf")).to(tl.int32), 0)
        best = tl.argmax(tl.where(x < float("inf"), x, -float("inf")), 0, tie_break_left=True)
        vote = tl.where((wrong == 0) & (some > 0), best, width)
        if MARKED:
            vote = tl.where(tl.load(marked + row) != 0, width, vote)
        slot = tl.load(rows + row * 3 + 2)
        tl.atomic_add(counts + slot * columns + offset + vote, tl.full([], 1, tl.int64), sem="relaxed")


def add_noise(images: Tensor, names: Tensor, whose: Tensor, rows: Tensor, sigma: float, out: Tensor, last: bool) -> None:
    """Noisy copies, in `out`'s dtype and layout.

    Args:
        images: `(N, H * W * C)` float32, the channels of a pixel together.
        names: `(R, 4)` int64, `stream_words` of each request.
        whose: `(R,)` int64, the image of each request.
        rows: `(B, 3)` int64: request (R: a row of zeros), vote, and where its vote is counted.
        sigma: standard deviation.
        out: `(B, C, H, W)`, dense.
        last: whether `out` is in channels_last.
    """
    numel, channels = images.shape[1], out.shape[1]
    grid = (len(out), triton.cdiv(triton.cdiv(numel, 4), BLOCKS))
    noise_kernel[grid](
        images, names, whose, rows, out, sigma, len(names), numel, channels, numel // channels, last, BLOCKS, **OPTIONS
    )


def count_votes(logits: Tensor, rows: Tensor, marked: Tensor | None, counts: Tensor, offset: int) -> None:
    """Adds the votes of `logits (B, C)` to `counts (R + 1, columns)` int64, from column `offset` on, at each row's own line; a
    row that is `marked (B,)` votes for `C`."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    width = logits.shape[1]
    flags = rows if marked is None else marked.to(torch.int8)
    size = triton.next_power_of_2(width)
    count_kernel[(len(logits),)](
        logits, rows, flags, counts, width, logits.stride(0), counts.shape[1], offset, marked is not None, size, **OPTIONS
    )


@cache
def usable(device: torch.device) -> bool:
    """Whether both kernels compile and run there; said once where they should and do not."""
    if triton is None or device.type != "cuda":
        return False
    try:
        rows, words = torch.zeros(1, 3, dtype=torch.int64, device=device), torch.zeros(1, 4, dtype=torch.int64, device=device)
        out, counts = torch.empty(1, 1, 2, 2, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
        add_noise(torch.zeros(1, 4, device=device), words, rows[:, 0], rows, 1.0, out, False)
        count_votes(out.view(2, 2)[:1], rows, None, counts, 0)
        return int(counts.sum()) == 1
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        warnings.warn(
            f"Triton does not work on {device} ({said}); torch makes the same noise, slower", RuntimeWarning, stacklevel=2
        )
        return False


__all__ = ["add_noise", "count_votes", "usable"]
