"""One commit to the Hub, guarded by its parent, and read back."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from rsrouter._version import __version__
from rsrouter.core.errors import HubError, InputError, IntegrityError, RSRouterError
from rsrouter.files import new_folder
from rsrouter.hub import explained
from rsrouter.publish.anew import load_anew
from rsrouter.publish.experts import Upload, Uploader, send_expert
from rsrouter.publish.files import check_pinned, collect
from rsrouter.publish.remote import REPO_ID, File, describe, is_stored, within
from rsrouter.serialise import find_tables, read_router_config, rebind, router_folder

#: Seconds for the requests of one upload, and bytes a second that are waited for.
PATIENCE, SLOWEST = 600.0, 50_000


@dataclass(frozen=True)
class Publication:
    """What was published, or would be.

    Attributes:
        repo_id: `org/name`.
        files: every file of the commit.
        deleted: files of an earlier publication that the commit removes.
        commit: its hash; None for a dry run.
        parent: the commit it stands on; None for a dry run.
        url: of the commit, or of the pull request.
        dry_run: nothing was sent.
        verified: the commit was read back and is what was sent; False where the Hub could not be asked.
        experts: repositories of experts that were put on the Hub on the way, or found there.
        refused: of a dry run: why the publication itself would be refused (experts that are not on the Hub); None: it would not.
    """

    repo_id: str
    files: tuple[File, ...]
    deleted: tuple[str, ...] = ()
    commit: str | None = None
    parent: str | None = None
    url: str | None = None
    dry_run: bool = False
    verified: bool = False
    refused: str | None = None
    experts: tuple[Upload, ...] = ()
    card: str = field(default="", repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return asdict(self)


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    certificates: str | Path | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    branch: str = "main",
    licence: str = "apache-2.0",
    title: str | None = None,
    message: str | None = None,
    with_experts: str | None = None,
    imports: Sequence[str] = (),
    token: str | bool | None = None,
) -> Publication:
    """Publishes a router with its pinned experts, its certificates and a card.

    Everything is checked in a fresh folder first, and loaded by a fresh process with an empty cache, then goes up in *one*
    commit whose parent is the head that was read before: a repository holds the whole publication or none of it. The commit
    is read back and compared.

    Args:
        folder: the router's folder (`save_pretrained`), or a whole run with `router/` in it.
        repo_id: `org/name`.
        certificates: a results table, or a folder of them; default: those found in `folder`.
        private: visibility of a new repository; None leaves it to the account's default.
        create_pr: open a pull request instead of committing to `branch`.
        dry_run: check and render everything, send nothing, make no request. Experts that are not pinned on the Hub are then
            told in `Publication.refused`, beside files and card, instead of raised (raised where these cannot be shown).
        branch: where to commit; must exist unless it is `main`.
        licence: of the router, for the card.
        title: heading of the card.
        message: of the commit.
        with_experts: `org/prefix`: experts that lie on this machine are converted, put into repositories `org/prefix-NAME` and
            pinned there first. What the Hub has already is not sent again, so a run that was stopped is resumed by another.
        imports: modules that readers must import before loading, because they register architectures.
        token: as in `huggingface_hub`; never written or printed.

    Raises:
        InputError: experts that are not pinned on the Hub, a licence that promises more than theirs, a card with claims that
            are in no table, a bad name.
        IntegrityError: files that are not what they were saved as, a table of other weights, edited rows.
        ResultsError: a table that cannot be read or does not say how it was made.
        HubError: the Hub refused or was not reached; `branch` then holds none of this publication (or, where the line
            went dead after the commit and stayed so, all of it).
    """
    given = Path(folder).expanduser()
    source = router_folder(given)
    if not REPO_ID.fullmatch(repo_id):
        raise InputError(
            "A publication needs a full name",
            expected="org/name",
            received=repo_id,
            remedy="put your user name or organisation in front",
        )
    with tempfile.TemporaryDirectory(prefix="rsrouter-publish-") as scratch:
        fresh = Path(scratch) / "router"
        fresh.mkdir()
        tables = _tables(given, source, certificates)
        options: dict[str, Any] = {"tables": tables, "licence": licence, "title": title, "imports": imports}
        refused = _refused(source) if dry_run and with_experts is None else None
        experts: tuple[Upload, ...] = ()
        if with_experts is not None:
            source, experts = _with_experts(source, Path(scratch), repo_id, with_experts, options, private, dry_run, token)
        try:
            pinned = refused is None and not (dry_run and with_experts is not None)
            paths, card, saved = collect(source, fresh, repo_id, pinned=pinned, **options)
            cache = None if dry_run else Path(scratch) / "cache"
            digest = saved.routed.digest
            load_anew(fresh, digest, allow_local=not pinned, imports=imports, cache_dir=cache, token=token)
        except RSRouterError as error:
            if refused is not None:  # the first thing to mend
                check_pinned(read_router_config(source).pool["experts"])
            raise error
        files = tuple(describe(fresh, path) for path in paths)
        plan = Publication(repo_id, files, dry_run=True, refused=refused, experts=experts, card=card.text)
        if dry_run:
            return plan
        text = message or f"Publish router and certificates (rsrouter {__version__})"
        patience = PATIENCE + sum(f.size for f in files) / SLOWEST
        with explained(repo_id, branch):
            return within(patience, "the publication", lambda: _send(plan, fresh, branch, private, create_pr, text, token))


def _with_experts(
    source: Path,
    scratch: Path,
    repo_id: str,
    prefix: str,
    options: dict[str, Any],
    private: bool | None,
    dry_run: bool,
    token: str | bool | None,
) -> tuple[Path, tuple[Upload, ...]]:
    """Puts the router's experts on the Hub; a folder with the router bound to them, and the repositories."""
    first = scratch / "first"
    first.mkdir()
    # all that could be refused is, before an expert goes up
    _, _, saved = collect(source, first, repo_id, pinned=False, **options)
    api = HfApi(library_name="rsrouter", library_version=__version__, token=token)

    def send(upload: Upload, folder: Path) -> Upload:
        patience = PATIENCE + sum(f.size for f in upload.files) / SLOWEST
        return within(patience, f"the upload of {upload.repo_id}", lambda: send_expert(api, upload, folder, private))

    written = scratch / "experts"
    written.mkdir()
    uploader = Uploader(prefix, written, None if dry_run else send)
    entries = uploader.rebind(saved)
    if not any(upload.commit for upload in uploader.uploads):
        return source, tuple(uploader.uploads)
    bound = scratch / "bound"
    rebind(source, bound, entries)
    return bound, tuple(uploader.uploads)


