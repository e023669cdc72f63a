"""A routed classifier as files: `config.json` (pins and structure) and `router.safetensors` (router tensors only)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from rsrouter._version import __version__
from rsrouter.core.errors import CheckpointError, InputError, IntegrityError
from rsrouter.experts.describe import describe_module
from rsrouter.experts.expert import Expert
from rsrouter.experts.places import check_relative, expanded
from rsrouter.experts.pool import ExpertPool, pool_from_dict, pool_to_dict
from rsrouter.experts.provenance import Provenance
from rsrouter.experts.registry import package_of
from rsrouter.files import sha256_of, write_atomically
from rsrouter.hub import Hub, Reference, is_hub_reference
from rsrouter.router import router_from_config
from rsrouter.router.base import Routed, Router, single_tree
from rsrouter.router.stored import Name, StoredRouter
from rsrouter.sampling.execution import Execution
from rsrouter.sampling.noise import NOISES
from rsrouter.stored import Stored, read_json, validated

SCHEMA_VERSION: Literal[2] = 2
CONFIG, WEIGHTS = "config.json", "router.safetensors"


def _noise(name: str) -> str:
    if name not in NOISES:
        raise ValueError(f"one of {', '.join(NOISES)} is needed")
    return name


class RouterConfig(Stored):
    """`config.json` of a saved router.

    Attributes:
        schema_version: 2.
        rsrouter_version: which wrote it.
        pool: as `rsrouter.experts.entries` writes it.
        router, router_digest: kind and settings, and the sha256 over them and the weights.
        execution, noise: how the networks run.
        needs: packages beside rsrouter that build the networks, with the versions they were tested with.
        training: notes.
    """

    schema_version: Literal[2]
    rsrouter_version: Name
    library_name: Literal["rsrouter"]
    pool: dict[str, Any]
    router: StoredRouter
    router_digest: Name
    execution: dict[str, Any]
    noise: Annotated[str, AfterValidator(_noise)]
    needs: Annotated[dict[Name, Name], Field(max_length=100, default_factory=dict)]
    training: dict[str, Any] | None = None


@dataclass(frozen=True)
class Saved:
    """What a saved router consists of.

    Attributes:
        pool: the experts.
        router: which of them answers.
        execution: how the networks run.
        noise: the kind of noise.
    """

    pool: ExpertPool
    router: Router
    execution: Execution
    noise: str

    @cached_property
    def routed(self) -> Routed:
        """The bound classifier."""
        return replace(self.router.bind(self.pool), execution=self.execution, noise=self.noise)

    def alone(self, name: str) -> Routed:
        """One of its experts as a classifier by itself, run the same way."""
        return replace(single_tree(self.pool[name]), execution=self.execution, noise=self.noise)


def _written_down(expert: Expert, folder: Path) -> Expert:
    """The expert itself, or, for one made in memory, the same expert read from files written under `folder`.

    Raises:
        CheckpointError: its module is neither a registered architecture nor a stack of torch.nn layers.
    """
    if expert.provenance is not None:
        return expert
    target = folder / "experts" / expert.name
    target.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.detach().cpu().contiguous().clone() for k, v in expert.module.state_dict().items()}, target / "model.safetensors"
    )
    provenance = Provenance(
        source="local",
        location=str(target),
        filename="model.safetensors",
        sha256=sha256_of(target / "model.safetensors"),
        loader="rsrouter",
        architecture="torch_layers",
        kwargs={"description": describe_module(expert.module)},
    )
    return expert.with_settings(provenance=provenance)


def check_savable(pool: ExpertPool, router: Router | None = None, networks: Iterable[nn.Module] = ()) -> None:
    """Refuses what `save_routed` could not write down, before hours are spent on it.

    Raises:
        CheckpointError: which module, and what to register.
    """
    for module in (*(e.module for e in pool.members if e.provenance is None), *networks):
        describe_module(module)
    if router is not None:
        router.to_config()


def save_routed(folder: Path, pool: ExpertPool, router: Router, execution: Execution, noise: str) -> Path:
    """Writes `config.json` and `router.safetensors` into `folder`; returns it. Experts are pinned, not copied
    (those made in memory are written to `experts/`, and must be put on the Hub before publishing).

    Raises:
        CheckpointError: a router or expert whose structure cannot be written down.
    """
    folder = Path(os.path.abspath(folder))
    check_savable(pool)
    router_config = router.to_config()
    folder.mkdir(parents=True, exist_ok=True)
    in_memory = any(e.provenance is None for e in pool.members)
    pinned = ExpertPool([_written_down(e, folder) for e in pool.members]) if in_memory else pool
    content = {
        "schema_version": SCHEMA_VERSION,
        "rsrouter_version": __version__,
        "library_name": "rsrouter",
        "pool": pool_to_dict(pinned, folder),
        "router": router_config,
        "router_digest": router.digest,
        "execution": execution.to_dict(),
        "noise": noise,
        "needs": {package: version for package, version in needed_packages(pinned, router_config).items() if version},
    }
    config = validated(RouterConfig, content, CONFIG, error=CheckpointError, remedy="use a router that can be written down")
    tensors = {k: _compact(v.detach().cpu().contiguous().clone()) for k, v in router.modules.state_dict().items()}
    write_atomically(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    _write_config(folder, config)
    return folder


def needed_packages(pool: ExpertPool, router_config: Mapping[str, Any]) -> dict[str, str]:
    """Packages beside rsrouter that build the networks, with their versions here; "" for a module that no installed package
    holds, under its own name.

    >>> from rsrouter.demo import load_pool
    >>> needed_packages(load_pool(), {"kind": "cascade"})
    {}
    """
    names, found = _architectures_in(dict(router_config)), set()
    for origin in (origin for expert in pool.members for origin in origins(expert)):
        names |= {origin.architecture} | _architectures_in(origin.kwargs)
        if origin.loader not in ("checkpoint", "rsrouter"):
            found.add(origin.loader)  # a loader that reads with a library is called like it
    found |= {package for name in sorted(names) if (package := package_of(name)) is not None}
    return {package: _version_of(package) for package in sorted(found)}


def _architectures_in(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        own = {value["architecture"]} if isinstance(value.get("architecture"), str) else set()
        return own.union(*map(_architectures_in, value.values()))
    return set().union(*map(_architectures_in, value)) if isinstance(value, list | tuple) else set()


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def check_needs(config: RouterConfig) -> None:
    """Refuses a router whose networks need packages that are not installed here.

    Raises:
        CheckpointError: which ones, and the pip command.
    """
    if missing := {name: version for name, version in config.needs.items() if not _version_of(name)}:
        raise CheckpointError(
            "This router needs packages that are not installed",
            expected=", ".join(f"{name} (tested with {version})" for name, version in missing.items()),
            received="nothing of that name",
            remedy="if you trust them: pip install " + " ".join(f"{name}=={version}" for name, version in missing.items()),
        )


def _compact(tensor: Tensor) -> Tensor:
    """In float16 where that loses nothing (as trained heads are rounded to); loading gives the same float32 numbers back."""
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor


def read_router_config(folder: Path) -> RouterConfig:
    """The checked content of `config.json`.

    Raises:
        InputError: no such file. CheckpointError: not ours, or another schema.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise InputError(
            "No router there",
            expected=f"a folder with {CONFIG} and {WEIGHTS}, or a Hub repository",
            received=str(folder),
            remedy="write it with RoutedSmooth.save_pretrained or `rsrouter train`",
        )
    content = read_json(file, CONFIG, error=CheckpointError, remedy="fetch or save it again")
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION and isinstance(content, dict):
        raise CheckpointError(
            f"{CONFIG} has an unsupported schema version",
            expected=f"schema_version {SCHEMA_VERSION}",
            received=repr(version),
            remedy="it was written by an unreleased version: train the router again (`rsrouter train`)"
            if version == 1
            else "upgrade rsrouter, or check that this is an rsrouter repository",
        )
    return validated(RouterConfig, content, CONFIG, error=CheckpointError, remedy="fetch or save it again")


