"""Normal numbers from counters: Philox4x32-10 (Salmon et al. 2011) and Box-Muller in float32, the same bits on every device.

One call of the block cipher turns a counter of 128 bits and a key of 64 into four words of 32 bits. What stands where:

    counter   block of four values inside the image | vote | two words of the stream's name
    key       two more words of the stream's name

so that no two votes, and no two values of one, ever read the same counter, and two streams do so only where 128 bits of
sha256 agree. Values of an image are numbered pixel by pixel, the channels of a pixel together.

The transform uses additions, multiplications and one square root, each rounded as IEEE 754 says and none fused, in one fixed
order: that is what makes the float32 values the same in torch on any device and in the kernel of `rsrouter.sampling.kernels`.
"""

from __future__ import annotations

import hashlib
from math import pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsrouter.core.errors import InputError

#: Multipliers and key increments of Philox4x32, and its number of rounds.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
#: Votes of one stream: the vote is one word of the counter.
MOST_VOTES = 2**32
_WORD = 2**32 - 1

#: ln(1 + x) = x - x^2 / 2 + x^3 P(x) for 1/sqrt(2) <= 1 + x < sqrt(2); ln 2 in two parts (Cephes `logf`).
LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
LN2_LOW, LN2_HIGH = -2.12194440e-4, 0.693359375
#: sin x = x + x^3 S(x^2) and cos x = 1 - x^2 / 2 + x^4 C(x^2) for |x| <= pi / 4 (Cephes `sinf`, `cosf`).
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
#: Of one step of the 30 bits that place an angle in its quarter.
STEP = pi / 2**31
#: Mantissa bits of sqrt(2).
_SQRT2 = 0x3504F3


def stream_words(key: bytes) -> NDArray[np.int64]:
    """The four words that name a stream of `stream_key` in its counters and keys."""
    return np.frombuffer(hashlib.sha256(b"philox4x32-10" + key).digest()[:16], "<u4").astype(np.int64)


def check_votes_fit(end: int) -> None:
    """Raises InputError where a stream would be read past its last vote."""
    if end > MOST_VOTES:
        raise InputError(
            "The noise stream is exhausted",
            expected=f"at most {MOST_VOTES:,} votes of one image, purpose and network",
            received=f"vote {end - 1:,}",
            remedy="ask for fewer",
        )


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10, element by element; words are int64 tensors with values below 2^32, of shapes that broadcast.

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [hex(int(word)) for word in philox((zero, zero, zero, zero), (zero, zero))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # modulo 2^64, as int64 wraps
        c0, c1, c2, c3 = ((b >> 32) & _WORD) ^ c1 ^ k0, b & _WORD, ((a >> 32) & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + WEYL[0]) & _WORD, (k1 + WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        value = value * x + c
    return value


def box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normal float32 values of two words: `sqrt(-2 ln u)` times cosine and sine, u the first word
    over 2^32, rounded (0 counts as 1/2: the largest value is 6.8), and the angle the second word of 2^32 steps round the circle.
    """
    u = radius.to(torch.float32).clamp_min(0.5)
    bits = u.view(torch.int32)
    exponent, mantissa = (bits >> 23) - 127, bits & 0x7FFFFF
    high = (mantissa > _SQRT2).to(torch.int32)  # above sqrt(2): half of it, and one more power of two
    x = (mantissa | (0x3F800000 - (high << 23))).view(torch.float32) - 1.0
    power = (exponent + high - 32).to(torch.float32)
    square = x * x
    log = _polynomial(x, LOG) * x * square + power * LN2_LOW - square * 0.5 + x + power * LN2_HIGH
    # torch's float32 root may be off by an ulp on a CPU; through float64 it is the nearest float32 (Figueroa 1995)
    length = (log * -2.0).clamp_min(0.0).double().sqrt().to(torch.float32)
    quarter = (angle >> 30).to(torch.int32)
    x = ((angle & 0x3FFFFFFF) - 2**29).to(torch.float32) * STEP
    square = x * x
    sine = _polynomial(square, SIN) * square * x + x
    cosine = _polynomial(square, COS) * square * square - square * 0.5 + 1.0
    odd = (quarter & 1) == 1
    first, second = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    first = torch.where((quarter == 1) | (quarter == 2), -first, first)
    second = torch.where(quarter >= 2, -second, second)
    return length * first, length * second


def words(names: Tensor, votes: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of whole votes: `(B, blocks)` each, of streams `names (B, 4)` and votes `(B,)`, all int64."""
    place = torch.arange(blocks, device=votes.device)[None]
    k0, k1, c2, c3 = (names[:, i, None] for i in range(4))
    return philox((place, votes[:, None], c2, c3), (k0, k1))


def normals(names: Tensor, votes: Tensor, numel: int) -> Tensor:
    """`(B, numel)` standard normal float32 values: the first `numel` of each vote.

    >>> names, votes = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([0, 1])
    >>> normals(names, votes, 3).shape
    torch.Size([2, 3])
    """
    blocks = -(-numel // 4)
    step = len(votes) if votes.device.type == "cuda" else max(1, 2**16 // blocks)  # what a cache holds
    parts = []
    for at in range(0, len(votes), max(1, step)):
        a, b, c, d = words(names[at : at + step], votes[at : at + step], blocks)
        values = torch.stack((*box_muller(a, b), *box_muller(c, d)), -1)
        parts.append(values.view(len(values), -1)[:, :numel])
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def uniform60(names: Tensor, votes: Tensor, numel: int) -> Tensor:
    """`(B, numel)` int64 values, uniform on 60 bits: two words each."""
    parts = words(names, votes, -(-numel // 2))
    pairs = torch.stack([(high << 28) | (low >> 4) for high, low in (parts[:2], parts[2:])], -1)
    return pairs.view(len(votes), -1)[:, :numel].contiguous()


__all__ = ["MOST_VOTES", "box_muller", "check_votes_fit", "normals", "philox", "stream_words", "uniform60", "words"]
