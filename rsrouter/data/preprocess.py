"""The field's test transform for large images, pinned: the same pixels on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def short_side(size: int) -> int:
    """256 for 224, in proportion for others."""
    return round(size * 256 / 224)


def described(size: int) -> dict[str, Any]:
    """`resize_centre` for a job's metadata. Pillow's version is part of it: it also decodes the files."""
    import PIL

    return {"resize": short_side(size), "filter": "bilinear, antialiased", "crop": size, "pillow": PIL.__version__}


def resize_centre(pixels: Tensor, size: int) -> Tensor:
    """Short side to `size * 256 / 224`, centre crop of `size`: torchvision's `Resize(256)` and `CenterCrop(224)` on a PIL
    image, as Cohen et al. 2019 and the field use them.

    Pillow resizes in whole numbers, so the result does not depend on a processor's vector instructions, and stays 8-bit.

    Args:
        pixels: `(C, H, W)` float32 in [0,1], 1 or 3 channels.
        size: of the square that is kept.

    Returns:
        `(C, size, size)` float32 in [0,1], each pixel a multiple of 1/255.
    """
    from PIL import Image

    channels, height, width = pixels.shape
    short = short_side(size)
    # torchvision cuts the long side off to a whole number, and rounds the crop's corner half to even
    wide, high = (int(short * width / height), short) if height <= width else (short, int(short * height / width))
    eight_bit = (pixels * 255).round().to(torch.uint8).numpy()
    image = Image.fromarray(eight_bit[0] if channels == 1 else eight_bit.transpose(1, 2, 0))
    if (wide, high) != (width, height):
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = round((wide - size) / 2.0), round((high - size) / 2.0)
    array = np.array(image.crop((left, top, left + size, top + size)))
    cropped = array[None] if channels == 1 else array.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(cropped)).to(torch.float32).div_(255)
