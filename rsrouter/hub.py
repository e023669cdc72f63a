"""Pinned files from the Hugging Face Hub: branch or tag to commit hash, download, check, and errors that say what to do.

Everything that reads from the Hub goes through here (experts, data sets, routers), so that a file is always the file of
one commit. With a commit hash and a warm cache no request is made at all.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from rsrouter.core.errors import HubError, IntegrityError, RSRouterError

_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_HTTP_CLIENTS = {"httpx", "httpx2", "httpcore", "httpcore2"}
PREFIXES = ("hf-hub:", "hf_hub:", "hf://")


@dataclass(frozen=True)
class Reference:
    """A Hub repository at one commit.

    Attributes:
        repo_id: `org/name`.
        revision: full commit hash.
        requested: the branch, tag or hash that was asked for.
        repo_type: `"model"` or `"dataset"`.
    """

    repo_id: str
    revision: str
    requested: str
    repo_type: str = "model"


def is_hub_reference(text: str) -> bool:
    """Whether `text` is written as a Hub reference, `hf-hub:org/name@revision`.

    >>> is_hub_reference("hf-hub:org/name@v1"), is_hub_reference("models/a.pt")
    (True, False)
    """
    return text.startswith(PREFIXES)


def parse_reference(text: str) -> tuple[str, str | None]:
    """`hf-hub:org/name@revision` (or without prefix or revision) as `(repo_id, revision or None)`; HubError otherwise.

    >>> parse_reference("hf-hub:org/name@v1")
    ('org/name', 'v1')
    """
    plain = text
    for prefix in PREFIXES:
        plain = plain.removeprefix(prefix)
    repo_id, at, revision = plain.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or (at and not revision):
        raise HubError(
            "This is not a Hub repository",
            expected="hf-hub:org/name or hf-hub:org/name@revision",
            received=text,
            remedy="write the repository as it stands on the Hub",
        )
    return repo_id, revision or None


def explain(error: Exception, repo_id: str, revision: str | None = None, filename: str | None = None) -> RSRouterError | None:
    """The HubError for an error of `huggingface_hub` or its HTTP client; None if it is something else."""
    from huggingface_hub import errors as hf

    where = f"{repo_id}@{revision}" if revision else repo_id
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # most specific first: GatedRepoError is a RepositoryNotFoundError, and all of them are OSErrors
    if isinstance(error, hf.GatedRepoError):
        return HubError(
            f"{where} is gated",
            expected="access granted to your account",
            received=reason,
            remedy=f"ask for access on the page of {repo_id}, then log in with `hf auth login` or pass token=",
        )
    if isinstance(error, hf.RepositoryNotFoundError):
        return HubError(
            f"{repo_id} does not exist, or is private",
            expected="a repository you may read",
            received=reason,
            remedy="check the spelling; for a private repository pass token= or log in with `hf auth login`",
        )
    if isinstance(error, hf.RevisionNotFoundError):
        return HubError(
            f"{repo_id} has no revision {revision!r}",
            expected="a branch, tag or commit hash",
            received=repr(revision),
            remedy=f"look at the branches and tags of {repo_id}",
        )
    if isinstance(error, hf.LocalEntryNotFoundError | hf.OfflineModeIsEnabled):
        return HubError(
            f"{filename or 'The snapshot'} of {where} is not in the cache, and the Hub was not reached",
            expected="a cached copy or a connection",
            received=reason,
            remedy="connect (unset HF_HUB_OFFLINE, local_files_only=False) and try again",
        )
    if isinstance(error, hf.EntryNotFoundError):
        return HubError(
            f"{where} has no file {filename!r}",
            expected="a file of that revision",
            received=repr(filename),
            remedy="look at the files of that revision, and give filename=",
        )
    if isinstance(error, hf.HfHubHTTPError):
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = {
            401: "log in with `hf auth login` or pass token=",
            403: "use a token with the needed rights",
            412: "the repository moved on meanwhile; fetch its head and try again",
        }.get(status or 0, "try again later")
        return HubError(
            f"The Hub refused a request for {where}", expected="status 200", received=f"status {status}: {reason}", remedy=remedy
        )
    if type(error).__name__ == "RevisionResolutionError" or type(error).__module__.split(".")[0] in _HTTP_CLIENTS:
        return HubError(
            f"The Hub was not reached for {where}",
            expected="a connection",
            received=f"{type(error).__name__}: {reason}",
            remedy="check the network and HF_ENDPOINT; a commit hash with a warm cache needs no network",
        )
    if isinstance(error, hf.HFValidationError):
        return HubError(f"{repo_id!r} cannot be a repository", expected="org/name", received=reason, remedy="check the spelling")
    if isinstance(error, OSError) and "Consistency check" in str(error):
        return HubError(
            f"{filename} of {where} arrived incomplete",
            expected="the size that the Hub announces",
            received=reason,
            remedy="try again; nothing was kept",
        )
    return None


@contextmanager
def explained(repo_id: str, revision: str | None = None, filename: str | None = None) -> Iterator[None]:
    """Turns the client's errors in its body into HubError; others pass."""
    try:
        yield
    except RSRouterError:
        raise
    except Exception as error:
        told = explain(error, repo_id, revision, filename)
        if told is None and isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
            told = explain(error.__cause__, repo_id, revision, filename)  # uploads are wrapped once more
        if told is None:
            raise
        raise told from error


