"""`pool.json`: pinned experts as entries of a file. The weights stay where they are."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from rsrouter.core.errors import InputError, IntegrityError
from rsrouter.experts.expert import Expert
from rsrouter.experts.loaders import Sources, make_expert
from rsrouter.experts.preprocessing import Resize
from rsrouter.experts.probe import Probe, take_probe
from rsrouter.experts.provenance import REMEDY, Channels, Name, Order, Provenance, Sha256, Width
from rsrouter.files import write_atomically
from rsrouter.stored import Stored, validated

SCHEMA_VERSION = 2


class Entry(Stored):
    """One expert. Attributes as those of `Expert`; `digest` is what the pins must give."""

    name: Name
    sigma: float
    mean: Channels | None
    std: Channels | None
    resize: Resize | None = None
    order: Order | None = None
    num_classes: Width
    input_shape: tuple[Width, Width, Width]
    labels: tuple[Name, ...] | None = None
    digest: Sha256
    provenance: Provenance
    probe: Probe | None = None
    lipschitz: float | tuple[Channels, ...] | None = None
    rounding: float | None = None
    core: bool = False


class PoolFile(Stored):
    """The content of `pool.json`."""

    schema_version: int
    experts: Annotated[tuple[Entry, ...], Field(max_length=10_000)]
    rsrouter_version: Name | None = None
    description: str | None = None


def expert_to_dict(expert: Expert, folder: Path | None = None) -> dict[str, Any]:
    """JSON-ready entry of one expert.

    Args:
        expert: with a provenance.
        folder: local locations inside it are written relative to it.

    Raises:
        InputError: the expert was made in memory and has no origin to point at.
    """
    if expert.provenance is None:
        raise InputError(
            f"Expert {expert.name!r} has no provenance",
            expected="an expert from load_expert, wrap or a saved pool",
            received="a module made in memory",
            remedy="write it with rsrouter.experts.save_expert and load that folder",
        )
    if expert.beside:
        _settle(expert, folder)
    if expert.probe is None:
        expert.probe = take_probe(expert.network(), expert.input_shape, f"expert {expert.name!r}")
    entry = Entry(
        name=expert.name,
        sigma=expert.sigma,
        mean=expert.mean,
        std=expert.std,
        resize=expert.resize,
        order=expert.order,
        num_classes=expert.num_classes,
        input_shape=expert.input_shape,
        labels=expert.labels,
        digest=expert.digest,
        provenance=moved(expert.provenance, folder),
        probe=expert.probe,
        lipschitz=None if expert.lipschitz is None else expert.lipschitz.constants,
        rounding=None if expert.lipschitz is None else expert.lipschitz.rounding,
        core=expert.core,
    )
    return entry.model_dump(mode="json")


def _settle(expert: Expert, folder: Path | None) -> None:
    """Writes the weight files that were made with an expert, whole or not at all, and points at them."""
    assert expert.provenance is not None
    if folder is None:
        raise InputError(
            f"Expert {expert.name!r} has weights that lie nowhere yet",
            expected="a pool that is saved",
            received=", ".join(expert.beside),
            remedy="save the pool first (ExpertPool.save), and load it from there",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in expert.beside.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != data:
            write_atomically(folder / name, data)
    parts = tuple(
        part.model_copy(update={"provenance": part.provenance.model_copy(update={"location": str(folder)})})
        if part.provenance.source == "local" and part.provenance.filename in expert.beside
        else part
        for part in expert.provenance.parts
    )
    expert.provenance, expert.beside = expert.provenance.model_copy(update={"parts": parts}), {}


def moved(provenance: Provenance, folder: Path | None) -> Provenance:
    """Local locations inside `folder` relative to it."""
    parts = tuple(p.model_copy(update={"provenance": moved(p.provenance, folder)}) for p in provenance.parts)
    location = provenance.location
    if provenance.source == "local" and folder is not None:
        absolute = Path(os.path.abspath(location))
        if absolute.is_relative_to(folder):
            location = absolute.relative_to(folder).as_posix()
    return provenance.model_copy(update={"location": location, "parts": parts})


def _absolute(provenance: Provenance, folder: Path) -> Provenance:
    parts = tuple(p.model_copy(update={"provenance": _absolute(p.provenance, folder)}) for p in provenance.parts)
    location = os.path.abspath(folder / provenance.location) if provenance.source == "local" else provenance.location
    return provenance.model_copy(update={"location": location, "parts": parts})


def expert_from_dict(content: Any, sources: Sources | None = None, *, lazy: bool = False) -> Expert:
    """The expert of a `pool.json` entry.

    Args:
        content: as `expert_to_dict` writes it.
        sources: where files are looked for; relative local locations count from its folder.
        lazy: read and verify the weights when first needed instead of now. Its digest is known without them.

    Raises:
        InputError: keys that are missing or of the wrong kind.
        IntegrityError: the weight file, or the expert built from it, is not what was pinned; a source that is not allowed.
    """
    entry = validated(Entry, content, "An expert's entry", remedy=REMEDY)
    return _expert(entry, sources or Sources(), lazy)


def _expert(entry: Entry, sources: Sources, lazy: bool) -> Expert:
    who = f"Expert {entry.name!r}"
    sources.check(entry.provenance, who)
    if any(not file.tensors or not file.sha256 for file in entry.provenance.files()):
        raise InputError(
            f"{who} is not pinned",
            expected="sha256 and tensors of every weight file",
            received="an entry without them",
            remedy=REMEDY,
        )
    provenance = _absolute(entry.provenance, Path(os.path.abspath(sources.folder or Path())))
    settings = {key: getattr(entry, key) for key in Entry.model_fields if key not in ("digest", "provenance", "probe")}
    expert = make_expert(provenance, settings, sources, probe=entry.probe)
    if expert.digest != entry.digest:
        raise IntegrityError(
            f"{who} is not the one that was saved",
            expected=f"digest {entry.digest}",
            received=f"digest {expert.digest}",
            remedy="its entry was edited: wrap it anew",
        )
    if not lazy:
        expert.module  # noqa: B018  reads and verifies the weights
    return expert


def experts_to_dict(experts: Iterable[Expert], folder: Path | None = None) -> dict[str, Any]:
    """JSON-ready content of `pool.json`."""
    return {"schema_version": SCHEMA_VERSION, "experts": [expert_to_dict(e, folder) for e in experts]}


def experts_from_dict(content: Any, sources: Sources | None = None, *, lazy: bool = False) -> list[Expert]:
    """The experts of a `pool.json`; arguments and errors as in `expert_from_dict`."""
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION and isinstance(content, dict) and "experts" in content:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise InputError(
            "The pool has an unsupported schema version",
            expected=f"schema_version {SCHEMA_VERSION}",
            received=repr(version) + ("" if newer else ", made by an unreleased version"),
            remedy="upgrade rsrouter" if newer else "wrap it again with `rsrouter wrap`",
        )
    pool = validated(PoolFile, content, "A pool", remedy=REMEDY)
    return [_expert(entry, sources or Sources(), lazy) for entry in pool.experts]
