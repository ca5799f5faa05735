"""What the studies share: results files, and everything that they read of an audit's records."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from biasmap_fast.audit.controls import NEGATIVE
from biasmap_fast.audit.files import write_text

import biasmap_fast as bm
from biasmap_fast import testbed
from biasmap_fast.audit import AuditPlan, AuditResult
from training.train import weight_hashes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "studies/results"
WORD = "woman"
Labels = dict[str, dict[int, bool]]  # profession -> seed -> read as WORD
Values = dict[tuple[str, str], dict[int, tuple[float, float]]]  # seed -> containment, IoU


def options(doc: str | None, name: str, **numbers: int) -> argparse.Namespace:
    """Of a study: --runs, --out, and options with a number as their default."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / f"runs/study-{name}")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    for option, default in numbers.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=default)
    return parser.parse_args()


def write(path: Path, schema: int, record: dict[str, Any]) -> None:
    """Writes a results file, whole or not at all; a NaN in it is an error."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "biasmap_fast": bm.__version__,
    }
    head = {
        "schema": schema,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "weights": weight_hashes(testbed.WEIGHTS),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**head, **record}, indent=1, allow_nan=False) + "\n")
    print(path)


def plan_of(**settings: Any) -> AuditPlan:
    """An audit with no more than a question about shares and main figures needs."""
    lean = {"curve": False, "sweeps": [], "save_pictures": "none", "save_maps": "none"}
    return AuditPlan.model_validate({**lean, "controls": None, **settings})


def labels_of(result: AuditResult) -> Labels:
    """What the classifier read, of the pictures that it could read."""
    labels: Labels = {profession: {} for profession in result.plan.professions}
    for row in result.records.to_pylist():
        if row["demographic"] == WORD and row["attribute_label"] is not None:
            labels[row["semantic"]][row["seed"]] = row["attribute_label"] == WORD
    return labels


def values_of(result: AuditResult) -> Values:
    """(profession, word) -> what was measured on each of its pictures."""
    values: Values = {}
    for row in result.records.to_pylist():
        if row["status"] == "ok":
            pictures = values.setdefault((row["semantic"], row["demographic"]), {})
            pictures[row["seed"]] = (row["containment"], row["iou"])
    return values


def professions_right(result: AuditResult) -> dict[str, Any]:
    """The share of pictures that show the profession asked for, with its interval."""
    right: dict[str, Any] = result.summary["outputs"][0]["semantic_right"]
    return right


def above_chance(result: AuditResult, measure: str) -> list[dict[str, Any]]:
    """How many professions a measure puts above chance, and above every control too, per word."""
    summary = result.summary
    figures: Mapping[str, Any] = summary if measure == "iou" else summary[measure]
    counted = []
    for row in figures["overall"]:
        word, chance = row["demographic"], row["chance"]
        (counts,) = [one for one in figures["comparisons"] if one["demographic"] == word]
        (controls,) = [one for one in figures["controls"] if one["demographic"] == word]
        against = {one["semantic"]: one for one in controls["professions"]}
        beyond = [
            (one[measure]["low"] or 0.0) > chance
            and all(
                (against[one["semantic"]][kind]["difference"]["low"] or 0.0) > 0.0
                for kind in NEGATIVE
            )
            for one in figures["professions"]
            if one["demographic"] == word
        ]
        names = ("professions", "above", "below", "above_holm", "below_holm")
        counted.append(
            {
                "word": word,
                "mean over professions": row[measure],
                "chance": chance,
                **{name: counts[name] for name in names},
                "above chance and every control": sum(beyond),
            }
        )
    return counted
