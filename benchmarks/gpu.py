"""Builds, tests, checks and times the CUDA kernels on the GPU of this machine, without network.

    make gpu [OUT=DIR]      (or: python3 -m benchmarks.gpu [--out DIR])

Needs Python with torch and pytest, nvcc, scikit-build-core, pybind11 and ninja, all installed.
Without diffusers the one group that needs it is skipped. A step that fails is recorded as failed,
later ones still run, and the exit status is 1. Every step has its share of eight minutes and what
the steps before it left; then it is stopped. One file comes of it, ``<device>/gpu.json`` in
``benchmarks/results``, or in the folder that the option or the environment variable OUT names: a
results file of benchmarks/run.py, and the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/gpu"
SITE = BUILD / "site"
TOOLS = ("memcheck", "racecheck", "initcheck")
# Seconds of each step, in their order. What compiles through torch comes last, as it may be slow.
SHARES = {
    "build": 80.0,
    "tests": 90.0,
    "kernels": 85.0,
    **dict.fromkeys(TOOLS, 35.0),
    "kernels-compiled": 110.0,
}
BEGUN = time.monotonic()


@dataclass
class Step:
    name: str
    status: str  # "ok", "failed (...)" or "not run (...)"
    seconds: float
    output: str  # its end


def limit(name: str) -> float:
    """Seconds from now until a step and those before it have had their shares."""
    names = list(SHARES)
    shares = (SHARES[each] for each in names[: names.index(name) + 1])
    return BEGUN + sum(shares) - time.monotonic()


def finished(command: list[str], limit_s: float, environment: dict[str, str]) -> tuple[str, str]:
    """Output and status of a command, which ends in time with all that it started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0], f"failed (over {limit_s:.0f} s)"
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return output, "ok" if process.returncode == 0 else f"failed (exit {process.returncode})"


def run(name: str, command: list[str], **environment: str) -> Step:
    """Runs a command; whatever comes of it is a step."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    if limit(name) < 1.0:
        return Step(name, "not run (no time left)", 0.0, "")
    try:
        output, status = finished(command, limit(name), environment)
    except OSError as error:
        output, status = str(error), f"failed ({error})"
    seconds = time.monotonic() - start
    lines = output.splitlines()
    print("\n".join(lines[-25:]))
    print(f"== {name}: {status}, {seconds:.0f} s", flush=True)
    return Step(name, status, seconds, "\n".join(lines[-60:]))


def build(architecture: str) -> Step:
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation"]
    pip += ["--no-deps", "--upgrade", "--target", str(SITE), "--verbose", "."]
    own = {"SKBUILD_BUILD_DIR": str(BUILD / "cmake"), "SKBUILD_CMAKE_DEFINE": "BIASMAP_CUDA=ON"}
    return run("build", pip, CUDAARCHS=architecture, **own)


def with_site() -> dict[str, str]:
    rest = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": str(SITE) if not rest else f"{SITE}{os.pathsep}{rest}"}


def tests() -> Step:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/core/test_cuda.py", "-p"]
    command += ["no:cacheprovider", "-q", "--durations=5"]
    # Warnings of this machine's other packages are not our failures.
    step = run("tests", [*command, "-W", "default"], **with_site())
    if step.status == "ok" and not re.search(r"\d+ passed", step.output):
        step.status = "failed (no test ran)"
    return step


def benchmarks(part: str) -> Step:
    command = [sys.executable, "-m", "benchmarks.run", "--set", "gpu", "--part", part]
    # Less than the limit: what there is no time for is then a row that says so.
    command += ["--budget", f"{max(limit(part) - 10, 1):.0f}", "--out", str(BUILD / part)]
    return run(part, command, **with_site())


def sanitizer(tool: str) -> Step:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        return Step(tool, "not run (no compute-sanitizer)", 0.0, "")
    command = [found, "--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":  # calls that fail are others', probing; ours raise
        command += ["--report-api-errors", "no"]
    # Every tensor its own allocation, or what lies beyond one's end is another's.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command += [sys.executable, "-m", "benchmarks.sanitize"]
    return run(tool, command, **alone, **with_site())


def device() -> tuple[str, str]:
    """The GPU's name as torch says it, and what to compile for, without importing torch here."""
    code = "import torch; print(torch.cuda.get_device_name());"
    code += "print('{}{}-real'.format(*torch.cuda.get_device_capability()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    name, architecture = done.stdout.splitlines() if done.returncode == 0 else ("no GPU", "native")
    return name, architecture


def timings() -> dict[str, Any]:
    """The record of the kernels, with the rows of both parts."""
    records = []
    for part in ("kernels", "kernels-compiled"):
        paths = (BUILD / part).glob("*/*.json")
        records += [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    first: dict[str, Any] = records[0] if records else {}
    return {**first, "rows": [row for record in records for row in record["rows"]]}


def table(steps: list[Step], measured: dict[str, Any]) -> str:
    lines, group = [], ""
    for row in measured["rows"]:
        if row["group"] != group:
            group = row["group"]
            lines.append(f"\n{group}: {row['workload']}")
        if row["median_ms"] is None:
            lines.append(f"  {row['name']:34} {row['status']}")
            continue
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g}"
        bound = "" if row["bound_ms"] is None else f"{row['bound_ms'] / row['median_ms']:.0%}"
        lines.append(
            f"  {row['name']:34}{row['median_ms']:10.4f} ms {ratio:>9}"
            f"{error:>10}{bound:>6} of bound  {row['note']}"
        )
    lines.append("")
    for each in measured.get("limits", {}).values():
        rate = each["exponentials_g_s"]
        lines.append(
            f"bounds: {each['copy_gb_s']:.0f} GB/s copied, "
            + ("exponentials not measured" if rate is None else f"{rate:.0f}e9 exponentials a s")
        )
    lines += [f"{step.name:28}{step.status:30}{step.seconds:6.0f} s" for step in steps]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    out = os.environ.get("OUT") or ROOT / "benchmarks/results"
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    shutil.rmtree(BUILD, ignore_errors=True)
    name, architecture = device()
    steps = [build(architecture), tests(), benchmarks("kernels")]
    steps += [*(sanitizer(tool) for tool in TOOLS), benchmarks("kernels-compiled")]
    measured = timings()
    record = {"schema": 2, "device": name, **measured, "steps": [asdict(step) for step in steps]}
    folder = options.out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "gpu.json"
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(steps, measured))
    print(f"\n{name}: {target}")
    sys.exit(any(step.status != "ok" for step in steps))


if __name__ == "__main__":
    main()
