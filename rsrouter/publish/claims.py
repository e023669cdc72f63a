"""Cards that people wrote or edited: nothing in them may claim what the tables do not say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from rsrouter.core.errors import InputError
from rsrouter.publish.card import BEGIN, END, Card, headline

_PERCENT = re.compile(r"(?<![\w.])(\d{1,3}(?:\.\d+)?)\s*(?:%|percent\b|per cent\b)")
_RADIUS = re.compile(r"r\s*(=|>=|\u2265)\s*[\d.]+")
_SECTION = re.compile(r"^## Certified accuracy$.*?(?=^## What is not certified$)", re.MULTILINE | re.DOTALL)
_REMEDY = "let publish render the card (remove README.md), or keep your prose outside the markers and free of numbers of its own"


def check_claims(text: str, rendered: Card) -> None:
    """Refuses a card that claims what its tables do not say.

    The part between the markers must be what the tables render to, the model-index and every table of certified accuracies must
    be theirs, and every percentage in the prose around must be one of the rendered numbers.

    Args:
        text: README.md as the user wants it published.
        rendered: what the tables give.

    Raises:
        InputError: a claim that is not in the tables, with what it is.
    """
    data, body = read_card(text)
    if extra := other_metrics(data, rendered):
        raise InputError(
            "The card's model-index claims what the tables do not say",
            expected="metrics as the tables give them",
            received="; ".join(extra[:3]),
            remedy=_REMEDY,
        )
    if sorted(_bases(data)) != sorted(_bases(rendered.data)) and _bases(data):
        raise InputError(
            "The card names other base models than the router has",
            expected=str(_bases(rendered.data)),
            received=str(_bases(data)),
            remedy=_REMEDY,
        )
    theirs, ours = _block(body), _block(rendered.text)
    if theirs is not None and theirs.strip() != str(ours).strip():
        line = next(
            (a for a, b in zip(theirs.splitlines(), str(ours).splitlines(), strict=False) if a != b), "a line more or less"
        )
        raise InputError(
            "The card's generated part is not what the tables render to",
            expected="the text between the markers unchanged",
            received=repr(line[:120]),
            remedy=_REMEDY,
        )
    if stray := [*other_rows(body, rendered), *other_percentages(body, rendered)]:
        raise InputError(
            "The card claims numbers that are in no table",
            expected="figures that the tables give",
            received=", ".join(stray[:5]),
            remedy=_REMEDY,
        )


def read_card(text: str) -> tuple[ModelCardData, str]:
    """The metadata of a card, and the text below them.

    Raises:
        InputError: metadata that cannot be read.
    """
    try:
        given = ModelCard(text.removeprefix("\ufeff"))
        return ModelCardData(**given.data.to_dict()), given.text  # type: ignore[no-untyped-call]
    except Exception as error:  # yaml's errors and huggingface_hub's own, all about this text
        raise InputError(
            "The card's metadata cannot be read", expected="YAML between --- lines", received=str(error)[:200], remedy=_REMEDY
        ) from error


def other_metrics(data: ModelCardData, rendered: Card) -> list[str]:
    """Entries of a card's model-index that the tables do not give, each with what differs."""
    wanted, wrong = [_told(result) for result in rendered.data.eval_results or []], []
    for claimed in map(_told, data.eval_results or []):
        if claimed in wanted:
            continue
        what = f"model-index: {claimed.get('metric_type')} at radius {claimed.get('args.radius')}"
        near = next((w for w in wanted if all(w.get(k) == claimed.get(k) for k in ("metric_type", "args.radius"))), None)
        if near is None:
            wrong.append(f"{what} is {claimed.get('metric_value')}, and no table gives one")
            continue
        keys = [k for k in sorted({*claimed, *near}) if claimed.get(k) != near.get(k)]
        wrong.append(
            f"{what}: "
            + ", ".join(
                f"{_WORDS.get(k, k.removeprefix('args.'))} {claimed.get(k)} in the card, {near.get(k)} by the tables"
                for k in keys
            )
        )
    return wrong


_WORDS = {"metric_value": "value", "args.votes": "n", "dataset_name": "dataset"}
#: no figures
_FREE = ("source_name", "source_url", "task_name", "metric_args")


def _told(result: EvalResult) -> dict[str, Any]:
    arguments = result.metric_args
    told = {k: v for k, v in asdict(result).items() if k not in _FREE}
    told |= {f"args.{k}": v for k, v in arguments.items()} if isinstance(arguments, dict) else {"args": arguments}
    return {k: v for k, v in told.items() if v is not None and v is not False}


def other_rows(text: str, rendered: Card) -> list[str]:
    """Rows of Markdown tables with columns such as `r = 0.5` that the tables of certificates do not give."""
    ours = [] if rendered.summary is None else [_cells(line) for line in headline(rendered.summary)]
    return [" | ".join(cells) for cells in _rows(text) if cells not in ours]


def _rows(text: str) -> Iterator[list[str]]:
    inside = False
    for line in text.splitlines():
        cells = _cells(line)
        inside = len(cells) > 1 and (inside or any(map(_RADIUS.fullmatch, cells)))
        if inside and not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
            yield cells


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))]


def other_lines(text: str, rendered: Card) -> list[str]:
    """Lines about certified accuracy in a card's generated part that the tables do not render to, and those that it lacks."""
    block = _block(text)
    if block is None:
        return []
    theirs, ours = (
        [line.strip() for found in _SECTION.findall(part) for line in found.splitlines() if line.strip()]
        for part in (block, rendered.text)
    )
    wrong = [f"it says {line[:160]!r}" for line in theirs if line not in ours]
    return wrong + [f"it leaves out {line[:160]!r}" for line in ours if line not in theirs]


def other_percentages(text: str, rendered: Card) -> list[str]:
    """Percentages in a card's prose that are none of the tables' figures."""
    lines = [] if rendered.summary is None else headline(rendered.summary)[2:]
    allowed = {float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", " ".join(lines))}
    ours = {line.strip() for line in rendered.text.splitlines()}
    prose = "\n".join(line for line in text.splitlines() if line.strip() not in ours)
    return [m.group(0) for m in _PERCENT.finditer(prose) if float(m.group(1)) not in allowed]


def _bases(data: ModelCardData) -> list[str]:
    bases = data.base_model or []
    return [bases] if isinstance(bases, str) else list(bases)


def _block(text: str) -> str | None:
    start, end = text.find(BEGIN), text.find(END)
    return text[start : end + len(END)] if 0 <= start < end else None
