"""Kills an audit again and again with SIGKILL, restarts it each time, and compares the end.

    python benchmarks/kills.py [--kills N] [--professions N] [--seeds N] [--steps N]

An audit of the embedded model under two conditions runs undisturbed once. The same audit is then
begun in a process of its own, killed at a random moment, begun again in the same folder, and so on;
after the last kill it runs to its end. Each process is forked from one that has loaded torch and
the model, so the moments fall into the audit and not into imports. Records, ledger, pictures, maps,
hashes and summary must then be those of the undisturbed run, byte for byte, and the folder valid.
Exit status 1 if they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import biasmap_fast as bm
from biasmap_fast.audit.run import validate
from harness import save

# What of a run folder may differ: when it was begun, and what is on the disk only while it runs.
# The report quotes the former; `validate` has no difference to find in it.
MOMENTARY = ("environment.json", "report.html", ".lock", ".holder.json")


def make_plan(options: argparse.Namespace) -> bm.AuditPlan:
    professions = [row.profession for row in bm.testbed.truth()][: options.professions]
    settings: dict[str, Any] = {
        "professions": professions,
        "seeds": range(options.seeds),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "conditions": ["plain", "guided"],
    }
    return bm.AuditPlan(**settings, save_pictures="all", save_maps="all")


def begin(plan: bm.AuditPlan, folder: Path, pipe: Any) -> int:
    """Forks a process that runs the audit; its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        bm.run_audit(plan, folder, pipe=pipe, progress=False)
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def content(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file that two runs of one plan must share."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in MOMENTARY
    }


def state(folder: Path) -> str:
    """What a killed run left, in words."""
    if not (folder / "plan.yaml").exists():
        return "no plan yet"
    if not (folder / "environment.json").exists():
        return "no environment yet"
    if list(folder.rglob(".*.tmp")):
        return "in the middle of a file"
    if (folder / "summary.json").exists():
        return "writing the report"
    parts, hashes = (len(list((folder / n).glob("part-*"))) for n in ("records", "hashes"))
    return "between the files of a chunk" if hashes > parts else "between chunks or drawing"


def killed_run(
    plan: bm.AuditPlan, folder: Path, pipe: Any, kills: int, seconds: float, chance: random.Random
) -> list[dict[str, Any]]:
    """Begins and kills until it was killed often enough, and then lets it end."""
    log: list[dict[str, Any]] = []
    chunks = len(plan.chunks())
    while True:
        child = begin(plan, folder, pipe)
        if len(log) == kills:
            _, status = os.waitpid(child, 0)
            if status != 0:
                sys.exit(f"the audit failed after {kills} kills: status {status}")
            return log
        # The kills share out the time that measuring takes; a report takes longer than one of them.
        delay = chance.uniform(0.0, 2.0 * seconds / (kills + 1))
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                sys.exit(f"the audit failed by itself: status {os.WEXITSTATUS(status)}")
            continue  # it had ended, and is begun again: only its report is left to kill
        parts = len(list((folder / "records").glob("part-*.parquet")))
        log.append({"after_s": round(delay, 3), "chunks": parts, "state": state(folder)})
        print(f"kill {len(log)}: {parts} of {chunks} chunks, {log[-1]['state']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--professions", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--random", type=int, default=0, help="seed of the moments")
    parser.add_argument("--out", type=Path, help="folder of results; default none is written")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads of OpenMP must not be forked
    plan, pipe = make_plan(options), bm.testbed.pipeline()
    with tempfile.TemporaryDirectory() as place:
        undisturbed, killed = Path(place) / "undisturbed", Path(place) / "killed"
        begun, wall = time.perf_counter(), time.time()
        _, status = os.waitpid(begin(plan, undisturbed, pipe), 0)
        if status != 0:
            sys.exit(f"the undisturbed audit failed: status {status}")
        seconds = time.perf_counter() - begun
        parts = (undisturbed / "records").glob("part-*.parquet")
        measuring = max(path.stat().st_mtime for path in parts) - wall
        chance = random.Random(options.random)
        log = killed_run(plan, killed, pipe, options.kills, measuring, chance)
        expected, found = content(undisturbed), content(killed)
        different = sorted(
            name for name in expected | found if expected.get(name) != found.get(name)
        )
        invalid = validate(killed)
        records = bm.load_audit(killed).records
        table = {
            "pictures": plan.pictures,
            "chunks": len(plan.chunks()),
            "records": records.num_rows,
            "identical_records": records.equals(bm.load_audit(undisturbed).records),
            "files_compared": len(expected),
            "different_files": different,
            "differences_found_by_validate": invalid,
            "undisturbed_s": round(seconds, 1),
            "of_which_measuring_s": round(measuring, 1),
            "states": dict(Counter(entry["state"] for entry in log)),
            "kills": log,
        }
    if options.out is not None:
        path = save([], options.out, 1, "audit-kills")
        path.write_text(json.dumps({**json.loads(path.read_text()), **table}, indent=1) + "\n")
    print(json.dumps({name: each for name, each in table.items() if name != "kills"}, indent=1))
    sys.exit(bool(different or invalid or not table["identical_records"]))


if __name__ == "__main__":
    main()
