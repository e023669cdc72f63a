"""BatchNorm folded into the convolution before it, found by watching a network run.

A symbolic trace would patch `nn.Module.__call__` for the whole process while other threads run, and take other branches than
the network does. Here the network runs as it is, twice, on images; hooks on the convolutions and normalisations of this copy
say who was called with which tensor, and a `TorchFunctionMode`, which belongs to the thread, sees everyone who reads one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

from rsrouter.experts.structure import structure_of

#: What is asked of a tensor without reading its values.
_SHAPELY = {
    *("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad", "is_sparse", "is_quantized", "is_nested"),
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex", "__len__"),
}
#: What hands values, or shapes that depend on them, to Python, which may branch on them.
_READS = {
    *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "nonzero", "argwhere", "unique", "unique_consecutive"),
    *("masked_select", "bincount", "data_ptr", "storage", "untyped_storage", "cond", "while_loop", "_local_scalar_dense"),
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__", "__dlpack__", "__format__"),
    *("__repr__",),
}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class _Watch(TorchFunctionMode):
    """Who reads which tensor while a network runs.

    Attributes:
        inside: the convolution or normalisation that runs now.
        conv_of: id of a convolution's output to the convolution; `alive` keeps the tensors, so that ids stay theirs.
        touched: layers of which someone else read a parameter or what they returned.
        branches: a value was handed to Python.
    """

    def __init__(self, own: dict[int, nn.Module]) -> None:
        super().__init__()
        self.own = own
        self.inside: nn.Module | None = None
        self.alive: list[Tensor] = []
        self.conv_of: dict[int, nn.Module] = {}
        self.touched: set[nn.Module] = set()
        self.calls: Counter[nn.Module] = Counter()
        self.fed: dict[nn.Module, int] = {}
        self.branches = False

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name not in _SHAPELY:
            self.branches |= name in _READS or _dynamic(name, args, kwargs)
            self.read([args, kwargs])
        return func(*args, **kwargs)

    def read(self, value: Any) -> None:
        """Notes the watched tensors in `value`, unless the layer that runs is the one that may read them."""
        for tensor in _tensors(value):
            layer = self.own.get(id(tensor))
            if layer is None:
                layer = self.conv_of.get(id(tensor))
                if layer is None or (isinstance(self.inside, nn.BatchNorm2d) and self.fed[self.inside] == id(tensor)):
                    continue
            if layer is not self.inside:
                self.touched.add(layer)

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inside = layer
        self.calls[layer] += 1
        self.fed[layer] = id(args[0]) if len(args) == 1 and not kwargs else 0

    def after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.inside = None
        if type(layer) is nn.Conv2d:
            self.alive.append(output)
            self.conv_of[id(output)] = layer


def _dynamic(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the shape of the result depends on values."""
    if name == "__getitem__":
        return any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
    if name == "repeat_interleave":
        return sum(1 for _ in _tensors([args, kwargs])) > 1
    return name == "where" and len(args) + len(kwargs) == 1


def _plain(layer: nn.Module) -> bool:
    """A convolution or normalisation whose call is its class's forward and nothing else."""
    if type(layer) is nn.BatchNorm2d:
        if layer.training or layer.running_mean is None or layer.running_var is None:
            return False
    elif type(layer) is not nn.Conv2d:
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def fold_batchnorm(module: nn.Module, runs: list[Tensor]) -> int:
    """Folds, in place, every BatchNorm2d that reads what one convolution returns, and that nobody else reads.

    Args:
        module: a private copy, in eval mode, without gradients.
        runs: batches to watch it on; two show what is kept from one call for the next.

    Returns:
        How many were folded: none where values decide what runs next, so that other images might take another way.
    """
    layers = [m for m in module.modules() if _plain(m)]
    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()) or not any(
        isinstance(m, nn.BatchNorm2d) for m in layers
    ):
        return 0  # what a script reads is not seen
    if any("ScriptFunction" in words for words in structure_of(module).opaque):
        return 0
    watch = _Watch({id(t): m for m in layers for t in [*m.parameters(recurse=False), *m.buffers(recurse=False)]})
    hooks = [m.register_forward_pre_hook(watch.before, with_kwargs=True) for m in layers]
    hooks += [m.register_forward_hook(watch.after) for m in layers]
    pairs: list[set[tuple[nn.Module, nn.Module]]] = []
    try:
        for x in runs:
            watch.calls.clear()
            watch.fed.clear()
            with torch.inference_mode(), watch:
                output = module(x)
            watch.read(output if isinstance(output, tuple | list | dict | Tensor) else vars(output))
            fed = {n: watch.conv_of[f] for n, f in watch.fed.items() if isinstance(n, nn.BatchNorm2d) and f in watch.conv_of}
            uses = watch.calls + Counter(fed.values())  # a convolution: its call, and the one normalisation that it feeds
            pairs.append({(c, n) for n, c in fed.items() if uses[c] == 2 and uses[n] == 1})
    finally:
        for hook in hooks:
            hook.remove()
    if watch.branches:
        return 0
    found = [(c, n) for c, n in set.intersection(*pairs) if c not in watch.touched and n not in watch.touched]
    for conv, norm in found:
        _fuse(conv, norm)
    return len(found)


def _fuse(conv: Any, norm: Any) -> None:
    """`norm(conv(x))` as `conv`, and `norm` the identity; both stay the objects they are, wherever they are held."""
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    conv.requires_grad_(False)
    norm.__class__ = nn.Identity
    norm._parameters.clear()
    norm._buffers.clear()
