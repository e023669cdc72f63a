"""Experts that name their classes differently, or in another order, brought together by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rsrouter.core.errors import InputError
from rsrouter.experts.expert import Expert


def map_labels(
    experts: Sequence[Expert], order: Sequence[str] | None = None, names: Mapping[str, str] | None = None
) -> list[Expert]:
    """The same experts with their classes in one order.

    Args:
        experts: each with class names.
        order: class names in the order that is wanted; None: that of the first expert, once its names are replaced.
        names: what a name becomes; others stay.

    Returns:
        Experts whose logits are reordered; the order is part of their identity.

    Raises:
        InputError: an expert without names, two classes of one name, or other classes.

    >>> from torch import nn
    >>> def expert(name, labels):
    ...     return Expert(nn.Flatten(), sigma=1, num_classes=2, input_shape=(1, 1, 2), name=name, labels=labels)
    >>> [e.labels for e in map_labels([expert("a", ["cat", "dog"]), expert("b", ["Hund", "cat"])], names={"Hund": "dog"})]
    [('cat', 'dog'), ('cat', 'dog')]
    """
    made = []
    for expert in experts:
        if expert.labels is None:
            raise InputError(
                f"Expert {expert.name!r} does not say the names of its classes",
                expected="names, to reorder by",
                received="none",
                remedy="give labels (--class-names), in the order of its logits",
            )
        own = [(names or {}).get(label, label) for label in expert.labels]
        wanted = tuple(order or own)
        order = wanted
        if len(set(own)) != len(own) or set(own) != set(wanted):
            only, lacking = sorted(set(own) - set(wanted)), sorted(set(wanted) - set(own))
            raise InputError(
                f"Expert {expert.name!r} has different classes",
                expected=f"the {len(wanted)} classes {', '.join(wanted[:5])}{', ...' if len(wanted) > 5 else ''}",
                received=f"a name twice in {own[:8]}" if len(set(own)) != len(own) else f"also {only[:5]}, without {lacking[:5]}",
                remedy='say which name means which: --label-map FILE with {"its name": "the name"} as JSON',
            )
        at = [own.index(label) for label in wanted]
        if at == list(range(len(at))):
            made.append(expert if expert.labels == wanted else expert.with_settings(labels=wanted))
            continue
        before = expert.order or tuple(range(expert.num_classes))
        made.append(expert.with_settings(labels=wanted, order=tuple(before[i] for i in at), probe=None))
    return made
