"""What the first edition measured, and the figures that the reading half makes of it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from biasmap_fast import testbed
from biasmap_fast.audit.plan import AuditPlan
from biasmap_fast.audit.summary import summarise

FIRST_EDITION = Path(__file__).parent / "first_edition"

if "fractions" not in AuditPlan.model_fields:  # until the plan has them
    AuditPlan.fractions = property(
        lambda plan: tuple(round(1 - q / 100, 10) for q in plan.percentiles)
    )
    AuditPlan.setting = property(
        lambda plan: "{:g} in {:g}".format(*plan.containment.fractions)
        if plan.measure == "containment"
        else f"{plan.fractions[0]:g}"
    )


def fractions(*values):
    """The setting of a plan that takes masks of these fractions."""
    if "fractions" in AuditPlan.model_fields:
        return {"fractions": values}
    return {"percentiles": [round(100 * (1 - value), 10) for value in values]}


@pytest.fixture(scope="session")
def first_edition():
    """Plan and tables of the first edition's run, as keyword arguments of `summarise`."""
    plan = AuditPlan(
        professions=["architect", "artist", "baker", "chef"],
        seeds=range(5),
        conditions=("plain", "guided"),
        energy={"scale": 30.0},
        sweeps=("step", "layer", "branch"),
        guidance_scale=3.0,
        steps=10,
        **fractions(0.3, 0.1),
    )
    tables = {
        name: pd.read_parquet(FIRST_EDITION / f"{name}.parquet")
        for name in ("pictures", "measurements", "masks")
    }
    truth = [
        {"profession": row.profession, "shares": row.shares, "overlap": row.overlap}
        for row in testbed.truth()
    ]
    return {"plan": plan, **tables, "truth": truth}


@pytest.fixture(scope="session")
def summary(first_edition):
    """The first edition's run, summarised."""
    return summarise(**first_edition)