def write_card(
    folder: str | Path,
    out: str | Path,
    repo_id: str,
    *,
    certificates: str | Path | None = None,
    licence: str = "apache-2.0",
    title: str | None = None,
    imports: Sequence[str] = (),
) -> Path:
    """What `publish` would send, as a folder on this machine: the card, the tables, the curve, the router's files.

    For routers that stay where they are, such as those of `model_cards/`: experts need not be on the Hub.

    Args:
        folder, certificates, licence, title, imports: as in `publish`.
        out: a new or empty folder.
        repo_id: the name that the card's snippet uses.

    Returns:
        The card's path.

    Raises:
        InputError: `out` holds something, or as in `publish`. IntegrityError, ResultsError: as in `publish`.
    """
    given, target = Path(folder).expanduser(), Path(out).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(
            "The output folder is not empty",
            expected="a new or empty folder",
            received=str(target),
            remedy="choose another; nothing is overwritten",
        )
    source = router_folder(given)
    if not (source / "config.json").is_file():
        raise InputError(
            "No router there",
            expected="a router's folder, or a run with router/ in it",
            received=str(given),
            remedy="check the path, or train a router first",
        )
    tables = _tables(given, source, certificates)
    with new_folder(target) as fresh:
        collect(source, fresh, repo_id, tables=tables, licence=licence, title=title, imports=imports, pinned=False)
    return target / "README.md"


