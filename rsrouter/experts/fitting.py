"""Finds the tensors of a weight file that belong to an architecture, and loads them into it.

Wrappers leave prefixes on names (`module.`, `_orig_mod.`, `1.module.`), and training scripts keep other things beside the
weights (means, counters, criteria, averaged weights). The largest set of names that fits decides.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rsrouter.core.errors import CheckpointError
from rsrouter.experts.checkpoints import WeightFile, check_tensor
from rsrouter.experts.registry import architectures, build_architecture, build_skeleton

#: segments that wrappers put into the middle of names
_INNER = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: raw and averaged weights as timm writes them; it loads the averaged ones
_TIMM_PAIRS = (("state_dict", "state_dict_ema"), ("model", "model_ema"))
_TIMM_CANDIDATES = ("resnet18", "resnet34", "resnet50", "resnet101")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Fit:
    """One way to read an architecture's tensors from a file.

    Attributes:
        entry: of the file.
        prefix: taken off every name.
        tensors: by the architecture's own names.
        missing, misfit: names that are not there, or have another shape.
        inside: left-over names inside the architecture's own parts: the file is of a larger network.
        beside: left-over names that stand beside it.
    """

    entry: str
    prefix: str
    tensors: dict[str, Tensor]
    missing: tuple[str, ...]
    misfit: tuple[str, ...]
    inside: tuple[str, ...]
    beside: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every tensor of the architecture is there, and none is left over inside it."""
        return not (self.missing or self.misfit or self.inside)

    @property
    def title(self) -> str:
        """As `--weights-key` takes it."""
        return ":".join(part for part in (self.entry, self.prefix.rstrip(".")) if part) or "the file itself"


def _optional(name: str) -> bool:
    return name.endswith("num_batches_tracked")  # old files lack it, and evaluation does not use it


def fits(own: Shapes, file: WeightFile) -> list[Fit]:
    """Every entry and prefix of a file under which tensors of an architecture stand, best first."""
    found = []
    for entry, state in file.states.items():
        plain = {_INNER.sub("", name): name for name in state}
        if len(plain) < len(state):  # two names would become one
            plain = {name: name for name in state}
        for prefix in _prefixes(own, plain):
            taken = {name: state[plain[prefix + name]] for name in own if prefix + name in plain}
            rest = [
                name.removeprefix(prefix) for name in plain if name.startswith(prefix) and name.removeprefix(prefix) not in own
            ]
            tops = {name.split(".")[0] for name in own}
            inside = tuple(n for n in rest if not _optional(n) and (n.split(".")[0] in tops or n.split(".")[0].isdigit()))
            others = [name for name in plain if not name.startswith(prefix)] + [prefix + n for n in rest if n not in inside]
            found.append(
                Fit(
                    entry,
                    prefix,
                    taken,
                    tuple(n for n in own if n not in taken and not _optional(n)),
                    tuple(n for n in taken if tuple(taken[n].shape) != own[n]),
                    inside,
                    tuple(n for n in others if not _optional(n)),
                )
            )
    return sorted(found, key=lambda fit: (not fit.complete, len(fit.misfit) - len(fit.tensors), len(fit.inside), len(fit.prefix)))


