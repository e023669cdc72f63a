"""One network of every family that timm has, with random weights: certified, or refused in words."""

from __future__ import annotations

import gc
import os
import warnings
from functools import cache

import pytest
import torch
from torch import nn

from rsrouter import Execution, Expert, FixedPlan, Smooth, Terms
from rsrouter.core.errors import RSRouterError

timm = pytest.importorskip("timm")


@cache
def smallest() -> dict[str, str]:
    """Of every family (timm's module) the network with the shortest name among the small ones."""
    small = ("nano", "pico", "femto", "atto", "tiny", "small", "mini", "_xxs", "_xs", "_s", "18", "26", "0", "pit_ti")
    found = {}
    for family in timm.list_modules():
        names = [n for n in timm.list_models(module=family) if "22b" not in n and "giant" not in n and "gigantic" not in n]
        if names:
            rank = {n: next((i for i, word in enumerate(small) if word in n), len(small)) for n in names}
            found[family] = min(names, key=lambda n: (rank[n] == len(small), len(n), rank[n]))
    return found


def make(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The network, in eval mode, for images of 64 pixels where it takes them, else of its own size."""
    for options in ({"img_size": 64}, {}):
        try:
            net = timm.create_model(name, num_classes=10, **options).eval()
            with torch.inference_mode():
                net(torch.zeros(1, 3, 64, 64))
        except Exception:
            continue
        return net, (3, 64, 64)
    return net, net.pretrained_cfg["input_size"]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(smallest()))
def test_no_family_of_timm_ends_in_a_raw_error(family: str) -> None:
    name = smallest()[family]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net, shape = make(name)
        if net.num_classes != 10 or sum(p.numel() for p in net.parameters()) > 4e8:
            pytest.skip(f"{name}: no classifier, or too large for a test")
        smooth = Smooth(Expert(net, sigma=0.25, num_classes=10, input_shape=shape, name="e"), execution=Execution(batch=4))
        refused: RSRouterError | None = None
        try:
            certificates = smooth.certify(torch.rand(2, *shape), Terms(FixedPlan(4, 8), alpha=0.5, seed=0))
            ran = smooth.engine(0).describe()["execution"]["e"]
            said = f"{[c.predict for c in certificates]} { ({k: ran[k] for k in ('fold', 'channels_last', 'packs')}) }"
        except RSRouterError as error:
            refused, said = error, f"refused: {error}"
    assert refused is None or all((refused.expected, refused.received, refused.remedy))
    if "TIMM_REPORT" in os.environ:
        with open(os.environ["TIMM_REPORT"], "a") as out:
            out.write(f"{family}\t{name}\t{shape}\t{said}\n")
    del net, smooth
    gc.collect()
