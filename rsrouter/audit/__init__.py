"""Auditing published certificates: digests, radii from votes, votes from seeds, fresh noise, attacks."""

from rsrouter.audit.audit import audit
from rsrouter.audit.report import AuditReport, Check, Finding

__all__ = ["AuditReport", "Check", "Finding", "audit"]
