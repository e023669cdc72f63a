"""`Expert` and `ExpertPool`: frozen base classifiers with their noise level, normalisation and origin."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import isfinite
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rsrouter.core.errors import InputError, NetworkError
from rsrouter.experts.identity import module_digest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")


@dataclass(frozen=True)
class Provenance:
    """Where an expert came from, enough to fetch and verify it again.

    Attributes:
        source: `"hub"`, `"local"` or `"bundled"`.
        location: repository id, or path as the user gave it.
        revision: full commit hash for the Hub, else None.
        filename: file inside the repository or folder.
        sha256: digest of that file.
        loader: name of the loader that reads it (`rsrouter.experts.LOADERS`).
        architecture: name in the architecture registry, or a timm model name.
        kwargs: keyword arguments of the architecture.
        licence: licence of the weights, as stated by their publisher; None if nothing is stated.
        parts: for composite experts (`source="composite"`), the settings of each member as JSON-ready dictionaries,
            with its own `provenance`.
    """

    source: str
    location: str
    revision: str | None
    filename: str
    sha256: str
    loader: str
    architecture: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    licence: str | None = None
    parts: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        content = asdict(self)
        content["parts"] = list(content["parts"])
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Provenance:
        """Back from JSON; InputError where something is missing."""
        from rsrouter.experts.spec import provenance_from_dict

        return provenance_from_dict(content)


class Normalise(nn.Module):
    """`(x - mean) / std` per channel, the usual first layer of a classifier on [0,1] pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def check_sigma(sigma: object, who: str) -> float:
    """A usable sigma, or InputError; a value above 10 is taken for one in /255 units and refused."""
    if isinstance(sigma, bool) or not isinstance(sigma, Real) or not isfinite(sigma) or float(sigma) <= 0:
        raise InputError(
            f"{who} has no usable sigma",
            expected="a finite standard deviation above 0",
            received=repr(sigma),
            remedy="give the sigma the model was trained with; a checkpoint does not carry it",
        )
    sigma = float(sigma)
    if sigma > 10:
        raise InputError(
            f"The sigma of {who} looks like /255 units",
            expected="a standard deviation for pixels in [0,1]",
            received=f"{sigma:g}",
            remedy=f"divide by 255: sigma={sigma / 255:.4g}",
        )
    return sigma


