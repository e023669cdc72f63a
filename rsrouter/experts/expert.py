"""`Expert`: a frozen base classifier with its noise level, normalisation, class names and origin."""

from __future__ import annotations

import copy
import re
import uuid
from collections.abc import Callable, Sequence
from math import isfinite
from numbers import Integral, Real
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from rsrouter.core.errors import InputError, NetworkError
from rsrouter.experts.identity import module_record, module_state
from rsrouter.experts.lipschitz import Constants, Lipschitz, check_constants, compute, try_constants
from rsrouter.experts.preprocessing import Resize, around
from rsrouter.experts.probe import Probe, check_probe
from rsrouter.experts.provenance import Provenance
from rsrouter.experts.tensors import digest_of, tensors_digest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")


def check_sigma(sigma: object, who: str) -> float:
    """A usable sigma, or InputError; a value above 10 is taken for one in /255 units and refused.

    >>> check_sigma(1, "the expert")
    1.0
    """
    if isinstance(sigma, bool) or not isinstance(sigma, Real) or not 0 < sigma < float("inf"):  # type: ignore[operator]
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


def _no_votes(sigma: object, lipschitz: object, who: str) -> float:
    """0, the sigma of a core; InputError where it is to be certified as well."""
    if lipschitz is not None or (sigma is not None and (isinstance(sigma, bool) or sigma != 0)):
        raise InputError(
            f"{who[0].upper()}{who[1:]} is a core, but has a sigma or a Lipschitz constant",
            expected="core=True alone: it answers where nothing is certified, and is never certified itself",
            received=f"sigma={sigma!r}" if lipschitz is None else f"lipschitz={lipschitz!r}"[:200],
            remedy="leave out sigma and lipschitz, or core",
        )
    return 0.0


def _no_noise(sigma: object, who: str) -> float:
    """0, the sigma of a deterministic expert; InputError where another one is given."""
    if sigma is not None and (isinstance(sigma, bool) or sigma != 0):
        raise InputError(
            f"{who[0].upper()}{who[1:]} has a Lipschitz constant and a noise level",
            expected="one of the two: it is certified by one forward pass, or by votes under noise",
            received=f"sigma={sigma!r}",
            remedy="leave out sigma, or leave out lipschitz",
        )
    return 0.0


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


def check_labels(labels: object, num_classes: int, who: str) -> tuple[str, ...] | None:
    """Class names in the order of the logits, or InputError.

    >>> check_labels(["cat", "dog"], 2, "the expert")
    ('cat', 'dog')
    """
    if labels is None:
        return None
    names = tuple(labels) if isinstance(labels, list | tuple) else ()
    fits = all(isinstance(n, str) and 0 < len(n) <= 500 and n.isprintable() for n in names)
    if not fits or len(names) != num_classes or len(set(names)) != num_classes:
        raise InputError(
            f"The class names of {who} do not fit",
            expected=f"{num_classes} different names, in the order of the logits",
            received=repr(labels)[:200],
            remedy="leave labels out where they are not known",
        )
    return names


def refuse_core(expert: Expert, what: str) -> None:
    """Raises InputError where a core is asked for what only an expert can give."""
    if expert.core:
        raise InputError(
            f"{expert.name!r} is a core, and cannot {what}",
            expected="an expert with a sigma, or with a Lipschitz constant",
            received="a core: it answers where nothing is certified, without a certificate",
            remedy="put it beside experts in an ExpertPool; RoutedSmooth then asks it where it would abstain",
        )


def same_labels(experts: Sequence[Expert], who: str) -> tuple[str, ...] | None:
    """The class names that experts share; None where none of them says any.

    Raises:
        InputError: names or an order that differ.
    """
    told = [e for e in experts if e.labels is not None]
    for other in told[1:]:
        first, second = told[0].labels or (), other.labels or ()
        if first != second:
            at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
            order = " (the same names in another order)" if set(first) == set(second) else ""
            raise InputError(
                f"{who[0].upper()}{who[1:]} must agree on the names of the classes",
                expected=f"one list of names in one order; class {at} of {told[0].name!r} is {first[at : at + 1]}",
                received=f"class {at} of {other.name!r} is {second[at : at + 1]}{order}",
                remedy="`rsrouter wrap --label-map first` puts equal names in one order, and --label-map FILE renames them "
                "(in Python: rsrouter.experts.map_labels)",
            )
    return told[0].labels if told else None


