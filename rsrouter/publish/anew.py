"""Loading a router in a process of its own, as a stranger would: `python -m rsrouter.publish.anew`, told through stdin."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsrouter.core import errors
from rsrouter.core.errors import IntegrityError, RSRouterError

#: Seconds; experts of some gigabytes arrive within.
PATIENCE = 3600


def load_anew(
    folder: Path,
    digest: str,
    *,
    allow_local: bool = False,
    imports: Sequence[str] = (),
    cache_dir: Path | None = None,
    token: str | bool | None = None,
) -> None:
    """Refuses a router that another process does not load as the same classifier.

    Args:
        folder: with `config.json`.
        digest: of the classifier (`Routed.digest`).
        allow_local: experts may lie on this machine.
        imports: modules that the process imports first, as readers would with `--import`.
        cache_dir: where experts from the Hub are fetched to; None: this machine's cache, and no request is made.
        token: as in `huggingface_hub`; passed through a pipe.

    Raises:
        IntegrityError: it loads as something else, or the process dies. RSRouterError: what the process ran into.
    """
    told = {"folder": str(folder), "allow_local": allow_local, "imports": list(imports), "token": token}
    told |= {"cache_dir": None if cache_dir is None else str(cache_dir)}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "rsrouter.publish.anew"],
            input=json.dumps(told),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd=folder,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )
        lines = done.stdout.strip().splitlines()
        answer = json.loads(lines[-1]) if lines else {}
        words = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    except subprocess.TimeoutExpired:
        answer, words = {}, [f"not done after {PATIENCE} s"]
    except ValueError as error:
        answer, words = {}, [str(error)]
    remedy = "install or announce what its networks need (entry points of the group rsrouter.architectures), then try again"
    if "error" in answer:
        kind, message, expected, received, advice = answer["error"]
        made = getattr(errors, kind, RSRouterError)
        raise made(f"A fresh process cannot load this router: {message}", expected=expected, received=received, remedy=advice)
    if answer.get("digest") != digest:
        raise IntegrityError(
            "A fresh process does not load this router as the same classifier",
            expected=f"digest {digest}",
            received=f"digest {answer['digest']}" if "digest" in answer else words[0][:300],
            remedy=remedy,
        )


def answer(told: dict[str, Any]) -> dict[str, Any]:
    """What the process says: the digest, or the error's kind and its four parts."""
    from rsrouter.hub import Hub
    from rsrouter.serialise import load_folder

    try:
        for name in told["imports"]:
            importlib.import_module(name)
        hub = Hub(token=told["token"], cache_dir=told["cache_dir"], local_files_only=told["cache_dir"] is None)
        return {"digest": load_folder(Path(told["folder"]), hub=hub, allow_local=told["allow_local"]).routed.digest}
    except RSRouterError as error:
        return {"error": [type(error).__name__, error.message, error.expected, error.received, error.remedy]}
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        return {
            "error": ["CheckpointError", "its networks cannot be made", "a router that loads", why[:300], "see its traceback"]
        }


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
