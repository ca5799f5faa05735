"""What the benchmarks share: entries as data, interleaved timing, limits, and what a regression is.

Every entry of a group has its turn once a round, in one process, after a warm-up: a slow minute of
the machine then falls on all of them, and the ratio to the group's first entry is taken round by
round. Every other round goes backwards, so that no entry always comes after the same. A turn is one
call, or as many of a short one as fill 20 ms. Medians with quartiles; error and least time possible
stand in the same row. An entry that raises is a row that says so, and one that was not run says
why: neither is a number.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import biasmap_fast as bm
from biasmap_fast import _C
from biasmap_fast.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
TOLERANCE = 0.05  # worse by more than this, beyond both spreads, is a regression
FEW = 5  # rounds; of fewer the quartiles say too little, and worse is three times that
SAMPLE = 20.0  # milliseconds that one timing on the CPU takes at least, by calls in a row
Clock = Callable[[Callable[[], Any]], float]


@dataclass
class Entry:
    """One thing to time. ``run`` may be None if ``status`` says why."""

    name: str
    run: Callable[[], Any] | None
    error: Callable[[Any], float | None] | None = None  # of what `run` gave, from the exact value
    note: str = ""
    bytes: float = 0.0  # that must move at least, read and written
    flops: float = 0.0  # of matrix products
    exponentials: float = 0.0
    calls: int = 1  # that one `run` makes; times are of one
    ours: bool = False  # a regression of it is this package's
    held: Callable[[], int] | None = None  # bytes kept after `run`
    tolerance: float | None = None  # a greater error is a failure
    x: float | None = None  # what a slope is fitted over
    status: str = "ok"


@dataclass
class Group:
    """Entries on one workload, the first of which the others are compared with."""

    part: str
    name: str
    workload: str
    setup: Callable[[], Sequence[Entry]]
    rounds: int
    seconds: float  # that it takes on two idle cores, to keep within a budget
    threads: int = 1
    warm_up: str = ""  # the one entry that warms up, where a call takes long; default each
    peaks: bool = False  # peak memory, in a process an entry
    repeats: int = 1  # of a call between two events of a GPU
    slope: str = ""  # what the entries' `x` counts


@dataclass
class Row:
    part: str
    group: str
    name: str
    workload: str
    status: str
    threads: int
    note: str = ""
    ours: bool = False
    rounds: int = 0
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    ratio: float | None = None  # of time to the group's first row's, median over the rounds
    ratio_quartiles: tuple[float, float] | None = None
    error: float | None = None
    bound_ms: float | None = None  # no version can be faster
    bound_by: str = ""
    peak_mib: float | None = None  # growth of the high-water mark over one call
    held_kib: float | None = None
    x: float | None = None
    times_ms: list[float] = field(default_factory=list)


@dataclass
class Limits:
    """What the device was measured to do, at a number of threads."""

    copy_gb_s: float  # read and written
    matrix_gflop_s: float
    exponentials_g_s: float | None

    def bound(self, entry: Entry) -> tuple[float | None, str]:
        """Milliseconds that the entry's work takes at least, and by which limit."""
        times = {
            "copy": entry.bytes / self.copy_gb_s,
            "matrix": entry.flops / self.matrix_gflop_s,
            "exponentials": entry.exponentials / (self.exponentials_g_s or float("inf")),
        }
        name = max(times, key=lambda each: times[each])
        return (times[name] / 1e6, name) if times[name] > 0 else (None, "")


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


