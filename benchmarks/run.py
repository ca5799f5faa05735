"""Every benchmark by one command: one process, one results file, compared with the stored one.

    python -m benchmarks.run [--set cpu|gpu] [--ovam DIR] [--daam DIR]

A whole run is written to benchmarks/results/<device>/<date>.json, and the tables and figures of
README.md and docs/ are made from the newest such file by `python -m docs.build`. A run of some
parts, or a quick one, goes to runs/bench/ and into no table; a long part, which only runs by name,
to results/<device>/<part>.json.

Exit status 1 if a row of this package failed, or is worse than in the newest stored run of the same
device (`harness.regressions` says what that is). A group with a row that seems worse is measured
once more, if there is time, and judged by all the rounds.

What there was no time for is recorded as skipped. OVAM: a checkout of github.com/vpulab/ovam.
DAAM: `pip install --no-deps --target DIR daam; pip install --target DIR spacy`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import harness
from .harness import RESULTS, ROOT, Group, Limits, Row, wall_clock
from .settings import Settings, find_daam, find_ovam
from .tables import part_tables

logger = logging.getLogger("bench")

# part -> module and function; in a set, what matters most runs first
PARTS = {
    "overlap": ("overlap", "groups"),
    "recorder": ("recorder", "groups"),
    "guidance": ("guidance", "groups"),
    "audits": ("audits", "groups"),
    "peers": ("peers", "groups"),
    "engines": ("engines", "groups"),
    "kernels": ("kernels", "groups"),
    "kernels-compiled": ("kernels", "compiled_groups"),
    "engines-testbed": ("engines", "testbed_groups"),
    "engines-sd15": ("engines", "sd15_groups"),
}
SETS = {
    "cpu": ("overlap", "peers", "recorder", "engines", "audits", "guidance"),
    "gpu": ("kernels", "recorder", "guidance", "audits", "kernels-compiled"),
}
LONG = ("engines-testbed", "engines-sd15")
BUDGET = {"cpu": 880.0, "gpu": 450.0}  # seconds
PEAK_SECONDS = 300

# A peak is that of a new process. All of them are copies of one that has loaded the libraries, or
# loading would take most of the time that peaks take.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        *(f"benchmarks.{module}" for module in sorted({module for module, _ in PARTS.values()})),
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "transformers.models.clip.modeling_clip",
    ]
)  # fmt: skip


def groups_of(part: str, settings: Settings) -> Iterator[Group]:
    module, function = PARTS[part]
    yield from getattr(importlib.import_module(f"benchmarks.{module}"), function)(settings)


def peak_in_process(row: Row, options: argparse.Namespace) -> None:
    """Puts the peak memory of one entry into its row, measured in a process of its own."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    wanted = (row.part, row.group, row.name)
    process = PROCESSES.Process(target=send_peak, args=(sender, options, *wanted), daemon=True)
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(PEAK_SECONDS) else f"{PEAK_SECONDS} s passed"
        process.join(10)
    except EOFError:
        process.join(10)
        found = f"exit status {process.exitcode}"
    if process.is_alive():
        process.kill()
        process.join()
    if isinstance(found, float):
        row.peak_mib = found
    else:
        row.note += f"; peak failed: {found}"


def send_peak(sender: Any, options: argparse.Namespace, part: str, group: str, name: str) -> None:
    """What that process does: sends MiB, or in words why there are none."""
    quieten()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            settings = settings_of(options, Path(scratch))
            (found,) = (each for each in groups_of(part, settings) if each.name == group)
            torch.set_num_threads(found.threads)
            (entry,) = (each for each in found.setup() if each.name == name)
            if entry.run is None:
                raise ValueError(entry.status)
            sender.send(harness.peak_mib(entry.run, settings.device))
    except Exception as error:
        sender.send(harness.failure(error))


