"""The bundled demo: three Fashion-MNIST experts, a router over them, image slices, and the whole path in one call."""

from rsrouter.demo.bundled import CLASSES, SLICES, load_pool, load_router, load_slice
from rsrouter.demo.flow import Outcome, Settings, run

__all__ = ["CLASSES", "SLICES", "Outcome", "Settings", "load_pool", "load_router", "load_slice", "run"]
