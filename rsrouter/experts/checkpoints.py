"""Reading weights without running code: safetensors, and legacy pickles through torch's restricted unpickler.

Every reader takes the file's bytes, so that what was hashed is what is parsed, and looks at the content, not at the suffix.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import stat
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from rsrouter.core.errors import CheckpointError, IntegrityError
from rsrouter.files import sha256_of

LEGACY_SUFFIXES = (".pt", ".pth", ".tar", ".ckpt", ".bin")
MOST_BYTES = 64 * 2**30


@dataclass(frozen=True)
class WeightFile:
    """What a weight file holds.

    Attributes:
        states: named tensors, by the entry of the file they stand under; "" for a file that is one state dict itself.
        metadata: the other simple entries (`epoch`, `arch`).
    """

    states: dict[str, dict[str, Tensor]]
    metadata: dict[str, Any] = field(default_factory=dict)


def read_verified(path: Path, sha256: str | None) -> bytes:
    """The bytes of a regular file, after comparing their sha256 (None: not pinned yet).

    Raises:
        CheckpointError: missing, unreadable, no regular file, or too large.
        IntegrityError: other content than was pinned.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
            raise CheckpointError(
                f"Cannot read {path.name}",
                expected=f"a regular file of at most {MOST_BYTES >> 30} GiB",
                received=f"{path}: {found.st_size} bytes" if stat.S_ISREG(found.st_mode) else f"{path}: a folder, pipe or device",
                remedy="give the weight file itself",
            )
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Cannot read {path.name}",
            expected="a readable weight file",
            received=f"{path}: {getattr(error, 'strerror', None) or error}",
            remedy="check the path; relative ones count from the folder of the pool or spec file",
        ) from error
    if sha256 is not None and (digest := sha256_of(data)) != sha256:
        raise IntegrityError(
            f"{path.name} is not the file that was pinned",
            expected=f"sha256 {sha256}",
            received=f"sha256 {digest} ({len(data)} bytes) in {path}",
            remedy="fetch the file again (delete a cached copy), or wrap the pool anew if the change is meant",
        )
    return data


def parse_weights(data: bytes, filename: str) -> WeightFile:
    """The named tensors in a weight file's bytes: safetensors, or what the restricted unpickler gives.

    Raises:
        CheckpointError: no weights (said by content), damaged, or a pickle that wants to import or run something.
    """
    if not data:
        raise CheckpointError(f"{filename} is empty", expected="a weight file", received="0 bytes", remedy="fetch it again")
    _refuse_other_files(data, filename)
    if _is_safetensors(data) or filename.endswith(".safetensors"):
        try:
            return WeightFile({"": parse_safetensors(data)})
        except (SafetensorError, ValueError, KeyError, OverflowError, AttributeError) as error:
            raise CheckpointError(
                f"{filename} is not a readable safetensors file",
                expected="a complete safetensors file",
                received=f"{len(data)} bytes: {error}",
                remedy="fetch or copy it again; it looks truncated",
            ) from error
    return _states_of(_unpickle(data, filename), filename)


def _is_safetensors(data: bytes) -> bool:
    size = int.from_bytes(data[:8], "little")
    if not 2 <= size <= min(len(data) - 8, 100 * 2**20) or data[8:9] != b"{":
        return False
    try:
        return isinstance(json.loads(data[8 : 8 + size]), dict)
    except (ValueError, RecursionError):
        return False


def _refuse_other_files(data: bytes, filename: str) -> None:
    """Raises CheckpointError for files that are often found in the place of weights."""
    start = data[:512].lstrip().lower()
    found = None
    if data.startswith(b"version https://git-lfs"):
        found = "a Git LFS pointer, not the weights themselves", "run `git lfs pull` in that repository, or download the file"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        found = "a web page", "download it again: the address gives a page (a login, a warning, an error), not the file"
    elif data[:2] == b"\x1f\x8b":
        inner = _unzipped(data)
        found = f"compressed with gzip{inner}", "unpack it first: gunzip, or tar -xzf"
    elif data[:6] == b"\xfd7zXZ\x00" or data[:3] == b"BZh" or data[:4] == b"\x28\xb5\x2f\xfd":
        found = "compressed (xz, bzip2 or zstandard)", "unpack it first"
    elif data[257:262] == b"ustar" and not _is_old_torch_tar(data):
        found = f"a tar archive of {_tar_names(data)}", "unpack it with tar -xf, and give the weight file inside"
    elif start.startswith((b"{", b"[")) and start[:1] != b"\x80":
        found = "JSON text", "give the weight file beside it; a sharded checkpoint is to be merged into one file first"
    elif data[:8] == b"\x89HDF\r\n\x1a\n":
        found = "an HDF5 file (Keras)", "convert it to PyTorch in the code base that made it"
    elif data[:6] == b"\x93NUMPY":
        found = "a NumPy array", "save a state dict of tensors"
    if found is not None:
        raise CheckpointError(
            f"{filename} is not a weight file",
            expected="safetensors, or a state dict saved by torch.save",
            received=f"{found[0]} ({len(data)} bytes)",
            remedy=found[1],
        )