def measure_limits(device: torch.device, exponentials: float | None = None) -> Limits:
    """A copy of tensors larger than a cache, a matrix product, and exponentials inside one."""
    gpu = device.type == "cuda"
    clock: Clock = device_clock if gpu else wall_clock
    source = torch.rand(1 << (28 if gpu else 24), device=device)
    target = torch.empty_like(source)
    side = 8192 if gpu else 1536
    dtype = torch.float16 if gpu else torch.float32
    a = torch.rand(side, side, device=device, dtype=dtype)
    small = torch.rand(1 << 16, device=device)
    out = torch.empty_like(small)

    def median(run: Callable[[], Any]) -> float:
        run()
        return statistics.median(clock(run) for _ in range(9))

    def sixteen() -> None:
        for _ in range(16):
            torch.exp(small, out=out)

    copied = median(lambda: target.copy_(source))
    multiplied = median(lambda: a @ a)
    if exponentials is None and not gpu:
        exponentials = 16 * small.numel() / 1e6 / median(sixteen)
    return Limits(2 * source.nbytes / 1e6 / copied, 2 * side**3 / 1e6 / multiplied, exponentials)


def spread(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(median), (float(low), float(high))


def failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def measure(
    group: Group,
    entries: Sequence[Entry],
    limits: Limits | None,
    clock: Clock = wall_clock,
    deadline: float = float("inf"),
) -> list[Row]:
    """One row an entry; after ``deadline`` (monotonic) no round begins, but two there are."""
    times: dict[str, list[float]] = {entry.name: [] for entry in entries}
    results: dict[str, Any] = {}
    status = {entry.name: entry.status for entry in entries}
    in_a_row = {entry.name: 1 for entry in entries}

    def attempt(entry: Entry) -> float:
        """Milliseconds of a run, NaN of one that failed or cannot be."""
        if status[entry.name] != "ok" or entry.run is None:
            return float("nan")
        run = entry.run

        def keep() -> None:
            for _ in range(in_a_row[entry.name]):
                results.setdefault(entry.name, run())  # the first: inputs may rotate

        try:
            return clock(keep) / in_a_row[entry.name]
        except Exception as error:  # whatever a peer raises is its row's status
            status[entry.name] = failure(error)
            return float("nan")

    for entry in entries:
        if group.warm_up in ("", entry.name):
            took = attempt(entry)
            if clock is wall_clock and took < SAMPLE:
                took = attempt(entry)  # the first call may set something up
                in_a_row[entry.name] = max(1, round(SAMPLE / max(took, 1e-3)))
    for done in range(group.rounds):
        if done >= 2 and time.monotonic() > deadline:
            break
        for entry in entries if done % 2 == 0 else reversed(entries):
            times[entry.name].append(attempt(entry) / entry.calls)

    rows = []
    for entry in entries:
        row = Row(
            group.part, group.name, entry.name, group.workload, status[entry.name], group.threads,
            entry.note, entry.ours, x=entry.x,
        )  # fmt: skip
        rows.append(row)
        if row.status != "ok":
            continue
        row.times_ms = [round(each, 5) for each in times[entry.name]]
        if limits is not None:
            row.bound_ms, row.bound_by = limits.bound(entry)
        if entry.error is not None:
            try:
                row.error = entry.error(results[entry.name])
            except Exception as error:
                row.status = failure(error)
                continue
            if entry.tolerance is not None and not (row.error or 0.0) <= entry.tolerance:
                row.status = f"failed: error {row.error:.1e}, allowed {entry.tolerance:.0e}"
        if entry.held is not None:
            row.held_kib = entry.held() / 2**10
    summarize(rows)
    return rows


def summarize(rows: Sequence[Row]) -> None:
    """Medians, quartiles and ratios of a group's rows, from their times."""
    base = rows[0].times_ms if rows[0].status == "ok" else []
    for row in rows:
        if not row.times_ms:
            continue
        row.rounds = len(row.times_ms)
        row.median_ms, row.quartiles_ms = spread(row.times_ms)
        if base:
            row.ratio, row.ratio_quartiles = spread(
                [each / one for each, one in zip(row.times_ms, base, strict=True)]
            )


def add_rounds(rows: Sequence[Row], more: Sequence[Row]) -> None:
    """Puts a group's second measurement into the rows of its first."""
    if any(row.status != other.status for row, other in zip(rows, more, strict=True)):
        return  # an entry that runs only sometimes has no more rounds, and neither have the others
    for row, other in zip(rows, more, strict=True):
        row.times_ms += other.times_ms
    summarize(rows)


def no_row(group: Group, status: str, *, ours: bool = False) -> Row:
    """What stands for a group that was not run."""
    return Row(group.part, group.name, "*", group.workload, status, group.threads, ours=ours)


def peak_mib(run: Callable[[], Any], device: torch.device) -> float:
    """Growth of the process's high-water mark over one call, or of the allocator's on a GPU."""

    def high_water() -> float:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 2**10

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark of building
    started = high_water()
    run()
    return high_water() - started


def slope(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of log time over log x by least squares, with its 95 % interval (Student's t)."""
    from scipy import stats  # not on every machine that only times kernels

    x, y = np.log(np.array(points)).T
    fit = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, len(x) - 2) * fit.stderr)
    value = float(fit.slope)
    return {"slope": value, "low": value - half, "high": value + half, "points": len(x)}


def slopes(groups: Sequence[Group], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One for each group that has something to fit over."""
    fits = []
    for group in groups:
        points = [
            (row.x, time)
            for row in rows
            if (row.part, row.group) == (group.part, group.name) and row.x and row.status == "ok"
            for time in row.times_ms
        ]
        if group.slope and len({x for x, _ in points}) >= 3:
            named = {"part": group.part, "group": group.name, "over": group.slope}
            fits.append({**named, **slope(points)})
    return fits


def regressions(new: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of ours that got worse than stored ones, in words.

    Times are compared as ratios to the group's first row, as those on a shared machine mean nothing
    by themselves. A ratio is worse if it rose by more than 5 % (15 % where either run had fewer
    than five rounds) and each run's median lies outside the other's quartiles; memory, if it rose
    by more than 5 % and 8 MiB (held: 1 MiB). A row that was measured before and now failed is
    worse; one that was skipped says nothing.
    """
    names = ("part", "group", "name", "workload")
    stored = {tuple(row[n] for n in names): row for row in old if row["status"] == "ok"}
    found = []
    for row in new:
        before = stored.get(tuple(row[n] for n in names))
        if before is None or not row["ours"]:
            continue
        where = " / ".join(row[n] for n in names[:3])
        if row["status"].startswith("failed"):
            found.append(f"{where}: {row['status']}")
            continue
        if row["status"] != "ok":
            continue
        a, b = before["ratio"], row["ratio"]
        rise = TOLERANCE if min(before["rounds"], row["rounds"]) >= FEW else 3 * TOLERANCE
        slower = a is not None and b is not None and b > a * (1 + rise)
        if slower and b > before["ratio_quartiles"][1] and a < row["ratio_quartiles"][0]:
            found.append(f"{where}: {b:.3g} of the first row's time, was {a:.3g}")
        for name, more in (("peak_mib", 8.0), ("held_kib", 1024.0)):
            a, b = before[name], row[name]
            if a is not None and b is not None and b > max(a * (1 + TOLERANCE), a + more):
                found.append(f"{where}: {name} {b:.1f}, was {a:.1f}")
    return found


def device_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def slug(device: str) -> str:
    """The name of a device's folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def newest(folder: Path) -> Path | None:
    """The newest whole run of a device: files are called by their date."""
    found = sorted(folder.glob("[0-9]*-[0-9]*-[0-9]*.json"))
    return found[-1] if found else None


def environment(threads: int, gpu: str | None = None) -> dict[str, Any]:
    """Machine and versions, as every results file begins."""
    return {
        "schema": 2,
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
    }


def write(record: dict[str, Any], target: Path) -> Path:
    """Writes JSON, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, json.dumps(record, indent=1) + "\n")
    return target


def save(name: str, record: dict[str, Any]) -> None:
    """Writes and prints the record of a script that is not part of a whole run, on one thread."""
    whole = {**environment(1), **record}
    write(whole, RESULTS / slug(str(whole["device"])) / f"{name}.json")
    print(json.dumps(record, indent=1))
