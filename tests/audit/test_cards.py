"""Tables of a card, audited on a CPU: the same noise, votes to rounding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rsrouter import RoutedSmooth
from rsrouter.audit import audit
from rsrouter.data import ImageData
from rsrouter.jobs import certify_table
from tests.audit.test_audit import edit, failed
from tests.helpers import small_router as small


def test_a_table_that_names_a_card_and_ran_as_on_a_cpu_is_not_as_the_router_is_published(run: Path, data: ImageData) -> None:
    edit(run / "certificates.json", lambda m: m.update(device="Some GPU"))
    report = audit(run, data=data, rows=None, seed=8, attack_steps=0)
    assert "execution" in failed(report)
    assert any("stream chunks in the table, counters" in f.text for f in report.findings)


def on_a_card(m: dict) -> None:
    """What a table of a card says about its machine."""
    m.update(device="Some GPU", kernels={**m["kernels"], "float32": "tf32"})
    m["execution"].update(precision="tf32", graphs=True)
    m["info"].update(instructions="")


def test_votes_of_a_card_are_drawn_again_on_a_cpu(clean: Path, tmp_path: Path, data: ImageData) -> None:
    routed = RoutedSmooth.from_pretrained(clean / "router")
    routed.save_pretrained(tmp_path / "router")
    out = tmp_path / "certificates.tsv"
    certify_table(routed.with_execution(replace(routed.execution, stream="counters")), data, out, small.PLAN)
    assert json.loads(out.with_suffix(".json").read_text())["stream"] == {"philox": "4x32-10"}
    edit(out.with_suffix(".json"), on_a_card)
    report = audit(tmp_path, data=data, rows=None, seed=8, attack_steps=0)
    assert report.ok, str(report)
    votes = next(c for c in report.checks if c.name == "votes")
    assert votes.details["moved_share"] == 0
    assert votes.details["differs"][0].startswith("device Some GPU against cpu")
    edit(out.with_suffix(".json"), lambda m: m.update(stream={"chunk": 100}))
    report = audit(tmp_path, data=data, rows=None, seed=8, attack_steps=0)
    assert "votes" in {c.name for c in report.checks if c.status == "skipped"}