def check_values(module: nn.Module, name: str) -> None:
    """NetworkError where parameters have no values yet."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(is_lazy(t) or t.is_meta for t in tensors):
        raise NetworkError(
            f"Network {name!r} has parameters without values",
            expected="weights that are loaded",
            received="lazy parameters" if any(is_lazy(t) for t in tensors) else "tensors on the meta device",
            remedy="run the module once on a batch, or load its weights, before it is wrapped",
        )


class Expert:
    """A frozen base classifier trained for one noise level.

    Args:
        module: maps images `(B, C, H, W)` to logits `(B, num_classes)`; called in eval mode without gradients
            and never changed.
        sigma: noise level it is used at, standard deviation for pixels in [0,1].
        num_classes: width of the logits.
        input_shape: `(C, H, W)` of one image.
        mean, std: per-channel normalisation applied before the module; None for both: it normalises itself.
        name: unique in its pool; default `sigma_<sigma>`.
        provenance: where the weights came from; None for a module made in memory, which cannot be published.
        load: called once for the module when `module` is None (weights are read when first needed).

    Raises:
        InputError: a sigma, shape, class count, normalisation or name that cannot be used.
    """

    def __init__(
        self,
        module: nn.Module | None,
        *,
        sigma: float,
        num_classes: int,
        input_shape: Sequence[int],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        name: str | None = None,
        provenance: Provenance | None = None,
        load: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.sigma = check_sigma(sigma, f"expert {name!r}" if name else "the expert")
        self.name = f"sigma_{self.sigma:g}" if name is None else name
        if not isinstance(self.name, str) or not _NAME.match(self.name):
            raise InputError(
                "An expert's name is not usable",
                expected="letters, digits, '.', '_' and '-'",
                received=repr(name),
                remedy="choose a name that can stand in a file name",
            )
        if (module is None) == (load is None) or not (module is None or isinstance(module, nn.Module)):
            raise InputError(
                f"Expert {self.name!r} needs a module",
                expected="a torch.nn.Module that returns logits",
                received=type(module).__name__,
                remedy="wrap a function in a small nn.Module",
            )
        if isinstance(num_classes, Integral) and not isinstance(num_classes, bool):
            num_classes = int(num_classes)  # numpy's
        if num_classes == 1 and type(num_classes) is int:
            raise InputError(
                f"Expert {self.name!r} has one logit",
                expected="a logit for each class, num_classes >= 2",
                received="num_classes=1",
                remedy="one logit z votes as two classes: wrap the module so that it returns "
                "torch.cat([torch.zeros_like(z), z], 1), z of shape (n, 1), and give num_classes=2",
            )
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise InputError(
                f"Expert {self.name!r} needs its number of classes",
                expected="num_classes >= 2",
                received=repr(num_classes),
                remedy="give the width of the logits",
            )
        shape = tuple(int(s) if isinstance(s, Integral) else s for s in input_shape)
        if len(shape) != 3 or not all(isinstance(s, int) and s > 0 for s in shape):
            raise InputError(
                f"Expert {self.name!r} needs an input shape",
                expected="(C, H, W), positive integers",
                received=repr(input_shape),
                remedy="for CIFAR: (3, 32, 32)",
            )
        if (mean is None) != (std is None):
            raise InputError(
                f"Expert {self.name!r} has half a normalisation",
                expected="mean and std, or neither",
                received=f"mean={mean!r}, std={std!r}",
                remedy="std=(1, ...) for models that only centre",
            )
        for word, values in (("mean", mean), ("std", std)):
            if values is None:
                continue
            if len(values) != shape[0] or not all(isfinite(v) for v in values) or (word == "std" and min(values) <= 0):
                raise InputError(
                    f"The {word} of expert {self.name!r} does not fit",
                    expected=f"{shape[0]} finite values" + (" above 0" if word == "std" else ""),
                    received=repr(values),
                    remedy="one value per channel",
                )
        if module is not None:
            check_values(module, self.name)
        self._module, self._load = module, load
        self.num_classes, self.input_shape = num_classes, shape
        self.mean = None if mean is None else tuple(float(m) for m in mean)
        self.std = None if std is None else tuple(float(s) for s in std)
        self.provenance = provenance

    @property
    def module(self) -> nn.Module:
        """The base module (without the normalisation), read on first use."""
        if self._module is None:
            assert self._load is not None
            self._module = self._load()
        return self._module

    def network(self) -> nn.Module:
        """Pixels in [0,1] to logits: the normalisation, if any, and the module (shared, not copied)."""
        if self.mean is None or self.std is None:
            return self.module
        return nn.Sequential(Normalise(self.mean, self.std), self.module)

    @cached_property
    def digest(self) -> str:
        """sha256 of everything that decides a vote: weights, structure, sigma, normalisation."""
        return self._fresh_digest()

    def _fresh_digest(self) -> str:
        return module_digest(self.module, self.sigma, self.num_classes, self.input_shape, self.mean, self.std)

    def check_unchanged(self) -> None:
        """Raises NetworkError if weights or settings are no longer those that `digest` stands for (it is taken once)."""
        if "digest" in self.__dict__ and self._fresh_digest() != self.digest:
            raise NetworkError(
                f"Expert {self.name!r} was changed after it was wrapped",
                expected=f"what has digest {self.digest}",
                received=f"digest {self._fresh_digest()}",
                remedy="make a new Expert of the changed module; experts are frozen",
            )

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: the weights travel, the way to fetch them does not."""
        return {**self.__dict__, "_module": self.module, "_load": None}

    def __repr__(self) -> str:
        return f"Expert({self.name!r}, sigma={self.sigma:g}, num_classes={self.num_classes}, input_shape={self.input_shape})"