def _refused(source: Path) -> str | None:
    """What `publish` would say about the router's experts."""
    try:
        check_pinned(read_router_config(source).pool["experts"])
    except InputError as error:
        return str(error)
    return None


def _tables(given: Path, source: Path, certificates: str | Path | None) -> list[Path]:
    if certificates is None:
        return find_tables(source) or find_tables(given)
    path = Path(certificates).expanduser()
    found = [path] if path.is_file() else sorted(path.glob("*.tsv")) if path.is_dir() else []
    if not found:
        raise InputError(
            "There are no certificates there",
            expected="a results table, or a folder of them",
            received=str(path),
            remedy="run `rsrouter certify`, or leave certificates out",
        )
    return found


def _send(
    plan: Publication, fresh: Path, branch: str, private: bool | None, create_pr: bool, message: str, token: str | bool | None
) -> Publication:
    api = HfApi(library_name="rsrouter", library_version=__version__, token=token)
    repo_id = plan.repo_id
    try:
        info = api.model_info(repo_id, revision=branch)
        if private and not info.private:
            raise HubError(
                f"{repo_id} exists and is public",
                expected="a private repository",
                received="a public one",
                remedy="change its visibility on the Hub, or choose another name",
            )
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private, exist_ok=False)
        info = api.model_info(repo_id, revision=branch)
    wanted = {f.path for f in plan.files}
    present = {s.rfilename for s in info.siblings or []}
    # tables of an earlier publication would stand beside a router they do not belong to
    stale = tuple(sorted(p for p in present - wanted if p.startswith("certificates/")))
    operations = [CommitOperationAdd(path_in_repo=f.path, path_or_fileobj=fresh / f.path) for f in plan.files]
    try:
        done = api.create_commit(
            repo_id,
            [*operations, *(CommitOperationDelete(path_in_repo=p) for p in stale)],
            commit_message=message,
            parent_commit=info.sha,
            create_pr=create_pr,
            revision=branch,
        )
    except HfHubHTTPError:
        raise  # the Hub answered: it was refused
    except Exception:
        # the answer was lost; the commit may stand all the same
        landed = None if create_pr else _landed(api, plan, fresh, branch, str(info.sha))
        if landed is None:
            raise
        url = f"{api.endpoint}/{repo_id}/commit/{landed}"
        return replace(plan, deleted=stale, commit=landed, parent=info.sha, url=url, dry_run=False, verified=True)
    verified = True
    try:
        _read_back(api, repo_id, done.oid, fresh, plan.files)
    except IntegrityError:
        raise
    except Exception as error:  # whatever the line does now, the commit stands
        verified = False
        warnings.warn(f"published, but the commit could not be read back: {error}", RuntimeWarning, stacklevel=2)
    url = str(done.pr_url or done.commit_url)
    return replace(plan, deleted=stale, commit=done.oid, parent=info.sha, url=url, dry_run=False, verified=verified)


def _landed(api: HfApi, plan: Publication, fresh: Path, branch: str, parent: str) -> str | None:
    """The head of `branch` if it is the publication, None if it is not or cannot be told."""
    try:
        head = str(api.model_info(plan.repo_id, revision=branch).sha)
        if head == parent:
            return None
        _read_back(api, plan.repo_id, head, fresh, plan.files)
    except Exception:  # whatever goes wrong here, the first error is the one to tell
        return None
    return head


def _read_back(api: HfApi, repo_id: str, commit: str, fresh: Path, files: tuple[File, ...]) -> None:
    """Compares the commit with what was sent, by the Hub's own checksums."""
    stored = {entry.path: entry for entry in api.get_paths_info(repo_id, [f.path for f in files], revision=commit)}
    for file in files:
        entry = stored.get(file.path)
        if not is_stored(entry, fresh / file.path, file):
            raise IntegrityError(
                f"{file.path} is not on {repo_id} as it was sent, though the commit stands",
                expected=f"sha256 {file.sha256}",
                received="no such file" if entry is None else "other content",
                remedy="publish again, and look at the repository",
            )
