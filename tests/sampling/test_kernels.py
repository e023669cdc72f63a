"""The Triton kernels against torch, to the bit: interpreted on the CPU, compiled for cards that are not there, and on one."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from rsrouter.sampling import kernels
from rsrouter.sampling.noise import unflat
from rsrouter.sampling.philox import normals
from rsrouter.sampling.rounds import count

SHAPES = ((3, 5, 7), (1, 9, 9))


def noise_case(shape, dtype, last, device="cpu"):
    """Arguments of `add_noise`, and what it must write: rows of three requests, and one of none."""
    generator = torch.Generator().manual_seed(0)
    numel = shape[0] * shape[1] * shape[2]
    images = torch.rand((2, numel), generator=generator)
    names = torch.randint(0, 2**32, (3, 4), generator=generator)
    whose = torch.tensor([1, 0, 1])
    rows = torch.tensor([[0, 0, 0], [0, 2**32 - 1, 0], [1, 5, 1], [2, 77, 2], [3, 0, 3], [2, 12, 3]])
    request = rows[:, 0].clamp_max(2)
    expected = images[whose[request]] + normals(names[request], rows[:, 1], numel) * 0.37
    expected[4] = 0.0
    form = torch.channels_last if last else torch.contiguous_format
    out = torch.full((len(rows), *shape), 7.0, dtype=dtype).contiguous(memory_format=form)
    tensors = [t.to(device) for t in (images, names, whose, rows)]
    out = out.to(device).contiguous(memory_format=form)
    return (*tensors, 0.37, out, last), unflat(expected, shape).to(dtype)


def count_case(classes, dtype, device="cpu"):
    """Logits with ties, masked classes, NaN and infinities; lines; marks."""
    inf, nan = float("inf"), float("nan")
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(-3, 3, (40, classes), generator=generator).to(dtype)
    for row, values in enumerate(([nan], [inf], [-inf] * classes, [-inf, nan], [-inf], [0.0] * classes, [inf, -inf])):
        logits[row, : len(values)] = torch.tensor(values, dtype=dtype)
    rows = torch.stack([torch.zeros(40, dtype=torch.int64), torch.arange(40), torch.arange(40) % 4], 1)
    marked = torch.arange(40) % 7 == 3
    return logits.to(device), rows.to(device), marked.to(device)


def compare(device="cpu", dtypes=(torch.float32, torch.float16)):
    """Both kernels against torch."""
    for shape in SHAPES:
        for dtype in dtypes:
            for last in (True, False):
                arguments, expected = noise_case(shape, dtype, last, device)
                kernels.add_noise(*arguments)
                assert torch.equal(arguments[5].cpu(), expected), (shape, dtype, last)
    for classes in (2, 10, 33):
        for dtype in dtypes:
            logits, rows, marked = count_case(classes, dtype, device)
            for marks in (None, marked):
                found = torch.zeros((5, classes + 4), dtype=torch.int64, device=device)
                kernels.count_votes(logits, rows, marks, found, 3)
                expected = torch.zeros_like(found.cpu())
                marks = None if marks is None else marks.cpu()
                vote = count_of(logits.cpu(), rows.cpu()[:, 2], marks, expected[:, 3:])
                assert torch.equal(found.cpu()[:, 3:], vote), (classes, dtype)
                assert int(found.sum()) == 40


def count_of(logits, lines, marks, like):
    out = torch.zeros((like.shape[0], like.shape[1]), dtype=torch.int64)
    count((logits,), (logits.shape[1],), lines, marks, out)
    return out


def test_interpreted_the_kernels_do_what_torch_does():
    pytest.importorskip("triton")
    code = "from tests.sampling.test_kernels import compare; compare()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def compiled(kernel, signature, constants, capability):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(kernels.OPTIONS)).asm["ptx"]


@pytest.mark.parametrize("capability", [80])
def test_compiled_every_float_operation_is_rounded_by_itself(capability):
    """No fused multiply-add, no approximate root, no flushing: or the values would not be torch's. Needs no card."""
    pytest.importorskip("triton")
    pointers = {"images": "*fp32", "names": "*i64", "whose": "*i64", "rows": "*i64", "out": "*bf16", "sigma": "fp32"}
    numbers = dict.fromkeys(("requests", "numel", "channels", "area"), "i32")
    signature = {**pointers, **numbers, "LAST": "constexpr", "SIZE": "constexpr"}
    ptx = compiled(kernels.noise_kernel, signature, {(10,): True, (11,): kernels.BLOCKS}, capability)
    floats = set(re.findall(r"\b(\w+(?:\.\w+)*\.f32)\b", ptx))
    assert {"add.rn.f32", "mul.rn.f32", "sqrt.rn.f32", "cvt.rn.bf16.f32"} <= floats
    assert not [op for op in floats if op.startswith("fma") or ".approx" in op or ".ftz" in op]
    assert not [op for op in floats if op.split(".")[0] in ("add", "sub", "mul") and ".rn" not in op]
    signature = {"logits": "*bf16", "rows": "*i64", "marked": "*i8", "counts": "*i64"}
    signature |= {**dict.fromkeys(("width", "stride", "columns", "offset"), "i32"), "MARKED": "constexpr", "SIZE": "constexpr"}
    assert "add.u64" in compiled(kernels.count_kernel, signature, {(8,): True, (9,): 16}, capability)


def test_on_a_cpu_no_kernel_is_used():
    assert not kernels.usable(torch.device("cpu"))


def test_where_triton_cannot_compile_torch_makes_the_noise(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setattr(torch, "zeros", broken)
    with pytest.warns(RuntimeWarning, match="C compiler"):
        assert not kernels.usable.__wrapped__(torch.device("cuda"))


@pytest.mark.gpu
def test_on_a_card_the_kernels_do_what_torch_does():
    pytest.importorskip("triton")
    assert kernels.usable(torch.device("cuda"))
    compare("cuda", (torch.float32, torch.float16, torch.bfloat16))
