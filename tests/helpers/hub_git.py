"""The storage of `hub_server`: bare git repositories."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_GIT_ENV = {
    "GIT_AUTHOR_NAME": "hub",
    "GIT_AUTHOR_EMAIL": "hub@example.org",
    "GIT_COMMITTER_NAME": "hub",
    "GIT_COMMITTER_EMAIL": "hub@example.org",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
}


class Refused(Exception):
    """An answer other than 200: status, X-Error-Code, message."""

    def __init__(self, status: int, code: str = "", message: str = "", body: dict[str, Any] | None = None) -> None:
        self.status, self.code, self.message, self.body = status, code, message or code, body
        super().__init__(message)


class GitRepo:
    """A bare git repository, written through a temporary index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.exists():
            subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(folder)], check=True, env={**os.environ, **_GIT_ENV})

    def git(self, *args: str, data: bytes | None = None, index: str | None = None) -> bytes:
        env = {**os.environ, **_GIT_ENV, **({"GIT_INDEX_FILE": index} if index else {})}
        return subprocess.run(
            ["git", "--git-dir", str(self.folder), *args], input=data, check=True, env=env, capture_output=True
        ).stdout

    def resolve(self, revision: str) -> str:
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            try:
                return self.git("rev-parse", "--verify", "-q", f"{name}^{{commit}}").decode().strip()
            except subprocess.CalledProcessError:
                continue
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def commit(self, changes: Mapping[str, bytes | None], message: str, ref: str, parent: str | None) -> str:
        """Commits contents (None deletes a file, a trailing '/' a folder) onto `ref`; returns the commit hash."""
        with tempfile.TemporaryDirectory() as scratch:
            index = str(Path(scratch) / "index")
            if parent:
                self.git("read-tree", parent, index=index)
            for path, content in changes.items():
                if content is None:
                    self.git("rm", "-q", "-r", "--cached", "--", path.rstrip("/"), index=index)
                else:
                    blob = self.git("hash-object", "-w", "--stdin", data=content).decode().strip()
                    self.git("update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", index=index)
            tree = self.git("write-tree", index=index).decode().strip()
        oid = self.git("commit-tree", tree, *(("-p", parent) if parent else ()), "-m", message or "update").decode().strip()
        self.git("update-ref", ref, oid)
        return oid

    def tree(self, commit: str) -> list[tuple[str, str, int]]:
        """`(path, blob id, size)` of every file."""
        rows = []
        for line in self.git("ls-tree", "-r", "-l", "-z", commit).decode().split("\0"):
            if line:
                left, path = line.split("\t", 1)
                _, _, oid, size = left.split()
                rows.append((path, oid, int(size)))
        return rows

    def blob(self, oid: str) -> bytes:
        return self.git("cat-file", "blob", oid)
