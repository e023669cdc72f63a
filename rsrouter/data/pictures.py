"""Encoded pictures to pixels, as Pillow decodes them; what a conversion loses is counted and said.

16-bit grays keep their high byte, the EXIF orientation is applied, transparency is dropped, of several frames the first is
taken, CMYK and palettes become RGB. Floats (TIFF, PFM) stay floats and must lie in [0,1].
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.errors import InputError

#: Formats that are decoded. Named, because Pillow would hand EPS to Ghostscript, whatever a file is called.
FORMATS = (
    *("PNG", "JPEG", "MPO", "JPEG2000", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "ICO", "QOI", "PCX", "SGI"),
    *("SUN", "PSD", "DDS", "XBM", "XPM", "MSP", "IM", "TGA"),  # the last has no magic number
)
#: How their files are called.
_READ = """.png .apng .jpg .jpeg .jpe .jfif .mpo .jp2 .j2k .jpc .jpf .jpx .j2c .webp .avif .avifs .gif .bmp .dib .tif .tiff .ppm
.pgm .pbm .pnm .pfm .tga .icb .vda .vst .ico .qoi .pcx .sgi .rgb .rgba .bw .ras .psd .dds .xbm .xpm .msp .im"""
SUFFIXES = frozenset(_READ.split())
#: Pictures for others, but not read here.
_NOT_READ = """.eps .ps .pdf .svg .wmf .emf .heic .heif .jxl .fits .fit .fts .dcm .nii .mat .h5 .hdf .hdf5 .npy .npz .raw
.cr2 .nef .dng .exr .hdr .icns .mp4 .avi .mov .webm .mpg .mpeg .fli .flc .blp .cur .dcx .gbr .pcd .pxr"""
FOREIGN = frozenset(_NOT_READ.split())
#: Pictures whose header says whether a data set is gray.
PROBED = 8

SIXTEEN = "16-bit values: the high byte is kept"
FRAMES = "several frames: the first is taken"
ALPHA = "transparency is dropped"
TURNED = "the EXIF orientation is applied"
CMYK = "CMYK becomes RGB"
PALETTE = "palette colours become RGB"
BILEVEL = "1-bit pictures become 0 and 255"
FLOATS = "floats are taken as they are"
REPEATED = "gray pictures among colour ones get three equal channels"
#: Begins the note about format and mode that every picture gets.
MODE = "mode "
#: Said in a warning when it first happens; the others are counted.
LOUD = frozenset({SIXTEEN, FRAMES})


class UnreadableError(InputError):
    """One image that cannot be decoded; `skip_unreadable` leaves it out."""


def decode(encoded: bytes, who: str, channels: int | None = None, notes: Counter[str] | None = None) -> NDArray[Any]:
    """An encoded picture as pixels.

    Args:
        encoded: the bytes of the file.
        who: names the picture in an error.
        channels: 1 or 3; None: 1 for gray pictures, 3 for others.
        notes: counts what was done to it.

    Returns:
        `(C, H, W)` uint8; float32 for pictures that hold floats.

    Raises:
        UnreadableError: no picture of a format in `FORMATS`, truncated, or a mode without a plain meaning.
    """
    try:
        with opened(encoded) as image:
            return convert(image, who, channels, notes)
    except UnreadableError:
        raise
    except Exception as error:  # decoders fail in every way on damaged bytes
        raise UnreadableError(
            f"{who} is not a readable image",
            expected="PNG, JPEG or another bitmap that Pillow decodes",
            received=_said(encoded, error),
            remedy="fetch the file again, or leave unreadable images out: skip_unreadable=True (--skip-unreadable)",
        ) from error


def opened(encoded: bytes) -> Any:
    """The bytes as a PIL image, not yet decoded; only formats in `FORMATS`. Errors of Pillow pass."""
    from PIL import Image

    Image.init()
    return Image.open(io.BytesIO(encoded), formats=[f for f in FORMATS if f in Image.OPEN])


def _said(encoded: bytes, error: Exception) -> str:
    if not encoded:
        return "an empty file"
    if encoded.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file"
    if encoded.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "PostScript, which is never run"
    if encoded.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "a web page or SVG"
    reason = (str(error).splitlines() or [""])[0]
    return "no format that is known" if "cannot identify" in reason else f"{type(error).__name__}: {reason}"[:200]


def convert(image: Any, who: str, channels: int | None, notes: Counter[str] | None = None) -> NDArray[Any]:
    """A PIL image as `decode` gives it; errors of Pillow pass."""
    from PIL import ImageOps

    noted = [f"{MODE}{f'{image.format} ' if image.format else ''}{image.mode}"]
    if image.format not in (None, "MPO") and getattr(image, "n_frames", 1) > 1:
        noted.append(FRAMES)
    image.load()
    if image.getexif().get(0x112, 1) not in (1, None):
        format_, image = image.format, ImageOps.exif_transpose(image)
        image.format = format_
        noted.append(TURNED)
    array = _deep(image, who, noted)
    if array is None:
        gray = is_gray(image)
        if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
            noted.append(ALPHA)
        noted += [word for mode, word in (("CMYK", CMYK), ("1", BILEVEL)) if image.mode == mode]
        if image.mode == "P":
            noted += [] if gray else [PALETTE]
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        array = np.asarray(image.convert("L" if channels == 1 or (gray and channels is None) else "RGB"))
        if gray and channels == 3:
            noted.append(REPEATED)
    elif channels == 3:
        noted.append(REPEATED)
        array = np.repeat(array[:, :, None], 3, axis=2)
    if notes is not None:
        for word in noted:
            if word in LOUD and not notes[word]:
                warnings.warn(f"{who}: {word}", stacklevel=2)
            notes[word] += 1
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def _deep(image: Any, who: str, noted: list[str]) -> NDArray[Any] | None:
    """Gray levels `(H, W)` of a picture with more than 8 bits a value; None for others."""
    if image.mode == "F":
        noted.append(FLOATS)
        values = np.asarray(image, dtype=np.float32)
        if not (values.min() >= 0 and values.max() <= 1):
            raise UnreadableError(
                f"{who} holds floats outside [0,1]",
                expected="floats in [0,1], or 8 or 16 bits",
                received=f"[{values.min():g}, {values.max():g}]",
                remedy="write it again with white at 1, or as 8-bit PNG",
            )
        return values
    if not image.mode.startswith("I"):
        return None
    levels = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})
    bits = int(np.max(tags.get(258, 16)))
    if (
        (image.mode == "I" and image.format not in ("PNG", "PPM"))
        or tags.get(262) == 0
        or not 0 <= levels.min() <= levels.max() < 65536
    ):
        raise UnreadableError(
            f"{who} has values whose white is not known",
            expected="8 or 16 bits, white the largest value",
            received=f"mode {image.mode}, values {levels.min()} to {levels.max()}",
            remedy="write it again as 8-bit or 16-bit PNG",
        )
    noted.append(SIXTEEN)
    high: NDArray[np.uint8] = np.minimum(levels >> (bits - 8 if 8 < bits < 16 else 8), 255).astype(np.uint8)
    return high


def is_gray(image: Any) -> bool:
    """Whether an opened PIL image has one channel of brightness (a palette of grays counts)."""
    mode = str(image.mode)
    if mode == "P":
        palette = np.asarray(image.getpalette("RGB") or [0, 1, 2]).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")


class Pictures:
    """Pictures by index, all with one number of channels.

    The headers of a few decide: one channel where all are gray, else three (a gray picture among colour ones, as ImageNet
    has them, gets three equal channels, as the field does it).

    Args:
        fetch: index to the bytes of a file, or to a PIL image; raises UnreadableError for one that is not to be had.
        who: names a picture.
        probe: indices of pictures whose headers decide.
        channels: 1 or 3; None: the headers decide.
    """

    def __init__(
        self, fetch: Callable[[int], Any], who: Callable[[int], str], probe: Iterable[int], channels: int | None = None
    ) -> None:
        self._fetch, self._who, self._probe = fetch, who, tuple(probe)
        self._given, self._channels = channels, channels
        self.notes: Counter[str] = Counter()

    def __call__(self, i: int) -> NDArray[Any]:
        """Picture i, `(C, H, W)`."""
        if self._channels is None:
            grays = [g for p in self._probe if (g := self._gray(p)) is not None]
            self._channels = (1 if all(grays) else 3) if grays else None
        content = self._fetch(i)
        if not isinstance(content, bytes):
            return self._converted(content, i)
        if self._given is None and self._channels == 1:
            array = decode(content, self._who(i), None, self.notes)
            return self._one(array, i)
        return decode(content, self._who(i), self._channels, self.notes)

    def _converted(self, image: Any, i: int) -> NDArray[Any]:
        own = self._given is None and self._channels == 1
        try:
            array = convert(image, self._who(i), None if own else self._channels, self.notes)
        except UnreadableError:
            raise
        except Exception as error:
            raise UnreadableError(
                f"{self._who(i)} is not a readable image",
                expected="a picture that Pillow decodes",
                received=f"{type(error).__name__}: {error}"[:200],
                remedy="leave it out",
            ) from error
        return self._one(array, i) if own else array

    def _one(self, array: NDArray[Any], i: int) -> NDArray[Any]:
        if len(array) != 1:
            raise InputError(
                f"{self._who(i)} is in colour, and the first pictures are gray",
                expected="pictures with one channel",
                received=f"{len(array)} channels",
                remedy="channels=3 (--channels 3) reads all as RGB, channels=1 all as gray",
            )
        return array

    def _gray(self, i: int) -> bool | None:
        try:
            content = self._fetch(i)
            if not isinstance(content, bytes):
                return is_gray(content)
            with opened(content) as image:
                return is_gray(image)
        except Exception:  # said when that picture itself is asked for
            return None


def spread(count: int) -> list[int]:
    """Some indices of `count`, evenly spaced, the first and the last among them."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, PROBED))}) if count else []
