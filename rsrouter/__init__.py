"""rsrouter: route between randomized-smoothing experts, and certify the result.

Public names are imported on first use, as `__init__.pyi` lists them, so `import rsrouter.core` never loads torch.
"""

import lazy_loader

from rsrouter._version import __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