class Bench:
    """A run: its groups in turn, within a budget of seconds."""

    def __init__(self, settings: Settings, budget: float, options: argparse.Namespace) -> None:
        self.settings, self.options = settings, options
        self.begun = time.monotonic()
        self.deadline = self.begun + budget
        self.limits: dict[int, Limits] = {}
        self.rows: list[Row] = []
        self.groups: list[Group] = []

    def limit(self, threads: int) -> Limits:
        torch.set_num_threads(threads)
        if threads not in self.limits:
            rate = None
            if self.settings.gpu:
                rate = importlib.import_module("benchmarks.kernels").exponential_rate()
            self.limits[threads] = harness.measure_limits(self.settings.device, rate)
        return self.limits[threads]

    def run(self, parts: Sequence[str], keep: Callable[[], object]) -> None:
        """``keep`` is called after every group, should the time run out."""
        for part in parts:
            begun, found = time.monotonic(), len(self.rows)
            try:
                for group in groups_of(part, self.settings):
                    self.add(group)
                    keep()
            except ImportError as error:  # an extra that is not installed
                self.rows.append(Row(part, part, "*", "", f"skipped: {error}", 0))
            except Exception as error:  # of the part itself: the next has its turn
                logger.exception("%s", part)
                self.rows.append(Row(part, part, "*", "", harness.failure(error), 0, ours=True))
            took = time.monotonic() - begun
            logger.info("%s: %d rows in %.0f s", part, len(self.rows) - found, took)

    def add(self, group: Group) -> None:
        left = self.deadline - time.monotonic()
        if left < group.seconds:
            reason = f"{group.seconds:.0f} s needed, {max(left, 0):.0f} s of the budget left"
            self.rows.append(harness.no_row(group, f"skipped: {reason}"))
            return
        begun = time.monotonic()
        try:
            rows = self.measured(group)
        except ImportError as error:
            rows = [harness.no_row(group, f"skipped: {error}")]
        except Exception as error:  # of a set-up: recorded, and the next group has its turn
            logger.exception("%s / %s", group.part, group.name)
            rows = [harness.no_row(group, harness.failure(error), ours=True)]
        for row in rows if group.peaks else ():
            if row.status == "ok" and time.monotonic() < self.deadline:
                peak_in_process(row, self.options)
        took = time.monotonic() - begun
        logger.info("  %s: %.0f s (%.0f s allowed for)", group.name, took, group.seconds)
        self.rows += rows
        self.groups.append(group)

    def measured(self, group: Group) -> list[Row]:
        clock = (
            partial(harness.device_clock, repeats=group.repeats)
            if self.settings.gpu
            else wall_clock
        )
        return harness.measure(
            group, group.setup(), self.limit(group.threads), clock, self.deadline
        )

    def confirm(self, before: Sequence[dict[str, Any]]) -> None:
        """More rounds of every group with a row worse than ``before``, while there is time."""
        for group in self.groups:
            rows = [row for row in self.rows if (row.part, row.group) == (group.part, group.name)]
            left = self.deadline - time.monotonic()
            if left < group.seconds or not harness.regressions(
                [asdict(row) for row in rows], before
            ):
                continue
            logger.info("%s / %s: measured again, it seems worse", group.part, group.name)
            try:
                harness.add_rounds(rows, self.measured(group))
            except Exception:  # of a set-up: the first measurement stands
                logger.exception("%s / %s", group.part, group.name)

    def record(self, load: float) -> dict[str, Any]:
        gpu = torch.cuda.get_device_name(self.settings.device) if self.settings.gpu else None
        threads = max((group.threads for group in self.groups), default=1)
        peers = (self.settings.ovam, self.settings.daam)
        return {
            **harness.environment(threads, gpu),
            "quick": self.settings.quick,
            "load_before": round(load, 2),
            "seconds": round(time.monotonic() - self.begun, 1),
            "peers": {peer.name: peer.version or peer.status for peer in peers},
            "limits": {str(n): asdict(limits) for n, limits in self.limits.items()},
            "slopes": harness.slopes(self.groups, self.rows),
            "rows": [asdict(row) for row in self.rows],
        }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--set", choices=SETS, help="default gpu where there is one, else cpu")
    made.add_argument("--part", action="append", choices=PARTS, help="only this part; repeatable")
    made.add_argument("--ovam", type=Path, metavar="DIR", help="a checkout of OVAM to measure too")
    made.add_argument("--daam", type=Path, metavar="DIR", help="a folder with DAAM to measure too")
    made.add_argument("--quick", action="store_true", help="everything small, two rounds: a test")
    made.add_argument(
        "--budget", type=float, metavar="S", help="seconds; default 880, on a GPU 450"
    )
    made.add_argument("--out", type=Path, metavar="DIR", help="folder of results, see above")
    return made


