"""OpenAI's UNets: key names and shapes as their files have them, and the function against a plain restatement."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from rsrouter.core.errors import CheckpointError
from rsrouter.experts.openai_unet import OpenAIUNet, flags_of

CIFAR = {"image_size": 32, "num_channels": 128, "num_res_blocks": 3, "learn_sigma": True}


def test_the_published_cifar10_network_has_its_number_of_weights() -> None:
    """improved-diffusion's model card: cifar10_uncond_50M_500K, some 50 million parameters; first and last keys and shapes."""
    with torch.device("meta"):
        net = OpenAIUNet(**CIFAR)
    state = net.state_dict()
    assert sum(v.numel() for v in state.values()) == pytest.approx(52.5e6, rel=0.02)
    assert state["input_blocks.0.0.weight"].shape == (128, 3, 3, 3)
    assert state["input_blocks.4.0.op.weight"].shape == (128, 128, 3, 3)
    assert state["input_blocks.5.0.skip_connection.weight"].shape == (256, 128, 1, 1)
    assert state["input_blocks.5.1.qkv.weight"].shape == (768, 256, 1)
    assert state["middle_block.1.proj_out.weight"].shape == (256, 256, 1)
    assert state["output_blocks.3.1.conv.weight"].shape == (256, 256, 3, 3)
    assert state["output_blocks.15.0.emb_layers.1.weight"].shape == (256, 512)
    assert state["out.2.weight"].shape == (6, 128, 3, 3)
    assert not [k for k in state if "resample" in k]
    told = flags_of(dict(state))
    assert told == {"num_channels": 128, "image_channels": 3, "learn_sigma": True, "use_scale_shift_norm": True}


def test_the_published_imagenet_network_has_its_number_of_weights() -> None:
    """guided-diffusion's 256x256_diffusion_uncond: some 550 million parameters; resampling blocks own no weights of their own."""
    with torch.device("meta"):
        net = OpenAIUNet(256, 256, 2, (32, 16, 8), num_head_channels=64, resblock_updown=True, learn_sigma=True)
    state = net.state_dict()
    assert sum(v.numel() for v in state.values()) == pytest.approx(552.8e6, rel=0.01)
    assert state["input_blocks.3.0.in_layers.2.weight"].shape == (256, 256, 3, 3)
    assert "output_blocks.2.2.out_layers.3.weight" in state


@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize("new_order", [False, True])
def test_shapes_gradients_of_nothing_and_time(updown: bool, new_order: bool) -> None:
    torch.manual_seed(0)
    net = OpenAIUNet(
        16, 32, 1, (8,), channel_mult=(1, 2), num_heads=2, resblock_updown=updown, use_new_attention_order=new_order
    ).eval()
    x = torch.rand(3, 3, 16, 16)
    with torch.inference_mode():
        a, b = net(x, torch.tensor([1, 5, 9])), net(x, torch.tensor([1, 5, 10]))
    assert a.shape == x.shape
    torch.testing.assert_close(a[:2], b[:2])
    assert not torch.allclose(a[2], b[2], atol=1e-6)


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_is_what_the_papers_code_computes(new_order: bool) -> None:
    """softmax(q k / sqrt(width)) v, heads cut out of the channels in the order that each repository has."""
    from rsrouter.experts.openai_unet import _Attention

    torch.manual_seed(1)
    layer, x, heads = _Attention(64, 4, new_order).eval(), torch.randn(2, 64, 3, 5), 4
    with torch.inference_mode():
        flat = x.reshape(2, 64, 15)
        qkv = layer.qkv(F.group_norm(flat, 32, layer.norm.weight, layer.norm.bias))
        expected = torch.zeros(2, 64, 15)
        for h in range(heads):
            if new_order:
                q, k, v = (qkv[:, 64 * p + 16 * h : 64 * p + 16 * (h + 1)] for p in range(3))
            else:
                q, k, v = (qkv[:, 48 * h + 16 * p : 48 * h + 16 * (p + 1)] for p in range(3))
            weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(16), -1)
            expected[:, 16 * h : 16 * (h + 1)] = torch.einsum("bts,bcs->bct", weight, v)
        expected = (flat + layer.proj_out(expected)).reshape(x.shape)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_unknown_sizes_and_heads_are_refused() -> None:
    with pytest.raises(CheckpointError, match="widths are not known"):
        OpenAIUNet(48, 32, 1)
    with pytest.raises(CheckpointError, match="do not divide"):
        OpenAIUNet(32, 32, 1, (16,), num_heads=5)
