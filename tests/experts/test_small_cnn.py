"""The LeNet-like network: shapes that its arguments decide, and features that a router head can stand on."""

from __future__ import annotations

import pytest
import torch

from rsrouter.experts.registry import build_architecture, find_architecture


@pytest.mark.parametrize(("size", "in_channels"), [(28, 1), (32, 3)])
def test_shapes_follow_the_arguments(size, in_channels):
    kwargs = {"in_channels": in_channels, "channels": [6, 12], "kernels": [7, 5], "hidden": 20, "size": size}
    network = build_architecture("small_cnn", 7, kwargs).eval()
    assert find_architecture(network) == ("small_cnn", {"num_classes": 7, **kwargs})
    x = torch.rand(3, in_channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = network.forward_features(x)
        inner = network.forward_head(features, pre_logits=True)
        logits = network(x)
        last = network.get_classifier()(inner)
    assert features.shape == (3, 12, size // 4, size // 4)
    assert inner.shape == (3, network.num_features) == (3, 20)
    assert logits.shape == (3, 7)
    assert torch.equal(last, logits)
