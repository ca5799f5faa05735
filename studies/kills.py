"""Kills an audit again and again with SIGKILL, restarts it each time, and compares the end.

    python -m studies.kills [--kills N] [--professions N] [--seeds N] [--steps N]

An audit of the embedded model under two conditions runs undisturbed once. The same audit is then
begun in a process of its own, killed at a random moment, begun again in the same folder, and so on;
after the last kill, or once all chunks are there, it runs to its end (and another one is killed in
its place, until there were N kills). Each process is forked from one that has loaded torch and
the model, so the moments fall into the audit and not into imports. Records, ledger, pictures, maps,
hashes and summary must then be those of the undisturbed run, byte for byte, and the folder valid.
Exit status 1 if they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import biasmap_fast as bm
from biasmap_fast.audit.run import validate

from .common import RESULTS, write

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
    parts, hashes = (len(list((folder / n).glob("part-*"))) for n in ("pictures", "hashes"))
    return "between the files of a chunk" if hashes > parts else "between chunks or drawing"


def processor_time(child: int) -> float:
    """Seconds of processor time of a process' main thread, which draws and measures."""
    return int(Path(f"/proc/{child}/schedstat").read_text().split()[0]) / 1e9


def wait_for(child: int, done: Callable[[], bool]) -> int | None:
    """Waits until the process has ended, for its status, or until something is done."""
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            if status != 0:
                sys.exit(f"the audit failed by itself: status {status}")
            return status
        if done():
            return None
        time.sleep(0.001)


def undisturbed_run(plan: bm.AuditPlan, folder: Path, pipe: Any) -> tuple[float, float]:
    """Runs the audit to its end; processor time of its start, and of one chunk."""
    child, chunks = begin(plan, folder, pipe), len(plan.chunks())
    seconds = []
    for count in (1, chunks):

        def there(count: int = count) -> bool:
            return len(list((folder / "pictures").glob("part-*.parquet"))) >= count

        if wait_for(child, there) is not None:
            sys.exit("the audit ended before its last chunk was seen")
        seconds.append(processor_time(child))
    wait_for(child, lambda: False)
    chunk = (seconds[1] - seconds[0]) / (chunks - 1)
    return max(0.0, seconds[0] - chunk), chunk


def longest_delay(start: float, chunk: float, chunks: int, kills: int) -> float:
    """D such that delays drawn from [0, D] share out the chunks over the kills.

    A run that is killed at d has measured d - start; of that half a chunk is lost on average. With
    g seconds to measure a kill, E[max(0, d - start)] = (D - start)^2 / (2 D) = g.
    """
    gain = chunk * (chunks / kills + 0.5)
    return start + gain + math.sqrt(gain**2 + 2 * gain * start)


def killed_run(
    plan: bm.AuditPlan, folder: Path, pipe: Any, kills: int, longest: float, chance: random.Random
) -> list[dict[str, Any]]:
    """Begins and kills until it was killed often enough or has its chunks; then lets it end."""
    log: list[dict[str, Any]] = []
    chunks = len(plan.chunks())
    while True:
        child = begin(plan, folder, pipe)
        parts = len(list((folder / "pictures").glob("part-*.parquet")))
        if len(log) == kills or parts == chunks:
            wait_for(child, lambda: False)
            return log
        # In processor time: on a machine that grew busy all would else fall before the first chunk.
        delay = chance.uniform(0.0, longest)
        if wait_for(child, lambda child=child, delay=delay: processor_time(child) > delay) == 0:  # type: ignore[misc]
            return log  # it had ended before its time came
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        parts = len(list((folder / "pictures").glob("part-*.parquet")))
        log.append({"after_cpu_s": round(delay, 3), "chunks": parts, "state": state(folder)})
        print(f"killed at {parts} of {chunks} chunks, {log[-1]['state']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--professions", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--random", type=int, default=0, help="seed of the moments")
    parser.add_argument("--save", action="store_true", help="write studies/results/kills.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads of OpenMP must not be forked
    plan, pipe = make_plan(options), bm.testbed.pipeline()
    with tempfile.TemporaryDirectory() as place:
        undisturbed = Path(place) / "undisturbed"
        start, chunk = undisturbed_run(plan, undisturbed, pipe)
        longest = longest_delay(start, chunk, len(plan.chunks()), options.kills)
        chance = random.Random(options.random)
        expected, records = content(undisturbed), bm.load_audit(undisturbed).measurements
        log: list[dict[str, Any]] = []
        different: list[str] = []
        folders = 0
        while len(log) < options.kills:
            killed = Path(place) / f"killed-{folders}"
            log += killed_run(plan, killed, pipe, options.kills - len(log), longest, chance)
            found = content(killed)
            names = sorted(n for n in expected | found if expected.get(n) != found.get(n))
            different += [f"{killed.name}/{name}" for name in names]
            different += [f"{killed.name}: {line}" for line in validate(killed)]
            if not bm.load_audit(killed).measurements.equals(records):
                different.append(f"{killed.name}: measurements")
            folders += 1
        table = {
            "pictures": len(list(plan.pictures())),
            "chunks": len(plan.chunks()),
            "measurements": len(records),
            "runs_killed": folders,
            "files_compared_of_each": len(expected),
            "differences": different,
            "cpu_s_of_start_and_chunk": [round(start, 3), round(chunk, 3)],
            "states": dict(Counter(entry["state"] for entry in log)),
            "kills": log,
        }
    if options.save:
        write(RESULTS / "kills.json", 2, table)
    print(json.dumps({name: each for name, each in table.items() if name != "kills"}, indent=1))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
