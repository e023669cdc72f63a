"""Experts that are a denoiser before a classifier, one for each sigma; plain modules to the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rsrouter.core.errors import InputError, NetworkError
from rsrouter.experts.composite import composite, networks, part
from rsrouter.experts.denoiser_files import OPENAI, TIMED, Denoiser
from rsrouter.experts.expert import Expert, check_sigma
from rsrouter.experts.loaders import LOADERS, Sources
from rsrouter.experts.preprocessing import ClassifierFeatures
from rsrouter.experts.provenance import Part, Provenance
from rsrouter.experts.schedule import Diffusion, make_diffusion
from rsrouter.stored import Stored, validated


def _prediction(output: Any, like: Tensor, learned_variance: bool) -> Tensor:
    """The predicted tensor, of as many channels as `like`, in what a denoiser returns."""
    if isinstance(output, tuple):
        output = output[0]
    elif not isinstance(output, Tensor):
        output = output.sample
    expected = like.shape[1] * (2 if learned_variance else 1)
    if output.shape[1] != expected:
        raise NetworkError(
            "The denoiser returns another number of channels",
            expected=f"{expected}" + (", half of them variances" if learned_variance else ""),
            received=str(output.shape[1]),
            remedy="check learned_variance, and that it is a denoiser of such images",
        )
    predicted: Tensor = output[:, : like.shape[1]]
    return predicted


class DiffusionDenoised(ClassifierFeatures, nn.Module):
    """One-shot diffusion denoising before a classifier (Carlini et al. 2023, arXiv 2206.10550).

    The noisy image z = x + sigma * noise on [0,1] becomes x_t = sqrt(abar_t) (2 z - 1), one call of the denoiser gives
    x_0, and the classifier sees (x_0 + 1) / 2. No noise is added inside, so this is an ordinary base classifier.

    Args:
        denoiser: `(x_t (B, C, H, W), t (B,))`, with a third argument for a class where it takes one, to its prediction: a
            tensor, a tuple, or an object with `.sample`.
        classifier: pixels in [0,1] to logits.
        sigma: noise level, standard deviation on [0,1] pixels.
        diffusion: what the denoiser was trained with.
    """

    def __init__(self, denoiser: nn.Module, classifier: nn.Module, sigma: float, diffusion: Diffusion) -> None:
        super().__init__()
        self.t, self.abar = diffusion.step_for(sigma)
        self.scale = 1000 / diffusion.steps if diffusion.rescale_timesteps else None
        self.prediction, self.clip, self.null_class = diffusion.prediction, diffusion.clip, diffusion.null_class
        self.learned_variance = diffusion.learned_variance
        self.denoiser, self.classifier = denoiser, classifier

    def extra_repr(self) -> str:
        fed = f", fed as t * {self.scale:g}" if self.scale is not None else ""
        return f"t={self.t}{fed}, abar={self.abar!r}, prediction={self.prediction}, clip={self.clip}"

    def denoise(self, z: Tensor) -> Tensor:
        """Noisy pixels to denoised pixels, same shape, in [0,1] where the diffusion clips to [-1,1]."""
        signal, noise = math.sqrt(self.abar), math.sqrt(1 - self.abar)
        x_t = signal * (2 * z - 1)
        t = torch.full((z.shape[0],), self.t, device=z.device, dtype=torch.long)
        if self.scale is not None:
            t = t.to(torch.float32) * self.scale
        call: list[Tensor] = [x_t, t]
        if self.null_class is not None:
            call.append(torch.full_like(t, self.null_class, dtype=torch.long))
        predicted = _prediction(self.denoiser(*call), z, self.learned_variance)
        if self.prediction == "epsilon":
            x_0 = (x_t - noise * predicted) / signal
        elif self.prediction == "v_prediction":
            x_0 = signal * x_t - noise * predicted
        else:
            x_0 = predicted
        if self.clip is not None:
            x_0 = x_0.clamp(-self.clip, self.clip)
        pixels: Tensor = (x_0 + 1) / 2
        return pixels

    def shown(self, z: Tensor) -> Tensor:
        """What the classifier sees."""
        return self.denoise(z)

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


def denoised(
    denoiser: Denoiser | nn.Module,
    classifier: Expert,
    *,
    sigma: float,
    diffusion: Diffusion | None = None,
    timestep: str | None = None,
    input_shape: Sequence[int] | None = None,
    name: str | None = None,
) -> Expert:
    """A denoiser before a classifier that was trained on clean images.

    One denoiser and one classifier serve every sigma: call this once for each, the weights are shared. Images have the size
    that the denoiser was trained for: to resize a noisy image would change its noise. A classifier of another size resizes what
    the denoiser returns (`load_expert(..., input_size=)`), inside the certified function, so that radii stay in pixels of the
    images.

    Args:
        denoiser: from `load_denoiser`, or a module.
        classifier: its own sigma is not used; its normalisation and resizing are.
        sigma: noise level of the result.
        diffusion: the schedule of a denoiser that is a module (one-shot diffusion); None: what a loaded denoiser's files say,
            and for a module that it maps noisy pixels to clean ones (DnCNN).
        timestep: `"first"` or `"nearest"`, see `Diffusion`; None: as the diffusion says.
        input_shape: `(C, H, W)` of the images; default the denoiser's, where that is known, else the classifier's.
        name: of the result.

    Raises:
        InputError: sigma outside the schedule, or shapes that cannot go together.
    """
    sigma = check_sigma(sigma, "the denoised expert")
    source = denoiser if isinstance(denoiser, Denoiser) else Denoiser(denoiser)
    if diffusion is not None and source.diffusion not in (None, diffusion):
        raise InputError(
            "Two statements about the diffusion",
            expected=f"what the denoiser was loaded with: {source.diffusion}",
            received=str(diffusion),
            remedy="leave diffusion= out",
        )
    origin = source.provenance
    told = source.diffusion is not None or origin is None or origin.architecture not in TIMED
    if not told and origin is not None and (diffusion is None or origin.architecture == OPENAI):
        raise InputError(
            "The denoiser takes a time step, and how it was trained is not known",
            expected="diffusion settings, such as schedule, steps and rescale_timesteps",
            received="none" if diffusion is None else "settings that came after it was loaded",
            remedy="load_denoiser(..., diffusion={...}), as the repository it comes from says; in a spec diffusion = { ... }",
        )
    diffusion = diffusion or source.diffusion
    if diffusion is not None and timestep is not None:
        diffusion = replace(diffusion, timestep=timestep)
    shape = _shape(source, classifier, input_shape)
    kwargs = {"sigma": sigma, "diffusion": None if diffusion is None else diffusion.to_dict()}
    module = _denoised_module(source.module, classifier.network(), kwargs)
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


def _shape(denoiser: Denoiser, classifier: Expert, given: Sequence[int] | None) -> tuple[int, ...]:
    """`(C, H, W)` of the images, which is that of what the denoiser returns."""
    shape = tuple(given or denoiser.shape_for(classifier.input_shape))
    trained = denoiser.shape_for(shape)
    if trained != shape:
        raise InputError(
            "The denoiser was trained on other images",
            expected=str(trained),
            received=str(shape),
            remedy="use images of that shape, or another denoiser: to resize a noisy image would change its noise",
        )
    if shape != classifier.input_shape:
        told = shape[0] == classifier.input_shape[0]
        raise InputError(
            "Denoiser and classifier take different images",
            expected=f"a classifier of images {shape}, as the denoiser returns them",
            received=str(classifier.input_shape),
            remedy=f"load it with input_size={shape[1:]}: it then resizes them itself" if told else "use a classifier for them",
        )
    return shape


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
    return DiffusionDenoised(denoiser, classifier, kwargs["sigma"], make_diffusion(kwargs["diffusion"]))


class _Kwargs(Stored):
    """How a denoised expert is put together."""

    sigma: float
    diffusion: dict[str, Any] | None


def _load_denoised(provenance: Provenance, num_classes: int, sources: Sources) -> nn.Module:
    read = validated(_Kwargs, provenance.kwargs, "A denoised expert's entry", remedy="wrap it anew")
    denoiser, classifier = networks(provenance, sources)
    return _denoised_module(denoiser, classifier, read.model_dump())


LOADERS["denoised"] = _load_denoised
