"""Running an audit: draw, attribute, measure, write; stop and continue at any time.

The pictures are drawn in chunks that the plan alone decides; with a precision, the plan and the
records of earlier rounds (`rounds`). A chunk's records appear under their final name when all else
of it is on the disk, so continuing a run means measuring the chunks whose record file is missing,
and ends with the records of an undisturbed run.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..pipelines import TESTBED
from . import rounds
from .files import write_text
from .folder import AuditError, check_environment, finished, open_folder, read_plan
from .measure import RAISED
from .plan import AuditPlan
from .records import SIDES, part_path, read_part, read_records, read_side
from .report import write_report
from .summary import summarise
from .validate import validate as check
from .work import Worker
from .writer import Writer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pyarrow as pa

    from .cluster import Cluster
    from .measure import Chunk
    from .plan import Unit
    from .rounds import Asked

logger = logging.getLogger(__name__)

_Work = tuple[int, "list[Unit]"]  # index of a chunk, and its pictures


@dataclass(frozen=True)
class AuditResult:
    """A run folder, read.

    Attributes:
        folder: the run folder.
        plan: its plan.
        records: one row an image, concept pair and percentile (`records.SCHEMA`).
        summary: every figure with n and interval.
    """

    folder: Path
    plan: AuditPlan
    records: pa.Table
    summary: dict[str, Any]

    @property
    def report(self) -> Path:
        """The report, one self-contained HTML file."""
        return self.folder / "report.html"

    def to_pandas(self) -> Any:
        """The records as a data frame.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            return self.records.to_pandas()
        except ModuleNotFoundError as error:
            raise ImportError("records as a data frame need pandas: pip install pandas") from error


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
        plan: what to draw and measure.
        out: the run folder; made if it does not exist, continued if it holds the same plan.
        pipe: the pipeline to audit, already loaded; default loads ``plan.model``.
        progress: show a progress bar with rate and time left on stderr.
        retry_failed: measure those chunks again that have pictures whose drawing raised; with a
            precision those of the last round, for earlier ones have decided what was drawn since.
        cluster: ``"local"``, or the address of a Ray cluster: one worker a device. Default this
            process alone.
        workers: of the cluster; default as many as it has room for.
        threads: of each worker's CPU work.

    Returns:
        The finished run.

    Raises:
        AuditError: the folder is in use, cannot be used, holds another plan or was begun with other
            weights; every picture fails; the disk is full.
        ConditionError: a condition's pipeline cannot be made.
        ImportError: a cluster without Ray installed.
        ModelError: the model cannot be loaded.
        RecordError: a record file is damaged.
        ValueError: a concept is not in its attribution prompt, or too long for the text encoder;
            an unknown layer; ``workers`` or ``threads`` without a cluster.

    Example:
        >>> plan = AuditPlan(professions=["doctor", "judge"], seeds=[0, 1], steps=4)
        >>> result = run_audit(plan, "runs/example", progress=False)  # doctest: +SKIP
        >>> result.records.num_rows  # 2 professions x 2 seeds x 2 words  # doctest: +SKIP
        8
    """
    if cluster is None and (workers is not None or threads != 1):
        raise ValueError("`workers` and `threads` are of a cluster: give `cluster` (--cluster) too")
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
    """Reads a run folder, finished or not.

    Args:
        path: the run folder.

    Returns:
        The run; its summary is computed from the records that there are.

    Raises:
        AuditError: ``path`` is no run folder.
        RecordError: a record file is damaged.
    """
    folder = Path(path)
    plan = read_plan(folder)
    records = read_records(folder)
    sides = {side: read_side(folder, side) for side in SIDES}
    summary = summarise(plan, records, planted(plan), **sides)
    return AuditResult(folder, plan, records, summary)


def render(path: str | Path) -> AuditResult:
    """Computes the summary of a run folder from its records and writes the report anew.

    Args:
        path: the run folder; nothing else is read.

    Raises:
        AuditError: ``path`` is no run folder, or cannot be written.
        RecordError: a record file is damaged.
    """
    result = load_audit(path)
    try:
        text = json.dumps(result.summary, indent=1, allow_nan=False) + "\n"
        write_text(result.folder / "summary.json", text)
        write_report(result.folder, result.plan, result.records, result.summary)
    except OSError as error:
        raise AuditError(f"the report of {result.folder} cannot be written: {error}") from error
    return result


def validate(path: str | Path) -> list[str]:
    """Everything in which a run folder contradicts itself: records, plan, hashes, summary.

    Args:
        path: the run folder, finished or not; nothing in it is changed.

    Returns:
        One line a difference; none if the folder is whole.

    Raises:
        AuditError: ``path`` is no run folder.
    """
    folder = Path(path)
    return check(folder, planted(read_plan(folder)))


def planted(plan: AuditPlan) -> list[dict[str, Any]] | None:
    """The testbed's planted table, or ``None`` for any other model."""
    if plan.model != TESTBED:
        return None
    from .. import testbed

    return [
        {
            "semantic": row.profession,
            "shares": dict(row.shares),
            "level": row.level,
            "overlap": dict(row.overlap),
            "marker_fraction": row.marker_fraction,
        }
        for row in testbed.truth()
    ]


def _asked(plan: AuditPlan, folder: Path) -> Asked:
    """The pictures that are asked for so far."""
    if plan.precision is None:
        return rounds.asked(plan)
    return rounds.asked(plan, read_records(folder).select(rounds.COLUMNS).to_pylist())


