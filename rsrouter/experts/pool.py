"""`ExpertPool`: the experts of one router, over one label set and one input shape."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rsrouter.core.errors import InputError
from rsrouter.experts.entries import experts_from_dict, experts_to_dict
from rsrouter.experts.expert import Expert, refuse_core, same_labels
from rsrouter.experts.loaders import Sources
from rsrouter.experts.provenance import REMEDY
from rsrouter.experts.spec import SPEC_SUFFIXES, experts_of_spec
from rsrouter.experts.tensors import digest_of
from rsrouter.files import write_atomically
from rsrouter.hub import Hub
from rsrouter.stored import read_json


class ExpertPool(Sequence[Expert]):
    """The experts of one router, ordered by (sigma, name), over one label set and one input shape.

    Args:
        experts: at least one, with different names, and at most one core beside them; or the path of a saved pool or of a spec
            file.

    Attributes:
        experts: those that can be certified, in the pool's order.
        core: the network that answers where a router certifies nothing; None without one. It is not part of the sequence.
        members: all of them, the core last.
        labels: class names; None where they are not known.

    Raises:
        InputError: no expert, a name twice, two cores, or class counts, input shapes or class names that differ.

    >>> from torch import nn
    >>> pool = ExpertPool(Expert(nn.Flatten(), sigma=s, num_classes=4, input_shape=(1, 2, 2)) for s in (0.5, 0.25))
    >>> pool.names, pool.sigmas
    (('sigma_0.25', 'sigma_0.5'), (0.25, 0.5))
    """

    def __init__(self, experts: Iterable[Expert] | str | os.PathLike[str]) -> None:
        if isinstance(experts, str | os.PathLike):
            experts = type(self).load(experts)
        experts = experts.members if isinstance(experts, ExpertPool) else experts
        experts = list(experts) if isinstance(experts, Iterable) else [experts]
        if odd := [type(e).__name__ for e in experts if not isinstance(e, Expert)]:
            raise InputError(
                "A pool is made of experts",
                expected="Expert objects, or the path of a saved pool",
                received=", ".join(odd[:3]),
                remedy="Expert(module, sigma=0.5, num_classes=10, input_shape=(1, 28, 28)) wraps a module; "
                "load_expert(path, ...) a checkpoint",
            )
        given = sorted(experts, key=lambda e: (e.sigma, e.name))
        able, cores = [e for e in given if not e.core], [e for e in given if e.core]
        members = [*able, *cores]
        if len(cores) > 1:
            raise InputError(
                "A pool has one core at most",
                expected="one network that answers where nothing is certified",
                received=str([e.name for e in cores]),
                remedy="leave out the others",
            )
        if not able:
            raise InputError(
                "A pool needs experts",
                expected="at least one Expert",
                received="none" if not cores else "a core alone",
                remedy="wrap a checkpoint",
            )
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
        self.labels = same_labels(members, "experts of one pool")
        self.experts: tuple[Expert, ...] = tuple(able)
        self.members: tuple[Expert, ...] = tuple(members)
        self.core: Expert | None = cores[0] if cores else None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, lazy: bool = False, hub: Hub | None = None) -> ExpertPool:
        """The pool of a `pool.json`, a folder with one, or a spec file.

        Args:
            path: relative locations inside count from its folder.
            lazy: read and verify the weights when first needed instead of now.
            hub: how the Hub is read (token, cache, offline).

        Raises:
            InputError: no pool there. IntegrityError: an expert that is not what was pinned.
            CheckpointError, HubError: an expert that cannot be read or fetched.
        """
        given = Path(path).expanduser()
        if given.suffix in SPEC_SUFFIXES:
            return cls(experts_of_spec(given, hub=hub))
        file = _pool_path(given)
        if not file.exists():
            raise InputError(
                "No pool there",
                expected="a pool.json, a folder with one, or a spec file",
                received=str(file),
                remedy="write it with `rsrouter wrap` or ExpertPool.save",
            )
        sources = Sources(Path(os.path.abspath(file.parent)), hub or Hub())
        return cls(experts_from_dict(read_json(file, file.name, remedy=REMEDY), sources, lazy=lazy))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes `pool.json` whole or not at all: where each expert comes from, what pins it and its settings; not the weights.

        Raises:
            InputError: an expert without provenance.
        """
        file = Path(os.path.abspath(_pool_path(Path(path).expanduser())))
        text = json.dumps(pool_to_dict(self, file.parent), indent=2, allow_nan=False) + "\n"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text.encode())
        return file

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
        return digest_of([[e.name, e.digest] for e in self.experts])

    def __len__(self) -> int:
        return len(self.experts)

    def __iter__(self) -> Iterator[Expert]:
        return iter(self.experts)

    def __getitem__(self, key: int | str) -> Expert:  # type: ignore[override]
        if isinstance(key, str):
            for expert in self.members:
                if expert.name == key:
                    refuse_core(expert, "be certified")
                    return expert
            raise InputError("No such expert", expected=f"one of {list(self.names)}", received=repr(key), remedy="check the name")
        return self.experts[key]

    def __repr__(self) -> str:
        return f"ExpertPool({list(self.members)!r})"


def _pool_path(file: Path) -> Path:
    return file if file.suffix == ".json" else file / "pool.json"


def pool_to_dict(pool: ExpertPool, folder: Path | None = None) -> dict[str, Any]:
    """JSON-ready content of `pool.json`; local locations inside `folder` are relative to it."""
    return experts_to_dict(pool.members, folder)


def pool_from_dict(
    content: Any,
    folder: Path | None = None,
    *,
    lazy: bool = False,
    hub: Hub | None = None,
    allow_local: bool = True,
) -> ExpertPool:
    """The pool of `pool_to_dict`.

    Args:
        content: JSON.
        folder: where relative local locations count from.
        lazy: read and verify the weights when first needed instead of now.
        hub: how the Hub is read (token, cache, offline).
        allow_local: False for a configuration from elsewhere: it may name the Hub and what ships with this package, and no
            file of this machine is opened.

    Raises:
        InputError: not a pool. IntegrityError: not what was pinned, or a source that is not allowed.
    """
    return ExpertPool(experts_from_dict(content, Sources(folder, hub or Hub(), allow_local), lazy=lazy))
