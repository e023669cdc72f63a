"""Networks that cannot be certified are refused: before the first vote, and again while votes are drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from rsrouter.core.errors import NetworkError
from rsrouter.sampling.execution import Prepared
from rsrouter.sampling.logits import Moved, Outputs, forward, heads, moved, outputs, votes_of


@dataclass(frozen=True)
class Checked:
    """What a network did when it was checked, to be asked again later.

    Attributes:
        packs: a row's logits have the same bits in any position and company. Otherwise they only agree to rounding, and
            batches must not mix requests.
        gap: by how much the gaps between logits moved, relative to themselves (`Moved.gap`).
        rows: `(batch, C, H, W)`, the input.
        logits: the float32 logits of each head.
    """

    packs: bool
    gap: float
    rows: Tensor
    logits: Outputs


def logits_of(prepared: Prepared, x: Tensor, widths: tuple[int, ...], name: str) -> Outputs:
    """The network's logits `(B, width)` in float32, one tensor for each head.

    Raises:
        NetworkError: whatever the network raises, or another shape.
    """
    output = forward(prepared.module, prepared.input(x), name)
    return outputs(heads(output, widths, name, len(x)))


def company(x: Tensor, kept: Tensor, loud: bool) -> Tensor:
    """The rows `x (B, C, H, W)` where `kept (B,)` says so, among others: loud ones, of the opposite brightness and three times
    the contrast, or quiet ones, nearly gray. Neither their mean, nor their spread, nor their largest pixel is what it was."""
    others = 3.0 * (1.0 - x) if loud else 0.5 + 0.05 * (x - 0.5)
    return torch.where(kept.view(-1, 1, 1, 1), x, others)


def _refuse_random(name: str, found: Moved) -> NoReturn:
    raise NetworkError(
        f"Network {name!r} is random at test time",
        expected="the same logits for the same input",
        received=str(found),
        remedy="remove dropout and other randomness from the forward pass in eval mode",
    )


def _refuse_company(name: str, found: Moved) -> NoReturn:
    raise NetworkError(
        f"The votes of network {name!r} depend on the rest of the batch",
        expected="logits of a row alone",
        received=f"other logits beside other neighbours: {found}",
        remedy="use running statistics (track_running_stats=True) in normalisation layers, and no dynamic quantisation or "
        "other statistics of the batch",
    )


def _rows(shape: tuple[int, ...], batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images, every other one of little contrast, and among them noise around images: some of one image, as votes have.
    And `(B,)`: which rows have no noise."""
    x = torch.rand((batch, *shape), generator=generator)
    x[3::8] = 0.5 + 0.02 * x[3::8]
    x[1::4] += torch.randn(x[1::4].shape, generator=generator)
    x[2::4] = x[:1] + 0.5 * torch.randn(x[2::4].shape, generator=generator)
    place = torch.arange(batch)
    return x, (place % 4 == 0) | (place % 4 == 3)