class Expert:
    """A frozen base classifier trained for one noise level, or, with `lipschitz`, for none: one forward pass then certifies.

    With `core` it is not an expert that certifies, but the accurate network that answers where a router certifies nothing
    (ACES, Horvath et al. 2022): it stands in an `ExpertPool`, whose `core` it becomes.

    Args:
        module: maps images `(B, C, H, W)` to logits `(B, num_classes)`; called in eval mode without gradients
            and never changed.
        sigma: noise level it is used at, standard deviation for pixels in [0,1]; left out (0) with `lipschitz` and `core`.
        num_classes: width of the logits.
        input_shape: `(C, H, W)` of one image of the data; radii are distances between such images.
        mean, std: per-channel normalisation applied before the module; None for both: it normalises itself.
        resize: how such an image becomes one of the network's size, before the normalisation; None: it is that size.
        order: which of the module's logits each class reads; None: as they come.
        name: unique in its pool; default `sigma_<sigma>`, `lipschitz` or `core`.
        labels: class names in the order of the logits; None where they are not known.
        provenance: where the weights came from; None for a module made in memory, which cannot be published.
        probe: logits that the network gave when it was wrapped; compared when `load` gives the module.
        load: called once for the module when `module` is None (weights are read when first needed).
        lipschitz: of the logits in the L2 norm, as a function of [0,1] pixels, normalisation included: a number, a symmetric
            table of constants of their differences, or `"compute"` for layers that are known (`rsrouter.experts.lipschitz`).
            A declared constant is what certificates rest on; it is tried on pairs of inputs, which proves nothing.
        rounding: by how much a logit of a float64 pass may be wrong; None: computed, or 1e-6 where the constant is declared.
        core: whether it is the core of a pool; its answers carry no certificate.

    Raises:
        NetworkError: a declared constant that does not hold, or layers whose constant cannot be computed.
        InputError: a sigma, shape, class count, normalisation, name or label that cannot be used.

    >>> expert = Expert(nn.Flatten(), sigma=0.5, num_classes=4, input_shape=(1, 2, 2))
    >>> expert, expert.opaque
    (Expert('sigma_0.5', sigma=0.5, num_classes=4, input_shape=(1, 2, 2)), ())
    """

    def __init__(
        self,
        module: nn.Module | None,
        *,
        sigma: float | None = None,
        num_classes: int,
        input_shape: Sequence[int],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        resize: Resize | None = None,
        order: Sequence[int] | None = None,
        name: str | None = None,
        labels: Sequence[str] | None = None,
        provenance: Provenance | None = None,
        probe: Probe | None = None,
        load: Callable[[], nn.Module] | None = None,
        lipschitz: Constants | str | None = None,
        rounding: float | None = None,
        core: bool = False,
    ) -> None:
        who = f"expert {name!r}" if name else "the expert"
        self.core = bool(core)
        if core:
            self.sigma = _no_votes(sigma, lipschitz, who)
        else:
            self.sigma = check_sigma(sigma, who) if lipschitz is None else _no_noise(sigma, who)
        if name is None:
            name = "core" if core else f"sigma_{self.sigma:g}" if lipschitz is None else "lipschitz"
        self.name = name
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
        listed = hasattr(input_shape, "__iter__") and not isinstance(input_shape, str)
        shape = tuple(int(s) if isinstance(s, Integral) else s for s in input_shape) if listed else ()
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
            if not _fits(values, shape[0], word == "std"):
                raise InputError(
                    f"The {word} of expert {self.name!r} does not fit",
                    expected=f"{shape[0]} finite values" + (" above 0" if word == "std" else ""),
                    received=repr(values),
                    remedy="one value per channel",
                )
        if order is not None and sorted(order) != list(range(num_classes)):
            raise InputError(
                f"The order of expert {self.name!r}'s classes does not fit",
                expected=f"each of 0 to {num_classes - 1} once",
                received=repr(order)[:200],
                remedy="reorder by name: `rsrouter wrap --label-map`",
            )
        if module is not None:
            check_values(module, self.name)
        self.resize, self.order = resize, None if order is None else tuple(order)
        self.num_classes, self.input_shape = num_classes, shape
        self.mean = None if mean is None else tuple(float(m) for m in mean)
        self.std = None if std is None else tuple(float(s) for s in std)
        self.labels = check_labels(labels, num_classes, f"expert {self.name!r}")
        if provenance is not None and provenance.source != "composite" and not provenance.tensors and module is not None:
            provenance = provenance.model_copy(update={"tensors": tensors_digest(module)})
        self.provenance, self.probe = provenance, probe
        #: weight files that were made with the expert (text features), by name; written where its pool is saved
        self.beside: dict[str, bytes] = {}
        self._module, self._load = module, load
        self._token = ""
        self._known: str | None = None
        self._opaque: tuple[str, ...] = ()
        self._loaded = None if module is None or provenance is None else module_state(module).digest
        self.lipschitz: Lipschitz | None = None
        if lipschitz == "compute":
            self.lipschitz = compute(self.network(), shape)
        elif lipschitz is not None:
            self.lipschitz = Lipschitz(*check_constants(lipschitz, rounding, num_classes, f"expert {self.name!r}"))
            if module is not None:
                try_constants(self.normalised(module), shape, num_classes, self.lipschitz, f"expert {self.name!r}")
        elif rounding is not None:
            raise InputError(
                f"Expert {self.name!r} has a rounding and no Lipschitz constant",
                expected="lipschitz= with it",
                received=f"rounding={rounding!r}",
                remedy="leave rounding out: votes need none",
            )

    @property
    def module(self) -> nn.Module:
        """The base module (without the normalisation), read and verified on first use.

        Raises:
            IntegrityError: not what was pinned, or it gives other logits than when it was wrapped.
            CheckpointError, HubError: the weights cannot be had.
        """
        if self._module is None:
            assert self._load is not None
            module = self._load()
            if self.probe is not None:
                check_probe(self.normalised(module), self.input_shape, self.probe, f"expert {self.name!r}")
            if self.lipschitz is not None:
                try_constants(
                    self.normalised(module), self.input_shape, self.num_classes, self.lipschitz, f"expert {self.name!r}"
                )
            self._module, self._loaded = module, module_state(module).digest
        return self._module

    def normalised(self, module: nn.Module) -> nn.Module:
        """`module` behind what stands around the expert's own: size, normalisation, order of the classes."""
        return around(module, self.mean, self.std, self.resize, self.order)

    @property
    def surroundings(self) -> dict[str, Any]:
        """What `normalised` puts around a module, JSON-ready; size and order of the classes only where there are any."""
        told: dict[str, Any] = {"mean": self.mean, "std": self.std}
        if self.resize is not None:
            told["resize"] = self.resize.model_dump(mode="json")
        return told if self.order is None else told | {"order": self.order}

    def network(self) -> nn.Module:
        """Pixels in [0,1] to logits: the module (shared, not copied) with what stands around it."""
        return self.normalised(self.module)

    @property
    def pinned(self) -> bool:
        """Whether its identity is that of the files it was read from."""
        return self.provenance is not None and all(file.tensors for file in self.provenance.files())

    @property
    def network_digest(self) -> str:
        """sha256 of what decides its votes at a given sigma: weights, structure, normalisation, shapes."""
        return self._identity()[0]

    @property
    def digest(self) -> str:
        """sha256 of everything the expert is: its network, its sigma, and the names of its classes.

        For a pinned expert it follows from the pins, and nothing is read; for a module made in memory see
        `rsrouter.experts.identity`. It is taken once.
        """
        if self._known is None:
            self._known = self._fresh_digest()
        return self._known

    @property
    def opaque(self) -> tuple[str, ...]:
        """What of a module made in memory could not be read, one sentence each. Where there is any, the expert shares
        votes, seeds and rows of tables with no other object."""
        self.digest  # noqa: B018
        return self._opaque

    def _identity(self) -> tuple[str, tuple[str, ...]]:
        if self.pinned and self.provenance is not None:
            record: dict[str, Any] = self.provenance.network_record(self.num_classes)
            opaque: tuple[str, ...] = ()
        else:
            record, opaque = module_record(self.module)
        told: dict[str, Any] = {"network": record, "num_classes": self.num_classes, "input_shape": self.input_shape}
        told |= {key: value for key, value in self.surroundings.items() if value is not None}
        if opaque:
            self._token = self._token or uuid.uuid4().hex
            told["token"] = self._token
        return digest_of(told), opaque

    def _fresh_digest(self) -> str:
        network, self._opaque = self._identity()
        told: dict[str, Any] = {"network": network, "sigma": self.sigma}
        if self.labels is not None:
            told["labels"] = self.labels
        if self.lipschitz is not None:
            told["lipschitz"] = [self.lipschitz.constants, self.lipschitz.rounding]
        if self.core:
            told["core"] = True
        return digest_of(told)

    def check_unchanged(self) -> None:
        """Raises NetworkError if weights or settings are no longer those that `digest` stands for (it is taken once)."""
        changed = self._known is not None and self._fresh_digest() != self._known
        if not changed and (self._loaded is None or self._module is None or module_state(self._module).digest == self._loaded):
            return
        raise NetworkError(
            f"Expert {self.name!r} was changed after it was wrapped",
            expected=f"what has digest {self.digest}",
            received="other settings" if changed and self.pinned else "other weights, settings, hooks or functions",
            remedy="make a new Expert of the changed module; experts are frozen",
        )

    def with_settings(self, **changes: Any) -> Expert:
        """The same network as another expert.

        Args:
            changes: `sigma`, `name`, `labels`, `order`, `provenance`, `probe`.

        >>> Expert(nn.Flatten(), sigma=0.5, num_classes=4, input_shape=(1, 2, 2)).with_settings(sigma=1.0, name=None)
        Expert('sigma_1', sigma=1, num_classes=4, input_shape=(1, 2, 2))
        """
        kept = ("sigma", "num_classes", "input_shape", "mean", "std", "resize", "order", "name", "labels", "provenance", "probe")
        settings = {key: getattr(self, key) for key in kept}
        if self.lipschitz is not None and "lipschitz" not in changes:
            settings |= {"lipschitz": self.lipschitz.constants, "rounding": self.lipschitz.rounding}
        made = Expert(self.module, **{**settings, "core": self.core, **changes})
        made._token, made.beside = self._token, self.beside
        return made

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: the weights travel, the way to fetch them does not; both sides name it alike."""
        self.digest  # noqa: B018
        return {**self.__dict__, "_module": self.module, "_load": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Expert:
        """Another object, which may be changed: what could not be read of it is its own."""
        made = object.__new__(Expert)
        made.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        made._token, made._known = "", None
        return made

    def __repr__(self) -> str:
        noise = "core" if self.core else f"sigma={self.sigma:g}" if self.lipschitz is None else "deterministic"
        return f"Expert({self.name!r}, {noise}, num_classes={self.num_classes}, input_shape={self.input_shape})"


def _fits(values: object, channels: int, positive: bool) -> bool:
    """Whether a mean or std is one finite number per channel."""
    try:
        numbers = [float(v) for v in values]  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError):
        return False
    return len(numbers) == channels and all(isfinite(v) and (v > 0 or not positive) for v in numbers)
