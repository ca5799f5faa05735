"""Lists what the Python bindings of a TensorRT release offer: names only, one per line.

    pip download --no-deps tensorrt-cu13-bindings==11.4.0.106
    python export/tensorrt_names.py tensorrt_cu13_bindings-*.whl \\
        > tests/engines/data/tensorrt-11.4.0.106.txt

The bindings' wheel is small and public, the libraries behind it are not there. Stand-ins for them
are compiled that hold the handful of C functions the bindings ask for and do nothing, which is
enough to import the bindings and look at their classes. Needs a C compiler and the wheel's Python.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# The classes that `biasmap_fast.engines.tensorrt` uses.
OWNERS = (
    "Builder",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "ILogger",
    "IOptimizationProfile",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "Runtime",
)
LIST = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("tensorrt", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for owner in sorted(set(sys.argv[2:])):
    for name in sorted(dir(getattr(module, owner, None))):
        if not name.startswith("_"):
            print(f"{owner}.{name}")
"""


def names(wheel: Path) -> str:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract("tensorrt_bindings/tensorrt.so", folder)
        bindings = folder / "tensorrt_bindings" / "tensorrt.so"
        asked = subprocess.run(
            ["objdump", "-p", str(bindings)], check=True, capture_output=True, text=True
        ).stdout
        symbols = subprocess.run(
            ["nm", "-D", "--undefined-only", str(bindings)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        wanted = re.findall(r"\bU ([a-z]\w+)$", symbols, re.M)
        source = folder / "standin.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in wanted))
        for library in re.findall(r"NEEDED\s+(libnv\w+\.so\.\d+)", asked):
            target = str(folder / library)
            command = ["cc", "-shared", "-fPIC", "-o", target, str(source)]
            subprocess.run([*command, f"-Wl,-soname,{library}"], check=True)
        return subprocess.run(
            [sys.executable, "-c", LIST, str(bindings), *OWNERS],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
        ).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="of the bindings, for this Python")
    sys.stdout.write(names(parser.parse_args().wheel))


if __name__ == "__main__":
    main()
