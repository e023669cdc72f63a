"""Findings of an audit, as data, JSON and text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Finding:
    """Something that does not hold.

    Attributes:
        check: which check found it.
        table: name of the table, "" for the router itself.
        idx: image id, None where it is about no single image.
        text: what is wrong, with both values.
    """

    check: str
    table: str
    idx: int | None
    text: str

    def __str__(self) -> str:
        where = ", ".join(w for w in (self.table, "" if self.idx is None else f"image {self.idx}") if w)
        return f"[{self.check}] {where + ': ' if where else ''}{self.text}"


@dataclass(frozen=True)
class Check:
    """One check: passed, failed or skipped, in a sentence, with its figures."""

    name: str
    table: str
    status: str
    summary: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit.

    Attributes:
        subject: what was audited: folder or repository.
        revision: its commit hash, None for a folder.
        digest: of the routed classifier as loaded, None where it did not load.
        tables: table name to sha256 of its file.
        checks: in the order in which they were made.
        findings: everything that does not hold; empty for a clean audit.
        caveats: what makes this audit weaker than it could be, or is a publisher's choice, to be read first.
        settings: rows, votes, level, seed and what else repeats this audit.
        environment: device and versions it ran on.
    """

    subject: str
    revision: str | None
    digest: str | None
    tables: dict[str, str]
    checks: tuple[Check, ...]
    findings: tuple[Finding, ...]
    caveats: tuple[str, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Nothing was found."""
        return not self.findings

    @property
    def complete(self) -> bool:
        """No check had to be left out."""
        return all(check.status != SKIPPED for check in self.checks)

    @property
    def exit_status(self) -> int:
        """0: every check was made and nothing was found; 1: findings; 2: nothing was found, but checks could not be made."""
        return 1 if self.findings else 0 if self.complete else 2

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content."""
        return {"kind": "rsrouter-audit", "schema_version": 2, "ok": self.ok, "complete": self.complete, **asdict(self)}

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def __str__(self) -> str:
        lines = [f"Audit of {self.subject}" + (f" at {self.revision}" if self.revision else "")]
        lines += [f"  note: {c}" for c in self.caveats]
        lines += [f"  {c.status:<8} {c.name:<10} {c.table + ': ' if c.table else ''}{c.summary}" for c in self.checks]
        lines += ["Findings:", *(f"  {f}" for f in self.findings)] if self.findings else ["No findings."]
        if not self.complete:
            left_out = dict.fromkeys(c.name for c in self.checks if c.status == SKIPPED)
            lines.append(f"The audit is incomplete: {', '.join(left_out)} could not be checked.")
        return "\n".join(lines)
