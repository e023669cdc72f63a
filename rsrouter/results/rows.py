"""One row of the results table: how a certificate becomes a line of text, and a line becomes a row again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context, Decimal

import numpy as np

from rsrouter.core.errors import ResultsError
from rsrouter.core.rows import VoteColumns
from rsrouter.core.types import ABSTAIN, Certificate

#: The field's own columns (Cohen et al. 2019, `certify.py`), which every existing analysis reads.
FIELD_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")

#: Columns of our tables, in file order.
COLUMNS = (*FIELD_COLUMNS, "expert", "rule", "r_router", "r_expert", "n_drawn", "seed", "bound_by", "core", "counts")

HEADER = "\t".join(COLUMNS) + "\n"

#: Decimals of a written radius. Fewer than float64 holds, on purpose: readers that do not parse decimals
#: exactly (pandas' default) err by an ulp, which this leaves room for; it costs less than 1e-8 of radius.
RADIUS_DECIMALS = 8

_STEP = Decimal(1).scaleb(-RADIUS_DECIMALS)
_CONTEXT = Context(prec=400)
_TIMEDELTA = re.compile(r"(?:(-?\d+) days?, )?(\d+):(\d\d):(\d\d(?:\.\d+)?)")
_NUMBER = r"(?:0|[1-9][0-9]{0,18}+)"
_STAGES = r'\{(?:"[^"\\\x00-\x1f]*+":\[(?:NUMBER(?:,NUMBER)*+)?\](?:,(?=")|(?=\})))*+\}'.replace("NUMBER", _NUMBER)
#: What `Row.to_line` writes, unless a stage's name needs escapes. Parsing the votes of 1,000 classes takes six times as long.
_COUNTS = re.compile(r'\{"select":STAGES,"estimate":STAGES(?:,"earlier":STAGES)?\}'.replace("STAGES", _STAGES))
_WHOLE = ("select", "estimate", "earlier", "moved")
_MANY = re.compile(rf"(?:(?:{_COUNTS.pattern})?+(?:\n|\Z))*+")


def format_radius(radius: float) -> str:
    """`radius` in decimal, rounded *down*: reading the text back never gives more than was certified.

    The exact decimal value of the float64 is floored to 8 decimals; rounding to the nearest float64 is
    monotone, so the text's value is at most `radius`. Infinity is written `inf`.

    Raises:
        ResultsError: NaN or negative.
    """
    if not radius >= 0.0:
        raise ResultsError(
            "A radius must not be negative or NaN",
            expected="0 or more",
            received=repr(radius),
            remedy="write 0 where nothing is certified",
        )
    if math.isinf(radius):
        return "inf"
    return f"{Decimal(float(radius)).quantize(_STEP, rounding=ROUND_FLOOR, context=_CONTEXT):f}"


def correctness(label: int, predict: int) -> int:
    """The `correct` column: 1 or 0, and -1 where the label is unknown (negative)."""
    return -1 if label < 0 else int(label == predict)


def parse_time(text: str) -> float:
    """Seconds from our own `12.345` or the field's `0:00:14.1` (a printed `timedelta`).

    Raises:
        ValueError: neither.
    """
    match = _TIMEDELTA.fullmatch(text.strip()) if ":" in text else None
    if match is None:
        return float(text)
    days, hours, minutes, seconds = match.groups()
    return int(days or 0) * 86400.0 + int(hours) * 3600.0 + int(minutes) * 60.0 + float(seconds)


@dataclass(frozen=True, slots=True)
class Row:
    """One certified image.

    Attributes:
        idx: image id, 0 or more.
        label: true class, -1 where unknown. Never seen by certify.
        predict: certified class, -1 when abstaining.
        radius: certified L2 radius in [0,1]-pixel units, 0 when abstaining.
        time: seconds spent; the only column that differs between two runs of the same job.
        expert: the selected expert's name, "" for none.
        rule: "tree", "min", or "" for a single smoothed classifier.
        r_router: radius of the routing decisions alone (inf without routing), rounded down like every radius.
        r_expert: radius of the answering stage alone.
        n_drawn: votes drawn over all stages, selection included.
        seed: certification seed; None where there is none.
        bound_by: name of the stage that limits the radius.
        core: class that an uncertified core network answers where `predict` is -1; -1, written as an empty cell, where none
            does. The field's columns then say what they say of an abstention: predict -1, radius 0, correct 0.
        counts: `{"select": {stage: [votes]}, "estimate": {stage: [votes]}}`, and `"earlier": {"stage@votes": [votes]}`
            where a bound stands on a look before the last (`Certificate.earlier`), and `"logits": {stage: [numbers]}` of
            deterministic stages, null for a number that is not finite; of a transferred table `"moved": {stage: [disagreements,
            pairs]}`.
    """

    idx: int
    label: int
    predict: int
    radius: float
    time: float
    expert: str = ""
    rule: str = ""
    r_router: float = math.inf
    r_expert: float = 0.0
    n_drawn: int = 0
    seed: int | None = None
    bound_by: str = ""
    core: int = ABSTAIN
    counts: Mapping[str, Mapping[str, Sequence[int]]] | None = None

    @classmethod
    def from_certificate(
        cls, certificate: Certificate, *, idx: int, label: int = -1, seconds: float = 0.0, rule: str = "", seed: int | None = None
    ) -> Row:
        """The row of `certificate` for image `idx`; `label` enters here and nowhere before."""
        return cls(
            idx=int(idx),
            label=int(label),
            predict=certificate.predict,
            radius=certificate.radius,
            time=float(seconds),
            expert=certificate.expert or "",
            rule=rule,
            r_router=certificate.r_router,
            r_expert=certificate.r_expert,
            n_drawn=certificate.n_drawn,
            seed=None if seed is None else int(seed),
            bound_by=certificate.bound_by,
            core=certificate.core,
            counts={
                "select": certificate.selection,
                "estimate": certificate.counts,
                "earlier": certificate.earlier,
                "logits": certificate.logits,  # type: ignore[dict-item]
            },
        )

    @property
    def correct(self) -> int:
        """1, 0, or -1 where the label is unknown."""
        return correctness(self.label, self.predict)

    def to_line(self) -> str:
        """The row as one line of text, newline included; the errors of `cells`."""
        return "\t".join(self.cells()) + "\n"

    def cells(self) -> tuple[str, ...]:
        """The row as texts, in the order of `COLUMNS`.

        Raises:
            ResultsError: a value that the table must not hold.
        """
        if self.idx < 0 or self.label < -1 or self.predict < ABSTAIN or self.n_drawn < 0:
            raise ResultsError(
                "A row holds a number that no table may hold",
                expected="idx >= 0, label >= -1, predict >= -1, n_drawn >= 0",
                received=f"idx {self.idx}, label {self.label}, predict {self.predict}, n_drawn {self.n_drawn}",
                remedy="use -1 for an unknown label and for abstention",
            )
        if self.predict == ABSTAIN and self.radius != 0.0:
            raise ResultsError(
                "An abstention has no radius",
                expected="radius 0 where predict is -1",
                received=f"radius {self.radius!r} for image {self.idx}",
                remedy="write Certificates as certify returns them",
            )
        if self.core < ABSTAIN or (self.core != ABSTAIN and self.predict != ABSTAIN):
            raise ResultsError(
                "A row has an answer of the core beside a certified one",
                expected="core -1 where predict is a class",
                received=f"core {self.core}, predict {self.predict} for image {self.idx}",
                remedy="write Certificates as certify returns them",
            )
        if not math.isfinite(self.radius) or not math.isfinite(self.time):
            raise ResultsError(
                "A row holds a number that is not finite",
                expected="finite radius and time",
                received=f"radius {self.radius!r}, time {self.time!r}",
                remedy="write Certificates as certify returns them",
            )
        for what, text in (("expert", self.expert), ("rule", self.rule), ("bound_by", self.bound_by)):
            if re.search(r"[\t\r\n\x00]", text) or text.startswith('"') or text.splitlines() not in ([], [text]):
                raise ResultsError(
                    f"The {what} of a row cannot be written to a table",
                    expected="a name without tabs, line breaks or a leading quote",
                    received=repr(text),
                    remedy="rename the expert or stage",
                )
        counts = {
            purpose: {stage: [int(v) for v in votes] for stage, votes in sorted((self.counts or {}).get(purpose, {}).items())}
            for purpose in ("select", "estimate", *(("earlier",) if (self.counts or {}).get("earlier") else ()))
        }
        if moved := (self.counts or {}).get("moved"):
            counts["moved"] = {stage: [int(v) for v in pair] for stage, pair in sorted(moved.items())}
        if logits := (self.counts or {}).get("logits"):
            finite = {s: [float(v) if v is not None and math.isfinite(v) else None for v in z] for s, z in sorted(logits.items())}
            counts["logits"] = finite  # type: ignore[assignment]
        return (
            str(self.idx),
            str(self.label),
            str(self.predict),
            format_radius(self.radius),
            str(self.correct),
            # a clock that jumped backwards must not make the row unreadable
            f"{max(self.time, 0.0):.3f}",
            self.expert,
            self.rule,
            format_radius(self.r_router),
            format_radius(self.r_expert),
            str(self.n_drawn),
            "" if self.seed is None else str(self.seed),
            self.bound_by,
            "" if self.core == ABSTAIN else str(self.core),
            json.dumps(counts, separators=(",", ":")),
        )


def parse_counts(text: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """The `counts` column as a mapping.

    Raises:
        ValueError: not the JSON that `Row.to_line` writes.
    """
    data = json.loads(text)
    known = isinstance(data, dict) and set(data) - {"earlier", "logits", "moved"} == {"select", "estimate"}
    if not known or not all(isinstance(v, dict) for v in data.values()):
        raise ValueError('not {"select": {...}, "estimate": {...}}')
    for purpose, stages in data.items():
        for name, votes in stages.items():
            if purpose == "logits":
                if not isinstance(votes, list) or not all(v is None or (type(v) is float and math.isfinite(v)) for v in votes):
                    raise ValueError(f"logits of stage {name!r} are not a list of numbers")
            elif not isinstance(votes, list) or not all(type(v) is int and v >= 0 for v in votes):
                raise ValueError(f"votes of stage {name!r} are not a list of whole numbers")
    return {purpose: {name: tuple(votes) for name, votes in stages.items()} for purpose, stages in data.items()}


def all_counts(texts: Sequence[str]) -> bool:
    """Whether every text is votes as `Row.to_line` writes them, or empty; False may also mean a name that needs escapes."""
    return _MANY.fullmatch("\n".join(texts)) is not None if texts else True


def votes_of(texts: Sequence[str]) -> tuple[VoteColumns, set[int]]:
    """The votes of many rows, and the positions of texts that are not written as `Row.to_line` writes them.

    Such a text may name a stage twice; of two readers each could see another one.

    Raises:
        ValueError: a text that `check_counts` refuses.
    """
    columns = _columns(texts)
    if columns is not None:
        return columns, {i for i, text in enumerate(texts) if not text}
    found = [json.loads(check_counts(text)) if text else {} for text in texts]
    odd = {i for i, (v, t) in enumerate(zip(found, texts, strict=True)) if json.dumps(v, separators=(",", ":")) != t}
    return VoteColumns.of(found), odd


def _columns(texts: Sequence[str]) -> VoteColumns | None:
    """`VoteColumns` of texts that are all written as `Row.to_line` writes whole numbers, or empty; None if one is not.

    The texts are cut at their brackets: numbers are read all at once, and what remains of a row, its outline, is looked at
    once for all rows that share it.
    """
    joined = "\n".join(texts)
    if "\0" in joined or "\1" in joined:
        return None
    pieces = joined.replace("]", "[\0").split("[")
    outlines = "\1".join(pieces[::2]).split("\n")
    lists = pieces[1::2]
    numbers = ",".join(lists)
    between = f",{numbers},".encode()
    if len(outlines) != len(texts) or between.translate(None, b"0123456789,"):
        return None
    comma, zero = (np.frombuffer(between, np.uint8) == ord(character) for character in ",0")
    # no number between two commas, or a zero before another digit
    if lists and (np.any(comma[:-1] & comma[1:]) or np.any(comma[:-2] & zero[1:-1] & ~comma[2:])):
        return None
    values = np.fromstring(numbers, dtype=np.int64, sep=",") if lists else np.zeros(0, np.int64)
    ends = np.cumsum(np.array(list(map(len, lists)), dtype=np.int64) + 1)
    first = np.concatenate([[0], np.cumsum(comma)[ends] - 1])
    widths = np.diff(first)
    known = {outline: code for code, outline in enumerate(dict.fromkeys(outlines))}
    codes = np.array(list(map(known.__getitem__, outlines)), dtype=np.int64)
    slots = [_slots(outline) for outline in known]
    held = np.array([-1 if keys is None else len(keys) for keys in slots], dtype=np.int64)[codes]
    if np.any(held < 0) or held.sum() != len(lists):
        return None
    begins = np.cumsum(held) - held
    columns = VoteColumns(len(texts))
    for code, keys in enumerate(slots):
        images = np.flatnonzero(codes == code)
        for place, (purpose, key) in enumerate(keys or ()):
            at = begins[images] + place
            for width in np.unique(widths[at]):
                some = widths[at] == width
                columns.add(purpose, key, images[some], values[first[at[some], None] + np.arange(width)])
    return columns


def _slots(outline: str) -> list[tuple[str, str]] | None:
    """Purpose and key of each list of numbers in an outline, in order; None if no row has such an outline."""
    if not outline:
        return []
    text = outline.replace("\1\0", "[0]")
    try:
        row = parse_counts(text)
    except ValueError:
        return None
    found = [(purpose, key) for purpose, stages in row.items() for key in stages]
    strict = json.dumps(row, separators=(",", ":")) == text and len(found) == outline.count("\1")
    return found if strict and all(purpose in _WHOLE for purpose, _ in found) else None


def check_counts(text: str) -> str:
    """`text`, if `parse_counts` reads it.

    Raises:
        ValueError: it does not.
    """
    if _COUNTS.fullmatch(text) is None:
        parse_counts(text)
    return text
