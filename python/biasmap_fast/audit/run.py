"""Running an audit: draw, attribute, measure, write; stop and continue at any time.

The pictures are drawn in chunks that the plan alone decides; with a precision, the plan and the
records of earlier rounds (`rounds`). A chunk's pictures table appears under its final name when all
else of it is on the disk, so continuing a run means measuring the chunks that are not whole, and
ends with the records of an undisturbed run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..pipelines import TESTBED
from . import rounds
from .chunk import RAISED
from .folder import AuditError, Writer, check_environment, open_folder, read_plan
from .plan import AuditPlan
from .records import chunks_of, is_whole, read, read_part
from .worker import Worker

if TYPE_CHECKING:
    import pandas as pd

    from .cluster import Cluster
    from .plan import Picture
    from .rounds import Asked
    from .summary import Summary

logger = logging.getLogger(__name__)

_Work = tuple[int, "list[Picture]"]  # index of a chunk, and its pictures


@dataclass(frozen=True)
class AuditResult:
    """A run folder, read.

    Attributes:
        folder: The run folder.
        plan: Its plan.
        pictures: One row per picture (`records.PICTURES`).
        measurements: One row per measured value (`records.MEASUREMENTS`).
        summary: Every figure, with its interval.
    """

    folder: Path
    plan: AuditPlan
    pictures: pd.DataFrame
    measurements: pd.DataFrame
    summary: Summary

    @property
    def report(self) -> Path:
        """The report, one self-contained HTML file."""
        return self.folder / "report.html"

    def to_pandas(self) -> pd.DataFrame:
        """Returns the measurements, each with the columns of its picture.

        What the picture itself has under a name of the measurements (its status and reason) is
        called ``picture_status`` and ``picture_reason``.
        """
        key = ["condition", "profession", "seed"]
        pictures = self.pictures.rename(
            columns={name: f"picture_{name}" for name in ("status", "reason")}
        )
        return self.measurements.merge(pictures, on=key, how="left", validate="many_to_one")


def run_audit(
    plan: AuditPlan,
    out: str | Path,
    *,
    pipe: Any = None,
    progress: bool = True,
    retry_failed: bool = False,
    cluster: str | None = None,
    workers: int | None = None,
    threads: int = 1,
) -> AuditResult:
    """Runs the audit of ``plan``, or what is left of it, and writes the report.

    Args:
        plan: What to draw and measure.
        out: The run folder; made if it does not exist, continued if it holds the same plan.
        pipe: The pipeline to audit, already loaded; default loads ``plan.model``.
        progress: Show a progress bar with rate and time left on stderr.
        retry_failed: Measure those chunks again that have pictures whose drawing raised; with a
            precision those of the last round, for earlier ones have decided what was drawn since.
        cluster: ``"local"``, or the address of a Ray cluster: one worker per device. Default this
            process alone.
        workers: Workers of the cluster; default as many as it has room for.
        threads: CPU threads of each worker of the cluster.

    Returns:
        The finished run.

    Raises:
        AuditError: The folder is in use, cannot be used, holds another plan or was begun with other
            weights; every picture fails; the disk is full.
        ConditionError: A condition's pipeline cannot be made.
        ImportError: A cluster without Ray installed.
        ModelError: The model cannot be loaded.
        RecordError: A record file is damaged.
        TypeError: ``plan`` is no `AuditPlan`.
        ValueError: A concept is not in its attribution prompt, or too long for the text encoder;
            an unknown layer; ``workers`` or ``threads`` without a cluster.

    Example:
        >>> plan = AuditPlan(professions=["doctor", "judge"], seeds=[0, 1], steps=4)
        >>> result = run_audit(plan, "runs/example", progress=False)  # doctest: +SKIP
        >>> len(result.pictures)  # doctest: +SKIP
        4
    """
    if not isinstance(plan, AuditPlan):
        raise TypeError(f"expected an AuditPlan, got {type(plan).__name__}")
    if cluster is None and (workers is not None or threads != 1):
        raise ValueError("`workers` and `threads` belong to a cluster: give `cluster` (--cluster)")
    folder = Path(out)
    with open_folder(plan, folder):
        asked = _asked(plan, folder)
        todo = _unfinished(plan, folder, asked)
        if retry_failed:
            todo = sorted([*todo, *_failed(folder, asked)])
        if todo:
            source = _source(plan, pipe, cluster, workers, threads)
            _measure(source, plan, folder, asked, todo, progress=progress)
        else:
            logger.info("all %d chunks of %s are measured", len(asked.chunks), folder)
        return render(folder)


def load_audit(path: str | Path) -> AuditResult:
    """Reads a run folder, finished or not; its summary is computed from the records there are.

    Raises:
        AuditError: ``path`` is no run folder.
        RecordError: A record file is damaged.
    """
    from .summary import summarise

    folder = Path(path)
    plan = read_plan(folder)
    tables = {
        name: _frame(folder, name) for name in ("pictures", "measurements", "ledger", "masks")
    }
    pictures, measurements = tables.pop("pictures"), tables.pop("measurements")
    precision = rounds.figures(plan, rounds.asked(plan, pictures, measurements))
    summary = summarise(
        plan, pictures, measurements, truth=planted(plan), precision=precision, **tables
    )
    return AuditResult(folder, plan, pictures, measurements, summary)


def render(path: str | Path) -> AuditResult:
    """Computes the summary of a run folder from its records and writes the report anew.

    Raises:
        AuditError: ``path`` is no run folder, or cannot be written.
        RecordError: A record file is damaged.
    """
    from .report import write_report

    result = load_audit(path)
    try:
        write_report(result.folder, result.plan, result.summary)
    except OSError as error:
        raise AuditError(f"the report of {result.folder} cannot be written: {error}") from error
    return result


def validate(path: str | Path) -> list[str]:
    """Returns everything in which a run folder contradicts itself, one line per difference.

    Args:
        path: The run folder, finished or not; nothing in it is changed.

    Raises:
        AuditError: ``path`` is no run folder.
    """
    from .validate import validate as check

    folder = Path(path)
    return check(folder, planted(read_plan(folder)))


def planted(plan: AuditPlan) -> list[dict[str, Any]] | None:
    """Returns the testbed's planted table, or ``None`` for any other model."""
    if plan.model != TESTBED:
        return None
    from .. import testbed

    return [
        {
            "profession": row.profession,
            "shares": dict(row.shares),
            "level": row.level,
            "overlap": dict(row.overlap),
            "marker_fraction": row.marker_fraction,
        }
        for row in testbed.truth()
    ]