def _closer(x: Tensor, logits: Tensor) -> Tensor:
    """`x` with every other row moved to where its vote and that of another row are about equally likely, by the secant of their
    margins: what goes wrong only in close rows is to be seen as well. They stop short of a tie by several small shares: of a
    linear network the secant finds exact ties, which rounding alone decides."""
    votes = votes_of(logits)
    order = votes.argsort(stable=True)
    # in the order of their votes, half a batch further mostly is another class
    other = torch.empty_like(order)
    other[order] = order.roll(len(order) // 2)
    finite = logits.nan_to_num(posinf=0.0, neginf=-1e30).double()
    a, b = (v.clamp_max(logits.shape[1] - 1)[:, None] for v in (votes, votes[other]))
    here = (finite.gather(1, a) - finite.gather(1, b)).clamp_min(0.0)
    there = (finite[other].gather(1, b) - finite[other].gather(1, a)).clamp_min(0.0)
    place = torch.arange(len(x), device=x.device)
    short = 10.0 ** (place // 2 % 3 - 4.0)[:, None]
    share = torch.where(here + there > 0, (1.0 - short) * here / (here + there), 0.5).to(x.dtype).view(-1, 1, 1, 1)
    moves = (place % 2 == 0).view(-1, 1, 1, 1)
    return torch.where(moves, (1 - share) * x + share * x[other], x)


@torch.inference_mode()
def check_network(
    prepared: Prepared, name: str, widths: tuple[int, ...], shape: tuple[int, ...], batch: int, device: torch.device
) -> Checked:
    """Refuses networks that cannot be certified; says whether rows of a batch may be packed freely.

    Runs the network on a batch, again on the same batch, and twice with half of its rows in other places among other neighbours.
    What is compared is what decides votes: the gaps between each row's first logit and the others, every one on its own scale
    (`Moved`), over rows that include close ones.

    Raises:
        NetworkError: whatever the network raises; wrong shape, different logits on the same input (dropout), or logits that
            depend on the rest of the batch (batch statistics).
    """
    dtype = prepared.execution.rounding
    generator = torch.Generator().manual_seed(0)
    x, calm = (t.to(device) for t in _rows(shape, batch, generator))
    x[calm] = _closer(x[calm], logits_of(prepared, x, widths, name)[0][calm])
    first = logits_of(prepared, x, widths, name)
    if not (again := moved(first, logits_of(prepared, x, widths, name), dtype)).equal:
        _refuse_random(name, again)
    found: list[Moved] = []
    buffer = x.clone()  # one tensor with other content, as the engine's batches are
    nobody = torch.zeros_like(calm)
    for half, loud in ((calm, False), (~calm, True)):
        if not bool(half.any()):
            continue  # a batch of one
        places = torch.randperm(batch, generator=generator).to(device)[: int(half.sum())]
        buffer.copy_(company(x, nobody, loud))
        buffer[places] = x[half]
        elsewhere = logits_of(prepared, buffer, widths, name)
        found.append(moved(tuple(h[half] for h in first), tuple(h[places] for h in elsewhere), dtype))
        if not found[-1].is_rounding(dtype):
            _refuse_company(name, found[-1])
    return Checked(all(m.equal for m in found), max(m.gap for m in found), x, first)


#: Sizes of smaller batches that are tried, for votes that do not fill one.
_SIZES = (50, 100, 250, 500)


@torch.inference_mode()
def smaller_batches(checked: Checked, prepared: Prepared, name: str, widths: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes below the batch's in which rows have the bits that they have in a whole one, tried on its first and last rows: other
    rows, at other places, among others."""
    found = []
    for size in _SIZES:
        if 2 * size > len(checked.rows):
            break
        try:
            parts = [
                (logits_of(prepared, checked.rows[part].clone(), widths, name), part)
                for part in (slice(size), slice(-size, None))
            ]
        except (NetworkError, torch.OutOfMemoryError):  # made for one size, or full already
            break
        if all(moved(tuple(h[part] for h in checked.logits), logits).equal for logits, part in parts):
            found.append(size)
    return tuple(found)


@torch.inference_mode()
def check_votes(prepared: Prepared, name: str, widths: tuple[int, ...], x: Tensor, cast: Outputs, turn: int) -> None:
    """Refuses a network whose logits `cast` for a batch of votes `x` are not those that half of its rows get among others; which
    half, and which others, changes with `turn`.

    Raises:
        NetworkError: they depend on the rest of the batch, or on what was run before.
    """
    cast = outputs(cast)
    kept = torch.arange(len(x), device=x.device) % 2 == (turn // 2) % 2
    again = logits_of(prepared, company(x, kept | (len(x) == 1), loud=turn % 2 == 0), widths, name)
    kept = kept if bool(kept.any()) else ~kept
    found = moved(tuple(h[kept] for h in cast), tuple(h[kept] for h in again), prepared.execution.rounding)
    if not found.is_rounding(prepared.execution.rounding):
        _refuse_company(name, found)


@torch.inference_mode()
def check_again(checked: Checked, prepared: Prepared, name: str, widths: tuple[int, ...]) -> None:
    """Refuses a network that no longer gives the bits it gave when it was checked.

    Raises:
        NetworkError: it keeps a state that votes change (a counter, running statistics, a cache).
    """
    found = moved(checked.logits, logits_of(prepared, checked.rows.clone(), widths, name), prepared.execution.rounding)
    if not found.equal:
        raise NetworkError(
            f"The logits of network {name!r} changed while it was voting",
            expected="the bits it gave before the first vote, on the same input",
            received=str(found),
            remedy="remove state from its forward pass, and start again: its votes so far belong to no fixed classifier",
        )


@torch.inference_mode()
def check_compiled(checked: Checked, prepared: Prepared, name: str, widths: tuple[int, ...]) -> None:
    """Refuses a network whose compiled form gives other logits than the module itself.

    Raises:
        NetworkError: it asks whether it is being compiled, or the compiler got it wrong.
    """
    plain = replace(prepared, module=getattr(prepared.module, "_orig_mod", prepared.module))
    found = moved(checked.logits, logits_of(plain, checked.rows.clone(), widths, name), prepared.execution.rounding)
    if not found.is_rounding(prepared.execution.rounding):
        raise NetworkError(
            f"Compiled, network {name!r} is another function",
            expected="the logits of the module as it is, to rounding",
            received=str(found),
            remedy="pass Execution(compile=False)",
        )
