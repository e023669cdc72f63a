"""What goes up: an explicit list of files in a fresh folder, checked before anything is sent."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsrouter.core.errors import InputError, IntegrityError, ResultsError
from rsrouter.publish.card import Card, check_claims, render_card
from rsrouter.results import Table, TableMetadata, metadata_path, read_table
from rsrouter.results.verify import verify_rows
from rsrouter.serialise import CONFIG, WEIGHTS, Saved, load_folder, read_router_config

README, FIGURE = "README.md", "certificates/curve.svg"
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tsv\Z")


def check_pinned(experts: Sequence[Mapping[str, Any]]) -> None:
    """Refuses experts that others could not fetch: every weight file must be on the Hub at a full commit hash.

    Args:
        experts: entries of `config.json`'s pool.

    Raises:
        InputError: which ones, and how to pin them.
    """
    loose = []
    for entry in experts:
        todo = [entry["provenance"]]
        while todo:
            p = todo.pop()
            todo.extend(part["provenance"] for part in p.get("parts") or ())
            if not (p.get("parts") or (p["source"] == "hub" and _COMMIT.match(str(p.get("revision") or "")))):
                loose.append(f"{entry['name']} ({p['source']}: {p['location']}, revision {p.get('revision')})")
    if loose:
        raise InputError(
            "These experts are not pinned on the Hub, so nobody else could load this router",
            expected="every expert in a Hub repository at a commit hash of 40 hex digits",
            received="; ".join(loose),
            remedy="write each one with `rsrouter convert CHECKPOINT --out FOLDER`, upload that folder "
            "(`hf upload org/expert FOLDER`), wrap hf-hub:org/expert instead, and save the router over that pool "
            "(`RoutedSmooth(ExpertPool('pool.json'), old.router, execution=old.execution).save_pretrained(...)`: equal weights "
            "keep its certificates). Meanwhile `rsrouter card` writes files and card on this machine",
        )


def collect(
    folder: Path,
    fresh: Path,
    repo_id: str,
    *,
    tables: Sequence[Path],
    licence: str,
    title: str | None,
    pinned: bool = True,
) -> tuple[list[str], Card, Saved]:
    """Copies what is to be published into `fresh` and checks it there.

    Args:
        folder: the router's folder.
        fresh: an empty folder.
        repo_id: `org/name`.
        tables: results tables to publish.
        licence, title: for the card.
        pinned: refuse experts that are not on the Hub.

    Returns:
        Paths relative to `fresh`, sorted; the card that the tables render to; the router as loaded from `fresh`.

    Raises:
        InputError: unpinned experts, or a card with claims that are not in the tables.
        IntegrityError: weights that are not the saved ones, a table of other weights, rows that do not follow
            from their votes.
        ResultsError, CheckpointError, HubError: files or experts that cannot be read or fetched.
    """
    if pinned:
        check_pinned(read_router_config(folder).pool["experts"])
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(folder / name, fresh / name)
    if not pinned and (folder / "experts").is_dir():
        shutil.copytree(folder / "experts", fresh / "experts")  # weights that were written with the router
    routed = load_folder(fresh)
    names = [CONFIG, WEIGHTS]
    (fresh / "certificates").mkdir()
    loaded: list[Table] = []
    for path in tables:
        if not _NAME.match(path.name):
            raise InputError(
                "A table's name cannot be published",
                expected="letters, digits, '.', '_' and '-', ending in .tsv",
                received=path.name,
                remedy="rename it together with its JSON",
            )
        target = fresh / "certificates" / path.name
        if target.exists() or not metadata_path(path).is_file():
            raise ResultsError(
                f"{path} cannot be published",
                expected="one table per name, with its metadata beside it",
                received="a second table of that name" if target.exists() else f"no {metadata_path(path).name}",
                remedy="rename it, or certify again",
            )
        shutil.copyfile(path, target)
        shutil.copyfile(metadata_path(path), metadata_path(target))
        table = read_table(target)
        check_table(table, routed)
        loaded.append(table)
        names += [f"certificates/{path.name}", f"certificates/{metadata_path(path).name}"]
    figure = _figure(loaded, fresh, title or repo_id)
    card = render_card(routed, repo_id, loaded, licence=licence, title=title, figure=figure)
    text = card.text
    if (folder / README).is_file():
        text = (folder / README).read_text(encoding="utf-8")
        check_claims(text, card)
    (fresh / README).write_text(text, encoding="utf-8")
    return sorted([*names, README, *([figure] if figure else [])]), card, routed


def check_table(table: Table, saved: Saved) -> TableMetadata:
    """Refuses a table that is not about `saved` or one of its experts, or whose rows do not follow from their votes.

    Raises:
        ResultsError: metadata that do not say how the table was made.
        IntegrityError: other weights, other noise, or cells that were edited.
    """
    run = table.described()
    subjects = [saved.routed, *(saved.alone(name) for name in saved.pool.names)]
    subject = next((s for s in subjects if s.digest == run.digest), None)
    if subject is None or run.noise != saved.noise:
        raise IntegrityError(
            f"Table {table.name!r} belongs to other weights",
            expected=f"digest {saved.routed.digest} (or that of one of its experts), {saved.noise} noise",
            received=f"digest {run.digest}, {run.noise} noise",
            remedy="certify this router; do not publish certificates of another one with it",
        )
    derived = run.seed == subject.default_seed(run.seed_from)
    if bool(table.metadata.get("seed_derived")) != derived:
        raise IntegrityError(
            f"Table {table.name!r} says something else about its seed than is true",
            expected=f"seed_derived {derived}",
            received=f"seed_derived {table.metadata.get('seed_derived')}, seed {run.seed}",
            remedy="restore the table's JSON",
        )
    ours, theirs = saved.execution.to_dict(), dict(run.execution)
    if saved.execution.batch == 0:  # the default; a table records what it came to
        ours.pop("batch"), theirs.pop("batch", None)
    if ours != theirs:
        raise IntegrityError(
            f"Table {table.name!r} was drawn in another way than the router runs",
            expected=f"execution {ours}",
            received=f"execution {theirs}",
            remedy="votes of another dtype or layout belong to another function: certify the router as it is saved, or save it "
            "with the table's execution (`RoutedSmooth.with_execution`)",
        )
    if wrong := verify_rows(table, subject.tree):
        raise IntegrityError(
            f"{len(wrong)} cells of table {table.name!r} do not follow from the votes in their rows",
            expected="radii as certify writes them",
            received="; ".join(str(w) for w in wrong[:3]),
            remedy="restore the table; if nobody edited it, say so in an issue",
        )
    return run


def _figure(tables: list[Table], fresh: Path, title: str) -> str | None:
    """Draws the curve into the folder; its path, None where there is nothing to draw."""
    if not tables:
        return None
    from rsrouter.report import summarise
    from rsrouter.report.charts import curve_file

    (fresh / FIGURE).write_bytes(curve_file(summarise(tables, common=True), title))
    return FIGURE
