"""Settings that a user's process may hold, and those that networks run under whatever it holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import overrides
from torch.nn.modules import module as every_module
from torch.utils import _python_dispatch
from torch.utils._device import DeviceContext

from rsrouter.core.errors import InputError, NetworkError

_B: Any = torch.backends


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


#: Settings of the process by name: how they are read and set. Those of one name before the dot are set to one value.
_KNOBS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "default_dtype": (
        lambda: str(torch.get_default_dtype()).removeprefix("torch."),
        lambda value: torch.set_default_dtype(getattr(torch, value)),
    ),
    **{
        f"float32.{path}": _attribute(owner, "fp32_precision")
        for path, owner in {
            "cuda.matmul": _B.cuda.matmul,
            "cudnn.conv": _B.cudnn.conv,
            "cudnn.rnn": _B.cudnn.rnn,
            "mkldnn.conv": _B.mkldnn.conv,
            "mkldnn.matmul": _B.mkldnn.matmul,
            "mkldnn.rnn": _B.mkldnn.rnn,
        }.items()
    },
    "cudnn": _attribute(_B.cudnn, "enabled"),
    "cudnn_benchmark": _attribute(_B.cudnn, "benchmark"),
    "cudnn_deterministic": _attribute(_B.cudnn, "deterministic"),
    "mkldnn": _attribute(_B.mkldnn, "enabled"),
    "mkldnn_deterministic": _attribute(_B.mkldnn, "deterministic"),
    "deterministic_algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "reduced_precision_sums.float16": _attribute(_B.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    "reduced_precision_sums.bfloat16": _attribute(_B.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    "fused_attention.flash": (_B.cuda.flash_sdp_enabled, _B.cuda.enable_flash_sdp),
    "fused_attention.efficient": (_B.cuda.mem_efficient_sdp_enabled, _B.cuda.enable_mem_efficient_sdp),
    "fused_attention.cudnn": (_B.cuda.cudnn_sdp_enabled, _B.cuda.enable_cudnn_sdp),
    "fused_attention.math": (_B.cuda.math_sdp_enabled, _B.cuda.enable_math_sdp),
    "attention_fastpath": (_B.mha.get_fastpath_enabled, _B.mha.set_fastpath_enabled),
}

#: How every network runs, whatever the process has set: reduced float32, other kernels, and kernels picked by timing change bits.
KERNELS: dict[str, Any] = {
    "default_dtype": "float32",
    "float32": "ieee",
    "cudnn": True,
    "cudnn_benchmark": False,
    "cudnn_deterministic": True,
    "mkldnn": _B.mkldnn.is_available(),
    "mkldnn_deterministic": False,
    "deterministic_algorithms": False,
    "reduced_precision_sums": True,
    "fused_attention": True,
    "attention_fastpath": True,
}

#: How an accelerator may round the inputs of float32 products and convolutions.
PRECISIONS = ("ieee", "tf32")
#: The knobs of it, which only an accelerator's networks run by.
_ACCELERATOR = ("float32.cuda.matmul", "float32.cudnn.conv", "float32.cudnn.rnn")

#: The value of `KERNELS` that each knob has.
_USUAL: dict[str, Any] = {knob: KERNELS[knob.split(".")[0]] for knob in _KNOBS}

_lock = threading.Condition()
#: Who wants what of a knob, by an object of theirs, with their thread; a value of None takes whatever another one needs.
_pins: dict[str, dict[object, tuple[Any, int]]] = {knob: {} for knob in _KNOBS}
_before: dict[str, Any] = {}


#: All knobs at their usual values, or at what another thread needs.
_PLAIN: dict[str, Any] = dict.fromkeys(_KNOBS)


def kernels(precision: str = "ieee") -> dict[str, Any]:
    """`KERNELS` with that precision of float32, as tables record it.

    >>> kernels("tf32")["float32"], kernels() == KERNELS
    ('tf32', True)
    """
    return {**KERNELS, "float32": precision}


def _wanted(knob: str) -> Any:
    for value, _ in _pins[knob].values():
        if value is not None:
            return value
    return _USUAL[knob]


def _wait_for_turn(knobs: Mapping[str, Any]) -> None:
    """Waits until no other thread needs another value."""
    wanted = {knob: value for knob, value in knobs.items() if value is not None}
    while others := {t for k, v in wanted.items() for other, t in _pins[k].values() if other not in (None, v)}:
        if threading.get_ident() in others:
            raise InputError(
                "One thread draws votes in one float32 precision at a time",
                expected="networks of one precision inside another's forward pass",
                received=", ".join(sorted(set(wanted.values()))),
                remedy="draw one after the other",
            )
        _lock.wait()


@contextmanager
def _pinned(knobs: Mapping[str, Any]) -> Iterator[None]:
    """Settings of the process at the given values, None being their `KERNELS` value; where several threads want them, the last
    one puts back what was. A setting that someone else has changed meanwhile stays as they set it."""
    mine = object()
    with _lock:
        _wait_for_turn(knobs)
        me = threading.get_ident()
        for knob, value in knobs.items():
            if value is None and _pins[knob]:  # whoever was here first has set it
                _pins[knob][mine] = None, me
                continue
            read, write = _KNOBS[knob]
            old = _wanted(knob) if _pins[knob] else None
            if not _pins[knob]:
                _before[knob] = read()
            _pins[knob][mine] = value, me
            if _wanted(knob) != old and read() != _wanted(knob):
                write(_wanted(knob))
    try:
        yield
    finally:
        with _lock:
            for knob, value in knobs.items():
                if value is None and len(_pins[knob]) > 1:  # what the others want is what they wanted
                    del _pins[knob][mine]
                    continue
                read, write = _KNOBS[knob]
                held = _wanted(knob)
                del _pins[knob][mine]
                back = _wanted(knob) if _pins[knob] else _before[knob]
                if back != held and read() == held:
                    write(back)
            _lock.notify_all()


def _flushes_denormals() -> bool:
    with np.errstate(under="ignore"):
        return bool(np.float32(1e-38) * np.float32(1e-3) == 0.0)


def modes() -> list[str]:
    """Modes of this thread that may replace what torch computes, but for a default device."""
    functions: list[Any] = getattr(overrides, "_get_current_function_mode_stack", list)()
    dispatches: list[Any] = getattr(_python_dispatch, "_get_current_dispatch_mode_stack", list)()
    return [type(mode).__name__ for mode in (*functions, *dispatches) if not isinstance(mode, DeviceContext)]


@contextmanager
def _own_thread() -> Iterator[None]:
    """No autocast, no default device and no flushing of small numbers in this thread."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if _flushes_denormals() and torch.set_flush_denormal(False):
            stack.callback(torch.set_flush_denormal, True)
        yield


