"""Digests of tensors and of JSON: the parameters and persistent buffers of a module, by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def canonical(content: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values are equal bytes.

    >>> canonical({"b": [1, 2.5], "a": None})
    b'{"a":null,"b":[1,2.5]}'
    """
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest_of(content: Any) -> str:
    """Hex sha256 of `canonical` JSON.

    >>> digest_of([1])[:8]
    '080a9ed4'
    """
    return hashlib.sha256(canonical(content)).hexdigest()


def tensor_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The values of a dense tensor, row by row; its own memory where it lies so on the CPU.

    Raises:
        TypeError: a tensor without such values (on the meta device, sparse, quantised, not initialised).
    """
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    if not plain or tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
        kind = "meta" if tensor.is_meta else "quantised" if plain and tensor.is_quantized else type(tensor).__name__
        raise TypeError(f"a tensor of a kind that cannot be read ({kind})")
    value = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return value.reshape(-1).view(torch.uint8).numpy()


def put_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Feeds a hash with the name, dtype, shape and values of a tensor.

    Raises:
        TypeError: as `tensor_bytes`.
    """
    data = tensor_bytes(tensor)
    digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
    digest.update(data)


def tensors_digest(module: nn.Module) -> str:
    """sha256 over the parameters and persistent buffers of a module: name, dtype, shape and bytes, sorted by name.

    BatchNorm's `num_batches_tracked`, which old files lack and evaluation does not use, is left out.

    Raises:
        TypeError: a tensor without readable values.

    >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> tensors_digest(a) == tensors_digest(b)
    False
    >>> _ = b.load_state_dict(a.state_dict())
    >>> tensors_digest(a) == tensors_digest(b)
    True
    """
    return named_tensors_digest(dict(named_tensors(module)))


def named_tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """As `tensors_digest`, of tensors by name as a file holds them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        put_tensor(digest, name, tensor)
    return digest.hexdigest()


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, but for BatchNorm's `num_batches_tracked`."""
    for path, child in module.named_modules():
        before = f"{path}." if path else ""
        for key, parameter in child._parameters.items():
            if parameter is not None:
                yield before + key, parameter
        for key, buffer in child._buffers.items():
            if buffer is None or key in child._non_persistent_buffers_set:
                continue
            if not (key == "num_batches_tracked" and isinstance(child, _NormBase)):
                yield before + key, buffer