def _frame(folder: Path, name: str) -> pd.DataFrame:
    frame: pd.DataFrame = read(folder, name).to_pandas(maps_as_pydicts="strict")
    return frame


def _asked(plan: AuditPlan, folder: Path) -> Asked:
    if plan.precision is None:
        return rounds.asked(plan)
    return rounds.asked(plan, _frame(folder, "pictures"), _frame(folder, "measurements"))


def _unfinished(plan: AuditPlan, folder: Path, asked: Asked) -> list[_Work]:
    """Chunks that are not whole."""
    todo = []
    for index, pictures in enumerate(asked.chunks):
        if not is_whole(folder, index):
            todo.append((index, pictures))
            continue
        part = read_part(folder, "pictures", index)
        columns = (part[name].to_pylist() for name in ("condition", "profession", "seed"))
        there = set(zip(*columns, strict=True))
        if differing := there ^ {(p.condition, p.profession, p.seed) for p in pictures}:
            raise AuditError(
                f"chunk {index} of {folder} holds other pictures than the plan and the earlier "
                f"rounds ask for ({min(differing)} in one of them only): records before it were "
                "changed after they had decided what to draw. Restore them, or use another folder"
            )
        read_part(folder, "measurements", index)
    return todo


def _failed(folder: Path, asked: Asked) -> list[_Work]:
    """Measured chunks of the last round with pictures whose drawing raised."""
    failed = [
        index
        for index in chunks_of(folder)
        if index < len(asked.chunks)
        and not set(RAISED).isdisjoint(read_part(folder, "pictures", index)["status"].to_pylist())
    ]
    if earlier := [index for index in failed if index < asked.last]:
        logger.warning(
            "chunks %s have pictures that failed, and are not measured again: they are of earlier "
            "rounds, which have decided what was drawn since",
            earlier,
        )
    return [(index, asked.chunks[index]) for index in failed if index >= asked.last]


def _source(
    plan: AuditPlan, pipe: Any, cluster: str | None, workers: int | None, threads: int
) -> Worker | Cluster:
    if cluster is None:
        return Worker(plan, pipe)
    from .cluster import Cluster

    if pipe is not None:
        raise AuditError(
            "a pipeline that is already loaded cannot be sent to the workers of a cluster: give "
            "the plan a model, or a condition 'name=module:function' that makes one"
        )
    return Cluster(plan, cluster, workers=workers, threads=threads)


def _measure(
    source: Worker | Cluster,
    plan: AuditPlan,
    folder: Path,
    asked: Asked,
    todo: Sequence[_Work],
    *,
    progress: bool,
) -> None:
    """Measures chunks and stores them, whatever order they come in, until no more are asked for."""
    left = sum(len(pictures) for _, pictures in todo)
    with (
        source,
        _explained(folder, plan),
        tqdm(
            total=asked.count,
            initial=asked.count - left,
            unit="picture",
            desc="audit",
            disable=not progress,
            file=sys.stderr,
            dynamic_ncols=True,
        ) as bar,
        Writer(folder, measured=len(asked.chunks) > len(todo)) as writer,
    ):
        check_environment(folder, source.describe())
        while todo:
            sizes = {index: len(pictures) for index, pictures in todo}
            for entered, index, chunk in source.results(todo):
                for condition, description in entered.items():
                    check_environment(folder, description, condition)
                if chunk is not None:
                    writer.add(index, chunk)
                    bar.update(sizes[index])
            if plan.precision is None:
                return
            writer.flush()
            asked = _asked(plan, folder)
            todo = _unfinished(plan, folder, asked)
            if todo:
                logger.info(
                    "round %d: %d of %d professions are within %g, %d pictures for the others",
                    asked.rounds,
                    sum(state.narrow for state in asked.professions.values()),
                    len(plan.professions),
                    plan.precision,
                    sum(len(pictures) for pictures in asked.chunks[asked.last :]),
                )
                bar.total = asked.count  # known one round at a time
                bar.set_description(f"audit, round {asked.rounds}")


@contextmanager
def _explained(folder: Path, plan: AuditPlan) -> Iterator[None]:
    """Says of a failed disk where the run stood, and what to do."""
    try:
        yield
    except OSError as error:
        done = len(chunks_of(folder))
        of = f" of {len(plan.chunks())}" if plan.precision is None else ""  # who knows how many
        raise AuditError(
            f"{error} ({done}{of} chunks are measured and stay in {folder}). Make room or "
            "repair access, then start the same audit again"
        ) from error
