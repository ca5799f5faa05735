"""Writes the tables of README.md from committed results, or checks that they are up to date.

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
OVERLAP = ROOT / "benchmarks/results/amd-epyc/overlap.json"
SECOND_SEED = ROOT / "benchmarks/results/amd-epyc/testbed-seed1.json"
TRAINING = ROOT / "python/biasmap_fast/testbed/weights/training.json"


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def overlap() -> str:
    lines = []
    group = ""
    for row in read(OVERLAP)["rows"]:
        if row["group"] != group:
            group = row["group"]
            lines += ["", f"{group[0].upper()}{group[1:]}, {row['workload']}:", ""]
            lines += ["| | median ms | quartiles | speed-up | error |", "|---|---:|---:|---:|---:|"]
        low, high = row["quartiles_ms"]
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        note = f" ({row['note']})" if row["note"] else ""
        lines.append(
            f"| {row['name']}{note} | {row['median_ms']:.1f} | {low:.1f} to {high:.1f} | "
            f"{row['speedup']:.0f}x | {error} |"
        )
    return "\n".join(lines).strip()


def testbed() -> str:
    """Evaluation of the packaged weights and of a second training seed, side by side."""
    found = [read(path)["evaluation"] for path in (TRAINING, SECOND_SEED)]

    def line(name: str, *values: str) -> str:
        return f"| {name} | {' | '.join(values)} |"

    lines = ["| | packaged (seed 0) | seed 1 |", "|---|---:|---:|"]
    lines.append(
        line(
            "profession right, guidance 3, 25 steps",
            *(f"{100 * e['drawn']['profession_accuracy']:.1f} %" for e in found),
        )
    )
    for form, what in (("joint", "joint prompt"), ("single", "one concept a prompt")):
        for word in ("profession", "man", "woman"):
            aucs = (f"{e['maps'][f'{form} {word}']['auc']:.3f}" for e in found)
            lines.append(line(f"pixel AUC of the {word} map on its region, {what}", *aucs))
    shares = [e["shares"] for e in found]
    lines += [
        line("pictures a profession for the shares", *(str(s["pictures_each"]) for s in shares)),
        line(
            "mean error of the shares at guidance 1 (of sampling alone)",
            *(
                f"{s['mean_absolute_error']:.3f} ({s['expected_absolute_error']:.3f})"
                for s in shares
            ),
        ),
        line("chi-square p of the shares", *(f"{s['chi_square_p']:.3f}" for s in shares)),
        line(
            "slope of drawn on planted shares, guidance 3",
            *(f"{e['drawn']['share_slope']:.2f}" for e in found),
        ),
    ]
    return "\n".join(lines)


TABLES = {"overlap": overlap, "testbed": testbed}


def rendered(text: str) -> str:
    """The README with every table between ``<!-- name -->`` and ``<!-- /name -->`` made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if not re.search(pattern, text, re.DOTALL):
            raise ValueError(f"README.md has no place <!-- {name} --> ... <!-- /{name} -->")
        # no backslash of a table may act as a group reference
        filled = table().replace("\\", r"\\")
        text = re.sub(pattern, rf"\g<1>{filled}\n\g<2>", text, flags=re.DOTALL)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a table is out of date")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    fresh = rendered(text)
    if options.check:
        sys.exit("README.md is out of date: run benchmarks/tables.py" if fresh != text else 0)
    README.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