def _unfinished(plan: AuditPlan, folder: Path, asked: Asked) -> list[_Work]:
    """Chunks without records.

    Raises:
        AuditError: a chunk has the records of other pictures.
        RecordError: a record file is damaged.
    """
    todo = []
    for index, units in enumerate(asked.chunks):
        if not finished(folder, index):
            todo.append((index, units))
        elif plan.precision is not None:
            _check_pictures(folder, index, units)
    return todo


def _check_pictures(folder: Path, chunk: int, units: Sequence[Unit]) -> None:
    path = part_path(folder, chunk)
    columns = read_part(path).select(["condition", "semantic", "seed"]).to_pydict()
    found = set(zip(*columns.values(), strict=True))
    expected = {(unit.condition, unit.profession, unit.seed) for unit in units}
    if found != expected:
        example = min(found ^ expected)
        raise AuditError(
            f"{path} holds other pictures than the earlier rounds ask for ({len(found)} instead of "
            f"{len(expected)}, {example} in one of them only): a record file before it was changed "
            "after it had decided what to draw. Restore that file, or use another folder"
        )


def _failed(folder: Path, asked: Asked) -> list[_Work]:
    """Measured chunks of the last round with pictures whose drawing raised."""
    failed = [
        (index, units)
        for index, units in enumerate(asked.chunks)
        if part_path(folder, index).exists() and _has_failed(folder, index)
    ]
    if earlier := [index for index, _ in failed if index < asked.last]:
        logger.warning(
            "chunks %s have pictures that failed, and are not measured again: they are of earlier "
            "rounds, which have decided what was drawn since",
            earlier,
        )
    return [(index, units) for index, units in failed if index >= asked.last]


def _has_failed(folder: Path, chunk: int) -> bool:
    return not set(RAISED).isdisjoint(read_part(part_path(folder, chunk))["status"].to_pylist())


class _Here(AbstractContextManager["_Here"]):
    """Measures in this process, one chunk after the other."""

    def __init__(self, plan: AuditPlan, pipe: Any) -> None:
        self._worker = Worker(plan, pipe)

    def __enter__(self) -> _Here:
        self._worker.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._worker.__exit__(*error)

    def describe(self) -> dict[str, Any]:
        """What measures."""
        return self._worker.describe()

    def results(
        self, todo: Sequence[_Work]
    ) -> Iterator[tuple[dict[str, dict[str, Any]], int, Chunk | None]]:
        """Conditions whose pipeline was made just now, then the chunk itself."""
        for index, units in todo:
            entered = self._worker.prepare(units)
            if entered:
                yield entered, index, None
            yield {}, index, self._worker.measure(units)


def _source(
    plan: AuditPlan, pipe: Any, cluster: str | None, workers: int | None, threads: int
) -> _Here | Cluster:
    """What measures the chunks."""
    if cluster is None:
        return _Here(plan, pipe)
    from .cluster import Cluster

    if pipe is not None:
        raise AuditError(
            "a pipeline that is already loaded cannot be sent to the workers of a cluster: give "
            "the plan a model, or a condition 'name=module:function' that makes one"
        )
    return Cluster(plan, cluster, workers=workers, threads=threads)


def _measure(
    source: _Here | Cluster,
    plan: AuditPlan,
    folder: Path,
    asked: Asked,
    todo: Sequence[_Work],
    *,
    progress: bool,
) -> None:
    """Measures chunks and stores them, whatever order they come in, until no more are asked for."""
    left = sum(len(units) for _, units in todo)
    with (
        source,
        _explained(folder, plan),
        tqdm(
            total=asked.pictures,
            initial=asked.pictures - left,
            unit="image",
            desc="audit",
            disable=not progress,
            file=sys.stderr,
            dynamic_ncols=True,
        ) as bar,
        Writer(folder, measured=len(asked.chunks) > len(todo)) as writer,
    ):
        check_environment(folder, source.describe())
        while todo:
            _measure_chunks(source, folder, todo, writer, bar)
            if plan.precision is None:
                return
            writer.flush()
            asked = _asked(plan, folder)
            todo = _unfinished(plan, folder, asked)
            if todo:
                _tell_round(plan, asked)
                bar.total = asked.pictures  # known one round at a time
                bar.set_description(f"audit, round {asked.rounds}")


def _measure_chunks(
    source: _Here | Cluster, folder: Path, todo: Sequence[_Work], writer: Writer, bar: Any
) -> None:
    sizes = {index: len(units) for index, units in todo}
    for entered, index, chunk in source.results(todo):
        for condition, found in entered.items():
            check_environment(folder, found, condition)
        if chunk is not None:
            writer.add(index, chunk)
            bar.update(sizes[index])


def _tell_round(plan: AuditPlan, asked: Asked) -> None:
    narrow = sum(state.narrow for state in asked.professions.values())
    logger.info(
        "round %d: %d of %d professions are within %g, %d pictures for the others",
        asked.rounds,
        narrow,
        len(plan.professions),
        plan.precision,
        sum(len(units) for units in asked.chunks[asked.last :]),
    )


@contextmanager
def _explained(folder: Path, plan: AuditPlan) -> Iterator[None]:
    """Says of a failed disk where the run stood, and what to do."""
    try:
        yield
    except OSError as error:
        done = len(list((folder / "records").glob("part-*.parquet")))
        of = f" of {len(plan.chunks())}" if plan.precision is None else ""  # who knows how many
        raise AuditError(
            f"{error} ({done}{of} chunks are measured and stay in {folder}). Make room or "
            "repair access, then start the same audit again"
        ) from error
