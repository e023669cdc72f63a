"""Noise schedules of diffusion models: which time step a smoothing noise stands for, and how a denoiser is called there.

A weight file carries none of this. A folder of diffusers has it in `scheduler_config.json`; for other files it is stated, as the
repository that trained them says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from rsrouter.core.errors import CheckpointError, InputError
from rsrouter.stored import Stored, validated

#: diffusers' names; "cosine" is its squaredcos_cap_v2 and OpenAI's cosine
SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid", "trained_betas")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
TIMESTEPS = ("first", "nearest")
_WITH_ENDS = ("linear", "scaled_linear", "sigmoid")
REMEDY = "take them from the repository the denoiser comes from"
#: what a statement about a plain weight file must hold: nothing in the file tells it, and a guess errs in silence
STATED = ("schedule", "steps")


@dataclass(frozen=True)
class Diffusion:
    """What a diffusion denoiser was trained with, and how it is called.

    Attributes:
        schedule: `"linear"` (Ho et al. 2020), `"scaled_linear"` (linear in the square root of beta), `"cosine"` (Nichol and
            Dhariwal 2021; diffusers' `squaredcos_cap_v2`), `"sigmoid"`, or `"trained_betas"`.
        steps: number of time steps T.
        beta_start, beta_end: of the linear ones and of sigmoid; None: 1e-4 and 0.02 for linear with T = 1000, else they must
            be given (OpenAI's scripts take 0.1 / T and 20 / T, diffusers takes what its file says).
        trained_betas: beta_t, T of them, for the schedule of that name.
        zero_snr: betas rescaled so that the last step holds no signal (Lin et al. 2023, arXiv 2305.08891).
        prediction: what the network returns: `"epsilon"` (noise), `"sample"` (image) or `"v_prediction"` (Salimans and Ho 2022).
        learned_variance: the network returns twice the channels of an image; the second half is not used.
        clip: the predicted image is clipped to [-clip, clip]; None: not.
        rescale_timesteps: the network is fed t * 1000 / T as a float, as improved-diffusion does, instead of t.
        null_class: class that a class-conditional network is fed; None: it takes no class.
        timestep: `"first"`: the first step whose noise is at least that of the smoothing (Carlini et al. 2023), or `"nearest"`.
    """

    schedule: str = "linear"
    steps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    trained_betas: tuple[float, ...] | None = None
    zero_snr: bool = False
    prediction: str = "epsilon"
    learned_variance: bool = False
    clip: float | None = 1.0
    rescale_timesteps: bool = False
    null_class: int | None = None
    timestep: str = "first"

    def __post_init__(self) -> None:
        if self.schedule == "squaredcos_cap_v2":
            object.__setattr__(self, "schedule", "cosine")
        for name in ("beta_start", "beta_end", "clip"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))  # 1 and 1.0 are one setting
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", tuple(float(b) for b in self.trained_betas))
        for name, known in (("schedule", SCHEDULES), ("prediction", PREDICTIONS), ("timestep", TIMESTEPS)):
            if getattr(self, name) not in known:
                raise _unusable(f"{name} one of {', '.join(known)}", f"{name} {getattr(self, name)!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 2 <= self.steps <= 100_000:
            raise _unusable("steps, a whole number of at least 2", f"steps {self.steps!r}")
        if self.schedule == "linear" and self.steps == 1000 and self.beta_start is None and self.beta_end is None:
            object.__setattr__(self, "beta_start", 1e-4)
            object.__setattr__(self, "beta_end", 0.02)
        self._check_betas()
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise _unusable("clip above 0, or None", f"clip {self.clip!r}")
        if self.null_class is not None and (isinstance(self.null_class, bool) or self.null_class < 0):
            raise _unusable("null_class, a class number from 0", f"null_class {self.null_class!r}")

    def _check_betas(self) -> None:
        ends = self.beta_start, self.beta_end
        if self.schedule not in _WITH_ENDS:
            if ends != (None, None):
                raise _unusable(f"no beta_start or beta_end: a {self.schedule} schedule has none", str(ends))
        elif None in ends:
            raise InputError(
                f"A {self.schedule} schedule of {self.steps} steps needs its betas",
                expected="beta_start and beta_end",
                received=str(ends),
                remedy=f"{REMEDY}; OpenAI's scripts take {0.1 / self.steps:g} and {20 / self.steps:g} for a linear one",
            )
        elif not 0 < float(self.beta_start or 0) <= float(self.beta_end or 0) < 1:
            raise _unusable("0 < beta_start <= beta_end < 1", str(ends))
        betas = self.trained_betas
        if (betas is not None) != (self.schedule == "trained_betas"):
            raise _unusable("trained_betas for the schedule of that name, and for no other", f"schedule {self.schedule}")
        if betas is not None and (len(betas) != self.steps or not all(0 < b <= 1 for b in betas)):
            raise _unusable(f"{self.steps} trained_betas above 0 and at most 1", f"{len(betas)} from {min(betas, default=0)}")

    def alphas_cumprod(self) -> Tensor:
        """abar_t for t = 0 ... T - 1, `(T,)` float64.

        >>> first, *_, last = Diffusion().alphas_cumprod()
        >>> round(float(first), 4), round(float(last), 4)
        (0.9999, 0.0)
        """
        start, end = float(self.beta_start or 0), float(self.beta_end or 0)
        if self.schedule == "linear":
            betas = torch.linspace(start, end, self.steps, dtype=torch.float64)
        elif self.schedule == "scaled_linear":
            betas = torch.linspace(math.sqrt(start), math.sqrt(end), self.steps, dtype=torch.float64) ** 2
        elif self.schedule == "sigmoid":
            betas = torch.sigmoid(torch.linspace(-6, 6, self.steps, dtype=torch.float64)) * (end - start) + start
        elif self.schedule == "trained_betas":
            betas = torch.tensor(self.trained_betas, dtype=torch.float64)
        else:
            t = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
            f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        abar = torch.cumprod(1 - betas, 0)
        if self.zero_snr:
            root = abar.sqrt()
            abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        return abar

    def step_for(self, sigma: float) -> tuple[int, float]:
        """`(t, abar_t)` for smoothing noise of standard deviation sigma on [0,1] pixels, which is 2 sigma on [-1,1]: the first t
        with sqrt((1 - abar_t) / abar_t) >= 2 sigma, or the nearest.

        Raises:
            InputError: noise outside the schedule.

        >>> Diffusion().step_for(0.5)[0], Diffusion(timestep="nearest").step_for(0.5)[0]
        (259, 258)
        """
        abar = self.alphas_cumprod()
        noise = ((1 - abar) / abar).sqrt()  # per unit of signal on [-1,1]; infinite where there is no signal
        usable = noise[torch.isfinite(noise)]
        if not float(usable[0]) / 2 <= 2 * sigma <= float(usable[-1]):
            raise InputError(
                "This sigma is outside the diffusion's schedule",
                expected=f"{float(usable[0]) / 4:.4g} <= sigma <= {float(usable[-1]) / 2:.4g}",
                received=f"{sigma:g}",
                remedy="use another sigma, or check schedule and steps",
            )
        t = int((noise >= 2 * sigma).nonzero()[0]) if self.timestep == "first" else int((noise - 2 * sigma).abs().argmin())
        return t, float(abar[t])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `make_diffusion` reads it."""
        betas = self.trained_betas
        return {**asdict(self), "trained_betas": None if betas is None else list(betas)}

    def fed(self, t: int) -> float:
        """What the network gets as its time step."""
        return t * 1000 / self.steps if self.rescale_timesteps else t

    def words(self, sigma: float) -> str:
        """The time step for a sigma, in words.

        >>> Diffusion("cosine", 4000, rescale_timesteps=True).words(0.25)
        't = 1158 of 4000, fed as 289.5 (cosine schedule, epsilon, first step of at least this noise)'
        """
        t = self.step_for(sigma)[0]
        fed = f", fed as {self.fed(t):g}" if self.rescale_timesteps else ""
        which = "first step of at least this noise" if self.timestep == "first" else "nearest step"
        more = f", class {self.null_class}" if self.null_class is not None else ""
        return f"t = {t} of {self.steps}{fed} ({self.schedule.replace('_', ' ')} schedule, {self.prediction}, {which}{more})"


def _unusable(expected: str, received: str) -> InputError:
    return InputError("Unusable diffusion settings", expected=expected, received=received, remedy=REMEDY)


class _Diffusion(Stored):
    schedule: str = "linear"
    steps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    trained_betas: Annotated[tuple[float, ...], Field(max_length=100_000)] | None = None
    zero_snr: bool = False
    prediction: str = "epsilon"
    learned_variance: bool = False
    clip: float | None = 1.0
    rescale_timesteps: bool = False
    null_class: int | None = None
    timestep: str = "first"


FIELDS = tuple(f.name for f in fields(Diffusion))


def make_diffusion(content: Any) -> Diffusion:
    """`Diffusion` from a spec or a stored entry; what is left out has its default.

    Raises:
        InputError: unknown settings, or of another kind.

    >>> make_diffusion({"schedule": "squaredcos_cap_v2"}).schedule
    'cosine'
    """
    _known(content)
    return Diffusion(**validated(_Diffusion, content, "The diffusion settings", remedy=REMEDY).model_dump())


def _known(content: Any) -> None:
    if not isinstance(content, Mapping) or not content.keys() <= set(FIELDS):
        raise InputError(
            "Unknown diffusion settings",
            expected=f"some of {', '.join(FIELDS)}",
            received=repr(content)[:200],
            remedy=REMEDY,
        )


def stated_diffusion(stated: Any, who: str, required: tuple[str, ...] = STATED) -> Diffusion:
    """`Diffusion` of a plain weight file, as its user states it.

    Args:
        stated: settings by name.
        who: names the file in an error.
        required: settings that have no usual value.

    Raises:
        InputError: unknown settings, of another kind, or one that must be stated and is not.
    """
    _known(stated)
    if missing := [name for name in required if name not in stated]:
        raise InputError(
            f"{who} does not say how it was trained",
            expected=f"diffusion settings with {', '.join(missing)}",
            received=f"{sorted(map(str, stated))}" if stated else "none",
            remedy=f"{REMEDY} (rescale_timesteps: improved-diffusion's scripts have it on, guided-diffusion's off)"
            if "rescale_timesteps" in missing
            else REMEDY,
        )
    return make_diffusion(stated)


def with_statements(read: Diffusion, stated: Any, free: tuple[str, ...], who: str) -> Diffusion:
    """What a file says, with what its user adds.

    Args:
        read: of the file.
        stated: settings by name; those that the file has too must be the same.
        free: settings that the file does not have.
        who: names the file in an error.

    Raises:
        InputError: unknown settings, or of another kind. CheckpointError: the file says otherwise.

    >>> with_statements(Diffusion(), {"timestep": "nearest", "steps": 1000}, ("timestep",), "it").timestep
    'nearest'
    """
    _known(stated)
    told = {**asdict(read), **stated}
    if told["schedule"] == "squaredcos_cap_v2":
        told["schedule"] = "cosine"
    for name in stated:
        if name not in free and told[name] != getattr(read, name) and not _same(told[name], getattr(read, name)):
            raise CheckpointError(
                f"{who} contradicts the {name} that was given",
                expected=f"{getattr(read, name)!r}, as in the file"[:200],
                received=repr(told[name])[:200],
                remedy="leave it out: what the file says is used. Where the file is wrong, correct the file",
            )
    return make_diffusion({**read.to_dict(), **{name: stated[name] for name in free if name in stated}})


def _same(stated: Any, read: Any) -> bool:
    """Whether two numbers, or lists of them, are the same but for the rounding of their text."""
    if isinstance(stated, list | tuple) and isinstance(read, tuple) and len(stated) == len(read):
        return all(map(_same, stated, read))
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (stated, read))
    return numbers and math.isclose(stated, read, rel_tol=1e-9)


__all__ = [
    "FIELDS",
    "PREDICTIONS",
    "SCHEDULES",
    "TIMESTEPS",
    "Diffusion",
    "make_diffusion",
    "stated_diffusion",
    "with_statements",
]
