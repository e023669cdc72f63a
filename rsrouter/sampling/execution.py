"""The function that is certified is the one that runs: how networks run, recorded, and preparing them for it."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rsrouter.core.errors import InputError, NetworkError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Execution:
    """How networks run; changes bits, hence votes, hence belongs to every certificate's metadata.

    Attributes:
        batch: rows per forward pass; the last batch is padded to it. 0: `default_batch` for the input, halved where memory
            is short before the first vote is drawn. A number is a promise: exactly that, or a NetworkError.
        dtype: `float32`, `bfloat16` or `float16`.
        fold: fold BatchNorm into the convolution before it, where the module can be traced.
        channels_last: memory layout of weights and inputs.
        compile: use torch.compile.
    """

    batch: int = 0
    dtype: str = "float32"
    fold: bool = True
    channels_last: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise InputError(
                "Unknown dtype", expected=f"one of {sorted(_DTYPES)}", received=repr(self.dtype), remedy="use float32"
            )
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 0:
            raise InputError(
                "The execution batch must be a whole number",
                expected="batch >= 1, or 0 for the default",
                received=repr(self.batch),
                remedy="leave it out",
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any, where: str = "this execution") -> Execution:
        """The execution of `to_dict`. InputError for anything else: a setting that is not understood changes bits."""
        known = {f.name: type(f.default) for f in fields(cls)}
        if not isinstance(content, dict) or (bad := [k for k, v in content.items() if type(v) is not known.get(k)]):
            raise InputError(
                "An execution cannot be read",
                expected=", ".join(f"{name} ({kind.__name__})" for name, kind in known.items()),
                received=f"{where}: {bad if isinstance(content, dict) else type(content).__name__}",
                remedy="write it with `rsrouter calibrate`, or upgrade rsrouter",
            )
        return cls(**content)

    def save(self, path: str | Path, **notes: Any) -> Path:
        """Writes a JSON file that `load` and `--execution` read; `notes` stand beside it, as what was measured."""
        file = Path(path)
        content = {"kind": "rsrouter-execution", "schema_version": 1, "execution": self.to_dict(), **notes}
        file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return file

    @classmethod
    def load(cls, path: str | Path) -> Execution:
        """The execution that a JSON file records: one of `save`, a table's metadata, or a router's `config.json`.

        Raises:
            InputError: no such file, or no execution in it.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.from_dict(content["execution"], str(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                "No execution there",
                expected="a JSON file of `rsrouter calibrate`, a table's JSON or a router's config.json",
                received=f"{path}: {type(error).__name__}: {error}",
                remedy="write one with `rsrouter calibrate`",
            ) from error


def default_batch(numel: int, device: torch.device) -> int:
    """Rows per forward pass when nothing was calibrated: a function of input size and device type alone.

    On a CPU about a megabyte of input, which keeps the activations of small networks in cache; on an
    accelerator about 32 MB. Deterministic, so that two runs never differ by a timing.
    """
    budget = 2**20 if device.type == "cpu" else 2**25
    rows = budget // (4 * numel)
    return next((size for size in (1000, 500, 250, 100, 50, 25) if rows >= size), 10)


#: How every network runs, whatever the process has set: reduced float32 and kernels picked by timing change bits.
KERNELS = {"float32": "ieee", "cudnn_benchmark": False, "cudnn_deterministic": True}


_kernels_lock, _kernels_users = threading.Lock(), 0
_kernels_before: list[Any] = []


@contextmanager
def fixed_kernels() -> Iterator[None]:
    """Runs its body under `KERNELS`; the process's own settings (TF32, bf16 inside float32, cuDNN) are put back.

    They belong to the process: where several threads draw, the last one puts them back.
    """
    global _kernels_users
    b = torch.backends
    precisions: list[Any] = [b.cuda.matmul, b.cudnn.conv, b.mkldnn.conv, b.mkldnn.matmul]  # type: ignore[attr-defined]
    with _kernels_lock:
        _kernels_users += 1
        if _kernels_users == 1:
            _kernels_before[:] = [b.cudnn.benchmark, b.cudnn.deterministic, *(p.fp32_precision for p in precisions)]
            b.cudnn.benchmark, b.cudnn.deterministic = bool(KERNELS["cudnn_benchmark"]), bool(KERNELS["cudnn_deterministic"])
            for p in precisions:
                p.fp32_precision = str(KERNELS["float32"])
    try:
        yield
    finally:
        with _kernels_lock:
            _kernels_users -= 1
            if _kernels_users == 0:
                b.cudnn.benchmark, b.cudnn.deterministic, *values = _kernels_before
                for p, value in zip(precisions, values, strict=True):
                    p.fp32_precision = value


@cache
def keep_freed_memory() -> None:
    """Lets glibc keep the memory of one batch for the next.

    By default its allocator gives a large block back to the system when it is freed, and every batch pays for zeroed pages
    anew: a quarter of a float32 forward pass of a small network. Blocks of up to 32 MiB stay once one of that size has
    been freed (mallopt(3), M_MMAP_THRESHOLD). Elsewhere one allocation that changes nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def native_dtype(device: str | torch.device | None = None) -> str:
    """`"bfloat16"` on a processor with instructions that multiply it (AVX-512 BF16, AMX), twice as fast as float32 there;
    else `"float32"`.

    A fact of the machine, never a timing, so that two runs on one machine agree. Accelerators stay with float32 (nothing was
    measured there; `rsrouter calibrate --dtype fastest` measures).
    """
    if resolve_device(device).type != "cpu":
        return "float32"
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if known.get("avx512_bf16") or known.get("amx_bf16") else "float32"


#: What oneDNN chooses kernels of fewer bits by, as torch names it.
_FEW_BITS = {"avx512_bf16": "BF16", "amx_bf16": "AMX-BF16", "avx512_fp16": "FP16", "amx_fp16": "AMX-FP16"}


def instructions(device: str | torch.device | None = None) -> str:
    """The vector instructions that decide how a CPU's kernels round, such as `"AVX512 BF16"`, with oneDNN's cap where the
    environment sets one; empty for an accelerator."""
    if resolve_device(device).type != "cpu":
        return ""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    found = [text for flag, text in _FEW_BITS.items() if known.get(flag)]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *found, *([f"oneDNN<={cap}"] if cap else [])])


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A usable device; None means CPU.

    Raises:
        InputError: an unknown device, or one this machine does not have.
    """
    try:
        resolved = torch.device("cpu" if device is None else device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(
            "The device cannot be used",
            expected="'cpu', or an accelerator torch can see such as 'cuda:0'",
            received=repr(device),
            remedy=f"pick another device ({str(error).splitlines()[0]})",
        ) from error
    return resolved


def _fold_batchnorm(module: nn.Module) -> nn.Module | None:
    """A traced copy with every `conv -> batchnorm` pair folded; None where the module cannot be traced."""
    try:
        return _folded(module)
    except Exception:  # tracing runs user code: whatever it raises only means "do not fold"
        return None


def _folded(module: nn.Module) -> nn.Module:
    traced = fx.symbolic_trace(module)
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        conv, norm = modules[str(source.target)], modules[node.target]
        uses = sum(n.op == "call_module" and n.target == source.target for n in traced.graph.nodes)
        if type(conv) is not nn.Conv2d or uses > 1 or norm.running_mean is None:
            continue
        parent, _, leaf = str(source.target).rpartition(".")
        setattr(traced.get_submodule(parent), leaf, fuse_conv_bn_eval(conv, norm))
        modules[str(source.target)] = traced.get_submodule(str(source.target))
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


@torch.inference_mode()
def _same_function(folded: nn.Module, module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether two random images get the same outputs up to rounding. Tracing runs Python on stand-ins, so that a test
    such as `isinstance(x, Tensor)` may silently take the other branch."""
    x = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0))
    try:
        pairs = [tuple(o) if isinstance(o, tuple | list) else (o,) for o in (folded(x), module(x))]
        return len(pairs[0]) == len(pairs[1]) and all(
            a.shape == b.shape
            and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * (1 + float(torch.nan_to_num(b).abs().max())), equal_nan=True)
            for a, b in zip(*pairs, strict=True)
        )
    except Exception:  # whatever a wrongly traced module raises only means "do not fold"
        return False


def prepare(module: nn.Module, execution: Execution, device: torch.device, shape: tuple[int, ...] | None = None) -> nn.Module:
    """A private copy of `module`, in eval mode, as it will run; the original is not touched.

    Args:
        module: from images to logits.
        execution: how it is to run.
        device: where.
        shape: `(C, H, W)`; where given, a folded copy is used only if it computes the same function.
    """
    try:
        prepared = copy.deepcopy(module).eval().requires_grad_(False)
    except RuntimeError as error:  # tensors with a history, such as the weights of the old `nn.utils.weight_norm`
        raise NetworkError(
            "A network cannot be copied",
            expected="a module that copy.deepcopy accepts",
            received=str(error).splitlines()[0],
            remedy="call torch.nn.utils.remove_weight_norm, or use nn.utils.parametrizations",
        ) from error
    if execution.fold:
        folded = _fold_batchnorm(copy.deepcopy(prepared))
        if folded is not None and (shape is None or _same_function(folded, prepared, shape)):
            prepared = folded
    prepared = prepared.to(device=device, dtype=_DTYPES[execution.dtype])
    if execution.channels_last:
        prepared = prepared.to(memory_format=torch.channels_last)
    if execution.compile:
        prepared = torch.compile(prepared, dynamic=False)  # type: ignore[assignment]
    return prepared


def as_input(x: Tensor, execution: Execution) -> Tensor:
    """The batch in the dtype and memory layout of the execution."""
    return x.to(
        dtype=_DTYPES[execution.dtype], memory_format=torch.channels_last if execution.channels_last else torch.contiguous_format
    )
