"""The function that is certified is the one that runs: how networks run, recorded, and preparing them for it."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property, partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsrouter.core.errors import DeviceError, InputError
from rsrouter.experts.preprocessing import Resized
from rsrouter.process import KERNELS as KERNELS
from rsrouter.process import PRECISIONS
from rsrouter.process import fixed_kernels as fixed_kernels
from rsrouter.sampling.fold import fold_batchnorm
from rsrouter.sampling.int8 import Ranges, fingerprint, quantise
from rsrouter.sampling.logits import Outputs, forward, out_of_memory, outputs, same_votes
from rsrouter.sampling.noise import STREAMS
from rsrouter.sampling.private import private_copy

#: What tensors between layers are in.
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32}

_NO_RANGES = Ranges()


@dataclass(frozen=True)
class Execution:
    """How networks run; changes bits, hence votes, hence belongs to every certificate's metadata.

    Attributes:
        batch: rows per forward pass; the last batch is padded to it. 0: `default_batch` for the largest input of a network,
            halved where memory is short before the first vote is drawn. A number is a promise: exactly that, or a NetworkError.
        dtype: `float32`, `bfloat16`, `float16`, or `int8`: convolutions and linear layers in whole numbers, on a CPU (`ranges`).
        fold: fold BatchNorm into the convolution before it, where the module then votes the same.
        channels_last: memory layout of weights and inputs, where the module takes it and votes the same.
        compile: use torch.compile.
        precision: of float32 products and convolutions on CUDA: `tf32`, the default there as it is cuDNN's, or `ieee`, all that
            a CPU does. Empty: the device's default.
        graphs: replay each forward pass as a CUDA graph, where the module can be captured and then gives the same bits.
        stream: the kind of noise stream (`rsrouter.sampling.noise.STREAMS`): `chunks`, the default on a CPU, or `counters`, the
            default on an accelerator. Empty: the device's default.
        threads: of each forward pass on a CPU. 0: torch's own number, one pass after the other. Otherwise torch's own number of
            threads runs as many passes side by side as it has room for, which changes no bit.
        ranges: of the inputs of layers in int8, as `rsrouter calibrate --dtype int8` measured them; empty for other dtypes.
    """

    batch: int = 0
    dtype: str = "float32"
    fold: bool = True
    channels_last: bool = True
    compile: bool = False
    precision: str = ""
    graphs: bool = True
    stream: str = ""
    threads: int = 0
    ranges: Ranges = _NO_RANGES

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise InputError(
                "Unknown dtype", expected=f"one of {sorted(_DTYPES)}", received=repr(self.dtype), remedy="use float32"
            )
        if self.dtype != "int8":
            object.__setattr__(self, "ranges", _NO_RANGES)
        elif not self.ranges or self.compile:
            raise InputError(
                "int8 runs as it was calibrated, and is not compiled",
                expected="an execution of `rsrouter calibrate --dtype int8`, compile=False",
                received="compile=True" if self.ranges else "dtype 'int8' without ranges of its layers' inputs",
                remedy="rsrouter calibrate ROUTER --dtype int8 --data DATA --out execution.json, then --execution execution.json",
            )
        for name, known in (("precision", PRECISIONS), ("stream", tuple(STREAMS))):
            if getattr(self, name) not in ("", *known):
                raise InputError(
                    f"Unknown {name}",
                    expected=f"one of {sorted(known)}, or '' for the device's default",
                    received=repr(getattr(self, name)),
                    remedy="leave it out",
                )
        for name, what in (("batch", "execution batch"), ("threads", "number of threads of a forward pass")):
            value = getattr(self, name)
            if not isinstance(value, bool | int) and isinstance(value, Integral):  # numpy's
                value = int(value)
                object.__setattr__(self, name, value)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(
                    f"The {what} must be a whole number",
                    expected=f"{name} >= 1, or 0 for the default",
                    received=repr(value),
                    remedy="leave it out",
                )

    def on(self, device: torch.device) -> Execution:
        """The same with the device's own defaults in the place of empty values, and without what no such device does.

        Raises:
            InputError: TF32 or int8 where there is none.

        >>> Execution().on(torch.device("cuda")).precision, Execution().on(torch.device("cpu")).precision
        ('tf32', 'ieee')
        """
        if device.type != "cuda" and self.precision == "tf32":
            raise InputError(
                f"There is no TF32 on {device.type}",
                expected="precision 'ieee', or leave it out",
                received="precision 'tf32'",
                remedy="run on CUDA, or certify anew with a precision that this device has",
            )
        if device.type != "cpu" and self.dtype == "int8":
            raise InputError(
                f"int8 does not run on {device.type}",
                expected="a CPU",
                received=str(device),
                remedy="run on a CPU, or certify anew in a dtype that this device has",
            )
        return self.nearest(device)

    def nearest(self, device: torch.device) -> Execution:
        """`on`, but with what the device does instead of what it cannot do: the same function, to rounding."""
        cuda = device.type == "cuda"
        reduced = cuda and self.dtype == "float32" and self.precision != "ieee"
        return replace(
            self,
            precision="tf32" if reduced else "ieee",
            graphs=self.graphs and cuda,
            stream=self.stream or ("chunks" if device.type == "cpu" else "counters"),
            threads=self.threads if device.type == "cpu" else 0,
        )

    @property
    def rounding(self) -> str:
        """How many bits products have: the dtype, or `tf32`."""
        return "tf32" if self.precision == "tf32" and self.dtype == "float32" else self.dtype

    def settings(self, device: torch.device) -> tuple[str | None, int]:
        """What networks run under there, for `fixed_kernels`: the float32 precision of an accelerator, the threads of a CPU."""
        return self.nearest(device).precision if device.type == "cuda" else None, self.threads if device.type == "cpu" else 0

    def kernels(self, device: torch.device) -> AbstractContextManager[None]:
        """`fixed_kernels` under `settings`."""
        return fixed_kernels(*self.settings(device))

    @classmethod
    def recorded(cls, content: Any, device: str, where: str = "this execution") -> Execution:
        """The execution of a table's metadata, whose `device` is `cpu` or a card's name; what an older table leaves out is
        what that kind of device did."""
        return cls.from_dict(content, where).nearest(torch.device("cpu" if device == "cpu" else "cuda"))

    def threads_of(self, device: torch.device) -> int:
        """Threads of each forward pass, as tables record them."""
        return self.nearest(device).threads or torch.get_num_threads()

    def with_numbers(self, name: str) -> Execution:
        """The same in other numbers: a dtype, or `tf32` or `ieee`, float32 in that precision.

        >>> Execution().with_numbers("tf32").precision
        'tf32'
        """
        if name in PRECISIONS:
            return replace(self, dtype="float32", precision=name)
        return replace(self, dtype=name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description; `ranges` only where there are some."""
        found = {**asdict(self), "ranges": self.ranges.to_dict()}
        return found if self.ranges else {k: v for k, v in found.items() if k != "ranges"}

    @classmethod
    def from_dict(cls, content: Any, where: str = "this execution") -> Execution:
        """The execution of `to_dict`. InputError for anything else: a setting that is not understood changes bits."""
        known: dict[str, type] = {**{f.name: type(f.default) for f in fields(cls)}, "ranges": dict}
        if not isinstance(content, dict) or (bad := [k for k, v in content.items() if type(v) is not known.get(k)]):
            raise InputError(
                "An execution cannot be read",
                expected=", ".join(f"{name} ({kind.__name__})" for name, kind in known.items()),
                received=f"{where}: {bad if isinstance(content, dict) else type(content).__name__}",
                remedy="write it with `rsrouter calibrate`, or upgrade rsrouter",
            )
        if "ranges" in content:
            content = {**content, "ranges": Ranges.from_dict(content["ranges"], where)}
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


