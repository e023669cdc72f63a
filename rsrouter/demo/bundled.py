"""The package's own Fashion-MNIST experts, a router trained offline over them, and three slices of images."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from rsrouter.core.errors import InputError
from rsrouter.data import ImageData, load_data
from rsrouter.experts import ExpertPool, load_expert
from rsrouter.sampling import Execution
from rsrouter.smooth import RoutedSmooth

ASSETS = Path(__file__).resolve().parent / "assets"
SLICES = ("train", "validation", "test")
#: class names of Fashion-MNIST (Xiao et al. 2017)
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")


def load_pool() -> ExpertPool:
    """The bundled experts, loaded like any expert from a folder; weights verified against their pins."""
    return ExpertPool(load_expert(folder) for folder in sorted((ASSETS / "experts").iterdir()) if folder.is_dir())


def load_router(execution: Execution | None = None) -> RoutedSmooth:
    """The bundled router over the bundled experts, bound to run as `execution` says (default: as it was saved).

    `examples/train_demo_router.py` trained it; its own network and every choice are from training and validation images.
    """
    return RoutedSmooth.from_pretrained(ASSETS / "router", execution=execution)


@cache
def load_slice(name: str) -> ImageData:
    """Images and labels of one slice: `train` and `validation` were held out from the experts' training, `test` is
    the beginning of the official test set."""
    if name not in SLICES:
        raise InputError(
            "Unknown slice",
            expected=f"one of {SLICES}",
            received=repr(name),
            remedy="--data demo:validation",
        )
    data = load_data(ASSETS / "images" / f"{name}.npz", classes=CLASSES)
    data.name = "demo" if name == "test" else f"demo:{name}"  # what stands behind --data in the commands that a card gives
    return data
