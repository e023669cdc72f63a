"""README's two commands as processors of other kinds run them, one setting after the other.

    PYTHONPATH=. python tests/processors.py FOLDER [--only WORD] [--again]

Run in an environment where the package is installed: of the first command the demo alone is run. FOLDER keeps the output of every
command and `results.json`; what has passed there at this commit is not run again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("ATEN_CPU_CAPABILITY=default", "ATEN_CPU_CAPABILITY=avx2", "ONEDNN_MAX_CPU_ISA=AVX2")
#: The last rounds every product otherwise for each shape and row; the demo shows nothing there.
SETTINGS = [*(f"{kind} OMP_NUM_THREADS={threads}" for kind in KINDS for threads in (1, 2)), "PYTHONPATH=tests/rounding"]


def commands() -> dict[str, str]:
    """The demo and the tests, as README shows them."""
    lines = [line[2:] for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("$ ")]
    return {"demo": lines[0].split(" && ")[-1], "tests": lines[1]}


def run(command: str, setting: str, log: Path) -> dict[str, object]:
    """Runs one command in a shell, in the repository; whether it passed, its seconds, and the last line it printed."""
    environment = {**os.environ, "PYTHONHASHSEED": "random"}
    for word in setting.split():
        name, value = word.split("=")
        environment[name] = os.pathsep.join([str(ROOT / value), str(ROOT)]) if name == "PYTHONPATH" else value
    start = time.monotonic()
    with log.open("w") as out:
        status = subprocess.run(command, shell=True, cwd=ROOT, env=environment, stdout=out, stderr=out, check=False).returncode
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    return {"status": status, "seconds": round(time.monotonic() - start), "last": lines[-1][:100]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="settings and commands whose names hold this")
    parser.add_argument("--again", action="store_true", help="run also what has passed")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    store = asked.folder / "results.json"
    kept = json.loads(store.read_text()) if store.exists() else {}
    results = kept["results"] if kept.get("commit") == commit else {}
    for setting in SETTINGS:
        for name, command in commands().items():
            key = f"{setting} {name}"
            passed = results.get(key, {}).get("status") == 0
            if asked.only not in key or (passed and not asked.again) or (name == "demo" and "rounding" in setting):
                continue
            scratch = asked.folder.resolve() / "demo-run"
            shutil.rmtree(scratch, ignore_errors=True)
            log = asked.folder / f"{key.replace(' ', '_').replace('/', '_')}.log"
            results[key] = run(command.replace("demo-run", str(scratch)), setting, log)
            store.write_text(json.dumps({"commit": commit, "results": results}, indent=2) + "\n")
            print(f"{'passed' if results[key]['status'] == 0 else 'FAILED'} {results[key]['seconds']:>5} s  {key}", flush=True)
    print(f"\nat {commit[:12]}\n{'':7} {'seconds':>7}  setting and command")
    for key, found in results.items():
        print(f"{'passed' if found['status'] == 0 else 'FAILED':7} {found['seconds']:>7}  {key}  ({found['last']})")
    return int(any(found["status"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