#: Bytes of input in a batch that nobody chose, where it is not what an accelerator takes.
BATCH_BYTES = {"cpu": 2**20}


def default_batch(numel: int, device: torch.device) -> int:
    """Rows per forward pass when nothing was calibrated: a function of input size (`largest_input`) and device type alone.

    On a CPU about a megabyte of input, which keeps the activations of small networks in cache; on an
    accelerator about 32 MB. Deterministic, so that two runs never differ by a timing.
    """
    rows = BATCH_BYTES.get(device.type, 2**25) // (4 * numel)
    return next((size for size in (1000, 500, 250, 100, 50, 25) if rows >= size), 10)


def largest_input(shape: Sequence[int], networks: Iterable[nn.Module]) -> int:
    """Numbers in the largest image that any of the networks sees: the data's, or one that an expert resizes it to.

    >>> from rsrouter.experts.preprocessing import Resize, Resized
    >>> largest_input((3, 32, 32), [Resized(Resize(size=(224, 224)))]) == 3 * 224 * 224
    True
    """
    resized = [m.size for network in networks for m in network.modules() if isinstance(m, Resized)]
    return max([math.prod(shape), *(shape[0] * height * width for height, width in resized)])


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


def named_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, which this machine need not have; None means CPU.

    Raises:
        InputError: a name that torch does not know.
    """
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, ValueError) as error:
        raise _no_device(device, error) from error


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A usable device; None means CPU.

    Raises:
        InputError: an unknown device, or one this machine does not have.
    """
    resolved = named_device(device)
    try:
        if resolved.type == "meta":
            raise ValueError("meta tensors have no values")
        torch.empty(1, device=resolved)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _no_device(device, error) from error
    return resolved


