#!/usr/bin/env python3
"""Compiles the CUDA sources, warnings as errors, and refuses kernels that spill or have a stack.

    .ci/resources.py [--arch 80 --arch 90]

Without nvcc there is nothing to do, and it says so.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def compile_one(source: Path, archs: list[str], target: Path) -> str:
    """What ptxas says of machine code for every architecture, and PTX of the last."""
    command = ["nvcc", "-std=c++17", "-O3", "-c", "-o", str(target), str(source)]
    command += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"]
    for arch in archs:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-gencode", f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{source.name} does not compile:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def refusals(text: str) -> tuple[int, int, list[str]]:
    """Kernels seen, most registers of one, and those with a stack frame or spills."""
    kernel, kernels, most, bad = "", 0, 0, []
    for line in text.splitlines():
        if found := ENTRY.search(line):
            kernel = f"{found[1]} for {found[2]}"
            kernels += 1
        elif found := STACK.search(line):
            if any(int(count) for count in found.groups()):
                bad.append(f"{kernel}: {found[0]}")
        elif found := REGISTERS.search(line):
            most = max(most, int(found[1]))
    return kernels, most, bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", action="append", help="default 80 and 90")
    archs = parser.parse_args().arch or ["80", "90"]
    if shutil.which("nvcc") is None:
        print("no nvcc: the CUDA sources were not compiled")
        return
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(CSRC.glob("*.cu")):
            text = compile_one(source, archs, Path(folder) / "kernels.o")
            kernels, most, bad = refusals(text)
            print(f"{source.name}: {kernels} kernels for {', '.join(archs)}, {most} registers most")
            if kernels == 0:
                bad.append("ptxas named no kernel: its output has changed")
            failed = failed or bool(bad)
            print("\n".join(bad), end="\n" if bad else "")
    sys.exit(failed)


if __name__ == "__main__":
    main()
