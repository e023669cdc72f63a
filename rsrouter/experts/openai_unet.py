"""The UNets of OpenAI's improved-diffusion and guided-diffusion, with their key names, for one-shot denoising."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsrouter.core.errors import CheckpointError
from rsrouter.experts.denoisers import timestep_embedding

#: Channel multipliers by image size where none are given, as the two repositories' scripts have them.
CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


class _Norm(nn.GroupNorm):
    """GroupNorm with 32 groups, in float32 whatever the network's dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class _Up(nn.Module):
    def __init__(self, channels: int, learned: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class _Down(nn.Module):
    def __init__(self, channels: int, learned: bool) -> None:
        super().__init__()
        self.op: nn.Module = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if learned else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class _ResBlock(nn.Module):
    """Residual block with the time embedding added, or as scale and shift; may halve or double the resolution."""

    def __init__(self, channels: int, out: int, width: int, scale_shift: bool, resample: nn.Module | None = None) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(_Norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(_Norm(out), nn.SiLU(), nn.Identity(), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.in_layers[1](self.in_layers[0](x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)
        shift = self.emb_layers(time)[:, :, None, None].to(h.dtype)
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[3](self.out_layers[1](h))
        else:
            h = self.out_layers(h + shift)
        out: Tensor = self.skip_connection(x) + h
        return out


class _Attention(nn.Module):
    """Self-attention over positions.

    `split_first`: guided-diffusion's "new attention order", which splits query, key and value before the heads.
    """

    def __init__(self, channels: int, heads: int, split_first: bool) -> None:
        super().__init__()
        self.heads, self.split_first = heads, split_first
        self.norm = _Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *size = x.shape
        flat = x.reshape(batch, channels, -1)
        qkv = self.qkv(self.norm(flat))
        width = channels // self.heads
        if self.split_first:
            q, k, v = (part.reshape(batch, self.heads, width, -1) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(batch, self.heads, 3 * width, -1).split(width, dim=2)
        attended = F.scaled_dot_product_attention(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3))
        h = self.proj_out(attended.transpose(2, 3).reshape(batch, channels, -1))
        out: Tensor = (flat + h).reshape(batch, channels, *size)
        return out


class _Stack(nn.Sequential):
    """Layers in a row, of which residual blocks get the time embedding too."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, time) if isinstance(layer, _ResBlock) else layer(x)
        return x


class OpenAIUNet(nn.Module):
    """Noise-predicting UNet of improved-diffusion (Nichol and Dhariwal 2021, arXiv 2102.09672) and guided-diffusion
    (Dhariwal and Nichol 2021, arXiv 2105.05233). Arguments are called as the flags of their scripts.

    Args:
        image_size: side of the images it was trained on.
        num_channels: channels at full resolution.
        num_res_blocks: residual blocks of each resolution.
        attention_resolutions: resolutions (sides in pixels) with attention.
        channel_mult: channels of each resolution over `num_channels`; None: by `image_size`, as the scripts do.
        num_heads: attention heads, in the upsampling half `num_heads_upsample` where that is given.
        num_head_channels: channels of a head, in the place of their number.
        use_scale_shift_norm: the time embedding scales and shifts, instead of being added.
        resblock_updown: residual blocks resample (guided-diffusion).
        use_new_attention_order: see guided-diffusion.
        learn_sigma: twice the channels come out; the second half (variances) is not used for denoising.
        image_channels: channels of an image.
        class_cond: number of classes of a class-conditional network, which is then called with `y (B,)` too; 0: it takes none.

    Shapes: `(x_t (B, C, H, W) on [-1,1], t (B,))` to `(B, C, H, W)`, with `learn_sigma` `(B, 2 C, H, W)`.

    Raises:
        CheckpointError: an image size without known multipliers, or widths that attention cannot divide.
    """

    def __init__(
        self,
        image_size: int,
        num_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int] = (16, 8),
        *,
        channel_mult: Sequence[float] | None = None,
        num_heads: int = 4,
        num_heads_upsample: int | None = None,
        num_head_channels: int | None = None,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        learn_sigma: bool = False,
        image_channels: int = 3,
        class_cond: int = 0,
    ) -> None:
        super().__init__()
        if channel_mult is None and image_size not in CHANNEL_MULT:
            raise CheckpointError(
                "The UNet's widths are not known",
                expected=f"channel_mult, or image_size one of {sorted(CHANNEL_MULT)}",
                received=f"image_size {image_size}",
                remedy="give channel_mult as the training script had it",
            )
        mult = CHANNEL_MULT[image_size] if channel_mult is None else tuple(channel_mult)
        attended, width = {image_size // int(r) for r in attention_resolutions}, 4 * num_channels
        self.num_channels = num_channels

        def block(channels: int, out: int, resample: nn.Module | None = None) -> _ResBlock:
            return _ResBlock(channels, out, width, use_scale_shift_norm, resample)

        def attention(channels: int, heads: int) -> _Attention:
            heads = channels // num_head_channels if num_head_channels else heads
            if heads < 1 or channels % heads:
                raise CheckpointError(
                    "Attention heads do not divide the channels",
                    expected=f"a divisor of {channels}",
                    received=f"{heads} heads",
                    remedy="check num_heads and num_head_channels",
                )
            return _Attention(channels, heads, use_new_attention_order)

        self.time_embed = nn.Sequential(nn.Linear(num_channels, width), nn.SiLU(), nn.Linear(width, width))
        self.label_emb = nn.Embedding(class_cond, width) if class_cond else None
        channels = int(mult[0] * num_channels)
        self.input_blocks = nn.ModuleList([_Stack(nn.Conv2d(image_channels, channels, 3, padding=1))])
        kept, factor = [channels], 1
        for level, m in enumerate(mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [block(channels, int(m * num_channels))]
                channels = int(m * num_channels)
                if factor in attended:
                    layers.append(attention(channels, num_heads))
                self.input_blocks.append(_Stack(*layers))
                kept.append(channels)
            if level < len(mult) - 1:
                down = block(channels, channels, _Down(channels, False)) if resblock_updown else _Down(channels, True)
                self.input_blocks.append(_Stack(down))
                kept.append(channels)
                factor *= 2
        self.middle_block = _Stack(block(channels, channels), attention(channels, num_heads), block(channels, channels))
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(num_res_blocks + 1):
                layers = [block(channels + kept.pop(), int(m * num_channels))]
                channels = int(m * num_channels)
                if factor in attended:
                    layers.append(attention(channels, num_heads if num_heads_upsample is None else num_heads_upsample))
                if level and i == num_res_blocks:
                    layers.append(block(channels, channels, _Up(channels, False)) if resblock_updown else _Up(channels, True))
                    factor //= 2
                self.output_blocks.append(_Stack(*layers))
        outputs = image_channels * (2 if learn_sigma else 1)
        self.out = nn.Sequential(_Norm(channels), nn.SiLU(), nn.Conv2d(channels, outputs, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        time = self.time_embed(timestep_embedding(t, self.num_channels).to(x.dtype))
        if self.label_emb is not None:
            time = time + self.label_emb(y)
        kept = []
        for stack in self.input_blocks:
            x = stack(x, time)
            kept.append(x)
        x = self.middle_block(x, time)
        for stack in self.output_blocks:
            x = stack(torch.cat([x, kept.pop()], dim=1), time)
        noise: Tensor = self.out(x)
        return noise


def flags_of(state: dict[str, Tensor]) -> dict[str, int | bool]:
    """What a state dictionary of these UNets tells about their flags; heads, order of attention and schedule it does not.

    Returns:
        `num_channels`, `image_channels`, `learn_sigma`, `use_scale_shift_norm`; empty where it is not such a file.
    """
    first, out, emb = (state.get(k) for k in ("input_blocks.0.0.weight", "out.2.weight", "input_blocks.1.0.emb_layers.1.weight"))
    time, conv = state.get("time_embed.0.weight"), state.get("input_blocks.1.0.in_layers.2.weight")
    if first is None or out is None or emb is None or time is None or conv is None:
        return {}
    return {
        "num_channels": int(time.shape[1]),
        "image_channels": int(first.shape[1]),
        "learn_sigma": int(out.shape[0]) == 2 * int(first.shape[1]),
        "use_scale_shift_norm": math.isclose(emb.shape[0], 2 * conv.shape[0]),
    }