#: What torch says about a device that it cannot use, and what helps.
_DEVICE_REMEDIES = {
    "not compiled with cuda": "install a CUDA build of torch (pytorch.org/get-started), or use --device cpu",
    "no nvidia driver": "install the NVIDIA driver, or start the container with GPUs (docker run --gpus all), or use the CPU",
    "driver on your system is too old": "update the NVIDIA driver, or install a torch that is built for an older CUDA",
    "driver version is insufficient": "update the NVIDIA driver, or install a torch that is built for an older CUDA",
    "no kernel image": "this torch is not built for so old, or so new, a card: install another build of torch",
    "invalid device ordinal": "look at `nvidia-smi -L`, and at CUDA_VISIBLE_DEVICES, for the cards there are",
    "busy or unavailable": "another process holds the card alone: end it, or take another card",
}


def _no_device(device: str | torch.device | None, error: Exception) -> DeviceError:
    said = (str(error).splitlines() or [type(error).__name__])[0]
    remedies = [remedy for words, remedy in _DEVICE_REMEDIES.items() if words in str(error).lower()]
    return DeviceError(
        "The device cannot be used",
        expected="'cpu', or an accelerator torch can see such as 'cuda:0'",
        received=repr(str(device)),
        remedy=f"{remedies[0] if remedies else 'pick another device'} ({said})",
    )


