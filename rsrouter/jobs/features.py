"""A folder of cached noisy features: the declaration, what was drawn, and a file for each image."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rsrouter.core.errors import IntegrityError, ResultsError
from rsrouter.experts.tensors import put_tensor
from rsrouter.files import write_atomically
from rsrouter.results.about import unpack_ids
from rsrouter.results.declared import Declaration
from rsrouter.stored import Stored, read_json, validated

DECLARATION, DRAWN = "declaration.json", "drawn.json"


class Drawn(Stored):
    """What a folder of features holds, and where it was drawn.

    Attributes:
        declaration: digest of the declaration whose noise it is.
        data: description of the data set.
        indices: image ids in their order, as runs (`pack_ids`).
        device, versions, instructions, threads: of the machine that ran the trunk.
    """

    kind: Literal["rsrouter-features"] = "rsrouter-features"
    schema_version: Literal[1] = 1
    declaration: str
    data: dict[str, Any]
    indices: tuple[tuple[int, int, int], ...]
    device: str
    versions: dict[str, str] = Field(default_factory=dict)
    instructions: str
    threads: int

    @cached_property
    def order(self) -> list[int]:
        """Image ids."""
        return [int(i) for i in unpack_ids(self.indices)]


@dataclass(frozen=True)
class Cached:
    """Features of one image's noisy copies.

    Attributes:
        idx: image id.
        label: copied into tables, and used for nothing else.
        identity: hex name of the image in its noise streams.
        select, estimate: float32 `(n0, F)` and `(n, F)`; rows of NaN are not votes.
    """

    idx: int
    label: int
    identity: str
    select: Tensor
    estimate: Tensor

    def digest(self, declaration: str) -> str:
        """sha256 of everything here, and of the declaration that it belongs to."""
        digest = hashlib.sha256(repr(("rsrouter-features", declaration, self.idx, self.label, self.identity)).encode())
        for name, tensor in (("select", self.select), ("estimate", self.estimate)):
            put_tensor(digest, name, tensor)
        return digest.hexdigest()


@dataclass(frozen=True)
class Features:
    """An opened folder.

    Attributes:
        folder: where.
        declaration: of the heads that may be certified on it.
        drawn: what it holds.
    """

    folder: Path
    declaration: Declaration
    drawn: Drawn

    @classmethod
    def begin(cls, folder: Path, declaration: Declaration, drawn: Drawn) -> Self:
        """The folder for a draw, made where there is none.

        Raises:
            IntegrityError: it is another declaration's, or another draw's.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "features").mkdir(exist_ok=True)
        write_declaration(folder, declaration)
        if (folder / DRAWN).is_file():
            there = cls.open(folder).drawn
            differs = [key for key, value in drawn.model_dump().items() if there.model_dump()[key] != value]
            if differs:
                raise IntegrityError(
                    "The folder holds features of another draw",
                    expected=", ".join(f"{key} {str(getattr(there, key))[:80]}" for key in differs),
                    received=", ".join(f"{key} {str(getattr(drawn, key))[:80]}" for key in differs),
                    remedy="run the same command on the same machine, or give another folder",
                )
        else:
            write_atomically(folder / DRAWN, _json(drawn.model_dump(mode="json")))
        return cls(folder, declaration, drawn)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """A folder of `draw_features`.

        Raises:
            IntegrityError: no such folder, or one whose declaration was edited after the draw.
        """
        declaration = Declaration.load(folder / DECLARATION)
        remedy = "draw the features with `rsrouter heads draw`"
        content = read_json(folder / DRAWN, DRAWN, error=IntegrityError, remedy=remedy)
        drawn = validated(Drawn, content, DRAWN, error=IntegrityError, remedy=remedy)
        if drawn.declaration != declaration.digest:
            raise _other(declaration.digest, drawn.declaration)
        return cls(folder, declaration, drawn)

    def path(self, idx: int) -> Path:
        """The file of an image."""
        return self.folder / "features" / f"{idx:08d}.safetensors"

    def require_whole(self) -> None:
        """Raises ResultsError while images have no features."""
        missing = [i for i in self.drawn.order if not self.path(i).is_file()]
        if missing:
            raise ResultsError(
                "Not all features are drawn",
                expected=f"{len(self.drawn.order)} images",
                received=f"{len(self.drawn.order) - len(missing)}, none of image {missing[0]}",
                remedy="run the same `rsrouter heads draw` again: it goes on where it stopped",
            )

    def keep(self, cached: Cached) -> None:
        """Writes the features of an image, whole or not at all."""
        told = {
            "declaration": self.declaration.digest,
            "idx": str(cached.idx),
            "label": str(cached.label),
            "identity": cached.identity,
            "sha256": cached.digest(self.declaration.digest),
        }
        write_atomically(self.path(cached.idx), save({"select": cached.select, "estimate": cached.estimate}, told))

    def load(self, idx: int) -> Cached:
        """The features of an image.

        Raises:
            IntegrityError: a file that is torn, edited, of another image, or of another declaration.
        """
        path = self.path(idx)
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
                cached = Cached(
                    int(told["idx"]),
                    int(told["label"]),
                    told["identity"],
                    file.get_tensor("select"),
                    file.get_tensor("estimate"),
                )
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise IntegrityError(
                f"Features of image {idx} cannot be read",
                expected=f"{path.name}, as `rsrouter heads draw` writes it",
                received=f"{type(error).__name__}: {error}",
                remedy="delete the file and run the same draw again",
            ) from error
        if told.get("declaration") != self.declaration.digest:
            raise _other(self.declaration.digest, str(told.get("declaration")))
        told_n, width = self.declaration, self.declaration.features
        shapes = [tuple(cached.select.shape), tuple(cached.estimate.shape)]
        if (
            cached.idx != idx
            or shapes != [(told_n.n0, width), (told_n.n, width)]
            or told.get("sha256") != cached.digest(self.declaration.digest)
        ):
            raise IntegrityError(
                f"Features of image {idx} are not those that were drawn",
                expected=f"sha256 {told.get('sha256')}, {told_n.n0} and {told_n.n} rows of {width}",
                received=f"sha256 {cached.digest(self.declaration.digest)}, image {cached.idx}, {shapes}",
                remedy="delete the file and run the same draw again",
            )
        return cached


def write_declaration(folder: Path, declaration: Declaration) -> None:
    """Puts a declaration into its folder.

    Raises:
        IntegrityError: another one is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / DECLARATION
    if path.is_file():
        if (there := Declaration.load(path)).digest != declaration.digest:
            raise _other(there.digest, declaration.digest)
        return
    write_atomically(path, _json(declaration.to_dict()))


def _other(expected: str, received: str) -> IntegrityError:
    return IntegrityError(
        "The features belong to another declaration",
        expected=f"declaration {expected}",
        received=f"declaration {received}",
        remedy="restore the declaration, or draw anew into another folder: other heads, votes or alpha need other noise",
    )


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


__all__ = ["Cached", "Drawn", "Features", "write_declaration"]
