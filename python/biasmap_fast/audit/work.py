"""The worker: measures chunks of a plan in this process, each under its condition.

It holds the plan's pipeline and, beside it, that of one condition that has its own. A picture that
cannot be drawn, for want of memory or whatever else is raised, becomes a row that says so, and its
neighbours are drawn without it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from .. import environment
from ..concepts import text_encoders, tokenize
from ..pipelines import load_pipeline
from . import conditions
from .classifiers import reader_for
from .controls import control_prompts
from .draw import Cache, check_drawable
from .files import sha256
from .folder import AuditError
from .measure import Chunk, failed_chunk, measure_chunk, merged

if TYPE_CHECKING:
    from types import TracebackType

    from .measure import Reader
    from .plan import AuditPlan, Unit

logger = logging.getLogger(__name__)


class Worker:
    """Measures chunks between ``__enter__`` and ``__exit__``.

    Args:
        plan: what to draw and measure.
        pipe: the pipeline to audit, already loaded; left as it was. Default loads ``plan.model``.
        folder: the user's working directory, where the modules of conditions are looked for.
    """

    def __init__(self, plan: AuditPlan, pipe: Any = None, *, folder: str | None = None) -> None:
        self._plan = plan
        self._given = pipe
        self._folder = str(Path.cwd()) if folder is None else folder
        self._stack = ExitStack()
        self._pipe: Any = None
        self._cache = Cache()
        self._own: tuple[str, Any, Cache] | None = None  # of the condition with its own pipeline
        self._own_stack = ExitStack()
        self._read: Reader | None = None
        self._reported: set[tuple[bool, str]] = set()  # whether of one picture alone, and why

    def __enter__(self) -> Self:
        for condition in self._plan.interventions:
            kind, target = conditions.parse(self._plan.interventions[condition])
            if kind == "function":  # before a model is loaded
                conditions.find(target, self._folder)
        self._read = reader_for(self._plan, self._folder)
        pipe = self._given or self._load()
        self._pipe = self._stack.enter_context(_ready(self._plan, pipe))
        try:
            _check_prompts(self._pipe, self._plan)
            for condition in self._plan.conditions:
                if self._plan.pipeline_of(condition) is None:
                    check_drawable(self._pipe, self._plan, condition)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave()
        self._stack.close()

    def describe(self) -> dict[str, Any]:
        """What measures, for `folder.check_environment`."""
        return {
            **environment.describe(),
            "model": {"id": self._plan.model, "revision": _revision(self._pipe, self._plan)},
            **environment.describe_pipeline(self._pipe),
        }

    def prepare(self, units: Sequence[Unit]) -> dict[str, dict[str, Any]]:
        """Makes the pipeline of the units' condition, unless it is there already.

        Returns:
            condition -> what measures, of a pipeline that was made just now.
        """
        owners = {self._plan.pipeline_of(unit.condition) for unit in units}
        (owner,) = owners
        if owner is None or (self._own is not None and self._own[0] == owner):
            return {}
        self._leave()
        text = self._plan.interventions[owner]
        try:
            made = conditions.make(text, self._load, self._own_stack, folder=self._folder)
            pipe = self._own_stack.enter_context(_ready(self._plan, made))
            _check_prompts(pipe, self._plan)
            check_drawable(pipe, self._plan, owner)
        except BaseException:
            self._own_stack.close()
            raise
        self._own = (owner, pipe, Cache())
        source = conditions.source_of(text, self._folder)
        return {
            owner: {
                "intervention": text,
                "source_sha256": None if source is None else sha256(source),
                **environment.describe(),
                **environment.describe_pipeline(pipe),
            }
        }

    def measure(self, units: Sequence[Unit]) -> Chunk:
        """Measures one chunk, whose condition was prepared.

        Raises:
            OSError: files or the network failed, which is no fault of a picture.
        """
        own = self._plan.pipeline_of(units[0].condition)
        if own is None or self._own is None:
            return self._attempt(self._pipe, self._cache, units)
        return self._attempt(*self._own[1:], units)

    def _attempt(self, pipe: Any, cache: Cache, units: Sequence[Unit]) -> Chunk:
        """Measures the units together; if that raises, each half of them by itself."""
        try:
            return measure_chunk(pipe, self._plan, units, self._read, cache)
        except OSError:
            raise
        except Exception as error:  # whatever a picture raises is its row's reason
            status, reason = _fault(error)
            self._report(len(units), reason)
        # Past the handler: what the failed attempt held on the device is free again.
        if status == "out_of_memory" and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(units) == 1:
            return failed_chunk(pipe, self._plan, units, status, reason)
        half = len(units) // 2
        first = self._attempt(pipe, cache, units[:half])
        return merged(first, self._attempt(pipe, cache, units[half:]))

    def _report(self, pictures: int, reason: str) -> None:
        """Warns of what was raised, of a single picture with its traceback, and of that once."""
        alone = pictures == 1
        first = (alone, reason) not in self._reported
        self._reported.add((alone, reason))
        level = logging.WARNING if first else logging.DEBUG
        word = "picture" if alone else "pictures"
        logger.log(level, "%d %s raised %s", pictures, word, reason, exc_info=alone and first)

    def _load(self, model: str | None = None, revision: str | None = None) -> Any:
        """A model loaded anew, by default the plan's own."""
        plan = self._plan
        if model is None and self._given is not None:
            return _copied(self._given)
        return load_pipeline(
            model or plan.model,
            revision=revision if model else plan.revision,
            dtype=plan.dtype,
            device=plan.device,
        )

    def _leave(self) -> None:
        """Lets go of the pipeline of the condition so far."""
        self._own = None
        self._own_stack.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _copied(pipe: Any) -> Any:
    """A pipeline with weights of its own, and not compiled."""
    unet = pipe.unet
    pipe.unet = getattr(unet, "_orig_mod", unet)
    try:
        return copy.deepcopy(pipe)
    finally:
        pipe.unet = unet


def _fault(error: Exception) -> tuple[str, str]:
    """Status and reason of a picture whose drawing raised."""
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "out_of_memory" if memory else "error", text[:500]


@contextmanager
def _ready(plan: AuditPlan, ready: Any) -> Iterator[Any]:
    """The pipeline with the plan's scheduler and without bars; afterwards as it was."""
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
        if plan.compile:
            ready.unet = torch.compile(unet)
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


def _revision(pipe: Any, plan: AuditPlan) -> str | None:
    """The commit a hub model was loaded from, or what the plan asked for."""
    commit = getattr(pipe.unet.config, "_commit_hash", None) or pipe.config.get("_commit_hash")
    return commit or plan.revision
