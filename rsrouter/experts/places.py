"""Where the files of one model lie, a folder or a commit of the Hub, and reading its weights, also from several shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from rsrouter.core.errors import CheckpointError, HubError, InputError, IntegrityError
from rsrouter.experts.checkpoints import LEGACY_SUFFIXES, WeightFile, parse_weights, read_verified
from rsrouter.experts.provenance import Name
from rsrouter.experts.tensors import digest_of
from rsrouter.files import sha256_of
from rsrouter.hub import Hub, Reference, is_hub_reference
from rsrouter.stored import Stored, parse_json, validated

#: folder of the weights that ship with the package (`source="bundled"`)
ASSETS = Path(__file__).resolve().parent.parent / "demo" / "assets"
WEIGHTS = "model.safetensors"
CARD = "README.md"
INDEX = ".safetensors.index.json"
SAFE_NAMES = (WEIGHTS, f"model{INDEX}")
WEIGHT_NAMES = (*SAFE_NAMES, "pytorch_model.bin", "checkpoint.pth.tar")


def check_relative(filename: str, who: str) -> str:
    """A file name from somebody's config: relative, inside its folder; InputError otherwise.

    >>> check_relative("weights/model.safetensors", "The provenance")
    'weights/model.safetensors'
    """
    path = PurePosixPath(filename)
    if not filename or path.is_absolute() or ".." in path.parts or "\\" in filename or ":" in filename or "\0" in filename:
        raise InputError(
            f"{who} names a file outside its folder",
            expected="a relative path without '..'",
            received=repr(filename),
            remedy="do not use this configuration unless you know who wrote it",
        )
    return filename


def expanded(text: str) -> Path:
    """A path with `~` as the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~ of a user that does not exist
        return Path(text)


def hub_name(text: str, base: Path | None = None) -> str:
    """A source as the Hub is asked for it: `timm/NAME`, where no such path exists, is timm's repository of that name.

    >>> hub_name("timm/resnet18.a1_in1k"), hub_name("models/a.pt")
    ('hf-hub:timm/resnet18.a1_in1k', 'models/a.pt')
    """
    short = text.startswith("timm/") and text.count("/") == 1
    return f"hf-hub:{text}" if short and not ((base or Path()) / text).exists() else text


@dataclass(frozen=True)
class Place:
    """A folder of this machine, or a repository at one commit.

    Attributes:
        folder: on this machine; None: on the Hub.
        reference, hub: of the repository.
        only: the weight file that was named by its path.
    """

    folder: Path | None
    reference: Reference | None = None
    hub: Hub | None = None
    only: str | None = None

    def find(self, name: str) -> Path | None:
        """The file on this machine, fetched where needed; None where there is none."""
        if self.reference is not None and self.hub is not None:
            return self.hub.try_fetch(self.reference, name)
        assert self.folder is not None
        return self.folder / name if (self.folder / name).is_file() else None

    def licence(self) -> str | None:
        """The licence in the metadata of the model card; None: no card, or none that says.

        Of a file that was named alone on this machine nothing is read: the card beside it may be about another.
        """
        if self.only is not None:
            return None
        try:
            path = self.find(CARD)
        except HubError as error:
            if isinstance(error.__cause__, FileNotFoundError):  # not in the cache, and the Hub may not be asked
                return None
            raise
        return None if path is None else card_licence(path)

    def weights(self, filename: str | None = None, names: Sequence[str] = WEIGHT_NAMES) -> tuple[str, Path]:
        """Name and path of the weight file: the one that is named, or the first of `names` that is there.

        Raises:
            CheckpointError, HubError: none, or several that cannot be told apart.
        """
        filename = filename or self.only
        if filename is not None:
            check_relative(filename, "The argument")
        if self.reference is not None and self.hub is not None:
            if filename is not None:
                return filename, self.hub.fetch(self.reference, filename)
            path = self.hub.fetch_first(self.reference, names)
            return path.name, path
        assert self.folder is not None
        if filename is not None:
            return filename, self.folder / filename
        named = [name for name in names if (self.folder / name).is_file()]
        others = sorted(
            p.name for p in self.folder.iterdir() if p.suffix in {".safetensors", *LEGACY_SUFFIXES} and p.name not in named
        )
        if named or len(others) == 1:
            return (named or others)[0], self.folder / (named or others)[0]
        raise CheckpointError(
            "The folder has no weight file that can be told apart",
            expected=f"{names[0]}, or exactly one weight file",
            received=f"{others} in {self.folder}",
            remedy="give filename=",
        )

    def where(self, filename: str) -> dict[str, Any]:
        """The location fields of a `Provenance` of one of its files."""
        if self.reference is not None:
            told: dict[str, Any] = {"source": "hub", "location": self.reference.repo_id, "revision": self.reference.revision}
            return {**told, "filename": filename}
        assert self.folder is not None
        folder = Path(os.path.abspath((self.folder / filename).parent))
        told = {"source": "local", "location": str(folder), "revision": None}
        if folder.is_relative_to(ASSETS):
            told |= {"source": "bundled", "location": folder.relative_to(ASSETS).as_posix()}
        return {**told, "filename": Path(filename).name}


