"""Reading weights without running code: safetensors, and legacy pickles through torch's restricted unpickler.

Every reader takes the file's bytes, so that what was hashed is what is parsed.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor, nn

from rsrouter.core.errors import CheckpointError, IntegrityError
from rsrouter.experts.registry import architectures, build_architecture
from rsrouter.files import sha256_of

#: keys under which training scripts keep the state dict: Cohen and followers, MACER, and common others
CONTAINERS = ("state_dict", "net", "model", "model_state_dict", "params")
#: prefixes that wrappers leave on names: Sequential(normalise, net), DataParallel, both, Lightning
PREFIXES = ("1.module.", "module.1.", "1.", "module.", "0.module.", "0.", "model.module.", "model.", "net.", "_orig_mod.")
LEGACY_SUFFIXES = (".pt", ".pth", ".tar", ".ckpt", ".bin")
_TIMM_CANDIDATES = ("resnet18", "resnet34", "resnet50", "resnet101")


@dataclass(frozen=True)
class Checkpoint:
    """What a weight file holds.

    Attributes:
        state: name to tensor, as stored.
        container: key the state dict stood under; "" for a bare one.
        metadata: the other simple entries of the container (`epoch`, `arch`).
    """

    state: dict[str, Tensor]
    container: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


def read_verified(path: Path, sha256: str | None) -> bytes:
    """The bytes of a file, after comparing their sha256 (None: not pinned yet).

    Raises:
        CheckpointError: missing or unreadable.
        IntegrityError: other content than was pinned.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path.name}",
            expected="a readable weight file",
            received=f"{path}: {error.strerror}",
            remedy="check the path; relative ones count from the folder of the pool or spec file",
        ) from error
    if sha256 is not None and (found := sha256_of(data)) != sha256:
        raise IntegrityError(
            f"{path.name} is not the file that was pinned",
            expected=f"sha256 {sha256}",
            received=f"sha256 {found} ({len(data)} bytes) in {path}",
            remedy="fetch the file again (delete a cached copy), or wrap the pool anew if the change is meant",
        )
    return data


def parse_checkpoint(data: bytes, filename: str) -> Checkpoint:
    """The state dict in a weight file's bytes; safetensors by suffix, anything else by the restricted unpickler.

    Raises:
        CheckpointError: damaged, of no known layout, or a pickle that wants to import or run something.
    """
    if filename.endswith(".safetensors"):
        try:
            return Checkpoint(parse_safetensors(data))
        except (SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{filename} is not a readable safetensors file",
                expected="a complete safetensors file",
                received=f"{len(data)} bytes: {error}",
                remedy="fetch or copy it again; it looks truncated",
            ) from error
    return _unpack(_unpickle(data, filename), filename)


def _unpickle(data: bytes, filename: str) -> object:
    if not data:
        raise CheckpointError(
            f"{filename} is empty", expected="a PyTorch checkpoint", received="0 bytes", remedy="fetch it again"
        )
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


def _is_state(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _unpack(content: object, filename: str) -> Checkpoint:
    if _is_state(content):
        return Checkpoint(dict(content))  # type: ignore[call-overload]
    if isinstance(content, Mapping):
        found = [key for key in content if isinstance(key, str) and _is_state(content[key])]
        known = [key for key in CONTAINERS if key in found]
        if len(known) == 1 or len(found) == 1:
            key = (known or found)[0]
            rest = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, str | int | float)}
            return Checkpoint(dict(content[key]), key, rest)
        received = f"{len(found)} state dicts {found}" if found else f"keys {list(content)[:8]}"
    else:
        received = type(content).__name__
    raise CheckpointError(
        f"{filename} has no state dict that can be told apart",
        expected=f"tensors by name, or one of {CONTAINERS}",
        received=received,
        remedy="save the state dict you mean on its own: torch.save(model.state_dict(), ...)",
    )


def strip_prefix(state: Mapping[str, Tensor], wanted: set[str]) -> tuple[dict[str, Tensor], str]:
    """State with a wrapper's prefix removed, and the prefix: the one that matches most of the `wanted` names.

    A prefix is taken off only where every name carries it.
    """
    best, best_prefix = dict(state), ""
    hits = len(wanted & best.keys())
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            stripped = {name[len(prefix) :]: value for name, value in state.items()}
            if (n := len(wanted & stripped.keys())) > hits:
                best, best_prefix, hits = stripped, prefix, n
    return best, best_prefix


