"""Where an expert's weights came from, and what pins them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from rsrouter.core.errors import InputError
from rsrouter.experts.preprocessing import Resize
from rsrouter.stored import Stored, validated

#: bounds of what a stored form may say; larger is a mistake or an attack
Name = Annotated[str, Field(max_length=1_000)]
Width = Annotated[int, Field(ge=1, le=1_000_000)]
Channels = Annotated[tuple[float, ...], Field(max_length=1_000)]
Order = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=1_000_000)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
REMEDY = "write pools with `rsrouter wrap` or ExpertPool.save"


class Part(Stored):
    """One network of a composite expert.

    Attributes:
        role: `"member"`, `"denoiser"` or `"classifier"`.
        num_classes: width of its logits (2 for a denoiser, which has none).
        mean, std: per-channel normalisation before it; None: none.
        resize, order: as in `Expert`.
        provenance: where it came from.
    """

    role: Name
    num_classes: Width
    mean: Channels | None
    std: Channels | None
    resize: Resize | None = None
    order: Order | None = None
    provenance: Provenance

    def record(self) -> dict[str, Any]:
        """What pins it, as JSON-ready values."""
        network = self.provenance.network_record(self.num_classes)
        told: dict[str, Any] = {"role": self.role, "mean": self.mean, "std": self.std, "network": network}
        if self.resize is not None:
            told["resize"] = self.resize.model_dump(mode="json")
        return told if self.order is None else {**told, "order": self.order}


class Provenance(Stored):
    """Where an expert came from, enough to fetch and verify it again.

    Attributes:
        source: `"hub"`, `"local"` or `"bundled"`; `"composite"` for experts made of several networks.
        location: repository id, or path as the user gave it.
        revision: full commit hash for the Hub, else None.
        filename: file inside the repository or folder.
        sha256: digest of that file; empty for a composite.
        tensors: digest of the weights that it holds, as `rsrouter.experts.tensors.tensors_digest` gives it for the module
            they were loaded into: the same whatever kind of file they lie in. Empty for a composite.
        loader: name of the loader that reads it (`rsrouter.experts.LOADERS`).
        architecture: name in the architecture registry, or a timm model name.
        kwargs: keyword arguments of the architecture.
        licence: licence of the weights, as stated by their publisher; None if nothing is stated.
        weights_key: the entry of the file that holds the weights, where the user named one.
        parts: of a composite, its networks.
    """

    source: Literal["hub", "local", "bundled", "composite"]
    location: Name
    revision: Name | None = None
    filename: Name
    sha256: Sha256 | Literal[""] = ""
    tensors: Sha256 | Literal[""] = ""
    loader: Name
    architecture: Name
    kwargs: Annotated[dict[str, Any], Field(default_factory=dict)]
    licence: Name | None = None
    weights_key: Name | None = None
    parts: Annotated[tuple[Part, ...], Field(max_length=1_000)] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready copy.

        >>> provenance = Provenance(source="local", location="a", filename="m.pt", loader="checkpoint", architecture="x")
        >>> Provenance.from_dict(provenance.to_dict()) == provenance
        True
        """
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, content: Any) -> Provenance:
        """Back from JSON.

        Raises:
            InputError: something is missing, or of another kind.
        """
        return validated(cls, content, "A provenance", error=InputError, remedy=REMEDY)

    def files(self) -> list[Provenance]:
        """The provenance of every weight file: itself, or those of its parts."""
        return [self] if self.source != "composite" else [file for part in self.parts for file in part.provenance.files()]

    def network_record(self, num_classes: int) -> dict[str, Any]:
        """What pins the network, as JSON-ready values; not where it lies."""
        if self.source == "composite":
            parts = [part.record() for part in self.parts]
            return {"composite": self.loader, "kwargs": self.kwargs, "parts": parts}
        return network_record(self.architecture, self.kwargs, num_classes, self.tensors)


def network_record(architecture: str, kwargs: Mapping[str, Any], num_classes: int | None, tensors: str) -> dict[str, Any]:
    """A network of a registered architecture as JSON-ready values: the same for a module in memory and for its pins."""
    kwargs = dict(kwargs)
    if architecture == "torch_layers":
        description = kwargs.get("description")
        if not isinstance(description, dict) or "architecture" not in description:
            return {"layers": description, "tensors": tensors}
        architecture, kwargs = str(description["architecture"]), dict(description.get("kwargs", {}))
        num_classes = kwargs.pop("num_classes", None)
    return {"architecture": architecture, "kwargs": kwargs, "num_classes": num_classes, "tensors": tensors}


Part.model_rebuild()
