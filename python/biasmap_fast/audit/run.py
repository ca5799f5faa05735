"""Running an audit: draw, attribute, measure, write; stop and continue at any time.

The pictures are drawn in chunks that the plan alone decides. A chunk's records appear under their
final name when all else of it is on the disk, so continuing a run means measuring the chunks whose
record file is missing, and ends with the records of an undisturbed run.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from tqdm import tqdm

from .. import environment
from ..concepts import text_encoders, tokenize
from ..pipelines import TESTBED, load_pipeline
from .classifiers import reader_for
from .controls import control_prompts
from .measure import Chunk, measure_chunk
from .plan import AuditPlan, explain
from .records import SIDES, part_path, read_part, read_records, read_side, write_part, write_side
from .report import write_report
from .summary import summarise
from .tables import write_tables

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa

    from .plan import Unit

logger = logging.getLogger(__name__)


class AuditError(RuntimeError):
    """An audit cannot start or go on; what was measured before is kept."""


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
    plan: AuditPlan, out: str | Path, *, pipe: Any = None, progress: bool = True
) -> AuditResult:
    """Runs the audit of ``plan``, or what is left of it, and writes the report.

    Args:
        plan: what to draw and measure.
        out: the run folder; made if it does not exist, continued if it holds the same plan.
        pipe: the pipeline to audit, already loaded; default loads ``plan.model``.
        progress: show a progress bar with rate and time left on stderr.

    Returns:
        The finished run.

    Raises:
        AuditError: the folder cannot be used, holds another plan or was begun with other weights;
            memory or disk ran out.
        ModelError: the model cannot be loaded.
        RecordError: a record file is damaged.
        ValueError: a concept is not in its attribution prompt, or too long for the text encoder.

    Example:
        >>> plan = AuditPlan(professions=["doctor", "judge"], seeds=[0, 1], steps=4)
        >>> result = run_audit(plan, "runs/example", progress=False)  # doctest: +SKIP
        >>> result.records.num_rows  # 2 professions x 2 seeds x 2 words  # doctest: +SKIP
        8
    """
    folder = Path(out)
    _open_folder(plan, folder)
    chunks = list(enumerate(plan.chunks()))
    todo = [(index, units) for index, units in chunks if not _finished(folder, index)]
    if todo:
        with _ready(plan, pipe) as ready:
            _check_prompts(ready, plan)
            _check_model(ready, plan, folder)
            _measure(ready, plan, folder, todo, progress=progress)
    else:
        logger.info("all %d chunks of %s are measured", len(chunks), folder)
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
    plan = _read_plan(folder)
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
        write_tables(result.folder, result.plan, result.summary)
        write_report(result.folder, result.plan, result.records, result.summary)
    except OSError as error:
        raise AuditError(f"the report of {result.folder} cannot be written: {error}") from error
    return result


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


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _open_folder(plan: AuditPlan, folder: Path) -> None:
    """Makes the run folder, or checks that it can be continued, before any model is loaded."""
    if (folder / "plan.yaml").exists():
        differences = _read_plan(folder).differences(plan)
        if differences:
            raise AuditError(
                f"{folder} holds an audit of another plan (setting: there, here): "
                f"{'; '.join(differences)}. Use another folder, or the same plan to continue"
            )
    elif folder.is_dir() and any(path.name != ".plan.yaml.tmp" for path in folder.iterdir()):
        raise AuditError(f"{folder} is not empty and holds no plan.yaml: give a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "plan.yaml", plan.to_yaml())
        (folder / "records").mkdir(exist_ok=True)
    except OSError as error:
        raise AuditError(f"the run folder {folder} cannot be written: {error}") from error


def _read_plan(folder: Path) -> AuditPlan:
    path = folder / "plan.yaml"
    if not path.is_file():
        raise AuditError(f"{folder} is no run folder: it has no plan.yaml")
    try:
        return AuditPlan.from_yaml(path)
    except ValidationError as error:
        raise AuditError(f"{path} is not a plan of this version: {explain(error)}") from error


def _finished(folder: Path, chunk: int) -> bool:
    path = part_path(folder, chunk)
    if not path.exists():
        return False
    read_part(path)  # a damaged file must stop the run before hours are spent on the rest
    return True


@contextmanager
def _ready(plan: AuditPlan, pipe: Any) -> Iterator[Any]:
    """The pipeline with the plan's scheduler and without bars; a given one is left as it was."""
    ready = pipe or load_pipeline(
        plan.model, revision=plan.revision, dtype=plan.dtype, device=plan.device
    )
    dtype = str(ready.unet.dtype).removeprefix("torch.")
    device = torch.device(getattr(ready, "_execution_device", ready.unet.device)).type
    if (dtype, device) != (plan.dtype, torch.device(plan.device).type):
        raise AuditError(
            f"the plan says {plan.dtype} on {plan.device}, the given pipeline has a UNet of "
            f"{dtype} on {device}"
        )
    scheduler, bar = ready.scheduler, getattr(ready, "_progress_bar_config", {})
    unet = ready.unet
    try:
        if plan.engine is not None:
            ready.unet = _engine(plan, unet)
        if plan.scheduler is not None:
            ready.scheduler = _scheduler(plan.scheduler).from_config(scheduler.config)
        ready.set_progress_bar_config(**{**bar, "disable": True})
        yield ready
    finally:
        ready.scheduler, ready.unet = scheduler, unet
        ready.set_progress_bar_config(**bar)


