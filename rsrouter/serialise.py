"""A routed classifier as files: `config.json` (pins and structure) and `router.safetensors` (router tensors only)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from rsrouter._version import __version__
from rsrouter.core.errors import CheckpointError, InputError, IntegrityError
from rsrouter.experts.describe import describe_module
from rsrouter.experts.expert import Expert
from rsrouter.experts.pool import ExpertPool, pool_from_dict, pool_to_dict
from rsrouter.experts.provenance import Provenance
from rsrouter.files import sha256_of, write_atomically
from rsrouter.hub import Hub, Reference, is_hub_reference
from rsrouter.router import router_from_config
from rsrouter.router.base import Routed, Router, single_tree
from rsrouter.sampling.execution import Execution
from rsrouter.stored import Stored, read_json, validated

SCHEMA_VERSION: Literal[2] = 2
CONFIG, WEIGHTS = "config.json", "router.safetensors"


class RouterConfig(Stored):
    """`config.json` of a saved router.

    Attributes:
        schema_version: 2.
        rsrouter_version: which wrote it.
        pool: as `rsrouter.experts.spec` writes it.
        router, router_digest: kind and settings, and the sha256 over them and the weights.
        execution, noise: how the networks run.
        training: notes.
    """

    schema_version: Literal[2]
    rsrouter_version: str
    library_name: Literal["rsrouter"]
    pool: dict[str, Any]
    router: dict[str, Any]
    router_digest: str
    execution: dict[str, Any]
    noise: str
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


def save_routed(folder: Path, pool: ExpertPool, router: Router, execution: Execution, noise: str) -> Path:
    """Writes `config.json` and `router.safetensors` into `folder`; returns it. Experts are pinned, not copied
    (those made in memory are written to `experts/`, and must be put on the Hub before publishing).

    Raises:
        CheckpointError: a router or expert whose structure cannot be written down.
    """
    folder = Path(os.path.abspath(folder))
    router_config = router.to_config()
    described = [describe_module(e.module) for e in pool if e.provenance is None]  # refuse before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    pinned = ExpertPool([_written_down(e, folder) for e in pool]) if described else pool
    config = RouterConfig(
        schema_version=SCHEMA_VERSION,
        rsrouter_version=__version__,
        library_name="rsrouter",
        pool=pool_to_dict(pinned, folder),
        router=router_config,
        router_digest=router.digest,
        execution=execution.to_dict(),
        noise=noise,
    )
    tensors = {k: _compact(v.detach().cpu().contiguous().clone()) for k, v in router.modules.state_dict().items()}
    write_atomically(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    _write_config(folder, config)
    return folder


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
            f"{CONFIG} has another schema",
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


def _write_config(folder: Path, config: RouterConfig) -> None:
    content = config.model_dump(exclude_none=True)
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
    pool = pool_from_dict(config.pool, folder, hub=hub, allow_local=allow_local)
    router = router_from_config(config.router)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{WEIGHTS} cannot be read",
            expected="a safetensors file",
            received=f"{folder / WEIGHTS}: {error}",
            remedy="fetch or save it again",
        ) from error
    state = router.modules.state_dict()
    if {k: tuple(v.shape) for k, v in state.items()} != {k: tuple(v.shape) for k, v in tensors.items()}:
        raise CheckpointError(
            f"{WEIGHTS} does not fit {CONFIG}",
            expected=str({k: tuple(v.shape) for k, v in state.items()}),
            received=str({k: tuple(v.shape) for k, v in tensors.items()}),
            remedy="the two files belong to different routers",
        )
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


def origins(expert: Expert) -> list[Provenance]:
    """Where the weights of an expert come from: one provenance, or those of its members (composite experts)."""
    return [] if expert.provenance is None else expert.provenance.files()


def resolve_source(
    name: str | Path,
    revision: str | None = None,
    *,
    extra: tuple[str, ...] = (),
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[Path, Reference | None]:
    """The folder of a router, fetched where `name` is a Hub repository, and then the commit it is.

    Args:
        name: a folder, or `org/name` (or `hf-hub:org/name@revision`).
        revision: branch, tag or commit.
        extra: patterns of further files to fetch, such as `certificates/*`.
        token, cache_dir, local_files_only: as in `huggingface_hub`.

    Raises:
        InputError: neither a folder nor a repository. HubError, IntegrityError: see `rsrouter.hub`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InputError(
                "A folder has no revisions", expected="revision=None", received=repr(revision), remedy="leave it out"
            )
        return folder, None
    text = str(name)
    if isinstance(name, Path) or not (is_hub_reference(text) or (text.count("/") == 1 and not text.startswith((".", "/", "~")))):
        raise InputError(
            "No router there",
            expected="a folder, or a Hub repository 'org/name'",
            received=text,
            remedy="check the path, or train a router first",
        )
    hub = Hub(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    reference = hub.reference(text, revision)
    path = hub.fetch(reference, CONFIG)
    hub.fetch(reference, WEIGHTS)
    if extra:
        hub.snapshot(reference, [CONFIG, WEIGHTS, *extra])
    return path.parent, reference


def load_routed(name: str | Path, revision: str | None = None, **hub: Any) -> Saved:
    """As `load_folder`, from a folder or from a Hub repository at a revision.

    Args:
        hub: `token`, `cache_dir`, `local_files_only`; they hold for the pinned experts as well.
    """
    folder, reference = resolve_source(name, revision, **hub)
    with torch.no_grad():
        return load_folder(folder, hub=Hub(**hub), allow_local=reference is None)
