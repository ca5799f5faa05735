"""What the benchmarks share: interleaved timing, and one JSON file a run.

Every variant of a group runs once a round, in turn, in one process, after a warm-up: a slow minute
of the machine then falls on all of them. Medians with quartiles; the error stands beside the time,
and so does the least time possible where that is known.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import biasmap_fast as bm
from biasmap_fast import _C


@dataclass
class Row:
    group: str
    name: str
    workload: str
    median_ms: float
    quartiles_ms: tuple[float, float]
    speedup: float  # over the group's first row
    error: float | None  # greatest difference from the exact value
    note: str = ""
    peak_mib: float | None = None  # growth of the process's high-water mark over one call
    bound_ms: float | None = None  # no version can be faster


@dataclass
class Variant:
    name: str
    run: Callable[[], Any]
    error: Callable[[Any], float | None]
    note: str = ""
    bound_ms: float | None = None
    calls: int = 1  # that one `run` makes


def wall_clock(run: Callable[[], Any]) -> float:
    """Milliseconds of one run on the CPU."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def device_clock(run: Callable[[], Any], repeats: int = 10) -> float:
    """Milliseconds of one run on the GPU, of several in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def measure(
    group: str,
    workload: str,
    variants: list[Variant],
    rounds: int,
    clock: Callable[[Callable[[], Any]], float] = wall_clock,
) -> list[Row]:
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    results = {variant.name: variant.run() for variant in variants}  # warm-up
    for _ in range(rounds):
        for variant in variants:
            times[variant.name].append(clock(variant.run) / variant.calls)
    base = statistics.median(times[variants[0].name])
    rows = []
    for variant in variants:
        low, median, high = statistics.quantiles(times[variant.name], n=4, method="inclusive")
        rows.append(
            Row(
                group=group,
                name=variant.name,
                workload=workload,
                median_ms=median,
                quartiles_ms=(low, high),
                speedup=base / median,
                error=variant.error(results[variant.name]),
                note=variant.note,
                bound_ms=variant.bound_ms,
            )
        )
    return rows


def device_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def save(rows: list[Row], folder: Path, threads: int, name: str, gpu: str | None = None) -> Path:
    """Writes ``folder/<device>/<name>.json``, whole or not at all; the device is a GPU if named."""
    record = {
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": gpu or device_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "biasmap_fast": bm.__version__,
        },
        "build": _C.build_info(),
        "rows": [asdict(row) for row in rows],
    }
    device = re.sub(r"[^a-z0-9]+", "-", str(record["device"]).lower()).strip("-")
    target = folder / device / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(target)
    return target


def show(rows: list[Row]) -> None:
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            print(f"\n{group}: {row.workload}")
            print(
                f"{'':36}{'median ms':>10}{'quartiles':>20}{'speed-up':>10}{'error':>10}{'MiB':>8}"
                f"{'of bound':>10}"
            )
        low, high = row.quartiles_ms
        error = "" if row.error is None else f"{row.error:.1e}"
        peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        bound = "" if row.bound_ms is None else f"{row.bound_ms / row.median_ms:.0%}"
        digits = 2 if row.median_ms >= 1 else 4
        print(
            f"{row.name:36}{row.median_ms:10.{digits}f}"
            f"{f'{low:.{digits}f} to {high:.{digits}f}':>20}"
            f"{row.speedup:9.1f}x{error:>10}{peak:>8}{bound:>10}  {row.note}"
        )