def _engine(plan: AuditPlan, unet: Any) -> Any:
    from ..engines import load_engine

    engine = load_engine(str(plan.engine), device=plan.device, unet=unet)
    if engine.manifest.dtype != plan.dtype:
        raise AuditError(
            f"the plan says {plan.dtype}, the engine in {plan.engine} is {engine.manifest.dtype}"
        )
    return engine


def _scheduler(name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise AuditError(
            f"expected the class name of a scheduler of diffusers ('DDIMScheduler'), got {name!r}"
        )
    return found


def _check_prompts(pipe: Any, plan: AuditPlan) -> None:
    """Finds every concept's tokens now: the last profession's error must not take hours."""
    for profession in plan.professions:
        for pair in plan.pairs(profession):
            for tokenizer, _ in text_encoders(pipe):
                tokenize(pair.semantic_prompt, tokenizer)
                tokenize(pair.demographic_prompt, tokenizer)
    for prompt in control_prompts(plan, plan.professions):
        for tokenizer, _ in text_encoders(pipe):
            try:
                tokenize(prompt, tokenizer)
            except ValueError as error:
                raise ValueError(
                    f"a control cannot be measured: {error}. Choose other control words, or turn "
                    "the controls off"
                ) from error


def _check_model(pipe: Any, plan: AuditPlan, folder: Path) -> None:
    """Writes environment.json; of a run that goes on, compares the weights with it."""
    path = folder / "environment.json"
    found = {
        **environment.describe(),
        "model": {"id": plan.model, "revision": _revision(pipe, plan)},
        **environment.describe_pipeline(pipe),
    }
    if not path.exists():
        begun = {"begun": datetime.now(UTC).isoformat(timespec="seconds"), **found}
        write_text(path, json.dumps(begun, indent=1) + "\n")
        return
    began = json.loads(path.read_text(encoding="utf-8"))
    for name in ("weights_sha256", "scheduler_config"):
        if began[name] != found[name]:
            raise AuditError(
                f"{folder} was begun with another {name}: expected {began[name]}, got "
                f"{found[name]}. Records of two models must not be mixed: use another folder"
            )
    if began["versions"] != found["versions"]:
        logger.warning(
            "%s was begun with other versions: %s, now %s",
            folder,
            began["versions"],
            found["versions"],
        )


def _revision(pipe: Any, plan: AuditPlan) -> str | None:
    """The commit a hub model was loaded from, or what the plan asked for."""
    commit = getattr(pipe.unet.config, "_commit_hash", None) or pipe.config.get("_commit_hash")
    return commit or plan.revision


def _measure(
    pipe: Any,
    plan: AuditPlan,
    folder: Path,
    todo: list[tuple[int, list[Unit]]],
    *,
    progress: bool,
) -> None:
    total = plan.pictures
    left = sum(len(units) for _, units in todo)
    read = reader_for(plan)
    with tqdm(
        total=total,
        initial=total - left,
        unit="image",
        desc="audit",
        disable=not progress,
        file=sys.stderr,
        dynamic_ncols=True,
    ) as bar:
        for index, units in todo:
            with _explained(index, len(plan.chunks()), folder, plan):
                chunk = measure_chunk(pipe, plan, units, read)
                _store(chunk, plan, folder)
                for side, table in chunk.sides.items():
                    write_side(folder, side, index, table)
                write_part(folder, index, chunk.table)
            bar.update(len(units))


@contextmanager
def _explained(index: int, count: int, folder: Path, plan: AuditPlan) -> Iterator[None]:
    """Says of an error where the run stood, and what to do about memory and disk."""
    kept = f"{index} of {count} chunks were reached; what is measured stays in {folder}"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise AuditError(
            f"out of memory with batch_size {plan.batch_size} ({kept}). Start a new folder with a "
            "smaller batch size"
        ) from error
    except OSError as error:
        raise AuditError(
            f"{error} ({kept}). Make room or repair access, then start the same audit again"
        ) from error


def _store(chunk: Chunk, plan: AuditPlan, folder: Path) -> None:
    """Writes the pictures and maps that the plan asks to keep."""
    from safetensors.torch import save

    for name, picture in chunk.pictures.items():
        path = folder / "pictures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
    for name, maps in chunk.maps.items():
        path = folder / "maps" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(save(maps))