@contextmanager
def usual_settings(*, gradients: bool = True) -> Iterator[None]:
    """Runs its body as if nothing had been set around it: float32 and the CPU by default, no autocast, no inference mode,
    gradients on unless they are not wanted. For whatever makes networks or trains them.

    >>> with torch.inference_mode(), torch.device("meta"), usual_settings():
    ...     (torch.ones(1, requires_grad=True) * 2).sum().backward()
    """
    with _own_thread(), _pinned({"default_dtype": None}), torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


@contextmanager
def fixed_kernels(precision: str | None = None, threads: int = 0) -> Iterator[None]:
    """Runs its body under `KERNELS`, without autocast or default device; what the process and thread had set is put back.

    Autocast, default device and small numbers belong to the thread. The others belong to the process, and threads beside this
    one see them meanwhile.

    Args:
        precision: of float32 on an accelerator, one of `PRECISIONS`; None where none takes part. Threads of another precision
            wait for each other.
        threads: that torch uses on a CPU; 0 leaves them as they are.

    Raises:
        InputError: this thread runs under another precision already.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16), fixed_kernels():
    ...     (torch.ones(1, 2) @ torch.ones(2, 1)).dtype
    torch.float32
    """
    with _own_thread(), _pinned(_PLAIN if precision is None else {**_PLAIN, **dict.fromkeys(_ACCELERATOR, precision)}):
        if threads in (0, before := torch.get_num_threads()):
            yield
            return
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def disturbed() -> list[str]:
    """Settings that are not what `fixed_kernels` made them: somebody else, another thread or a network, sets them as well."""
    return [knob for knob, (read, _) in _KNOBS.items() if read() != _wanted(knob)]


def check_settings(name: str) -> None:
    """Refuses votes that were drawn while somebody changed what they depend on.

    Raises:
        NetworkError: a setting that `fixed_kernels` makes is not what it made it, hooks on all modules of the process, or a
            mode that replaces functions of torch.
    """
    if hooks := every_module.__dict__["_global_forward_hooks"] | every_module.__dict__["_global_forward_pre_hooks"]:
        raise NetworkError(
            f"Hooks on all modules of the process ran while network {name!r} was voting",
            expected="the module's own hooks alone",
            received=", ".join(getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks.values()),
            remedy="remove what register_module_forward_hook or register_module_forward_pre_hook returned, and start again",
        )
    if around := modes():
        raise NetworkError(
            f"Torch function or dispatch modes were active while network {name!r} was voting",
            expected="the functions of torch as they are",
            received=", ".join(around),
            remedy="leave them before, and start again",
        )
    if changed := disturbed():
        raise NetworkError(
            f"Settings of the process changed while network {name!r} was voting",
            expected="the settings of rsrouter.process.KERNELS for as long as votes are drawn",
            received=f"others: {', '.join(changed)}",
            remedy="set them before or after, neither in another thread nor in a forward pass, and start again",
        )