def _prefixes(own: Shapes, names: Mapping[str, str]) -> list[str]:
    """Prefixes under which some of the architecture's names stand, "" always."""
    wanted = [n for n in own if not _optional(n)]
    anchors = {wanted[i] for i in (0, len(wanted) // 3, len(wanted) // 2, -2, -1) if -len(wanted) <= i < len(wanted)}
    found = {""}
    for anchor in anchors:
        found |= {name.removesuffix(anchor) for name in names if name.endswith("." + anchor)}
    return sorted(found)


def choose(own: Shapes, file: WeightFile, *, weights_key: str | None, architecture: str, filename: str) -> Fit:
    """The one way to read an architecture's tensors from a file.

    Args:
        own: shapes of the architecture's tensors.
        file: parsed.
        weights_key: the entry that is meant, or the prefix, or `entry:prefix`; None: it must be clear.
        architecture, filename: for errors.

    Raises:
        CheckpointError: nothing fits, or several different sets of weights do.
    """
    if any(name.endswith("_extra_state") for name in own):
        raise CheckpointError(
            f"{architecture!r} keeps more than tensors in its state",
            expected="an architecture whose state dict holds tensors",
            received=next(name for name in own if name.endswith("_extra_state")),
            remedy="build it without `get_extra_state` (quantisation, float8)",
        )
    found = fits(own, file)
    if weights_key is not None:
        found = [f for f in found if weights_key in (f.title, f.entry, f.prefix, f.prefix.rstrip("."))]
        if not found:
            raise CheckpointError(
                f"{filename} has no weights under {weights_key!r}",
                expected=f"one of {sorted({f.title for f in fits(own, file)})}",
                received=repr(weights_key),
                remedy="leave weights_key out, or name one of these",
            )
    complete = [f for f in found if f.complete]
    if not complete:
        raise _misfit(found[0], own, file, architecture, filename)
    chosen = complete[0]
    if weights_key is None:
        rivals = [f for f in complete[1:] if not _equal(f, chosen)]
        entries = {f.entry: f for f in complete}
        for raw, averaged in _TIMM_PAIRS:
            if raw in entries and averaged in entries and {f.entry for f in rivals} | {chosen.entry} == {raw, averaged}:
                chosen, rivals = entries[averaged], []
        if rivals:
            keys = sorted({f.title for f in (chosen, *rivals)})
            raise CheckpointError(
                f"{filename} holds several sets of weights that fit {architecture!r}",
                expected="one, or a word on which is meant",
                received=", ".join(keys),
                remedy=f"weights_key={keys[0]!r} (--weights-key): published figures are often of the averaged (EMA) ones",
            )
    for name, tensor in chosen.tensors.items():
        check_tensor(name, tensor, filename)
    if chosen.beside:
        shown = ", ".join(chosen.beside[:6]) + (f" and {len(chosen.beside) - 6} more" if len(chosen.beside) > 6 else "")
        warnings.warn(f"{filename}: all {len(chosen.tensors)} names fit {architecture!r}; left over: {shown}", stacklevel=2)
    return chosen


def _equal(a: Fit, b: Fit) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every entry of a module's state dict (`()` for one that is not a tensor)."""
    return {name: tuple(v.shape) if isinstance(v, Tensor) else () for name, v in module.state_dict().items()}


def build_fitted(
    architecture: str, num_classes: int, kwargs: Mapping[str, Any], file: WeightFile, filename: str, weights_key: str | None
) -> nn.Module:
    """An architecture with a file's weights, in eval mode and without gradients.

    Names and shapes are compared before any memory is taken for the network, where its constructor allows it.

    Raises:
        CheckpointError: unknown architecture, arguments or weights that do not fit, or values that are not finite.
    """
    module: nn.Module | None = None
    try:
        own = shapes_of(build_skeleton(architecture, num_classes, kwargs))
    except Exception:  # a user's architecture may need real tensors
        module = build_architecture(architecture, num_classes, kwargs)
        own = shapes_of(module)
    fit = choose(own, file, weights_key=weights_key, architecture=architecture, filename=filename)
    module = module or build_architecture(architecture, num_classes, kwargs)
    state = module.state_dict()
    for name, tensor in fit.tensors.items():
        if state[name].dtype.is_floating_point and not tensor.dtype.is_floating_point:
            raise CheckpointError(
                f"{filename} holds weights of another dtype",
                expected=f"{name} as {state[name].dtype}",
                received=str(tensor.dtype),
                remedy="dequantise the weights where they were made",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{filename} holds values that are not finite",
                expected="finite weights",
                received=f"NaN or Inf in {name}",
                remedy="use an earlier checkpoint; training diverged",
            )
    module.load_state_dict(fit.tensors, strict=False)
    return module.eval().requires_grad_(False)


def _misfit(best: Fit, own: Shapes, file: WeightFile, architecture: str, filename: str) -> CheckpointError:
    misfit = [f"{n} {tuple(best.tensors[n].shape)} instead of {own[n]}" for n in best.misfit]
    parts = [
        f"{len(names)} {word}: {', '.join(names[:4])}{' and others' if len(names) > 4 else ''}"
        for word, names in (("missing", best.missing), ("left over", best.inside or best.beside), ("of another shape", misfit))
        if names
    ]
    if best.tensors:
        parts.insert(0, f"{len(best.tensors) - len(misfit)} names fit")
    remedy = "check architecture, its kwargs and num_classes"
    width = head_width(file.states[best.entry])
    only_head = not best.missing and not best.inside and all(best.tensors[n].shape[1:] == own[n][1:] for n in best.misfit)
    if only_head and width is not None and len(misfit) <= 2:
        remedy = f"the file was trained for num_classes={width}"
    elif (nearest := nearest_architecture(file.states[best.entry])) is not None:
        name, share, width = nearest
        remedy = (
            f"the nearest architecture is {name!r} with num_classes={width} ({share:.0%} of names and shapes fit)"
            if share > 0.3
            else "no known architecture is near; register_architecture(name, YourModule)"
        )
    return CheckpointError(
        f"{filename} does not fit {architecture!r}",
        expected=f"the {len(own)} tensors of {architecture!r}",
        received="; ".join(parts),
        remedy=remedy,
    )


def head_width(state: Mapping[str, Tensor]) -> int | None:
    """Width of the logits, from the one two-dimensional weight or the one called like a head; None if neither is clear.

    >>> head_width({"conv.weight": torch.zeros(8, 3, 3, 3), "fc.weight": torch.zeros(7, 8)})
    7
    """
    flat = {name: value for name, value in state.items() if name.endswith("weight") and value.ndim == 2}
    heads = {k: v for k, v in flat.items() if k.split(".")[-2:-1] in (["fc"], ["head"], ["classifier"], ["linear"])} or flat
    widths = {int(value.shape[0]) for value in heads.values()}
    return widths.pop() if len(widths) == 1 and (len(heads) == 1 or heads is not flat) else None


def file_width(file: WeightFile) -> int | None:
    """Width of the logits, where every entry of a file that tells one tells the same."""
    widths = {width for state in file.states.values() if (width := head_width(state)) is not None}
    return widths.pop() if len(widths) == 1 else None


@cache
def _usual_shapes(name: str, width: int) -> dict[str, tuple[int, ...]] | None:
    """Shapes of an architecture without arguments; None where it needs some, or real tensors: it cannot be a suggestion."""
    try:
        return shapes_of(build_skeleton(name, width))
    except Exception:
        return None


def nearest_architecture(state: Mapping[str, Tensor]) -> tuple[str, float, int | None] | None:
    """`(name, share of names and shapes in common, num_classes)` of the registered or common timm architecture that
    fits a state best; None if nothing can be compared."""
    best: tuple[str, float, int | None] | None = None
    width = head_width(state)
    for name in (*architectures(), *_TIMM_CANDIDATES):
        own = _usual_shapes(name, width or 10)
        if own is None:
            continue
        fit = fits(own, WeightFile({"": dict(state)}))[0]
        left = {item for item in own.items() if not _optional(item[0])}
        right = {(n, tuple(t.shape)) for n, t in fit.tensors.items()} | {(n, ()) for n in (*fit.inside, *fit.beside)}
        share = len(left & right) / max(1, len(left | right))
        if best is None or share > best[1]:
            best = (name, share, width)
    return best
