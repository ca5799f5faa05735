"""What the studies share: results files, and everything that they read of an audit's records."""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch

import biasmap_fast as bm
from biasmap_fast import testbed
from biasmap_fast.audit import AuditPlan, AuditResult
from biasmap_fast.audit.plan import setting_of
from biasmap_fast.audit.sentences import NEGATIVE
from biasmap_fast.audit.summary import MEASURED, where
from biasmap_fast.files import write_text
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
    for row in result.pictures.to_dict("records"):
        # Parquet gives a map as pairs, and none as None or NaN
        read = dict(row["labels"]) if isinstance(row["labels"], (dict, list)) else {}
        if (word := read.get("gender")) is not None:
            labels[row["profession"]][row["seed"]] = word == WORD
    return labels


def settings_of(result: AuditResult) -> dict[str, str]:
    """Measure -> the setting of its main figure."""
    plan = result.plan
    settings = {"iou": setting_of(plan.fractions[:1])}
    return settings | {plan.measure: plan.setting}


def values_of(result: AuditResult) -> Values:
    """(profession, word) -> what was measured on each of its pictures."""
    rows = where(result.measurements, part="", control="", status=MEASURED)
    columns = {
        measure: where(rows, measure=measure, setting=setting)
        .set_index(["profession", "word", "seed"])["value"]
        .to_dict()
        for measure, setting in settings_of(result).items()
    }
    values: Values = {}
    for (profession, word, seed), iou in columns["iou"].items():
        if (containment := columns["containment"].get((profession, word, seed))) is not None:
            values.setdefault((profession, word), {})[seed] = (containment, iou)
    return values


def professions_right(result: AuditResult) -> dict[str, Any]:
    """The share of pictures that show the profession asked for, with its interval."""
    return figure_of(result.summary.find(scope="run", quantity="right").iloc[0])


def figure_of(row: Any) -> dict[str, Any]:
    return {
        "value": float(row["estimate"]),
        "low": float(row["low"]),
        "high": float(row["high"]),
        "n": int(row["n"]),
        "method": row["method"],
    }


def above_chance(result: AuditResult, measure: str) -> list[dict[str, Any]]:
    """How many professions a measure puts above chance, and above every control too, per word."""
    setting = settings_of(result)[measure]
    figures = result.summary.find(measure=measure, setting=setting, part="", baseline="")
    counted = []
    for word in figures["word"][figures["word"] != ""].unique():
        rows = where(figures, word=word)
        means = where(rows, quantity="mean", control="")
        overall = where(means, scope="overall").iloc[0]
        each = where(means, scope="profession").set_index("profession")
        corrected = where(rows, quantity="corrected", scope="profession").set_index("profession")
        against = where(rows, quantity="difference", scope="profession", control=NEGATIVE)
        beyond = (corrected["low"] > 0) & (against.groupby("profession")["low"].min() > 0)
        clear = each["p_adjusted"] <= 0.05
        counted.append(
            {
                "word": word,
                "mean over professions": figure_of(overall),
                "chance": float(where(rows, quantity="chance")["estimate"].iloc[0]),
                "professions": len(each),
                "above": int((corrected["low"] > 0).sum()),
                "below": int((corrected["high"] < 0).sum()),
                "above_holm": int((clear & (corrected["estimate"] > 0)).sum()),
                "below_holm": int((clear & (corrected["estimate"] < 0)).sum()),
                "above chance and every control": int(beyond.sum()),
            }
        )
    return counted
