"""Experts made of several networks: pinned by their parts and how these are put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rsrouter.experts.expert import Expert
from rsrouter.experts.loaders import Sources, load_network
from rsrouter.experts.preprocessing import around
from rsrouter.experts.provenance import Part, Provenance


def part(role: str, expert: Expert) -> Part | None:
    """One classifier of a composite expert; None where it was made in memory."""
    if expert.provenance is None:
        return None
    return Part(
        role=role,
        num_classes=expert.num_classes,
        mean=expert.mean,
        std=expert.std,
        resize=expert.resize,
        order=expert.order,
        provenance=expert.provenance,
    )


def composite(kind: str, kwargs: dict[str, Any], parts: Sequence[Part | None]) -> Provenance | None:
    """Provenance of a composite expert; None where a part was made in memory."""
    known = tuple(p for p in parts if p is not None)
    if len(known) < len(parts):
        return None
    licences = {p.provenance.licence for p in known}
    licence = None if None in licences else " AND ".join(sorted(filter(None, licences)))
    return Provenance(
        source="composite",
        location="",
        filename="",
        loader=kind,
        architecture=kind,
        kwargs=kwargs,
        licence=licence,
        parts=known,
    )


def networks(provenance: Provenance, sources: Sources) -> list[nn.Module]:
    """The parts of a composite expert, loaded and verified, each with what stands around it."""
    networks = []
    for found in provenance.parts:
        module = load_network(found.provenance, found.num_classes, sources)
        networks.append(around(module, found.mean, found.std, found.resize, found.order))
    return networks