def store_execution(folder: Path, execution: Execution) -> None:
    """Writes how networks run into a saved router; its weights and digest stay. Tables drawn otherwise cannot be resumed."""
    _write_config(folder, read_router_config(folder).model_copy(update={"execution": execution.to_dict()}))


def rebind(folder: Path, out: Path, entries: list[dict[str, Any]]) -> Path:
    """Writes the router of `folder`, with its README, into the new folder `out`, over experts that are pinned elsewhere.

    Args:
        entries: of the same experts in the same order, as in `pool.json`; equal weights keep the router's certificates.
    """
    out.mkdir()
    for name in (WEIGHTS, "README.md"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    config = read_router_config(folder)
    _write_config(out, config.model_copy(update={"pool": {**config.pool, "experts": entries}}))
    return out


def _write_config(folder: Path, config: RouterConfig) -> None:
    content = config.model_dump(mode="json", exclude={"training"} if config.training is None else None)
    write_atomically(folder / CONFIG, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def router_folder(folder: Path) -> Path:
    """The folder with `config.json`: `folder` itself, or `folder/router` of a whole run."""
    if not (folder / CONFIG).is_file() and (folder / "router" / CONFIG).is_file():
        return folder / "router"
    return folder


def find_tables(folder: Path) -> list[Path]:
    """Results tables that belong to a router: `certificates/*.tsv` in its folder, or of a whole run
    `certificates.tsv` and `experts/*.tsv`; sorted, empty if there are none."""
    found = sorted((folder / "certificates").glob("*.tsv"))
    if not found and (folder / "certificates.tsv").is_file():
        found = [folder / "certificates.tsv", *sorted((folder / "experts").glob("*.tsv"))]
    return found


def load_folder(folder: Path, *, hub: Hub | None = None, allow_local: bool = True) -> Saved:
    """Pool, router, execution and noise of a folder; every expert and the router verified against their digests.

    Raises:
        IntegrityError: weights that are not the ones that were saved.
        CheckpointError, InputError: files that are missing or do not fit.
    """
    config = read_router_config(folder)
    check_needs(config)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{WEIGHTS} cannot be read",
            expected="a safetensors file",
            received=f"{folder / WEIGHTS}: {error}",
            remedy="fetch or save it again",
        ) from error
    described = config.router.model_dump(mode="json")
    with suppress(NotImplementedError), torch.device("meta"):  # shapes first: no memory for what does not fit anyway
        _check_fit(router_from_config(described), tensors)
    router = router_from_config(described)
    _check_fit(router, tensors)
    pool = pool_from_dict(config.pool, folder, hub=hub, allow_local=allow_local)
    router.modules.load_state_dict(tensors, strict=True)
    for module in router.modules.values():
        module.eval().requires_grad_(False)
    if router.digest != config.router_digest:
        raise IntegrityError(
            "The router is not the one that was saved",
            expected=f"digest {config.router_digest}",
            received=f"digest {router.digest}",
            remedy="fetch or save it again; do not use its certificates",
        )
    execution = Execution.from_dict(config.execution, f"{CONFIG} of {folder.name}")
    return Saved(pool, router, execution, config.noise)


def _check_fit(router: Router, tensors: Mapping[str, Tensor]) -> None:
    wanted, found = ({k: tuple(v.shape) for k, v in side.items()} for side in (router.modules.state_dict(), tensors))
    if wanted != found:
        raise CheckpointError(
            f"{WEIGHTS} does not fit {CONFIG}",
            expected=str(wanted)[:500],
            received=str(found)[:500],
            remedy="the two files belong to different routers",
        )


def origins(expert: Expert) -> list[Provenance]:
    """Where the weights of an expert come from: one provenance, or those of its members (composite experts)."""
    return [] if expert.provenance is None else expert.provenance.files()


def resolve_source(
    name: str | Path,
    revision: str | None = None,
    *,
    extra: tuple[str, ...] = (),
    subfolder: str = "",
    **hub_settings: Any,
) -> tuple[Path, Reference | None]:
    """The folder of a router, fetched where `name` is a Hub repository, and then the commit it is.

    Args:
        name: a folder, or `org/name` (or `hf-hub:org/name@revision`).
        revision: branch, tag or commit.
        extra: patterns of further files to fetch, such as `certificates/*`.
        subfolder: of the folder or repository, where the router lies.
        hub_settings: `token`, `cache_dir`, `local_files_only`, `force_download`, as in `huggingface_hub`.

    Raises:
        InputError: neither a folder nor a repository. HubError, IntegrityError: see `rsrouter.hub`.
    """
    folder, inside = expanded(str(name)), check_relative(subfolder, "The argument") if subfolder else ""
    if folder.is_dir():
        if revision is not None:
            raise InputError(
                "A folder has no revisions", expected="revision=None", received=repr(revision), remedy="leave it out"
            )
        return folder / inside, None
    text = str(name)
    if isinstance(name, Path) or not (is_hub_reference(text) or (text.count("/") == 1 and not text.startswith((".", "/", "~")))):
        raise InputError(
            "No router there",
            expected="a folder, or a Hub repository 'org/name'",
            received=text,
            remedy="check the path, or train a router first",
        )
    hub = Hub(**hub_settings)
    reference = hub.reference(text, revision)
    at = f"{inside}/" if inside else ""
    path = hub.fetch(reference, at + CONFIG)
    hub.fetch(reference, at + WEIGHTS)
    if extra:
        hub.snapshot(reference, [at + name for name in (CONFIG, WEIGHTS, *extra)])
    return path.parent, reference


def load_routed(name: str | Path, revision: str | None = None, *, subfolder: str = "", **hub: Any) -> Saved:
    """As `load_folder`, from a folder or from a Hub repository at a revision.

    Args:
        subfolder: of the folder or repository, where the router lies.
        hub: `token`, `cache_dir`, `local_files_only`, `force_download`; they hold for the pinned experts as well.
    """
    folder, reference = resolve_source(name, revision, subfolder=subfolder, **hub)
    with torch.no_grad():
        return load_folder(folder, hub=Hub(**hub), allow_local=reference is None)
