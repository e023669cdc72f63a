"""Experts that are a denoiser before a classifier, one for each sigma; plain modules to the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rsrouter.core.errors import CheckpointError, InputError
from rsrouter.experts.composite import composite, networks, part
from rsrouter.experts.config import checked
from rsrouter.experts.expert import Expert, check_sigma
from rsrouter.experts.loaders import LOADERS, Sources, load_network, open_checkpoint
from rsrouter.experts.preprocessing import ClassifierFeatures
from rsrouter.experts.provenance import Part, Provenance, Width
from rsrouter.experts.registry import is_denoiser
from rsrouter.experts.structure import tensors_digest
from rsrouter.hub import Hub
from rsrouter.stored import Stored, validated


@dataclass(frozen=True)
class Diffusion:
    """What a diffusion denoiser was trained with; a checkpoint does not carry it.

    Attributes:
        schedule: `"linear"` (Ho et al. 2020) or `"cosine"` (Nichol and Dhariwal 2021).
        steps: number of time steps T.
        beta_start, beta_end: of the linear schedule.
        prediction: what the network returns: `"epsilon"` (noise), `"x0"` (image) or `"v"` (Salimans and Ho 2022).
    """

    schedule: str = "linear"
    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        if self.schedule not in {"linear", "cosine"} or self.prediction not in {"epsilon", "x0", "v"} or self.steps < 2:
            raise InputError(
                "Unknown diffusion settings",
                expected="schedule linear or cosine, prediction epsilon, x0 or v, steps >= 2",
                received=str(asdict(self)),
                remedy="take them from the repository the denoiser comes from",
            )

    def alphas_cumprod(self) -> Tensor:
        """abar_t for t = 0 ... T - 1, `(T,)` float64."""
        if self.schedule == "linear":
            betas = torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)
        else:
            t = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
            f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        return torch.cumprod(1 - betas, 0)

    def step_for(self, sigma: float) -> tuple[int, float]:
        """`(t, abar_t)` whose noise is nearest to sigma on [0,1] pixels: (1 - abar_t) / abar_t = (2 sigma)^2.

        Raises:
            InputError: noise outside the schedule.
        """
        abar = self.alphas_cumprod()
        noise = ((1 - abar) / abar).sqrt()  # per unit of signal on [-1,1]
        if not float(noise[0]) / 2 <= 2 * sigma <= float(noise[-1]):
            raise InputError(
                "This sigma is outside the diffusion's schedule",
                expected=f"{float(noise[0]) / 4:.4g} <= sigma <= {float(noise[-1]) / 2:.4g}",
                received=f"{sigma:g}",
                remedy="use another sigma, or check schedule and steps",
            )
        t = int((noise - 2 * sigma).abs().argmin())
        return t, float(abar[t])


class _Diffusion(Stored):
    schedule: str = "linear"
    steps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction: str = "epsilon"


def make_diffusion(content: Any) -> Diffusion:
    """`Diffusion` from a spec or a stored entry.

    Raises:
        InputError: unknown settings, or of another kind.

    >>> make_diffusion({"schedule": "cosine"}).schedule
    'cosine'
    """
    known = {f.name for f in fields(Diffusion)}
    if not isinstance(content, Mapping) or not content.keys() <= known:
        raise InputError(
            "Unknown diffusion settings",
            expected="schedule, steps, beta_start, beta_end, prediction",
            received=repr(content)[:200],
            remedy="take them from the repository the denoiser comes from",
        )
    return Diffusion(**validated(_Diffusion, content, "The diffusion settings").model_dump())


def _prediction(output: Any, like: Tensor) -> Tensor:
    """The predicted tensor, of as many channels as `like`, in what a denoiser returns."""
    if isinstance(output, tuple):
        output = output[0]
    elif not isinstance(output, Tensor):
        output = output.sample
    predicted: Tensor = output[:, : like.shape[1]]
    return predicted


class DiffusionDenoised(ClassifierFeatures, nn.Module):
    """One-shot diffusion denoising before a classifier (Carlini et al. 2023, arXiv 2206.10550).

    The noisy image z = x + sigma * noise on [0,1] becomes x_t = sqrt(abar_t) (2 z - 1), one call of the denoiser gives
    x_0, and the classifier sees (x_0 + 1) / 2. No noise is added inside, so this is an ordinary base classifier.

    Args:
        denoiser: `(x_t (B, C, H, W), t (B,))` to its prediction, as a tensor, a tuple, or an object with `.sample`;
            channels beyond C (learned variances) are ignored.
        classifier: pixels in [0,1] to logits.
        sigma: noise level, standard deviation on [0,1] pixels.
        diffusion: what the denoiser was trained with.
        size: side to which x_0 is resized (bicubic, antialiased) for the classifier; None: as it is.
    """

    def __init__(
        self, denoiser: nn.Module, classifier: nn.Module, sigma: float, diffusion: Diffusion, size: int | None = None
    ) -> None:
        super().__init__()
        self.t, self.abar = diffusion.step_for(sigma)
        self.denoiser, self.classifier, self.prediction, self.size = denoiser, classifier, diffusion.prediction, size

    def extra_repr(self) -> str:
        return f"t={self.t}, abar={self.abar!r}, prediction={self.prediction}, size={self.size}"

    def denoise(self, z: Tensor) -> Tensor:
        """Noisy pixels to denoised pixels in [0,1], same shape."""
        signal, noise = math.sqrt(self.abar), math.sqrt(1 - self.abar)
        x_t = signal * (2 * z - 1)
        output = self.denoiser(x_t, torch.full((z.shape[0],), self.t, device=z.device, dtype=torch.long))
        predicted = _prediction(output, z)
        if self.prediction == "epsilon":
            x_0 = (x_t - noise * predicted) / signal
        elif self.prediction == "v":
            x_0 = signal * x_t - noise * predicted
        else:
            x_0 = predicted
        pixels: Tensor = (x_0.clamp(-1, 1) + 1) / 2
        return pixels

    def shown(self, z: Tensor) -> Tensor:
        """What the classifier sees."""
        clean = self.denoise(z)
        if self.size is not None:
            clean = F.interpolate(clean, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        return clean

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.shown(z))
        return logits


class DirectDenoised(ClassifierFeatures, nn.Module):
    """Denoised smoothing (Salman et al. 2020, arXiv 2003.01908): denoiser on [0,1] pixels, then the classifier."""

    def __init__(self, denoiser: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.classifier = denoiser, classifier

    def shown(self, z: Tensor) -> Tensor:
        """What the classifier sees."""
        clean: Tensor = self.denoiser(z)
        return clean

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.shown(z))
        return logits


@dataclass(frozen=True)
class Denoiser:
    """A denoising network and where it came from (None: made in memory)."""

    module: nn.Module
    provenance: Provenance | None = None


def load_denoiser(
    source: str | Path,
    *,
    architecture: str,
    kwargs: dict[str, Any] | None = None,
    licence: str | None = None,
    filename: str | None = None,
    revision: str | None = None,
    **hub: Any,
) -> Denoiser:
    """A pinned denoiser from a folder, a file or the Hub.

    Args:
        source: as in `load_expert`.
        architecture: registered with `register_architecture(..., denoiser=True)`: `"dncnn"`, `"small_unet"`, or yours.
        kwargs: its arguments.
        licence: of the weights.

    Raises:
        CheckpointError: not a denoiser, or a file that does not fit. HubError, IntegrityError: as `load_expert`.
    """
    if not isinstance(architecture, str) or not is_denoiser(architecture):
        raise CheckpointError(
            f"{architecture!r} is not a denoiser",
            expected="an architecture registered with denoiser=True",
            received=repr(architecture),
            remedy="register_architecture(name, YourDenoiser, denoiser=True)",
        )
    told = checked({"kwargs": kwargs, "licence": licence}, "the denoiser")
    where, _, sha256, _ = open_checkpoint(source, filename=filename, revision=revision, **hub)
    provenance = Provenance(
        **where,
        sha256=sha256,
        loader="checkpoint",
        architecture=architecture,
        kwargs=told["kwargs"] or {},
        licence=told["licence"],
    )
    module = load_network(provenance, 2, Sources(hub=Hub(**hub)))
    return Denoiser(module, provenance.model_copy(update={"tensors": tensors_digest(module)}))


def denoised(
    denoiser: Denoiser | nn.Module,
    classifier: Expert,
    *,
    sigma: float,
    diffusion: Diffusion | None = None,
    input_shape: Sequence[int] | None = None,
    name: str | None = None,
) -> Expert:
    """A denoiser before a classifier that was trained on clean images.

    One denoiser and one classifier serve every sigma: call this once for each, the weights are shared.

    Args:
        denoiser: from `load_denoiser`, or a module.
        classifier: its own sigma is not used; its normalisation is.
        sigma: noise level of the result.
        diffusion: the denoiser's schedule (one-shot diffusion); None: it maps noisy pixels to clean ones (DnCNN).
        input_shape: `(C, H, W)` of the images; default the classifier's. Diffusion output is resized to the classifier's.
        name: of the result.

    Raises:
        InputError: sigma outside the schedule, or shapes that cannot go together.
    """
    sigma = check_sigma(sigma, "the denoised expert")
    source = denoiser if isinstance(denoiser, Denoiser) else Denoiser(denoiser)
    shape = tuple(input_shape or classifier.input_shape)
    size = None if shape == classifier.input_shape else classifier.input_shape[1]
    if size is not None and (
        diffusion is None or classifier.input_shape[1] != classifier.input_shape[2] or shape[0] != classifier.input_shape[0]
    ):
        raise InputError(
            "Denoiser and classifier take different images",
            expected=str(classifier.input_shape),
            received=str(shape),
            remedy="use a classifier for this image size, or a diffusion denoiser, whose output is resized",
        )
    kwargs = {"sigma": sigma, "size": size, "diffusion": None if diffusion is None else asdict(diffusion)}
    module = _denoised_module(source.module, classifier.network(), kwargs)
    origin = source.provenance
    first = None if origin is None else Part(role="denoiser", num_classes=2, mean=None, std=None, provenance=origin)
    return Expert(
        module,
        sigma=sigma,
        num_classes=classifier.num_classes,
        input_shape=shape,
        name=name,
        labels=classifier.labels,
        provenance=composite("denoised", kwargs, [first, part("classifier", classifier)]),
    )


def at_sigmas(expert: Expert, sigmas: Sequence[float]) -> list[Expert]:
    """One model as an expert at each of several sigmas; the weights are held once.

    They are called `<name>_at_<sigma>`, or `sigma_<sigma>` where the model has no name of its own.

    Raises:
        InputError: a denoised expert, whose network depends on its sigma.
    """
    unnamed = expert.name == f"sigma_{expert.sigma:g}"
    if isinstance(expert.module, DiffusionDenoised):
        raise InputError(
            f"Expert {expert.name!r} is denoised for one sigma",
            expected="a network that serves every sigma",
            received=f"a denoiser set to sigma {expert.sigma:g}",
            remedy="call denoised() once for each sigma",
        )
    for s in sigmas:
        check_sigma(s, "the expert")
    return [expert.with_settings(sigma=s, name=f"sigma_{s:g}" if unnamed else f"{expert.name}_at_{s:g}") for s in sigmas]


def _denoised_module(denoiser: nn.Module, classifier: nn.Module, kwargs: dict[str, Any]) -> nn.Module:
    if kwargs["diffusion"] is None:
        return DirectDenoised(denoiser, classifier)
    return DiffusionDenoised(denoiser, classifier, kwargs["sigma"], make_diffusion(kwargs["diffusion"]), kwargs["size"])


class _Kwargs(Stored):
    """How a denoised expert is put together."""

    sigma: float
    size: Width | None
    diffusion: dict[str, Any] | None


def _load_denoised(provenance: Provenance, num_classes: int, sources: Sources) -> nn.Module:
    read = validated(_Kwargs, provenance.kwargs, "A denoised expert's entry", remedy="wrap it anew")
    denoiser, classifier = networks(provenance, sources)
    return _denoised_module(denoiser, classifier, read.model_dump())


LOADERS["denoised"] = _load_denoised
