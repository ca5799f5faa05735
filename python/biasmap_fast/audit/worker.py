"""The worker: measures chunks of a plan in this process, each under its condition.

It holds the plan's pipeline and, beside it, that of one condition that has its own. A picture that
cannot be drawn, for want of memory or whatever else is raised, becomes a row that says so, and its
neighbours are drawn without it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from .. import environment
from ..concepts import text_encoders, tokenize
from ..files import sha256
from ..pipelines import load_pipeline
from . import conditions
from .chunk import Chunk, failed_chunk, measure_chunk, merged
from .classifiers import reader_for
from .draw import Cache, check_drawable
from .folder import AuditError

if TYPE_CHECKING:
    from types import TracebackType

    from .classifiers import Reader
    from .plan import AuditPlan, Picture

logger = logging.getLogger(__name__)

Described = dict[str, dict[str, Any]]  # condition -> what measures


class Worker:
    """Measures chunks between ``__enter__`` and ``__exit__``.

    Args:
        plan: What to draw and measure.
        pipe: The pipeline to audit, already loaded; left as it was. Default loads ``plan.model``.
        folder: The user's working directory, where the modules of conditions are looked for.
    """

    def __init__(self, plan: AuditPlan, pipe: Any = None, *, folder: str | None = None) -> None:
        self._plan = plan
        self._given = pipe
        self._folder = str(Path.cwd()) if folder is None else folder
        self._stack = ExitStack()
        self._pipe: Any = None
        self._cache = Cache()
        # of the condition with a pipeline of its own that is held now
        self._separate: tuple[str, Any, Cache] | None = None
        self._separate_stack = ExitStack()
        self._described: set[str] = set()
        self._read: Reader | None = None
        self._reported: set[tuple[bool, str]] = set()  # whether of one picture alone, and why

    def __enter__(self) -> Self:
        plan = self._plan
        for text in plan.interventions.values():
            kind, target = conditions.parse(text)
            if kind == "function":  # before a model is loaded
                conditions.find(target, self._folder)
        self._read = reader_for(plan, self._folder)
        try:
            self._pipe = self._stack.enter_context(_ready(plan, self._given or self._load()))
            _check_prompts(self._pipe, plan)
            separate = [name for name in plan.conditions if plan.pipeline_of(name) is not None]
            for condition in plan.conditions:
                if condition not in separate:
                    check_drawable(self._pipe, plan, condition)
            # a last condition that cannot be made must not be found when the first is drawn
            for condition in reversed(separate):
                self._switch_to(condition)
        except BaseException:
            self.__exit__(None, None, None)
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
        """Returns what measures, for `folder.check_environment`."""
        return {
            **environment.describe(),
            "model": {"id": self._plan.model, "revision": _revision(self._pipe, self._plan)},
            **environment.describe_pipeline(self._pipe),
        }

    def prepare(self, pictures: Sequence[Picture]) -> Described:
        """Makes the pipeline of the pictures' condition, unless it is there already.

        Returns:
            Condition -> what measures, if it was not returned before.
        """
        (condition,) = {self._plan.pipeline_of(picture.condition) for picture in pictures}
        if condition is None:
            return {}
        pipe = self._switch_to(condition)
        if condition in self._described:
            return {}
        self._described.add(condition)
        text = self._plan.interventions[condition]
        source = conditions.source_of(text, self._folder)
        return {
            condition: {
                "intervention": text,
                "source_sha256": None if source is None else sha256(source),
                **environment.describe(),
                **environment.describe_pipeline(pipe),
            }
        }

    def measure(self, pictures: Sequence[Picture]) -> Chunk:
        """Measures one chunk, whose condition was prepared."""
        condition = self._plan.pipeline_of(pictures[0].condition)
        if condition is None or self._separate is None:
            return self._attempt(self._pipe, self._cache, pictures)
        return self._attempt(*self._separate[1:], pictures)

    def results(
        self, todo: Iterable[tuple[int, list[Picture]]]
    ) -> Iterator[tuple[Described, int, Chunk | None]]:
        """Yields conditions whose pipeline was just made, then the chunk itself."""
        for index, pictures in todo:
            if entered := self.prepare(pictures):
                yield entered, index, None
            yield {}, index, self.measure(pictures)

    def _attempt(self, pipe: Any, cache: Cache, pictures: Sequence[Picture]) -> Chunk:
        """Measures the pictures together; if that raises, each half of them by itself."""
        try:
            return measure_chunk(pipe, self._plan, pictures, self._read, cache)
        except OSError:
            raise
        except Exception as error:  # whatever a picture raises is its row's reason
            status, reason = _fault(error)
            self._report(len(pictures), reason)
        # Past the handler: what the failed attempt held on the device is free again.
        if status == "out_of_memory" and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(pictures) == 1:
            return failed_chunk(pipe, self._plan, pictures, status, reason)
        half = len(pictures) // 2
        first = self._attempt(pipe, cache, pictures[:half])
        return merged(first, self._attempt(pipe, cache, pictures[half:]))

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

    def _switch_to(self, condition: str) -> Any:
        """Makes and checks the pipeline of a condition, unless it is the one held now."""
        if self._separate is not None and self._separate[0] == condition:
            return self._separate[1]
        self._leave()
        text, stack = self._plan.interventions[condition], self._separate_stack
        try:
            made = conditions.make(text, self._load, stack, folder=self._folder)
            pipe = stack.enter_context(_ready(self._plan, made))
            _check_prompts(pipe, self._plan)
            check_drawable(pipe, self._plan, condition)
        except BaseException:
            stack.close()
            raise
        self._separate = (condition, pipe, Cache())
        return pipe

    def _leave(self) -> None:
        self._separate = None
        self._separate_stack.close()
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
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "out_of_memory" if memory else "error", text[:500]


@contextmanager
def _ready(plan: AuditPlan, pipe: Any) -> Iterator[Any]:
    """The pipeline with the plan's scheduler and without bars; afterwards as it was."""
    dtype = str(pipe.unet.dtype).removeprefix("torch.")
    device = torch.device(getattr(pipe, "_execution_device", pipe.unet.device)).type
    if (dtype, device) != (plan.dtype, torch.device(plan.device).type):
        raise AuditError(
            f"the plan says {plan.dtype} on {plan.device}, the given pipeline has a UNet of "
            f"{dtype} on {device}"
        )
    scheduler, unet, bar = pipe.scheduler, pipe.unet, getattr(pipe, "_progress_bar_config", {})
    try:
        if plan.engine is not None:
            pipe.unet = _engine(plan, unet)
        if plan.compile:
            pipe.unet = torch.compile(unet)
        if plan.scheduler is not None:
            pipe.scheduler = _scheduler(plan.scheduler).from_config(scheduler.config)
        pipe.set_progress_bar_config(**{**bar, "disable": True})
        yield pipe
    finally:
        pipe.scheduler, pipe.unet = scheduler, unet
        pipe.set_progress_bar_config(**bar)


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

    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise AuditError(
            f"expected the class name of a scheduler of diffusers ('DDIMScheduler'), got {name!r}"
        )
    return kind


def _check_prompts(pipe: Any, plan: AuditPlan) -> None:
    """Looks for every concept's tokens now: the last profession's error must not take hours."""
    encoders = text_encoders(pipe)
    for profession in plan.professions:
        for pair in plan.pairs(profession) + plan.control_pairs(profession):
            try:
                for tokenizer, _ in encoders:
                    tokenize(pair.profession_prompt, tokenizer)
                    tokenize(pair.word_prompt, tokenizer)
            except ValueError as error:
                if not pair.control:
                    raise
                raise ValueError(
                    f"a control cannot be measured: {error}. Choose other control words, or turn "
                    "the controls off"
                ) from error


def _revision(pipe: Any, plan: AuditPlan) -> str | None:
    """The commit a hub model was loaded from, or what the plan asked for."""
    commit = getattr(pipe.unet.config, "_commit_hash", None) or pipe.config.get("_commit_hash")
    return commit or plan.revision
