"""Image processors of transformers repositories, read as the settings of an expert."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from rsrouter.core.errors import CheckpointError
from rsrouter.experts.places import Place
from rsrouter.experts.preprocessing import Resize, around, short_edge
from rsrouter.experts.probe import probe_batch
from rsrouter.stored import parse_json

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
#: largest difference of a processed pixel, in units of its standard deviation
TOLERANCE = 1e-4
_NAMES = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's


def library() -> Any:
    """transformers, or CheckpointError with the pip command."""
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            "This model needs transformers",
            expected="transformers 5 or later",
            received=str(error),
            remedy='pip install "rsrouter[transformers]"',
        ) from error
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and notes."""
    logging: Any = library().utils.logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def preprocessing(place: Place, config: Mapping[str, Any], data: tuple[int, ...] | None, told: bool) -> dict[str, Any]:
    """Data size, resizing and normalisation as the repository's image processor has them; nothing where it
    has none, or where the user says all of that."""
    path = next((found for name in _PROCESSORS if (found := place.find(name)) is not None), None)
    if path is None or told:
        size = _pair(config.get("image_size"))
        shape = None if data is None and size is None else (config.get("num_channels", 3), *(data or size or ()))
        return {} if shape is None else {"input_shape": shape}
    processor = _processor(path)
    mean, std = _numbers(processor, "image_mean"), _numbers(processor, "image_std")
    channels = int(config.get("num_channels", 3))
    if not getattr(processor, "do_normalize", False):
        mean = std = None
    if mean is not None and std is not None and not (len(mean) == len(std) == channels):
        raise CheckpointError(
            "Image processor and network disagree",
            expected=f"mean and std of {channels} channels, as config.json says",
            received=f"{len(mean)} and {len(std)} in {path.name}",
            remedy="use a repository whose preprocessor_config.json is that of the network",
        )
    factor = getattr(processor, "rescale_factor", None)
    if not getattr(processor, "do_rescale", True) or factor is None or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise CheckpointError(
            "The image processor takes pixels of another range",
            expected="do_rescale with 1/255: pixels in [0,1]",
            received=f"do_rescale {getattr(processor, 'do_rescale', None)}, rescale_factor {factor}",
            remedy="say mean and std for pixels in [0,1] in a folder without preprocessor_config.json",
        )
    target = _target(processor) or _pair(config.get("image_size"))
    shown = data or target
    if shown is None:
        raise CheckpointError(
            "Neither the image processor nor the model says a size",
            expected="size in preprocessor_config.json, or image_size in config.json",
            received=str(getattr(processor, "size", None)),
            remedy="--input-size of the data",
        )
    resize = _resize(processor, (int(shown[0]), int(shown[1])))
    _compare(processor, (channels, *shown), mean, std, resize)
    return {"input_shape": (channels, *shown), "mean": mean, "std": std, "resize": resize}


def _processor(path: Path) -> Any:
    transformers = library()
    content = parse_json(path.read_bytes(), path.name, error=CheckpointError, remedy="fetch the repository again")
    text = str(content)
    if isinstance(content, dict) and "image_processor" in content:
        content = content["image_processor"]
    if not isinstance(content, dict) or "'auto_map'" in text:
        raise CheckpointError(
            f"{path.name} brings its own code, or is not an image processor",
            expected="an image processor of transformers itself",
            received=text[:200],
            remedy="use a repository without remote code",
        )
    with TemporaryDirectory() as folder, quiet():  # transformers reads files; it gets this one and nothing else
        (Path(folder) / _PROCESSORS[0]).write_text(json.dumps(content), encoding="utf-8")
        try:
            return transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # an unknown type, or settings that do not fit it
            raise CheckpointError(
                f"transformers cannot make an image processor of {path.name}",
                expected="image_processor_type of transformers, with its settings",
                received=f"{type(error).__name__}: {str(error).strip()}"[:300],
                remedy="upgrade transformers, or use another repository",
            ) from error


def _numbers(processor: Any, name: str) -> tuple[float, ...] | None:
    value = getattr(processor, name, None)
    return None if value is None else tuple(float(v) for v in value)


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None


def _side(size: Any, key: str) -> int | None:
    value = size.get(key) if isinstance(size, Mapping) else getattr(size, key, None)
    return None if value is None else int(value)


def _target(processor: Any) -> tuple[int, int] | None:
    """`(height, width)` that comes out, where that is one size."""
    if getattr(processor, "do_center_crop", None):
        return _exact(processor.crop_size)
    if not getattr(processor, "do_resize", False):
        return None
    edge = _side(processor.size, "shortest_edge")
    return _exact(processor.size) or (None if edge is None else (edge, edge))


def _exact(size: Any) -> tuple[int, int] | None:
    height, width = _side(size, "height"), _side(size, "width")
    return None if height is None or width is None else (height, width)


def _resize(processor: Any, data: tuple[int, int]) -> Resize | None:
    """What the processor does to images of that size; None where it leaves them as they are."""
    size, crop = data, None
    if getattr(processor, "do_resize", False):
        edge, share = _side(processor.size, "shortest_edge"), getattr(processor, "crop_pct", None)
        exact = _exact(processor.size)
        if exact is not None:
            size = exact
        elif edge is not None and share is not None and edge < 384:  # ConvNeXt's
            size, crop = short_edge(data, int(edge / share)), (edge, edge)
        elif edge is not None:
            size = (edge, edge) if share is not None else short_edge(data, edge)
    if getattr(processor, "do_center_crop", None):
        crop = _exact(processor.crop_size)
    if crop == size:
        crop = None
    if size == data and crop is None:
        return None
    number = getattr(processor, "resample", None)
    name = _NAMES.get(-1 if number is None else int(number))
    if (name is None and size != data) or (crop is not None and (crop[0] > size[0] or crop[1] > size[1])):
        raise CheckpointError(
            "The image processor's resizing has no counterpart here",
            expected="nearest, bilinear or bicubic, and a crop inside the image",
            received=f"resample {number}, {size[0]} x {size[1]}, crop {crop}",
            remedy=f"say what is to be done: --resize {size[0]}x{size[1]}:bicubic with --input-size {data[0]}x{data[1]}",
        )
    return Resize.model_validate({"size": size, "crop": crop, "interpolation": name or "bicubic"})


def _compare(
    processor: Any, shape: tuple[int, ...], mean: tuple[float, ...] | None, std: tuple[float, ...] | None, resize: Resize | None
) -> None:
    """CheckpointError where the processor makes something else of an image than the expert will."""
    picture = probe_batch(shape)
    ours = around(nn.Identity(), mean, std, resize)(picture)
    try:
        theirs: Tensor = processor(picture, do_rescale=False, return_tensors="pt")["pixel_values"]
        apart = float((theirs - ours).abs().max()) if theirs.shape == ours.shape else math.inf
    except Exception as error:  # whatever a processor raises
        received = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:200]}"
    else:
        if apart <= TOLERANCE:
            return
        received = f"pixels that differ by {apart:.2g}" if math.isfinite(apart) else f"shape {tuple(theirs.shape)}"
    raise CheckpointError(
        "The image processor does more than resize, crop and normalise",
        expected=f"the same pixels from {type(processor).__name__}, within {TOLERANCE:g}",
        received=received,
        remedy="use another repository, or say mean, std and --resize in a folder without preprocessor_config.json",
    )
