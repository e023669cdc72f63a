"""The files to be published: an explicit list in a fresh folder, checked before anything is sent."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rsrouter.core.errors import InputError, IntegrityError, ResultsError
from rsrouter.process import kernels
from rsrouter.publish.card import Card, render_card
from rsrouter.publish.claims import check_claims
from rsrouter.publish.licences import check_licence
from rsrouter.results import Table, metadata_path, read_table, require_sound, require_whole
from rsrouter.results.verify import other_claims
from rsrouter.sampling.execution import Execution
from rsrouter.sampling.noise import STREAMS
from rsrouter.serialise import CONFIG, WEIGHTS, RouterConfig, Saved, load_folder, needed_packages, read_router_config

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
            remedy="`rsrouter publish DIR ORG/NAME --with-experts ORG/PREFIX` uploads and pins them on the way: equal weights "
            "keep the router's certificates. Meanwhile `rsrouter card` writes files and card on this machine",
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
    imports: Sequence[str] = (),
) -> tuple[list[str], Card, Saved]:
    """Copies what is to be published into `fresh` and checks it there.

    Args:
        folder: the router's folder.
        fresh: an empty folder.
        repo_id: `org/name`.
        tables: results tables to publish.
        licence, title: for the card.
        pinned: refuse experts that are not on the Hub.
        imports: modules that readers must import before loading.

    Returns:
        Paths relative to `fresh`, sorted; the card that the tables render to; the router as loaded from `fresh`.

    Raises:
        InputError: unpinned experts, networks that no package builds, a licence that promises more than the experts' own, or a
            card with claims that are not in the tables.
        IntegrityError: weights that are not the saved ones, a table of other weights, rows that do not follow
            from their votes.
        ResultsError, CheckpointError, HubError: files or experts that cannot be read or fetched.
    """
    config = read_router_config(folder)
    if pinned:
        check_pinned(config.pool["experts"])
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(folder / name, fresh / name)
    if not pinned and (folder / "experts").is_dir():
        shutil.copytree(folder / "experts", fresh / "experts")  # weights that were written with the router
    routed = load_folder(fresh)
    check_licence(licence, routed.pool.members)
    check_packages(routed, config)
    names = [CONFIG, WEIGHTS]
    (fresh / "certificates").mkdir()
    loaded: list[Table] = []
    for path in sorted(tables, key=lambda path: path.name):  # as they are found in what is published
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
        loaded.append(check_table(read_table(target), routed))
        names += [f"certificates/{path.name}", f"certificates/{metadata_path(path).name}"]
    figure = _figure(loaded, fresh, title)
    card = render_card(routed, repo_id, loaded, licence=licence, title=title, figure=figure, needs=config.needs, imports=imports)
    text = card.text
    if (folder / README).is_file():
        text = (folder / README).read_text(encoding="utf-8")
        check_claims(text, card)
    (fresh / README).write_text(text, encoding="utf-8")
    return sorted([*names, README, *([figure] if figure else [])]), card, routed


def check_packages(saved: Saved, config: RouterConfig) -> None:
    """Refuses networks that no installed package builds: nobody else could.

    Raises:
        InputError: modules that lie loose on this machine.
    """
    needed = needed_packages(saved.pool, config.router.model_dump(mode="json"))
    if loose := [name for name, version in needed.items() if not version]:
        raise InputError(
            "This router has networks that nobody else could build",
            expected="architectures of rsrouter, timm or an installed package",
            received=f"architectures from {', '.join(loose)}",
            remedy="put their module into a package that others can install, and announce it under the entry points "
            "rsrouter.architectures of its pyproject.toml",
        )


def check_table(table: Table, saved: Saved) -> Table:
    """`table`, if it is about `saved` or one of its experts, whole, and its rows follow from their votes.

    Raises:
        ResultsError: unfinished, a shard, a seed that was chosen by hand, or metadata that do not say how the table was made.
        IntegrityError: other weights, other noise, or cells that were edited.
    """
    about = table.described()
    subjects = [(saved.routed, "routed"), *((saved.alone(name), "expert") for name in saved.pool.names)]
    equal = [(s, role) for s, role in subjects if s.digest == about.digest]  # experts may be equal but for their names
    named = [(s, role) for s, role in equal if s.tree.root == about.tree.root]
    if not equal or about.noise != saved.noise:
        raise IntegrityError(
            f"Table {table.name!r} belongs to other weights",
            expected=f"digest {saved.routed.digest} (or that of one of its experts), {saved.noise} noise",
            received=f"digest {about.digest}, {about.noise} noise",
            remedy="certify this router; do not publish certificates of another one with it",
        )
    subject, role = (named or equal)[0]
    drawn_as = Execution.recorded(about.execution, about.device, f"the metadata of {table.name}")
    wrong = other_claims(
        about,
        subject.tree,
        role=role,
        router=saved.router.kind if role == "routed" else None,
        experts=[(e.name, float(e.sigma), e.digest) for e in saved.pool if role == "routed" or e.name == subject.tree.root],
        kernels=kernels(drawn_as.precision),
        core=None if role == "expert" or saved.pool.core is None else (saved.pool.core.name, saved.pool.core.digest),
    )
    derived = about.seed == subject.default_seed(about.seed_from)
    if about.seed_derived != derived:
        wrong.append(f"seed_derived: {about.seed_derived} in the table, {derived} for seed {about.seed}")
    if about.stream != STREAMS[drawn_as.stream]:
        wrong.append(f"stream: {about.stream} in the table, {STREAMS[drawn_as.stream]} in this version")
    if wrong:
        raise IntegrityError(
            f"Table {table.name!r} says something else about its classifier than is true",
            expected="what certify wrote about this router",
            received="; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""),
            remedy="restore the table's JSON, or certify again",
        )
    if not derived:
        raise ResultsError(
            f"The seed of table {table.name!r} was chosen by hand, so it could have been picked for a lucky result",
            expected=f"seed {subject.default_seed(about.seed_from)}, which derives from the classifier",
            received=f"seed {about.seed}",
            remedy="certify again without --seed, or with --seed-from TEXT, a public text such as a date",
        )
    where = torch.device("cpu" if about.device == "cpu" else "cuda")
    ours, theirs = saved.execution.nearest(where).to_dict(), drawn_as.to_dict()
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
    if about.shard is not None:
        raise ResultsError(
            f"Table {table.name!r} is a part of its job",
            expected="all images of the job",
            received=f"shard {about.shard.index} of {about.shard.count}",
            remedy="put the shards together: rsrouter merge",
        )
    return require_sound(require_whole(table), subject.tree)


def _figure(tables: list[Table], fresh: Path, title: str | None) -> str | None:
    """Draws the curve into the folder; its path, None where there is nothing to draw."""
    if not tables:
        return None
    from rsrouter.report import summarise
    from rsrouter.report.charts import curve_file
    from rsrouter.report.page import default_title

    summary = summarise(tables, common=True)
    (fresh / FIGURE).write_bytes(curve_file(summary, title or default_title(summary)))
    return FIGURE
