"""Does the measure measure it? Overlap measures against a planted truth, under a fixed protocol.

    python -m studies.validity [--runs DIR] [--group choosing|final] [--models 0,1]

The protocol is studies/validity/PROTOCOL.md. Every stage writes its result under a temporary
name and renames it, so a run that was killed goes on where it was: training (ten minutes of a core
a model), maps (four), scores (two). Processes may share a folder if each has its own --models.
What is complete is summed up in studies/results/ and drawn in docs/.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import pyarrow.parquet as pq
import torch

import biasmap_fast as bm
from biasmap_fast.files import writing

from ..common import RESULTS, ROOT, write
from .collect import collect, load
from .models import GROUPS, train_group
from .report import everything, plot, summarise
from .score import score_model

FIGURE = ROOT / "docs/validity.png"
SEEDS = range(12)
LOG = logging.getLogger(__name__)


def prepare(runs: Path, group: str, indices: tuple[int, ...]) -> None:
    """Trains, draws and scores what is missing of some models of a group."""
    train_group(GROUPS[group], runs, indices)
    for index in indices:
        model = runs / group / f"seed-{GROUPS[group].seeds[index]}"
        out = model.with_name(model.name + ".maps")
        if not (out / "pictures.json").is_file():
            LOG.info("drawing with %s", model)
            collect(model, out, SEEDS)
        if not (out / "scores.parquet").is_file():
            LOG.info("scoring %s", model)
            with writing(out / "scores.parquet") as partial:
                pq.write_table(score_model(*load(out)), partial, compression="zstd")


def report(runs: Path) -> None:
    """Results and figure, from the scores that are there; the choice needs the choosing group."""
    record = summarise(runs)
    write(RESULTS / "validity.json", 1, record)
    with writing(RESULTS / "validity.parquet") as partial:
        pq.write_table(everything(runs), partial, compression="zstd")
    plot(runs, record, FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/study-validity")
    parser.add_argument("--group", choices=list(GROUPS), help="only this one")
    parser.add_argument("--models", help="only these, as 0,1,2")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(given.threads)
    for name, group in GROUPS.items():
        if given.group in (None, name):
            chosen = given.models.split(",") if given.models else range(len(group.seeds))
            prepare(given.runs, name, tuple(int(index) for index in chosen))
    if given.group is None and given.models is None:
        if not (given.runs / "packaged.maps/pictures.json").is_file():
            collect(bm.testbed.WEIGHTS, given.runs / "packaged.maps", SEEDS)
        report(given.runs)


if __name__ == "__main__":
    main()
