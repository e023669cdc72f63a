"""`ExpertPool`: the experts of one router, over one label set and one input shape."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from rsrouter.core.errors import InputError
from rsrouter.experts.expert import Expert


class ExpertPool(Sequence[Expert]):
    """The experts of one router, ordered by (sigma, name), over one label set and one input shape.

    Args:
        experts: at least one, with different names; or the path of a saved pool or of a spec file.

    Raises:
        InputError: no expert, a name twice, or class counts or input shapes that differ.
    """

    def __init__(self, experts: Iterable[Expert] | str | os.PathLike[str]) -> None:
        if isinstance(experts, str | os.PathLike):
            experts = type(self).load(experts)
        members = sorted(experts, key=lambda e: (e.sigma, e.name))
        if not members:
            raise InputError("A pool needs experts", expected="at least one Expert", received="none", remedy="wrap a checkpoint")
        names = [e.name for e in members]
        if len(set(names)) != len(names):
            raise InputError(
                "Experts must have different names",
                expected="unique names",
                received=str(names),
                remedy="give name= to experts that share a sigma",
            )
        for what in ("num_classes", "input_shape"):
            values = {e.name: getattr(e, what) for e in members}
            if len(set(values.values())) > 1:
                raise InputError(
                    f"Experts of one pool must agree on {what}",
                    expected="one label set, one input size",
                    received=str(values),
                    remedy="leave out the experts that differ",
                )
        self.experts = tuple(members)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, lazy: bool = False) -> ExpertPool:
        """The pool of a `pool.json`, a folder with one, or a spec file.

        Args:
            path: relative locations inside count from its folder.
            lazy: read and verify the weights when first needed instead of now.

        Raises:
            InputError: no pool there. IntegrityError: an expert that is not what was pinned.
            CheckpointError, HubError: an expert that cannot be read or fetched.
        """
        from rsrouter.experts.spec import load_pool

        return load_pool(path, lazy=lazy)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `pool.json`: where each expert comes from, its sha256 and settings; not the weights.

        Raises:
            InputError: an expert without provenance.
        """
        from rsrouter.experts.spec import save_pool

        save_pool(self, path)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the K experts, in the pool's order."""
        return tuple(e.name for e in self.experts)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the K experts, ascending, in [0,1]-pixel units."""
        return tuple(e.sigma for e in self.experts)

    @property
    def num_classes(self) -> int:
        """Width of every expert's logits."""
        return self.experts[0].num_classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """`(C, H, W)` of one image."""
        return self.experts[0].input_shape

    @cached_property
    def digest(self) -> str:
        """sha256 over the experts' names and digests, in order."""
        return hashlib.sha256(repr([(e.name, e.digest) for e in self.experts]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.experts)

    def __iter__(self) -> Iterator[Expert]:
        return iter(self.experts)

    def __getitem__(self, key: int | str) -> Expert:  # type: ignore[override]
        if isinstance(key, str):
            for expert in self.experts:
                if expert.name == key:
                    return expert
            raise InputError("No such expert", expected=f"one of {list(self.names)}", received=repr(key), remedy="check the name")
        return self.experts[key]

    def __repr__(self) -> str:
        return f"ExpertPool({list(self.experts)!r})"
