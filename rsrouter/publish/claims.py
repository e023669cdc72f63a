"""Cards that people wrote or edited: nothing in them may claim what the tables do not say."""

from __future__ import annotations

import re

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from rsrouter.core.errors import InputError
from rsrouter.publish.card import BEGIN, END, Card, headline

_PERCENT = re.compile(r"(?<![\w.])(\d{1,3}(?:\.\d+)?)\s*(?:%|percent\b|per cent\b)")


def check_claims(text: str, rendered: Card) -> None:
    """Refuses a card that claims what its tables do not say.

    The part between the markers must be what the tables render to, the model-index must be theirs, and every
    percentage in the prose around must be one of the rendered numbers.

    Args:
        text: README.md as the user wants it published.
        rendered: what the tables give.

    Raises:
        InputError: a claim that is not in the tables, with what it is.
    """
    remedy = (
        "let publish render the card (remove README.md), or keep your prose outside the markers and free of numbers of its own"
    )
    try:
        given = ModelCard(text)
        data = ModelCardData(**given.data.to_dict())  # type: ignore[no-untyped-call]
    except Exception as error:  # yaml's errors and huggingface_hub's own, all about this text
        raise InputError(
            "The card's metadata cannot be read", expected="YAML between --- lines", received=str(error)[:200], remedy=remedy
        ) from error
    wanted = {_key(r) for r in rendered.data.eval_results or []}
    claimed = {_key(r) for r in data.eval_results or []}
    if extra := sorted(claimed - wanted):
        raise InputError(
            "The card's model-index claims what the tables do not say",
            expected=f"{sorted(wanted)[:3]}, ...",
            received=str(extra[:3]),
            remedy=remedy,
        )
    if sorted(_bases(data)) != sorted(_bases(rendered.data)) and _bases(data):
        raise InputError(
            "The card names other base models than the router has",
            expected=str(_bases(rendered.data)),
            received=str(_bases(data)),
            remedy=remedy,
        )
    body, ours = given.content.partition("\n---\n")[2] or given.text, _block(rendered.text)
    theirs = _block(body)
    if theirs is not None and theirs.strip() != str(ours).strip():
        line = next(
            (a for a, b in zip(theirs.splitlines(), str(ours).splitlines(), strict=False) if a != b), "a line more or less"
        )
        raise InputError(
            "The card's generated part is not what the tables render to",
            expected="the text between the markers unchanged",
            received=repr(line[:120]),
            remedy=remedy,
        )
    prose = body.replace(theirs, "") if theirs else body
    lines = [] if rendered.summary is None else headline(rendered.summary)[2:]
    allowed = {float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", " ".join(lines))}
    stray = [m.group(0) for m in _PERCENT.finditer(prose) if float(m.group(1)) not in allowed]
    if stray:
        raise InputError(
            "The card claims numbers that are in no table",
            expected="percentages that the tables give",
            received=", ".join(stray[:5]),
            remedy=remedy,
        )


def _key(result: EvalResult) -> tuple[str, str, str, float]:
    args = result.metric_args or {}
    return result.dataset_type, result.metric_type, f"{args.get('radius')}", float(result.metric_value)


def _bases(data: ModelCardData) -> list[str]:
    bases = data.base_model or []
    return [bases] if isinstance(bases, str) else list(bases)


def _block(text: str) -> str | None:
    start, end = text.find(BEGIN), text.find(END)
    return text[start : end + len(END)] if 0 <= start < end else None