def head_width(state: Mapping[str, Tensor]) -> int | None:
    """Width of the logits, from the one two-dimensional weight or the one called like a head; None if neither is clear."""
    flat = {name: value for name, value in state.items() if name.endswith("weight") and value.ndim == 2}
    heads = {k: v for k, v in flat.items() if k.split(".")[-2:-1] in (["fc"], ["head"], ["classifier"], ["linear"])} or flat
    return int(next(iter(heads.values())).shape[0]) if len(heads) == 1 else None


def fit_state(module: nn.Module, state: Mapping[str, Tensor], *, architecture: str, filename: str) -> nn.Module:
    """Loads a checkpoint's state into `module`, strictly, after taking off a wrapper's prefix; eval mode, no gradients.

    Only BatchNorm's `num_batches_tracked`, which old files lack and evaluation does not use, may be missing.

    Raises:
        CheckpointError: names or shapes that do not fit: which ones, and the nearest architecture.
    """
    own = module.state_dict()
    stripped, _ = strip_prefix(state, set(own))
    missing = [k for k in own if k not in stripped and not k.endswith("num_batches_tracked")]
    extra = [k for k in stripped if k not in own]
    misfit = [
        f"{k} {tuple(stripped[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in stripped and stripped[k].shape != own[k].shape
    ]
    if missing or extra or misfit:
        parts = [
            f"{len(names)} {word}: {', '.join(names[:4])}{' and others' if len(names) > 4 else ''}"
            for word, names in (("missing", missing), ("left over", extra), ("of another shape", misfit))
            if names
        ]
        remedy = "check architecture, its kwargs and num_classes"
        width = head_width(stripped)
        only_head = not missing and not extra and all(stripped[k].shape[1:] == own[k].shape[1:] for k in own if k in stripped)
        if only_head and width is not None and len(misfit) <= 2:
            remedy = f"the file was trained for num_classes={width}"
        elif (nearest := nearest_architecture(state)) is not None:
            name, share, width = nearest
            remedy = (
                f"the nearest architecture is {name!r} with num_classes={width} ({share:.0%} of names and shapes fit)"
                if share > 0.3
                else "no known architecture is near; register_architecture(name, YourModule)"
            )
        raise CheckpointError(
            f"{filename} does not fit {architecture!r}",
            expected=f"the {len(own)} tensors of {architecture!r}",
            received="; ".join(parts),
            remedy=remedy,
        )
    not_finite = [k for k in own if k in stripped and not bool(torch.isfinite(stripped[k]).all())]
    if not_finite:
        raise CheckpointError(
            f"{filename} holds values that are not finite",
            expected="finite weights",
            received=f"NaN or Inf in {', '.join(not_finite[:4])}",
            remedy="use an earlier checkpoint; training diverged",
        )
    module.load_state_dict({k: stripped[k] for k in own if k in stripped}, strict=False)
    return module.eval().requires_grad_(False)


def nearest_architecture(state: Mapping[str, Tensor]) -> tuple[str, float, int | None] | None:
    """`(name, share of names and shapes in common, num_classes)` of the registered or common timm architecture that
    fits a state best; None if nothing can be compared."""
    best: tuple[str, float, int | None] | None = None
    width = head_width(state)
    for name in (*architectures(), *_TIMM_CANDIDATES):
        try:
            with torch.device("meta"):
                own = build_architecture(name, width or 10).state_dict()
        except Exception:
            continue  # a user's architecture that needs arguments or real tensors cannot be a suggestion
        stripped, _ = strip_prefix(state, set(own))
        left = {(k, tuple(v.shape)) for k, v in own.items() if not k.endswith("num_batches_tracked")}
        right = {(k, tuple(v.shape)) for k, v in stripped.items() if not k.endswith("num_batches_tracked")}
        share = len(left & right) / max(1, len(left | right))
        if best is None or share > best[1]:
            best = (name, share, width)
    return best
