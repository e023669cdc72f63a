"""A Hub on loopback for the unmodified `huggingface_hub` client: real bare git repositories and a sha256 store.

Commit ids, tags and trees are git's own; large files are LFS pointers whose content lies under its sha256. Use it as a
context manager, or through the `hub` fixture of `tests/conftest.py` (which attaches the client of this process and gives
it an empty cache):

    def test_fetch(hub):
        first = hub.put("org/model", {"config.json": b"{}", "model.safetensors": weights}, tag="v1")   # commit hash
        path = huggingface_hub.hf_hub_download("org/model", "config.json", revision="v1")
        hub.requests.clear()                                             # [(method, path), ...] seen so far
        hub.fault("GET", r"model\\.safetensors", "corrupt")               # the next matching request goes wrong

Without the fixture: `with HubServer(folder) as hub: ...`, then either `hub.attach(monkeypatch)` for the client in this
process, or `hub.run(code)` for a fresh interpreter with `HF_ENDPOINT` set before the import.

    hub.files(repo_id, revision="main")      path -> content as the Hub would serve it
    hub.head(repo_id, branch="main")         commit hash of a branch
    hub.gated.add(repo_id)                   403 with X-Error-Code GatedRepo
    hub.private.add(repo_id)                 as if it did not exist; one created with private=True opens to its creator's token
    hub.tokens = {"hf_secret"}               writes need one of these tokens (401 otherwise); None: anyone may write

Faults (`hub.fault(method, path_regex, action, times=1)`, times=None for always): an int is that status (412, 503);
"corrupt" flips a bit of the body at equal size; "truncate" sends a shorter body as if it were whole; "cut" closes the
connection in the middle of the body; "drop" closes it before any answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.helpers.hub_git import GitRepo, Refused

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".tar", ".npz", ".parquet", ".ckpt", ".png")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"


@dataclass
class Fault:
    method: str
    pattern: re.Pattern[str]
    action: int | str
    times: int | None


class HubServer:
    """See the module's docstring."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        (self.folder / "lfs").mkdir(parents=True, exist_ok=True)
        self.requests: list[tuple[str, str]] = []
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.owners: dict[str, str] = {}
        self.tokens: set[str] | None = None
        self.stopped = False
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes the server down: connections are refused from now on, and open ones are dropped."""
        self.stopped = True
        self._http.shutdown()
        self._http.server_close()

    # -- what tests call ------------------------------------------------------------------------------------------

    def put(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | None],
        *,
        repo_type: str = "model",
        branch: str = "main",
        tag: str | None = None,
        message: str = "update",
    ) -> str:
        """Commits files (None deletes) as somebody else would have; creates the repository; returns the commit hash."""
        repo = self.repo(repo_id, repo_type, create=True)
        contents = {p: c.encode() if isinstance(c, str) else c for p, c in files.items()}
        stored = {p: self._stored(p, c) if c is not None else None for p, c in contents.items()}
        with self._lock:
            try:
                parent: str | None = repo.resolve(f"refs/heads/{branch}")
            except Refused:
                parent = None
            oid = repo.commit(stored, message, f"refs/heads/{branch}", parent)
            if tag:
                repo.git("update-ref", f"refs/tags/{tag}", oid)
        return oid

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        repo = self.repo(repo_id, repo_type)
        return {path: self.content(repo, oid)[0] for path, oid, _ in repo.tree(repo.resolve(revision))}

    def head(self, repo_id: str, branch: str = "main", *, repo_type: str = "model") -> str:
        return self.repo(repo_id, repo_type).resolve(f"refs/heads/{branch}")

    def fault(self, method: str, pattern: str, action: int | str, times: int | None = 1) -> None:
        self._faults.append(Fault(method, re.compile(pattern), action, times))

    def env(self, **extra: str) -> dict[str, str]:
        """Environment for a client in another process."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": "hf_test",
            **extra,
        }

    def run(self, code: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Runs Python code in a fresh interpreter whose client talks to this server."""
        return subprocess.run([sys.executable, "-c", code], env=self.env(**extra), capture_output=True, text=True, check=False)

    def attach(self, monkeypatch: Any, cache: Path | None = None) -> None:
        """Points the client of this process at the server, with its own cache and token, for one test."""
        import huggingface_hub
        from huggingface_hub import constants, hf_api

        cache = cache or self.folder / "cache"
        for name, value in (
            ("ENDPOINT", self.url),
            ("HF_HUB_CACHE", str(cache)),
            ("HF_HUB_DISABLE_PROGRESS_BARS", True),
            ("HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        # for the processes that it starts
        for name, value in (("HF_ENDPOINT", self.url), ("HF_TOKEN", "hf_test"), ("HF_HUB_CACHE", str(cache))):
            monkeypatch.setenv(name, value)
        assert huggingface_hub.HfApi().endpoint == self.url

    # -- storage --------------------------------------------------------------------------------------------------

    def repo(self, repo_id: str, repo_type: str, *, create: bool = False) -> GitRepo:
        folder = self.folder / repo_type / f"{repo_id}.git"
        if not create and not folder.exists():
            raise Refused(404, "RepoNotFound", "Repository not found")
        return GitRepo(folder)

    def _stored(self, path: str, content: bytes) -> bytes:
        if not path.endswith(LARGE):
            return content
        oid = hashlib.sha256(content).hexdigest()
        (self.folder / "lfs" / oid).write_bytes(content)
        return POINTER.format(oid=oid, size=len(content)).encode()

    def content(self, repo: GitRepo, blob: str) -> tuple[bytes, str | None]:
        """`(content, sha256 if it is an LFS file)` of a blob."""
        data = repo.blob(blob)
        match = re.match(rb"version https://git-lfs\S*\noid sha256:([0-9a-f]{64})\n", data)
        if match:
            oid = match.group(1).decode()
            return (self.folder / "lfs" / oid).read_bytes(), oid
        return data, None

    def take_fault(self, method: str, path: str) -> int | str | None:
        with self._lock:
            for fault in self._faults:
                if fault.method == method and fault.pattern.search(path) and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault.action
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    _ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/(?P<type>model|dataset)s/(?P<id>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", r"/api/(?P<type>model|dataset)s/(?P<id>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)", "commit"),
        ("POST", r"/api/(?P<type>model|dataset)s/(?P<id>[^/]+/[^/]+)/(?P<what>tag|branch)/(?P<rev>[^/]+)", "name_ref"),
        ("POST", r"/api/(?P<type>model|dataset)s/(?P<id>[^/]+/[^/]+)/paths-info/(?P<rev>[^/]+)", "paths_info"),
        ("GET", r"/api/(?P<type>model|dataset)s/(?P<id>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("GET", r"/api/(?P<type>model|dataset)s/(?P<id>[^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/(?P<type>model|dataset)s/(?P<id>[^/]+/[^/]+)(?:/revision/(?P<rev>[^/]+))?", "info"),
        ("POST", r"/(?:(?P<type>dataset)s/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
        ("GET", r"/(?:(?P<type>dataset)s/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
        ("HEAD", r"/(?:(?P<type>dataset)s/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        self.body = self._read_body()
        self.broken = self.hub.take_fault(self.command, path)
        if self.broken == "drop" or self.hub.stopped:
            self.close_connection = True
            self.connection.close()
            return
        try:
            if isinstance(self.broken, int):
                raise Refused(self.broken, "", f"injected {self.broken}")
            for method, pattern, name in self._ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    groups = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                    self._check_access(groups)
                    with self.hub._lock:
                        getattr(self, name)(**groups)
                    return
            raise Refused(404, "", f"no such route {self.command} {path}")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            self._send(
                refused.status,
                json.dumps(refused.body or {"error": refused.message}).encode(),
                {**headers, "X-Error-Message": refused.message, "Content-Type": "application/json"},
            )

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _check_access(self, groups: Mapping[str, str]) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if (
            self.command in {"POST", "PUT"}
            and self.hub.tokens is not None
            and token not in self.hub.tokens
            and "/lfs/" not in self.path
            and "validate-yaml" not in self.path
        ):
            raise Refused(401, "", "Invalid username or password.")
        if groups.get("id") in self.hub.gated and self.command in {"GET", "HEAD"} and "/resolve/" in self.path:
            raise Refused(403, "GatedRepo", f"Access to model {groups['id']} is restricted")
        if groups.get("id") in self.hub.private and token != self.hub.owners.get(groups["id"]):
            raise Refused(401, "RepoNotFound", "Repository not found")

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        if self.broken == "corrupt" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if self.broken == "truncate":
            data = data[: len(data) // 2]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            if self.broken == "cut":
                data, self.close_connection = data[: len(data) // 2], True
            self.wfile.write(data)

    def _json(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    # -- endpoints ------------------------------------------------------------------------------------------------

    def create(self) -> None:
        body = json.loads(self.body)
        repo_type = body.get("type") or "model"
        repo_id = f"{body.get('organization') or 'tester'}/{body['name']}"
        url = f"{self.hub.url}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
        if (self.hub.folder / repo_type / f"{repo_id}.git").exists():
            message = "You already created this repo"
            raise Refused(409, "", message, {"error": message, "url": url, "name": repo_id})
        repo = self.hub.repo(repo_id, repo_type, create=True)
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
        repo.commit({".gitattributes": rules.encode()}, "initial commit", "refs/heads/main", None)
        if body.get("private") or body.get("visibility") == "private":
            self.hub.private.add(repo_id)
            self.hub.owners[repo_id] = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self._json({"url": url, "name": repo_id, "id": repo_id})

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def whoami(self) -> None:
        self._json({"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})

    def preupload(self, id: str, rev: str, type: str = "model") -> None:
        self.hub.repo(id, type).resolve(rev)
        self._json(
            {
                "files": [
                    {
                        "path": f["path"],
                        "shouldIgnore": False,
                        "uploadMode": "lfs" if f["path"].endswith(LARGE) or f["size"] > 1 << 20 else "regular",
                    }
                    for f in json.loads(self.body)["files"]
                ]
            }
        )

    def lfs_batch(self, id: str, type: str = "model") -> None:
        self.hub.repo(id, type)
        objects = []
        for item in json.loads(self.body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if not (self.hub.folder / "lfs" / item["oid"]).exists():
                href = f"{self.hub.url}/lfs/{item['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "", "content does not have the sha256 it was announced with")
        (self.hub.folder / "lfs" / oid).write_bytes(self.body)
        self._json({})

    def lfs_verify(self, oid: str) -> None:
        path = self.hub.folder / "lfs" / oid
        if not path.exists() or path.stat().st_size != json.loads(self.body)["size"]:
            raise Refused(404, "", "object is not there")
        self._json({})

    def commit(self, id: str, rev: str, type: str = "model") -> None:
        repo = self.hub.repo(id, type)
        head = repo.resolve(rev)
        changes: dict[str, bytes | None] = {}
        header: dict[str, Any] = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    header = value
                case "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    stored = self.hub.folder / "lfs" / value["oid"]
                    if not stored.exists():
                        raise Refused(400, "", f"LFS object {value['oid']} was not uploaded")
                    changes[value["path"]] = POINTER.format(oid=value["oid"], size=stored.stat().st_size).encode()
                case "deletedFile" | "deletedFolder":
                    changes[value["path"]] = None
        if header.get("parentCommit") not in {None, head}:
            raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
        ref, extra = f"refs/heads/{rev}", {}
        if "create_pr=1" in urlsplit(self.path).query:
            number = len(repo.git("for-each-ref", "refs/pr").splitlines()) + 1
            ref, extra = f"refs/pr/{number}", {"pullRequestUrl": f"{self.hub.url}/{id}/discussions/{number}"}
        oid = repo.commit(changes, header.get("summary", ""), ref, head)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{id}/commit/{oid}", **extra})

    def name_ref(self, id: str, what: str, rev: str, type: str = "model") -> None:
        repo, body = self.hub.repo(id, type), json.loads(self.body or b"{}")
        # a tag is posted to the revision it marks, a branch to its own name
        name, start = f"refs/heads/{rev}", body.get("startingPoint") or "main"
        if what == "tag":
            name, start = f"refs/tags/{body['tag']}", rev
        oid = repo.resolve(start)
        if repo.git("for-each-ref", name):
            raise Refused(409, "", f"{name} exists")
        repo.git("update-ref", name, oid)
        self._json({})

    def _entries(self, repo: GitRepo, commit: str) -> list[dict[str, Any]]:
        entries = []
        for path, oid, size in repo.tree(commit):
            content, sha256 = self.hub.content(repo, oid)
            entry: dict[str, Any] = {"type": "file", "path": path, "oid": oid, "size": len(content)}
            if sha256:
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": size}
            entries.append(entry)
        return entries

    def tree(self, id: str, rev: str, path: str = "", type: str = "model") -> None:
        repo = self.hub.repo(id, type)
        self._json([e for e in self._entries(repo, repo.resolve(rev)) if e["path"].startswith(f"{path}/" if path else "")])

    def paths_info(self, id: str, rev: str, type: str = "model") -> None:
        repo = self.hub.repo(id, type)
        text = self.body.decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        self._json([e for e in self._entries(repo, repo.resolve(rev)) if e["path"] in paths])

    def refs(self, id: str, type: str = "model") -> None:
        lines = self.hub.repo(id, type).git("for-each-ref", "--format=%(refname) %(objectname)").decode().splitlines()
        entries = [{"name": r.split()[0].split("/", 2)[2], "ref": r.split()[0], "targetCommit": r.split()[1]} for r in lines]
        self._json(
            {
                kind: [e for e in entries if e["ref"].startswith(start)]
                for kind, start in (("branches", "refs/heads/"), ("tags", "refs/tags/"), ("converts", "refs/convert/"))
            }
        )

    def info(self, id: str, rev: str = "main", type: str = "model") -> None:
        repo = self.hub.repo(id, type)
        sha = repo.resolve(rev)
        siblings = [{"rfilename": path} for path, _, _ in repo.tree(sha)]
        self._json(
            {
                "_id": hashlib.sha1(id.encode()).hexdigest()[:24],
                "id": id,
                "modelId": id,
                "sha": sha,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "private": id in self.hub.private,
                "gated": "auto" if id in self.hub.gated else False,
                "siblings": siblings,
            }
        )

    def resolve(self, id: str, rev: str, path: str, type: str = "model") -> None:
        repo = self.hub.repo(id, type)
        commit = repo.resolve(rev)
        blobs = {p: oid for p, oid, _ in repo.tree(commit)}
        if path not in blobs:
            self._send(404, b"Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        data, sha256 = self.hub.content(repo, blobs[path])
        headers = {
            "ETag": f'"{sha256 or blobs[path]}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if sha256:
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
        status, wanted = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start, last = int(wanted.group(1)), min(int(wanted.group(2) or len(data)), len(data) - 1)
            status, headers["Content-Range"] = 206, f"bytes {start}-{last}/{len(data)}"
            data = data[start : last + 1]
        self._send(status, data, headers)
