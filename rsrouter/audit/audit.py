"""The audit itself: which checks, on what, and what each one says."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rsrouter.audit.report import AuditReport
from rsrouter.audit.rows import audit_rows
from rsrouter.audit.state import Progress, Settings, State, environment
from rsrouter.audit.votes import repeated_rows
from rsrouter.core.errors import CheckpointError, InputError, IntegrityError
from rsrouter.data import ImageData, from_arrays, load_data
from rsrouter.results import Table, read_table
from rsrouter.results.verify import verify_rows
from rsrouter.sampling.execution import Execution
from rsrouter.serialise import find_tables, resolve_source, router_folder
from rsrouter.smooth import RoutedSmooth, Smooth


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
    progress: Progress | None = None,
) -> AuditReport:
    """Checks a router and its published certificates.

    What is checked: the digests of the router, of every pinned expert and of the tables' metadata; the radius and
    every other cell of *every* row against the votes stored in it; that no two rows share their votes; that the seed
    derives from the digests. Given the images, for `rows` rows drawn at random: the votes, drawn again from the
    published seed; fresh votes, against which counts and radii are tested; and an attack inside the certified ball.

    A table that passes is what this code makes of these weights, this plan and these images, as far as the audited
    rows show. Each statistical check errs with probability `level`; an honest certificate fails the attack with
    probability at most its alpha plus that of two independent predictions.

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
        An `AuditReport`; `report.exit_status` is 0 where nothing was found.

    Raises:
        InputError: no router, no tables, or data that do not fit.
        HubError: files that could not be fetched.
        ResultsError: a table that cannot be read or does not say how it was made.
    """
    if rows is not None and rows < 1:
        raise InputError(
            "An audit needs rows", expected="rows >= 1, or None for all", received=repr(rows), remedy="20 is the default"
        )
    settings = Settings(
        rows, fresh_votes, attack_steps, predict_votes, level, secrets.randbits(48) if seed is None else int(seed), device
    )
    given, reference = resolve_source(
        name, revision, extra=("certificates/*",), token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    folder = router_folder(given)
    paths = [Path(t) for t in tables] if tables is not None else (find_tables(folder) or find_tables(given))
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
                reference.repo_id, reference.revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
            )
        state.add(
            "weights",
            "",
            [],
            f"router and {len(routed.pool)} experts are the ones that are pinned",
            experts={e.name: e.digest for e in routed.pool},
            router=routed.router.digest,
        )
    except (IntegrityError, CheckpointError) as error:
        state.add("weights", "", [(None, str(error))], "the router or one of its experts is not the one that was saved")
    images = None if data is None else _images(data)
    digests = {}
    for path in paths:
        digests[path.stem] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        table = read_table(path, name=path.stem)
        if routed is not None:
            _audit_table(state, table, routed, images)
    return AuditReport(
        subject=str(name),
        revision=None if reference is None else reference.revision,
        digest=None if routed is None else routed.digest,
        tables=digests,
        checks=tuple(state.checks),
        findings=tuple(state.findings),
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


def _audit_table(state: State, table: Table, routed: RoutedSmooth, images: ImageData | None) -> None:
    run, name = table.described(), table.name
    execution = Execution(**{k: v for k, v in run.execution.items() if k in Execution.__dataclass_fields__})
    whole = RoutedSmooth(routed.pool, routed.router, execution=execution, noise=run.noise)
    subjects: list[Smooth | RoutedSmooth] = [whole, *(Smooth(e, execution=execution, noise=run.noise) for e in routed.pool)]
    subject = next((s for s in subjects if s.digest == run.digest), None)
    wrong = []
    if subject is None:
        wrong.append((None, f"the table is about weights with digest {run.digest}, the router's is {routed.digest}"))
        alone = [x for x in subjects if isinstance(x, Smooth) and x.expert.name == name]
        subject = alone[0] if run.role == "expert" and alone else whole
    if run.noise != routed.noise:
        wrong.append((None, f"the table was drawn with {run.noise} noise, the router is published with {routed.noise}"))
    told = {s.name: s.sigma for s in run.tree.stages}
    wrong += [
        (None, f"stage {s.name}: sigma {told[s.name]} in the table, {s.sigma} in the router")
        for s in subject.tree.stages.values()
        if s.name in told and told[s.name] != s.sigma
    ]
    state.add("digests", name, wrong, "the table is about these weights" if not wrong else "the table is about other weights")
    derived = subject.routed.default_seed(run.seed_from)
    state.add(
        "seed",
        name,
        []
        if run.seed == derived
        else [(None, f"seed {run.seed} was chosen by hand; the digests give {derived}. Seeds can be shopped for")],
        "the seed derives from the digests" if run.seed == derived else "the seed does not derive from the digests",
    )
    cells = verify_rows(table, subject.tree)
    state.add(
        "radii",
        name,
        [(m.idx, str(m).partition(": ")[2]) for m in cells],
        f"{len({m.idx for m in cells})} of {len(table)} rows do not follow from their votes"
        if cells
        else f"all {len(table)} rows follow from their votes",
        rows=len(table),
    )
    votes = [(int(table.idx[i]), table.counts(i)) for i in range(len(table))]
    groups = repeated_rows(votes)
    state.add(
        "repeats",
        name,
        [(g[0], f"images {', '.join(map(str, g))} have equal votes, which chance does not explain") for g in groups],
        "no two images share their votes" if not groups else f"{len(groups)} groups of images share their votes",
    )
    if images is None:
        for check in ("votes", "fresh", "attack"):
            state.skip(check, name, "no images were given (--data)")
        return
    beyond = [int(i) for i in table.idx if not 0 <= i < len(images)]
    if beyond or tuple(images.image(0).shape) != tuple(routed.pool.input_shape):
        raise InputError(
            "The data are not the certified images",
            expected=f"image ids up to {int(table.idx.max())}, {routed.pool.input_shape}",
            received=f"{len(images)} images of shape {tuple(images.image(0).shape)}",
            remedy="give the data set of the table's JSON",
        )
    audit_rows(state, table, run, subject, images)