def device_name(device: torch.device) -> str:
    """What a table calls it: `cpu`, or the card's own name."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


@dataclass(frozen=True)
class Prepared:
    """A network as it runs.

    Attributes:
        module: a private copy.
        execution: how it runs: `fold` and `channels_last` are False where it does not take them.
    """

    module: Any
    execution: Execution

    @cached_property
    def input(self) -> Callable[[Tensor], Tensor]:
        """Puts a batch `(B, C, H, W)` into the dtype and memory layout that the module runs in."""
        form = torch.channels_last if self.execution.channels_last else torch.contiguous_format
        return partial(Tensor.to, dtype=_DTYPES[self.execution.dtype], memory_format=form)

    def __call__(self, x: Tensor) -> Any:
        """What the network returns for a batch `(B, C, H, W)`."""
        return self.module(self.input(x))


def prepare(
    module: nn.Module, execution: Execution, device: torch.device, shape: Sequence[int], name: str = "network"
) -> Prepared:
    """A private copy of `module`, in eval mode, as it will run; the original is not touched.

    Folding and channels_last are used only where the copy then gives the same votes on a batch of images as it does without.

    Args:
        module: from images to logits.
        execution: how it is to run.
        device: where.
        shape: `(C, H, W)`.
        name: of the network, for errors.

    Raises:
        NetworkError: a module that cannot be copied or moved whole, or that cannot run.
        InputError: an int8 execution without ranges of this module.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
    >>> prepare(net, Execution(batch=4), torch.device("cpu"), (1, 4, 4)).execution.fold
    True
    """
    with replace(execution, precision="ieee").kernels(device):  # what is compared differs by nothing else
        prepared = private_copy(module, name, device, _DTYPES[execution.dtype])
        if execution.fold or execution.channels_last:
            runs, expected = _example(prepared, shape, execution, device, name)
            prepared, folded = _folded(prepared, runs, expected) if execution.fold else (prepared, False)
            last = execution.channels_last and _takes_channels_last(prepared, runs[0], expected)
            execution = replace(execution, fold=folded, channels_last=last)
        prepared = prepared.to(dtype=_DTYPES[execution.dtype])
        if execution.dtype == "int8":
            run = Prepared(prepared, execution)
            x = run.input(_example(prepared, shape, execution, device, name)[0][0])
            prepared = quantise(prepared, execution.ranges.layers(fingerprint(module), name), x, name)
    if execution.compile:
        prepared = torch.compile(prepared, dynamic=False)  # type: ignore[assignment]
    return Prepared(prepared, execution)


def _example(
    module: nn.Module, shape: Sequence[int], execution: Execution, device: torch.device, name: str
) -> tuple[list[Tensor], Outputs]:
    """Two batches of as many images as it will run on, where memory allows, and what the network returns for the first: it may
    run other layers for other sizes."""
    rows = execution.batch or default_batch(largest_input(shape, [module]), device)
    while True:
        generator = torch.Generator().manual_seed(0)
        base = torch.rand((2, rows, *shape), generator=generator)
        base[:, ::2] += torch.randn((2, len(range(0, rows, 2)), *shape), generator=generator)
        try:
            with torch.inference_mode():
                return list(base.to(device)), outputs(forward(module, base[0].to(device), name))
        except torch.OutOfMemoryError as error:
            if rows == 1:
                raise out_of_memory(name, execution.batch or rows, error) from error
            rows = rows // 2


def _folded(module: nn.Module, runs: list[Tensor], expected: Outputs) -> tuple[nn.Module, bool]:
    """The module with BatchNorm folded and True, or, where that would not be the same function, as it is and False."""
    copied = copy.deepcopy(module)
    try:
        if not fold_batchnorm(copied, runs):
            return module, not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
        with torch.inference_mode():
            same = same_votes(expected, outputs(copied(runs[0])))
    except Exception:  # whatever a network raises when it is watched only means that it runs as it is
        return module, False
    return (copied, True) if same else (module, False)


def _takes_channels_last(module: nn.Module, x: Tensor, expected: Outputs) -> bool:
    """Puts the module into channels_last, and back where it raises or votes otherwise then."""
    _lay_out(module, torch.channels_last)
    try:
        with torch.inference_mode():
            if same_votes(expected, outputs(module(x.contiguous(memory_format=torch.channels_last)))):
                return True
    except Exception:  # `.view` after a convolution, for one
        pass
    _lay_out(module, torch.contiguous_format)
    return False


def _lay_out(module: nn.Module, form: torch.memory_format) -> None:
    # `Module.to(memory_format=...)` refuses what has five dimensions, and leaves what has one channel as it lies
    module._apply(lambda t: t.clone(memory_format=form) if t.dim() == 4 else t)  # type: ignore[no-untyped-call]
