"""One audit with one and with two Ray workers, one thread each: the time, and the same records.

    python -m benchmarks.cluster [--seeds N] [--steps N] [--rounds N]

Each time is that of measuring alone, from the moment when every worker has the model to the last
chunk: what it takes to start Ray and load models does not grow with the audit. The runs take turns.
Exit status 1 if the records differ. On an otherwise idle machine of two cores or more: under four
minutes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any

import pyarrow as pa

import biasmap_fast as bm
from biasmap_fast.audit.cluster import Cluster

from .harness import save


def measure(plan: bm.AuditPlan, workers: int) -> tuple[float, pa.Table]:
    """Seconds of measuring all chunks, and their records in canonical order."""
    with Cluster(plan, "local", workers=workers, threads=1) as cluster:
        cluster.wait_for_all()
        begun = time.perf_counter()
        work = list(enumerate(plan.chunks()))
        tables = [chunk.tables["measurements"] for *_, chunk in cluster.results(work) if chunk]
        seconds = time.perf_counter() - begun
    table = pa.concat_tables(tables)
    key = [name for name in table.column_names if name not in ("value", "chance", "reason")]
    return seconds, table.sort_by([(name, "ascending") for name in key])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    # Ray's workers inherit it: a thread that spins while it waits would take a core from the other.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    load = os.getloadavg()[0]
    settings: dict[str, Any] = {
        "seeds": range(options.seeds),
        "steps": options.steps,
        "batch_size": options.batch_size,
    }
    plan = bm.AuditPlan(**settings, save_pictures="none", save_maps="none")
    seconds: dict[int, list[float]] = {1: [], 2: []}
    first: pa.Table = None
    identical = True
    for _ in range(options.rounds):
        for workers, times in seconds.items():
            took, rows = measure(plan, workers)
            times.append(took)
            first = rows if first is None else first
            identical = identical and rows.equals(first)
            print(f"{workers} workers: {took:.1f} s", flush=True)
    ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    table = {
        "pictures": len(list(plan.pictures())),
        "chunks": len(plan.chunks()),
        "steps": options.steps,
        "threads_per_worker": 1,
        "load_before": round(load, 2),
        "seconds": {str(n): [round(each, 2) for each in times] for n, times in seconds.items()},
        "speed_up": round(statistics.median(ratios), 3),
        "speed_up_of_each_round": [round(each, 3) for each in ratios],
        "identical_records": identical,
    }
    save("audit-cluster", table)
    sys.exit(not identical)


if __name__ == "__main__":
    main()