def _unzipped(data: bytes) -> str:
    try:
        with gzip.open(io.BytesIO(data)) as file:
            inner = file.read(512)
    except (OSError, EOFError, ValueError):
        return ""
    return ", a tar archive inside" if inner[257:262] == b"ustar" else ""


def _tar_names(data: bytes) -> str:
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            return ", ".join(archive.getnames()[:4]) or "nothing"
    except (tarfile.TarError, OSError, ValueError):
        return "something unreadable"


def _is_old_torch_tar(data: bytes) -> bool:
    return "storages" in _tar_names(data)


def _unpickle(data: bytes, filename: str) -> object:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        wanted = re.search(r"(?:GLOBAL|global|type|class)\s+`?([A-Za-z_][\w]*(?:\.\w+)+)", text)
        if wanted or "Unsupported" in text or "persistent" in text:
            raise CheckpointError(
                f"{filename} was refused: it is a pickle that needs more than tensors",
                expected="a state dict of tensors (torch.load with weights_only=True)",
                received=f"it wants {wanted.group(1)}" if wanted else _reason(text),
                remedy="nothing in it was run. Where you trust it, save torch.save(model.state_dict(), ...) in the code "
                "base that made it, and import that file",
            ) from error
        raise _damaged(data, filename, error) from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{filename} was refused: it is a TorchScript archive, which holds code",
                expected="a state dict of tensors",
                received="TorchScript",
                remedy="save torch.save(module.state_dict(), ...) where you trust it",
            ) from error
        raise _damaged(data, filename, error) from error


def _reason(text: str) -> str:
    """The one line of torch's advice that says what the unpickler met."""
    found = re.search(r"WeightsUnpickler error:\s*([^\n]+)", text)
    return (found.group(1) if found else text.strip().splitlines()[0])[:200]


def _damaged(data: bytes, filename: str, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return CheckpointError(
        f"{filename} is not a readable checkpoint",
        expected="a complete file written by torch.save",
        received=f"{len(data)} bytes: {reason}",
        remedy="fetch or copy it again; it looks truncated or damaged",
    )


_QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def check_tensor(name: str, tensor: Tensor, filename: str) -> None:
    """Raises CheckpointError for a tensor that holds no plain numbers."""
    kind = None
    if tensor.is_meta:
        kind = "on the meta device: it has a shape and no values"
    elif tensor.is_quantized or tensor.dtype in _QUANTISED:
        kind = f"quantised ({tensor.dtype})"
    elif tensor.layout != torch.strided:
        kind = f"sparse ({tensor.layout})"
    if kind is not None:
        raise CheckpointError(
            f"{filename} holds weights that cannot be used",
            expected="dense tensors of floating-point numbers",
            received=f"{name} is {kind}",
            remedy="save the weights in float32 or bfloat16 (dequantised), from where the model was trained",
        )


def _tensors(value: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _find_states(content: Mapping[Any, Any], path: str, depth: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    tensors = _tensors(content)
    if tensors:
        yield path, tensors
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and depth < 3 and key not in ("optimizer", "optimizer_state_dict"):
            yield from _find_states(value, f"{path}.{key}" if path else key, depth + 1)


def _states_of(content: object, filename: str) -> WeightFile:
    """Every set of named tensors in what was unpickled."""
    found = dict(_find_states(content, "", 0)) if isinstance(content, Mapping) else {}
    if not found:
        raise CheckpointError(
            f"{filename} has no state dict",
            expected="tensors by name, or entries that hold them (state_dict, model, net, ...)",
            received=f"keys {list(content)[:8]}" if isinstance(content, Mapping) else type(content).__name__,
            remedy="save the state dict you mean on its own: torch.save(model.state_dict(), ...)",
        )
    simple = content.items() if isinstance(content, Mapping) else ()
    return WeightFile(found, {k: v for k, v in simple if isinstance(k, str) and isinstance(v, str | int | float)})
