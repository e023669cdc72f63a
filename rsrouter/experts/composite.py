"""What experts made of several networks are pinned by: a digest over their parts and how these are put together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rsrouter.core.errors import IntegrityError
from rsrouter.experts.expert import Normalise, Provenance
from rsrouter.experts.loaders import build_module


def part(
    role: str, provenance: Provenance | None, num_classes: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> dict[str, Any] | None:
    """One network of a composite expert; None where it was made in memory."""
    if provenance is None:
        return None
    return {
        "role": role,
        "num_classes": num_classes,
        "mean": None if mean is None else list(mean),
        "std": None if std is None else list(std),
        "provenance": provenance.to_dict(),
    }


def composite(kind: str, kwargs: dict[str, Any], parts: Sequence[dict[str, Any] | None]) -> Provenance | None:
    """Provenance of a composite expert; None where a part was made in memory."""
    known = [p for p in parts if p is not None]
    if len(known) < len(parts):
        return None
    licences = {p["provenance"]["licence"] for p in known}
    licence = None if None in licences else " AND ".join(sorted(licences))
    return Provenance(
        source="composite",
        location="",
        revision=None,
        filename="",
        sha256=_composite_sha256(kind, kwargs, known),
        loader=kind,
        architecture=kind,
        kwargs=kwargs,
        licence=licence,
        parts=tuple(known),
    )


def _composite_sha256(kind: str, kwargs: dict[str, Any], parts: Sequence[dict[str, Any]]) -> str:
    """sha256 over what the parts are (not where they lie) and how they are put together."""
    told = [
        {
            **{k: p.get(k) for k in ("role", "num_classes", "mean", "std")},
            **{k: p["provenance"].get(k) for k in ("sha256", "loader", "architecture", "kwargs")},
        }
        for p in parts
    ]
    return hashlib.sha256(json.dumps([kind, kwargs, told], sort_keys=True).encode()).hexdigest()


def networks(provenance: Provenance, folder: Path | None) -> list[nn.Module]:
    """The parts of a composite expert, loaded and verified, each with its own normalisation.

    Raises:
        IntegrityError: an entry whose parts or settings are not the pinned ones.
    """
    if _composite_sha256(provenance.loader, provenance.kwargs, provenance.parts) != provenance.sha256:
        raise IntegrityError(
            "A composite expert's entry was changed",
            expected=f"sha256 {provenance.sha256}",
            received="other parts or settings",
            remedy="wrap it anew",
        )
    networks = []
    for part in provenance.parts:
        module = build_module(Provenance.from_dict(part["provenance"]), part["num_classes"], folder)
        if part["mean"] is not None and part["std"] is not None:
            module = nn.Sequential(Normalise(part["mean"], part["std"]), module)
        networks.append(module)
    return networks
