"""Builds, tests, checks and times the CUDA kernels on the GPU of this machine, without network.

    make gpu                (or: python3 benchmarks/gpu.py [--out DIR])

Needs Python with torch and pytest, nvcc, scikit-build-core, pybind11 and ninja, all installed; of
diffusers what is there. A step that fails is recorded as failed, later ones still run, and the exit
status is 1. After eight minutes nothing is begun, and what runs is stopped. One file comes of it:
``benchmarks/results/<device>/gpu.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
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
DEADLINE = time.monotonic() + 470.0


@dataclass
class Step:
    name: str
    status: str  # "ok", "failed (...)" or "not run (...)"
    seconds: float
    output: str  # its end


def run(name: str, command: list[str], limit_s: float, **environment: str) -> Step:
    """Runs a command; whatever comes of it is a step."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    limit_s = min(limit_s, DEADLINE - start)
    if limit_s < 1.0:
        return Step(name, "not run (no time left)", 0.0, "")
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit_s,
        )
        output = done.stdout
        status = "ok" if done.returncode == 0 else f"failed (exit {done.returncode})"
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        output = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
        status = f"failed (over {limit_s:.0f} s)"
    except OSError as error:
        output, status = str(error), f"failed ({error})"
    seconds = time.monotonic() - start
    lines = output.splitlines()
    print("\n".join(lines[-25:]))
    print(f"== {name}: {status}, {seconds:.0f} s", flush=True)
    return Step(name, status, seconds, "\n".join(lines[-60:]))


def build() -> Step:
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation"]
    pip += ["--no-deps", "--upgrade", "--target", str(SITE), "--verbose", "."]
    own = {"SKBUILD_BUILD_DIR": str(BUILD / "cmake"), "SKBUILD_CMAKE_DEFINE": "BIASMAP_CUDA=ON"}
    return run("build", pip, 200, CUDAARCHS="native", **own)


def with_site() -> dict[str, str]:
    rest = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": str(SITE) if not rest else f"{SITE}{os.pathsep}{rest}"}


def tests() -> Step:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_cuda.py", "-p"]
    command += ["no:cacheprovider", "-q", "--durations=5"]
    # Warnings of this machine's other packages are not our failures.
    step = run("tests", [*command, "-W", "default"], 150, **with_site())
    if step.status == "ok" and not re.search(r"\d+ passed", step.output):
        step.status = "failed (no test ran)"
    return step


def benchmarks() -> Step:
    command = [sys.executable, "benchmarks/run.py", "--set", "gpu", "--part", "kernels"]
    command += ["--part", "kernels-compiled", "--budget", "150", "--out", str(BUILD / "results")]
    return run("benchmarks", command, 170, **with_site())


def sanitizer(tool: str) -> Step:
    name = f"compute-sanitizer {tool}"
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        return Step(name, "not run (no compute-sanitizer)", 0.0, "")
    command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable]
    # Every tensor its own allocation, or what lies beyond one's end is another's.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return run(name, [*command, "benchmarks/sanitize.py"], 60, **alone, **with_site())


def device() -> str:
    """The GPU's name as torch says it, without importing torch here."""
    code = "import torch; print(torch.cuda.get_device_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "no GPU"


def timings() -> dict[str, Any]:
    found = sorted((BUILD / "results").glob("*/*.json"))
    record: dict[str, Any] = json.loads(found[0].read_text(encoding="utf-8")) if found else {}
    return record


def table(steps: list[Step], rows: list[dict[str, Any]]) -> str:
    lines, group = [], ""
    for row in rows:
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
    lines += [f"{step.name:28}{step.status:30}{step.seconds:6.0f} s" for step in steps]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    shutil.rmtree(BUILD, ignore_errors=True)
    name = device()
    steps = [build(), tests(), benchmarks(), *(sanitizer(tool) for tool in TOOLS)]
    measured = timings()
    record = {"schema": 1, "device": name, **measured, "steps": [asdict(step) for step in steps]}
    folder = options.out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "gpu.json"
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(steps, measured.get("rows", [])))
    print(f"\n{name}: {target}")
    sys.exit(any(step.status != "ok" for step in steps))


if __name__ == "__main__":
    main()
