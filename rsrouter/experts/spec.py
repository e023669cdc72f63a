"""`pool.json`: a pool as a file that names its pinned experts. The weights stay where they are."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rsrouter.core.errors import InputError, IntegrityError
from rsrouter.experts.expert import Expert, Provenance
from rsrouter.experts.loaders import make_expert
from rsrouter.experts.pool import ExpertPool

SCHEMA_VERSION = 1
_EXPERT_KEYS = ("name", "sigma", "mean", "std", "num_classes", "input_shape", "digest", "provenance")


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
    return {
        "name": expert.name,
        "sigma": expert.sigma,
        "mean": None if expert.mean is None else list(expert.mean),
        "std": None if expert.std is None else list(expert.std),
        "num_classes": expert.num_classes,
        "input_shape": list(expert.input_shape),
        "digest": expert.digest,
        "provenance": _relative(expert.provenance, folder).to_dict(),
    }


def _relative(provenance: Provenance, folder: Path | None) -> Provenance:
    parts = tuple(
        {**part, "provenance": _relative(Provenance.from_dict(part["provenance"]), folder).to_dict()} for part in provenance.parts
    )
    location = provenance.location
    if provenance.source == "local" and folder is not None:
        absolute = Path(os.path.abspath(location))
        if absolute.is_relative_to(folder):
            location = absolute.relative_to(folder).as_posix()
    return replace(provenance, location=location, parts=parts)


def _absolute(provenance: Provenance, folder: Path) -> Provenance:
    parts = tuple(
        {**part, "provenance": _absolute(Provenance.from_dict(part["provenance"]), folder).to_dict()} for part in provenance.parts
    )
    location = provenance.location
    if provenance.source == "local":
        location = os.path.abspath(folder / location)
    return replace(provenance, location=location, parts=parts)


def expert_from_dict(entry: Mapping[str, Any], folder: Path | None = None, *, lazy: bool = False) -> Expert:
    """The expert of a `pool.json` entry.

    Args:
        entry: as `expert_to_dict` writes it.
        folder: where relative local locations count from.
        lazy: read and verify the weights when first needed instead of now.

    Raises:
        InputError: keys that are missing or of the wrong kind.
        IntegrityError: the weight file, or the expert built from it, is not what was pinned.
    """
    if not isinstance(entry, Mapping) or (missing := [k for k in _EXPERT_KEYS if k not in entry and k != "digest"]):
        raise InputError(
            "An expert's entry is incomplete",
            expected=f"an object with {list(_EXPERT_KEYS)}",
            received=f"without {missing}" if isinstance(entry, Mapping) else type(entry).__name__,
            remedy="write pools with `rsrouter wrap` or ExpertPool.save",
        )
    provenance = _absolute(Provenance.from_dict(entry["provenance"]), Path(os.path.abspath(folder or Path())))
    expert = make_expert(provenance, entry)
    if not lazy:
        pinned = entry.get("digest")
        if pinned is not None and expert.digest != pinned:
            raise IntegrityError(
                f"Expert {expert.name!r} is not the one that was saved",
                expected=f"digest {pinned}",
                received=f"digest {expert.digest}",
                remedy="its entry was edited, or this version builds the architecture differently: wrap it anew",
            )
    return expert


def pool_to_dict(pool: ExpertPool, folder: Path | None = None) -> dict[str, Any]:
    """JSON-ready content of `pool.json`."""
    return {"schema_version": SCHEMA_VERSION, "experts": [expert_to_dict(e, folder) for e in pool]}


def pool_from_dict(content: Mapping[str, Any], folder: Path | None = None, *, lazy: bool = False) -> ExpertPool:
    """The pool of a `pool.json`; arguments and errors as in `expert_from_dict`."""
    if not isinstance(content, Mapping) or not isinstance(content.get("experts"), list):
        raise InputError(
            "This is not a pool",
            expected="an object with schema_version and experts",
            received=type(content).__name__,
            remedy="write pools with `rsrouter wrap` or ExpertPool.save",
        )
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise InputError(
            "The pool has another schema",
            expected=f"schema_version {SCHEMA_VERSION}",
            received=repr(version),
            remedy="upgrade rsrouter" if newer else "wrap the pool anew",
        )
    if unknown := sorted(content.keys() - {"schema_version", "experts", "rsrouter_version", "description"}):
        warnings.warn(f"pool: unknown keys {unknown} are ignored; they may need a newer rsrouter", stacklevel=3)
    return ExpertPool(expert_from_dict(entry, folder, lazy=lazy) for entry in content["experts"])


def pool_path(path: str | os.PathLike[str]) -> Path:
    """`path` itself if it names a `.json` file, else `pool.json` in that folder."""
    file = Path(path).expanduser()
    return file if file.suffix == ".json" else file / "pool.json"


def save_pool(pool: ExpertPool, path: str | os.PathLike[str]) -> Path:
    """Writes `pool.json` in one step (a crash leaves the old file); returns its path."""
    file = Path(os.path.abspath(pool_path(path)))
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(pool_to_dict(pool, file.parent), indent=2, allow_nan=False) + "\n"
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)
    return file


def load_pool(path: str | os.PathLike[str], *, lazy: bool = False) -> ExpertPool:
    """The pool of a `pool.json` (or of the folder that holds one), or of a spec file (`.toml`, `.yaml`).

    Raises:
        InputError: no such file, or not a pool.
        IntegrityError, CheckpointError, HubError: an expert that cannot be had as pinned.
    """
    given = Path(path).expanduser()
    if given.suffix in {".toml", ".yaml", ".yml"}:
        from rsrouter.experts.wrap import wrap

        return wrap(given).pool
    file = pool_path(given)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            "No pool there",
            expected="a pool.json, a folder with one, or a spec file",
            received=str(file),
            remedy="write it with `rsrouter wrap` or ExpertPool.save",
        ) from error
    except ValueError as error:
        raise InputError(
            "The pool file is not JSON",
            expected="a JSON object",
            received=f"{file}: {error}",
            remedy="write pools with `rsrouter wrap` or ExpertPool.save",
        ) from error
    return pool_from_dict(content, Path(os.path.abspath(file.parent)), lazy=lazy)


def provenance_from_dict(content: Mapping[str, Any]) -> Provenance:
    """`Provenance` from JSON; unknown keys warn, missing ones are an InputError."""
    names = {f.name for f in fields(Provenance)}
    if not isinstance(content, Mapping) or (
        missing := sorted({"source", "location", "revision", "filename", "sha256", "loader", "architecture"} - content.keys())
    ):
        raise InputError(
            "A provenance is incomplete",
            expected=f"an object with {sorted(names)}",
            received=f"without {missing}" if isinstance(content, Mapping) else type(content).__name__,
            remedy="write pools with `rsrouter wrap` or ExpertPool.save",
        )
    if unknown := sorted(content.keys() - names):
        warnings.warn(f"provenance: unknown keys {unknown} are ignored; they may need a newer rsrouter", stacklevel=4)
    values = {k: v for k, v in content.items() if k in names}
    return Provenance(**{**values, "parts": tuple(values.get("parts") or ())})
