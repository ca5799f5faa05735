"""Finished runs of a tiny random pipeline, made once and shared; plans of the tests."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from biasmap_fast.audit import AuditPlan, run_audit, worker
from biasmap_fast.audit.run import planted
from biasmap_fast.audit.summary import summarise

FIRST_EDITION = Path(__file__).parent / "first_edition"

TINY = {
    "model": "tiny",
    "professions": ["doctor", "pilot"],
    "axes": ["gender"],
    "prompt_template": "a photo of {profession}",
    "attribution_template": "a photo of {profession} and {demographic}",
    "seeds": [0, 1, 2],
    "steps": 1,
    "batch_size": 2,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def tiny_plan():
    """Makes a plan of a tiny pipeline: two professions, three seeds, one step."""
    return lambda **changes: AuditPlan(**(TINY | changes))


@pytest.fixture
def quick(monkeypatch):
    """Leaves the report out: only what is measured counts here."""
    monkeypatch.setattr("biasmap_fast.audit.report.write_report", lambda *args: [])


@pytest.fixture(scope="session")
def tiny(make_sd):
    """The tiny pipeline."""
    return make_sd()


@pytest.fixture(scope="session")
def finished(tiny, tiny_plan, tmp_path_factory):
    """A finished run of `tiny_plan`; only copies of its folder may be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return run_audit(tiny_plan(), folder, pipe=tiny, progress=False)


@pytest.fixture
def stops(monkeypatch):
    """Ends drawing with `KeyboardInterrupt` after some chunks; gives the list of those drawn."""

    real = worker.measure_chunk

    def after(count):
        drawn = []

        def measure(pipe, plan, pictures, *rest):
            if len(drawn) == count:
                raise KeyboardInterrupt
            drawn.append(pictures)
            return real(pipe, plan, pictures, *rest)

        monkeypatch.setattr(worker, "measure_chunk", measure)
        return drawn

    return after


@pytest.fixture(scope="session")
def first_edition():
    """Plan and tables of the first edition's run, as keyword arguments of `summarise`."""
    plan = AuditPlan(
        professions=["architect", "artist", "baker", "chef"],
        seeds=range(5),
        conditions=["plain", "guided"],
        energy={"scale": 30.0},
        fractions=[0.3, 0.1],
        sweeps=["step", "layer", "branch"],
        guidance_scale=3.0,
        steps=10,
    )
    names = ("pictures", "measurements", "masks")
    tables = {name: pd.read_parquet(FIRST_EDITION / f"{name}.parquet") for name in names}
    return {"plan": plan, **tables, "truth": planted(plan)}


@pytest.fixture(scope="session")
def summary(first_edition):
    """The first edition's run, summarised."""
    return summarise(**first_edition)
