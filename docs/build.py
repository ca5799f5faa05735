"""Writes the generated parts of README.md and docs/ from committed results, or checks them.

python -m docs.build [--check]

A table stands between ``<!-- name -->`` and ``<!-- /name -->``, a number inside a sentence between
``<!-- = name -->`` and ``<!-- /= -->``. Figures say in their metadata of which run they are.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import figures
from benchmarks import tables as bench
from studies import tables as study

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {},
    DOCS / "testbed.md": {"testbed": study.testbed},
    DOCS / "benchmarks.md": {
        "headline": bench.headline,
        "machine": bench.machine,
        "overlap": lambda: bench.part_tables(bench.run(), "overlap"),
        "recorder": lambda: bench.part_tables(bench.run(), "recorder"),
        "peers": bench.peers,
        "guidance": lambda: bench.part_tables(bench.run(), "guidance"),
        "audits": bench.audits,
        "scaling": bench.scaling,
        "engines": lambda: bench.part_tables(bench.run(), "engines"),
        "engines testbed": lambda: bench.alone("engines-testbed"),
        "engines sd15": lambda: bench.alone("engines-sd15"),
        "other devices": bench.other_devices,
    },
    ROOT / "export/README.md": {},
    DOCS / "validity.md": {
        "validity": study.validity,
        "validity measures": study.validity_measures,
        "validity levels": study.validity_levels,
        "validity models": study.validity_models,
    },
    DOCS / "statistics.md": {
        "calibration": study.calibration,
        "precision": study.precision,
        "nothing": study.no_bias,
        "audit": study.audit,
    },
    DOCS / "guidance.md": {
        "study": study.guidance,
        "study more": study.guidance_more,
        "cost": lambda: bench.part_tables(bench.run(), "guidance"),
    },
    DOCS / "scale.md": {"profile": bench.profile},
}


def rendered(path: Path, text: str | None = None) -> str:
    """A page, or another text in its place, with tables and numbers made anew."""
    text = path.read_text(encoding="utf-8") if text is None else text
    for name, table in TABLES[path].items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        filled = table()
        text, count = block.subn(lambda match, new=filled: f"{match[1]}{new}\n{match[2]}", text)  # type: ignore[misc]
        if not count:
            raise ValueError(f"{path.name} has no place <!-- {name} --> ... <!-- /{name} -->")
    return re.sub(
        r"(<!-- = ([\w ]+) -->).*?(<!-- /= -->)",
        lambda match: f"{match[1]}{bench.INLINE[match[2]]()}{match[3]}",
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a part is out of date")
    check = parser.parse_args().check
    for path in TABLES:
        fresh = rendered(path)
        if check and fresh != path.read_text(encoding="utf-8"):
            sys.exit(f"{path.relative_to(ROOT)} is out of date: run `make docs`")
        path.write_text(fresh, encoding="utf-8")
    for path, (draw, part) in figures.FIGURES.items():
        if check and figures.stale(path, bench.run(), part):
            sys.exit(f"{path.relative_to(ROOT)} is out of date: run `make docs`")
        if not check:
            figures.save(path, draw, bench.run(), part)


if __name__ == "__main__":
    main()