def card_licence(path: Path) -> str | None:
    """The licence that a model card's metadata name: `license`, or `license_name` where that is `other`."""
    import yaml  # type: ignore[import-untyped]  # comes with huggingface_hub
    from huggingface_hub.repocard import metadata_load

    try:
        told = metadata_load(path) if path.stat().st_size <= 2**20 else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    told = told if isinstance(told, dict) else {}
    licence = told.get("license")
    if licence == "other":
        licence = told.get("license_name") or licence
    named = licence if isinstance(licence, list) else [licence]
    text = " AND ".join(str(name) for name in named if name)
    return text if 0 < len(text) <= 1_000 else None


def open_place(source: str | os.PathLike[str], revision: str | None = None, **hub_settings: Any) -> Place:
    """The place of a source as `load_expert` takes it.

    Raises:
        CheckpointError: no such file or folder. HubError: no such repository.
    """
    text = hub_name(os.fspath(source))
    if is_hub_reference(text):
        hub = Hub(**hub_settings)
        return Place(None, hub.reference(text, revision), hub)
    given = expanded(text)
    if not os.path.exists(given):
        raise CheckpointError(
            "No such checkpoint",
            expected="a folder, a weight file or hf-hub:org/name@revision",
            received=text,
            remedy="check the path; Hub repositories are written hf-hub:org/name",
        )
    return Place(given) if given.is_dir() else Place(given.parent, only=given.name)


class _Index(Stored):
    """`model.safetensors.index.json`: in which shard each tensor lies."""

    weight_map: Annotated[dict[Name, Name], Field(min_length=1, max_length=1_000_000)]


def read_weights(path: Path, sha256: str | None, beside: Callable[[str], Path]) -> tuple[str, Callable[[], WeightFile]]:
    """The verified bytes of a weight file, or of the shards that an index names.

    Args:
        path: the file.
        sha256: what it was pinned to; None: not yet.
        beside: a file of the same folder by its name.

    Returns:
        The digest of what was read (of an index: over the names and digests of its shards), and the function that parses it.

    Raises:
        CheckpointError: not readable, or shards that do not fit their index. IntegrityError: not what was pinned.
    """
    if not path.name.endswith(INDEX):
        data = read_verified(path, sha256)
        return sha256_of(data), lambda: parse_weights(data, path.name)
    remedy = "fetch the repository again"
    content = parse_json(read_verified(path, None), path.name, error=CheckpointError, remedy=remedy)
    content = {key: content[key] for key in ("weight_map",) if key in content} if isinstance(content, dict) else content
    index = validated(_Index, content, path.name, error=CheckpointError, remedy=remedy)
    names = sorted(set(index.weight_map.values()))
    if not all(name.endswith(".safetensors") for name in names):
        raise CheckpointError(
            f"{path.name} names shards that are not safetensors files",
            expected="*.safetensors",
            received=str(names),
            remedy=remedy,
        )
    shards = {name: read_verified(beside(check_relative(name, path.name)), None) for name in names}
    found = digest_of([[name, sha256_of(data)] for name, data in shards.items()])
    if sha256 is not None and found != sha256:
        raise IntegrityError(
            f"The shards of {path.name} are not those that were pinned",
            expected=f"digest {sha256}",
            received=f"digest {found}",
            remedy="fetch them again, or wrap the pool anew if the change is meant",
        )

    def parse() -> WeightFile:
        tensors: dict[str, Tensor] = {}
        for name, data in shards.items():
            tensors |= parse_weights(data, name).states[""]
        if missing := sorted(index.weight_map.keys() - tensors.keys()):
            raise CheckpointError(
                f"The shards do not hold what {path.name} says",
                expected=f"{len(index.weight_map)} tensors",
                received=f"without {', '.join(missing[:4])}",
                remedy=remedy,
            )
        return WeightFile({"": tensors})

    return found, parse