def check_content(path: Path, where: str) -> None:
    """Compares a cached file with the checksum the Hub gave for it: the blob it points to is named after it
    (sha256 for LFS files, git's blob id for others). The client itself compares sizes only.

    Raises:
        IntegrityError: other content.
    """
    blob = Path(os.path.realpath(path))
    if blob == path or not (_SHA256.match(blob.name) or _COMMIT.match(blob.name)):
        return  # a cache without links does not keep the checksum
    if _SHA256.match(blob.name):
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
    with blob.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != blob.name:
        raise IntegrityError(
            f"{path.name} of {where} is damaged",
            expected=f"{digest.name} {blob.name}",
            received=digest.hexdigest(),
            remedy=f"delete {blob} and fetch again",
        )


class Hub:
    """Reads from the Hub, one commit at a time.

    Args:
        token, cache_dir, local_files_only, force_download: as in `huggingface_hub`.
        repo_type: `"model"` or `"dataset"`.
    """

    def __init__(
        self,
        *,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        repo_type: str = "model",
    ) -> None:
        self.token, self.local_files_only, self.repo_type = token, local_files_only, repo_type
        self.force_download = force_download
        self.cache_dir = None if cache_dir is None else Path(cache_dir)

    def reference(self, text: str, revision: str | None = None) -> Reference:
        """A repository at the commit that a branch, tag or hash means now; no request for a full hash.

        Args:
            text: `hf-hub:org/name@revision`; the default branch without `@revision`.
            revision: instead of `@revision`.

        Raises:
            HubError: missing, gated, no such revision, no network and nothing cached.
        """
        repo_id, written = parse_reference(text)
        if revision is not None and written is not None and revision != written:
            raise HubError(
                "Two revisions were given", expected="one", received=f"{written!r} and {revision!r}", remedy="leave one out"
            )
        wanted = revision or written or "main"
        if _COMMIT.match(wanted):
            return Reference(repo_id, wanted, wanted, self.repo_type)
        from huggingface_hub import HfApi

        with explained(repo_id, wanted):
            found = HfApi(library_name="rsrouter").resolve_revision(
                repo_id,
                revision=wanted,
                repo_type=self.repo_type,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
                token=self.token,
            )
        return Reference(repo_id, str(getattr(found, "resolved", found)), wanted, self.repo_type)

    def fetch(self, reference: Reference, filename: str) -> Path:
        """The file of that commit on this machine, in the client's cache.

        Raises:
            HubError: no such file, or not to be had.
            IntegrityError: its content is not what the Hub announced.
        """
        from huggingface_hub import hf_hub_download

        where = f"{reference.repo_id}@{reference.revision[:12]}"
        with explained(reference.repo_id, reference.requested, filename):
            path = Path(
                hf_hub_download(
                    reference.repo_id,
                    filename,
                    revision=reference.revision,
                    repo_type=reference.repo_type,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                    force_download=self.force_download,
                    library_name="rsrouter",
                )
            )
        check_content(path, where)
        return path

    def fetch_pinned(self, repo_id: str, filename: str, revision: str | None) -> Path:
        """The file of a repository at a full commit hash; from the cache without any request where it is there.

        Raises:
            HubError: not to be had, or `revision` is not a full commit hash.
            IntegrityError: its content is not what the Hub announced.
        """
        if revision is None or not _COMMIT.match(revision):
            raise HubError(
                f"{repo_id} is not pinned",
                expected="a commit hash of 40 hex digits",
                received=repr(revision),
                remedy="resolve the branch or tag first; `rsrouter wrap` does",
            )
        return self.fetch(Reference(repo_id, revision, revision, self.repo_type), filename)

    def try_fetch(self, reference: Reference, filename: str) -> Path | None:
        """As `fetch`, but None where the commit has no such file; the absence is cached as well."""
        from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError

        known = try_to_load_from_cache(
            reference.repo_id, filename, cache_dir=self.cache_dir, revision=reference.revision, repo_type=reference.repo_type
        )
        if known is _CACHED_NO_EXIST:
            return None
        try:
            return self.fetch(reference, filename)
        except HubError as error:
            if isinstance(error.__cause__, EntryNotFoundError) and not isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def fetch_first(self, reference: Reference, names: Sequence[str]) -> Path:
        """The first of `names` that the commit has; HubError if it has none."""
        for name in names:
            if (path := self.try_fetch(reference, name)) is not None:
                return path
        raise HubError(
            f"{reference.repo_id} has no weight file with a known name",
            expected=" or ".join(names),
            received="none of them",
            remedy="give filename=",
        )

    def snapshot(self, reference: Reference, allow: Sequence[str] | None = None) -> Path:
        """The folder of that commit, with the files that match the patterns in `allow` (None: all), each checked.

        Raises:
            HubError, IntegrityError: as `fetch`.
        """
        from huggingface_hub import snapshot_download

        with explained(reference.repo_id, reference.requested):
            folder = Path(
                snapshot_download(
                    reference.repo_id,
                    revision=reference.revision,
                    repo_type=reference.repo_type,
                    allow_patterns=list(allow) if allow else None,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                    force_download=self.force_download,
                    library_name="rsrouter",
                )
            )
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            if allow is None or any(fnmatch(path.relative_to(folder).as_posix(), pattern) for pattern in allow):
                check_content(path, f"{reference.repo_id}@{reference.revision[:12]}")
        return folder

    def files(self, reference: Reference) -> list[str]:
        """Names of all files of that commit, sorted (one request)."""
        from huggingface_hub import HfApi

        with explained(reference.repo_id, reference.requested):
            return sorted(
                HfApi(library_name="rsrouter").list_repo_files(
                    reference.repo_id, revision=reference.revision, repo_type=reference.repo_type, token=self.token
                )
            )


def snapshot(
    repo_id: str,
    revision: str | None = None,
    *,
    allow: Sequence[str] | None = None,
    repo_type: str = "model",
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a repository at the commit that `revision` means now, with the files that match `allow`.

    Raises:
        HubError: missing, gated, no such revision, no network and nothing cached.
        IntegrityError: a file that is not what the Hub announced.
    """
    hub = Hub(token=token, cache_dir=cache_dir, local_files_only=local_files_only, repo_type=repo_type)
    return hub.snapshot(hub.reference(repo_id, revision), allow)
