"""Experts of this machine put on the Hub as safetensors, one repository each, and the router bound to them there.

An expert's identity is the content of its tensors, so the router's certificates stay those of the router.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import save

from rsrouter.core.errors import InputError
from rsrouter.experts.convert import save_expert
from rsrouter.experts.entries import expert_to_dict
from rsrouter.experts.expert import Expert
from rsrouter.experts.loaders import Sources, load_network, read_pinned
from rsrouter.experts.places import WEIGHTS
from rsrouter.experts.provenance import Provenance
from rsrouter.files import sha256_of
from rsrouter.hub import explained
from rsrouter.publish.remote import REPO_ID, File, describe, is_stored
from rsrouter.serialise import Saved

#: Files that must be there as they are; a README that somebody edited stays.
_DECISIVE = (WEIGHTS, "config.json")


@dataclass(frozen=True)
class Upload:
    """One repository of an expert, or of a part of one.

    Attributes:
        repo_id: `org/prefix-name`.
        files: what it must hold.
        commit: what the router is pinned to; None in a dry run.
        sent: False where the Hub had these weights already, or in a dry run.
    """

    repo_id: str
    files: tuple[File, ...]
    commit: str | None = None
    sent: bool = False


class Uploader:
    """Writes the experts of a router that lie on this machine, and sends what the Hub does not have yet.

    Args:
        prefix: `org/prefix`; the repositories are called `org/prefix-NAME`, parts of an expert `org/prefix-NAME-ROLE`.
        scratch: an empty folder.
        send: `send_expert` with its settings, or None for a dry run.

    Attributes:
        uploads: every repository, in the order in which it was met.
    """

    def __init__(self, prefix: str, scratch: Path, send: Callable[[Upload, Path], Upload] | None) -> None:
        if not REPO_ID.fullmatch(prefix):
            raise InputError(
                "Experts need a place on the Hub",
                expected="--with-experts ORG/PREFIX",
                received=prefix,
                remedy="org/prefix gives org/prefix-sigma_0.25 and so on",
            )
        self.prefix, self.scratch, self.send = prefix, scratch, send
        self.uploads: list[Upload] = []
        self._pinned: dict[tuple[str, str], Provenance] = {}

    def rebind(self, saved: Saved) -> list[dict[str, Any]]:
        """The pool's entries with every weight file pinned on the Hub (in a dry run: as they were).

        Raises:
            HubError: the Hub refused or was not reached; what it has by then is not sent again.
            CheckpointError: an expert that cannot be written.
        """
        entries = []
        for expert in saved.pool.members:
            entry = expert_to_dict(expert)
            pinned = self._pin(expert.provenance, f"{self.prefix}-{expert.name}", expert, expert.num_classes)
            entries.append({**entry, "provenance": pinned.to_dict()})
        return entries

    def _pin(self, provenance: Provenance | None, repo_id: str, expert: Expert | None, num_classes: int) -> Provenance:
        assert provenance is not None
        if provenance.source == "hub":
            return provenance
        if provenance.source == "composite":
            parts, roles = [], [part.role for part in provenance.parts]
            for i, part in enumerate(provenance.parts):
                name = f"{repo_id}-{part.role}" + (f"-{i}" if roles.count(part.role) > 1 else "")
                pinned = self._pin(part.provenance, name, None, part.num_classes)
                parts.append(part.model_copy(update={"provenance": pinned}))
            return provenance.model_copy(update={"parts": tuple(parts)})
        key = (provenance.tensors, json.dumps([provenance.architecture, provenance.kwargs, num_classes], sort_keys=True))
        if key not in self._pinned:  # one denoiser serves experts at several sigmas
            self._pinned[key] = self._put(provenance, repo_id, expert, num_classes)
        return self._pinned[key]

    def _put(self, provenance: Provenance, repo_id: str, expert: Expert | None, num_classes: int) -> Provenance:
        folder = self.scratch / repo_id.split("/")[1]
        own = provenance.loader in ("checkpoint", "rsrouter")
        if expert is not None and own:
            save_expert(expert, folder, origin={"filename": provenance.filename, "sha256": provenance.sha256})
        else:
            _write_part(provenance, num_classes, folder)
        upload = Upload(repo_id, tuple(describe(folder, p.name) for p in sorted(folder.iterdir())))
        if self.send is not None:
            upload = self.send(upload, folder)
        self.uploads.append(upload)
        if upload.commit is None:
            return provenance
        return provenance.model_copy(
            update={
                "source": "hub",
                "location": repo_id,
                "revision": upload.commit,
                "filename": WEIGHTS,
                "sha256": sha256_of(folder / WEIGHTS),
                "loader": "checkpoint" if own else provenance.loader,
                "weights_key": None,
            }
        )


def _write_part(provenance: Provenance, num_classes: int, folder: Path) -> None:
    """The weights of a part (a denoiser, a member) or of another library's model, and a few words about them."""
    folder.mkdir()
    if "config" in provenance.kwargs:  # of transformers: tensors as they are stored, and what they belong to
        state = read_pinned(provenance, Sources())().states[""]
        config = {**provenance.kwargs["config"], "architectures": [provenance.architecture], "num_labels": num_classes}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    else:
        state = load_network(provenance, num_classes).state_dict()
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    data = ModelCardData(license=provenance.licence, library_name="rsrouter", tags=["randomized-smoothing", "rsrouter"])
    words = (
        f"Weights of a part of a randomized-smoothing expert (`{provenance.architecture}`), converted without change from the\n"
    )
    words += f"file with sha256 `{provenance.sha256}`."
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n# {folder.name}\n\n{words}\n", encoding="utf-8")


def send_expert(api: HfApi, upload: Upload, folder: Path, private: bool | None) -> Upload:
    """Puts the files into their repository in one commit, if it does not hold equal weights and settings already."""
    with explained(upload.repo_id):
        try:
            info = api.model_info(upload.repo_id)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            api.create_repo(upload.repo_id, private=private, exist_ok=False)
            info = api.model_info(upload.repo_id)
        decisive = [f for f in upload.files if f.path in _DECISIVE]
        stored = {e.path: e for e in api.get_paths_info(upload.repo_id, [f.path for f in decisive], revision=info.sha)}
        if all(is_stored(stored.get(f.path), folder / f.path, f) for f in decisive):
            return Upload(upload.repo_id, upload.files, str(info.sha))
        done = api.create_commit(
            upload.repo_id,
            [CommitOperationAdd(path_in_repo=f.path, path_or_fileobj=folder / f.path) for f in upload.files],
            commit_message="A frozen expert for randomized smoothing, as safetensors",
            parent_commit=info.sha,
        )
    return Upload(upload.repo_id, upload.files, done.oid, sent=True)


__all__ = ["Upload", "Uploader", "send_expert"]
