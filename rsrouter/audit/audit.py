"""The audit itself: which checks, on what, and what each one says."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from rsrouter.audit.card import check_card
from rsrouter.audit.claims import check_core, check_head, check_labels, check_rows, check_seed, find_subject
from rsrouter.audit.report import AuditReport
from rsrouter.audit.rows import audit_rows
from rsrouter.audit.state import Settings, State, environment
from rsrouter.core.errors import ArchitectureError, CheckpointError, InputError, IntegrityError
from rsrouter.data import ImageData, from_arrays, load_data
from rsrouter.files import sha256_of
from rsrouter.publish.files import README
from rsrouter.results import Table, read_table
from rsrouter.serialise import find_tables, resolve_source, router_folder
from rsrouter.smooth import RoutedSmooth


def audit(
    name: str | Path,
    *,
    data: ImageData | Tensor | str | Path | None = None,
    rows: int | None = 20,
    tables: Sequence[str | Path] | None = None,
    revision: str | None = None,
    fresh_votes: int = 2000,
    attack_steps: int = 20,
    predict_votes: int = 1000,
    level: float = 1e-3,
    seed: int | None = None,
    device: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> AuditReport:
    """Checks a router and its published certificates.

    For every table: the digests of the router and of every pinned expert, what the table's JSON says about them, and the
    execution; that the seed derives from the classifier; every cell of *every* row against the votes stored in it; that no row
    is missing or repeated. Given the images: every label, every uncertified answer of a core, and for `rows` rows drawn at
    random the votes (earlier looks included), drawn again from the published seed; fresh votes, against which counts and radii
    are tested; and an attack inside the certified ball. Where a card and a curve stand beside the tables, their figures must be
    the tables' own.

    A table that passes is what this code makes of these weights, this plan and these images, as far as the audited rows show;
    `caveats` say what weakens that. Each statistical check errs with probability `level`; an honest certificate fails the
    attack with probability at most its alpha plus that of two independent predictions.

    Args:
        name: folder of a router or of a whole run, or `org/name` on the Hub.
        data: the certified images, by image id: what `rsrouter.data.load_data` takes, an `ImageData`, or a float
            tensor `(N, C, H, W)`. None skips the checks that need images.
        rows: how many rows per table to draw again, test and attack; None: all.
        tables: results tables; default: those in the repository or folder.
        revision: branch, tag or commit on the Hub.
        fresh_votes: fresh votes per network and row; more detect smaller inflations.
        attack_steps: gradient steps per row; 0 skips the attack.
        predict_votes: votes of each prediction at an attacked point.
        level: failure probability of each statistical check.
        seed: of the choice of rows, the fresh noise and the attack; None draws one, so that nobody can prepare for it.
        device: where to run; None is the CPU.
        token, cache_dir, local_files_only: as in `huggingface_hub`.
        progress: called with what is being done, how far, and of how many.

    Returns:
        An `AuditReport`; `report.exit_status` is 0 where every check was made and nothing was found.

    Raises:
        InputError: no router, no tables, or data that do not fit.
        HubError: files that could not be fetched.
        ResultsError: a table that cannot be read or does not say how it was made.
    """
    if rows is not None and rows < 1:
        raise InputError(
            "An audit needs rows", expected="rows >= 1, or None for all", received=repr(rows), remedy="20 is the default"
        )
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0.0 < level < 1.0:
        raise InputError(
            "An audit's level is out of range",
            expected="a failure probability between 0 and 1",
            received=repr(level),
            remedy="0.001 is the default",
        )
    settings = Settings(
        rows, fresh_votes, attack_steps, predict_votes, level, secrets.randbits(48) if seed is None else int(seed), device
    )
    given, reference = resolve_source(
        name, revision, extra=("certificates/*", README), token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    folder = router_folder(given)
    published = find_tables(folder) or find_tables(given)
    paths = published if tables is None else [Path(t) for t in tables]
    if not paths:
        raise InputError(
            "There are no certificates to audit",
            expected="certificates/*.tsv, or certificates.tsv of a run",
            received=str(name),
            remedy="run `rsrouter certify`, or name the tables",
        )
    state = State(settings, progress)
    routed: RoutedSmooth | None = None
    try:
        if reference is None:
            routed = RoutedSmooth.from_pretrained(folder)
        else:
            routed = RoutedSmooth.from_pretrained(
                reference.repo_id,
                revision=reference.revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        core = "" if routed.core is None else ", and the core,"
        state.add(
            "weights",
            "",
            [],
            f"router and {len(routed.pool)} experts{core} are the ones that are pinned",
            experts={e.name: e.digest for e in routed.pool.members},
            router=routed.router.digest,
        )
    except (ArchitectureError, ImportError) as error:
        state.skip("weights", "", f"could not be audited on this machine: {error}")
        state.warn("", "the router could not be loaded here, which says nothing about it: its architectures must be registered")
    except IntegrityError as error:
        state.add("weights", "", [(None, str(error))], "the router or one of its experts is not the one that was saved")
    except CheckpointError as error:
        state.skip("weights", "", f"could not be audited: {error}")
        state.warn("", "the router or one of its experts cannot be read here: nothing that its tables say was compared with it")
    images = None if data is None else _images(data)
    digests = {}
    for path in paths:
        digests[path.stem] = sha256_of(path) if path.is_file() else ""
        table = read_table(path, name=path.stem)
        _audit_table(state, table, routed, images)
    check_card(state, folder, published or paths, routed)
    return AuditReport(
        subject=str(name),
        revision=None if reference is None else reference.revision,
        digest=None if routed is None else routed.digest,
        tables=digests,
        checks=tuple(state.checks),
        findings=tuple(state.findings),
        caveats=tuple(state.caveats),
        settings={
            "rows": rows,
            "fresh_votes": fresh_votes,
            "attack_steps": attack_steps,
            "predict_votes": predict_votes,
            "level": level,
            "seed": settings.seed,
        },
        environment=environment(device),
    )


def _images(data: ImageData | Tensor | str | Path) -> ImageData:
    if isinstance(data, ImageData):
        return data
    if isinstance(data, Tensor):
        return from_arrays(data)
    return load_data(data)


def _audit_table(state: State, table: Table, routed: RoutedSmooth | None, images: ImageData | None) -> None:
    run, subject = table.described(), None
    if run.heads is not None:
        check_head(state, table, run)
        return
    if routed is None:
        for check in ("digests", "execution", "seed"):
            state.skip(check, table.name, "the router could not be loaded")
    else:
        subject = find_subject(state, table, run, routed)
        check_seed(state, table, run, subject)
    check_rows(state, table, run, subject)
    if images is None:
        for check in ("labels", "votes", "fresh", "attack"):
            state.skip(check, table.name, "no images were given (--data)")
        return
    shape = tuple(images.image(0).shape)
    if bool(np.any((table.idx < 0) | (table.idx >= len(images)))) or (routed is not None and shape != tuple(routed.shape)):
        raise InputError(
            "The data are not the certified images",
            expected=f"image ids up to {int(table.idx.max())}" + ("" if routed is None else f", {tuple(routed.shape)}"),
            received=f"{len(images)} images of shape {shape}",
            remedy="give the data set of the table's JSON",
        )
    check_labels(state, table, run, images)
    if subject is not None:
        check_core(state, table, subject, images)
    if subject is None:
        for check in ("votes", "fresh", "attack"):
            state.skip(check, table.name, "the router could not be loaded")
        return
    audit_rows(state, table, run, subject, images)