def settings_of(options: argparse.Namespace, scratch: Path) -> Settings:
    return Settings(
        torch.device("cuda" if options.set == "gpu" else "cpu"), scratch, options.quick,
        find_ovam(options.ovam), find_daam(options.daam),
    )  # fmt: skip


def quieten() -> None:
    """Of peers and libraries; what fails is a row."""
    for noisy in ("diffusers", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def place(options: argparse.Namespace, device: str) -> Path:
    """Where a run is written: only a whole one among those that tables are made of."""
    long = options.part is not None and len(options.part) == 1 and options.part[0] in LONG
    kept = not options.quick and (long or not options.part)
    folder = (options.out or (RESULTS if kept else ROOT / "runs/bench")) / harness.slug(device)
    return folder / f"{options.part[0] if long else time.strftime('%Y-%m-%d', time.gmtime())}.json"


def stored(options: argparse.Namespace, device: str) -> tuple[str, list[dict[str, Any]]]:
    """The rows to compare with, and where they are from."""
    alone = set(options.part or ()) & set(LONG)
    path = place(options, device) if alone else harness.newest(RESULTS / harness.slug(device))
    if options.quick or path is None or not path.exists():
        return "", []
    record = json.loads(path.read_text())
    return path.name, record["rows"] if record["schema"] >= 2 else []


def main() -> None:
    options = parser().parse_args()
    options.set = options.set or ("gpu" if torch.cuda.is_available() else "cpu")
    if options.set == "gpu" and not torch.cuda.is_available():
        raise SystemExit("--set gpu: torch finds no GPU")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logger.setLevel(logging.INFO)
    quieten()
    with tempfile.TemporaryDirectory() as scratch:
        settings = settings_of(options, Path(scratch))
        load = os.getloadavg()[0]
        budget = options.budget or BUDGET[options.set]
        if options.part and set(options.part) <= set(LONG):
            budget = options.budget or float("inf")
        bench = Bench(settings, budget, options)
        device = str(bench.record(load)["device"])
        name, before = stored(options, device)
        path = place(options, device)
        # A whole run replaces the stored one of the day at its end alone.
        keep = (lambda: harness.write(bench.record(load), path)) if options.part else (lambda: None)
        bench.run(options.part or SETS[options.set], keep)
        bench.confirm(before)
        record = bench.record(load)
        harness.write(record, path)

    for part in dict.fromkeys(row.part for row in bench.rows):
        print(f"\n# {part}\n\n{part_tables(record, part)}")
    for fit in record["slopes"]:
        print("{group}: slope {slope:.2f} [{low:.2f}, {high:.2f}] over {over}".format(**fit))
    worse = harness.regressions(record["rows"], before)
    failed = [row for row in bench.rows if row.ours and row.status.startswith("failed")]
    lines = [f"worse than {name}: {line}" for line in worse]
    lines += [f"failed: {row.part} / {row.group} / {row.name}: {row.status}" for row in failed]
    print("\n".join([*lines, f"{path}"]), file=sys.stderr)
    if not worse:
        said = f"no row is worse than in {name}" if before else "compared with no stored run"
        print(said, file=sys.stderr)
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
