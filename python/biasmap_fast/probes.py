"""Effect maps: where words change what a denoiser predicts, measured while a pipeline draws.

At the latents of a drawing the denoiser is also called with the prompts of a *swap*, such as
"a doctor and woman" and "a doctor and man". Where their predictions differ, the swapped words
decide what is drawn. No layer is hooked and no attention is read, so it works on any denoiser.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from .conditioning import Arguments, Conditionings, equal, latents_of, take, text_of, time_of
from .denoiser import Denoiser, probing
from .regions import EffectMaps, swap_index
from .shares import differs, mixture


@dataclass(frozen=True)
class Swap:
    """Prompts that differ in the words whose effect is measured.

    Attributes:
        name: What the maps are called: ``"gender"``.
        groups: Label -> prompt, at least two different ones.

    Example:
        >>> Swap("gender", {"woman": "a doctor and woman", "man": "a doctor and man"}).name
        'gender'
    """

    name: str
    groups: Mapping[str, str]

    def __post_init__(self) -> None:
        if len(set(self.groups.values())) < max(2, len(self.groups)):
            raise ValueError(
                f"swap {self.name!r}: expected at least two different prompts, got "
                f"{dict(self.groups)}"
            )


@dataclass(eq=False)
class _Run:
    """One call of the pipeline."""

    arguments: Arguments
    measured: list[int] = field(default_factory=list)  # numbers of the calls to measure
    text: Conditionings | None = None  # of the probes' prompts, then the pipeline's own
    index: int = -1  # of the denoiser call
    last: tuple[float, Any] | None = None  # time and latents of it
    sums: torch.Tensor | None = None  # [B, S, h, w]
    posteriors: list[list[torch.Tensor]] = field(default_factory=list)  # calls x S of [B, G]
    same: set[str] = field(default_factory=set)  # swaps whose words changed no prediction


def probe(
    pipe: Any,
    swaps: Sequence[Swap] | Sequence[Sequence[Swap]],
    *,
    calls: int | str | Sequence[float] = 3,
    rows: int = 32,
) -> Probes:
    """Measures where swapped words change the predictions for every picture drawn in a block.

    The pictures are the same to the bit as without. At a measured call every prompt costs one
    row per image, except where the pipeline's own prediction already is that prompt's.

    Args:
        pipe: A diffusers text-to-image pipeline with a UNet or transformer: the one that draws.
        swaps: The swaps. Or a sequence of swaps for each image of the batch, with the same names
            and labels.
        calls: Which of a run's denoiser calls to measure: a number of them, spread evenly over
            its middle (3 of 25: calls 6, 12, 18); ``"all"``; or fractions of the run.
        rows: Images in one forward pass at most; halved when memory runs out.

    Returns:
        A context manager; `Probes.effects` and `Probes.shares` give the results, also after the
        block.

    Raises:
        TypeError: The pipeline has no known denoiser or takes no prompt.
        ValueError: Wrong swaps or calls. While drawing: a step cache, perturbed-attention
            guidance, a video, prompts that change nothing, text that changes between calls.

    Example:
        >>> import biasmap_fast as bm
        >>> pipe = bm.testbed.pipeline()
        >>> words = {word: f"a photo of a doctor and {word}" for word in ("woman", "man")}
        >>> with bm.probe(pipe, [bm.Swap("gender", words)]) as probes:
        ...     images = pipe("a photo of a doctor", num_inference_steps=4).images
        >>> probes.effects()["gender"].shape
        torch.Size([1, 16, 16])
    """
    return Probes(pipe, swaps, calls=calls, rows=rows)


class Probes:
    """Measures effect maps and posterior shares between ``__enter__`` and ``__exit__``.

    Made by `probe`. Several pipeline calls in one block are stacked along the batch. Entering
    again after the block starts afresh.
    """

    def __init__(
        self,
        pipe: Any,
        swaps: Sequence[Swap] | Sequence[Sequence[Swap]],
        *,
        calls: int | str | Sequence[float] = 3,
        rows: int = 32,
    ) -> None:
        self._swaps, self._images = _checked(swaps)
        self.names = tuple(swap.name for swap in self._swaps[0])
        measured_calls(calls, 25)  # refuses what cannot be meant
        self._calls = calls
        texts = [text for own in self._swaps for swap in own for text in swap.groups.values()]
        self._prompts = list(dict.fromkeys(texts))
        self._pipe = pipe
        self._denoiser = Denoiser(pipe, type(pipe).__call__, rows)
        self._stack = ExitStack()
        self._entered = False
        self._interrupted: str | None = None
        self._run: _Run | None = None
        self._runs: list[_Run] = []

    @property
    def rows(self) -> int:
        """Images that went through the denoiser for probes alone."""
        return self._denoiser.forwarded

    def __enter__(self) -> Self:
        if self._entered:
            raise RuntimeError("these probes are measuring already; make others to nest them")
        self._entered, self._interrupted, self._runs = True, None, []
        self._denoiser.forwarded = 0
        # A dunder method is looked up on the class, so the instance gets one of its own.
        plain = type(self._pipe)
        self._pipe.__class__ = _watched(plain, self._drawing)
        self._stack.callback(setattr, self._pipe, "__class__", plain)
        # its graph must not hold what changes from call to call
        hook = torch.compiler.disable(self._after_call)  # type: ignore[no-untyped-call]
        self._stack.callback(
            self._denoiser.module.register_forward_hook(hook, with_kwargs=True).remove
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._entered, self._run = False, None
        self._stack.close()
        if kind is not None:
            self._interrupted = kind.__name__

    def effects(self) -> EffectMaps:
        """The effect maps of every picture drawn so far.

        Raises:
            RuntimeError: Nothing was drawn, or drawing ended before the last measured call.
            ValueError: Pictures of different sizes, or words that do not change the prediction.
        """
        runs = self._complete()
        for name in self.names:
            self._check_differs(runs, name)
        maps = [run.sums / len(run.measured) for run in runs if run.sums is not None]
        if len({each.shape[1:] for each in maps}) > 1:
            raise ValueError(
                f"pictures of different sizes {[tuple(each.shape[-2:]) for each in maps]} were "
                "drawn: measure them in separate blocks"
            )
        return EffectMaps(torch.cat(maps), self.names)

    def shares(self, name: str) -> torch.Tensor:
        """The posterior share of each group in each picture along its drawing.

        The pipeline's own prompt is the mixture, so it must leave the swapped words open.

        Args:
            name: The swap.

        Returns:
            ``[calls, B, G]`` float64 over the measured calls, on the simplex.

        Raises:
            KeyError: There is no such swap.
            RuntimeError: As `effects`.
            ValueError: Runs of different numbers of measured calls, or words that do not change
                the prediction.
        """
        index, runs = swap_index(self.names, name), self._complete()
        self._check_differs(runs, name)
        lengths = {len(run.measured) for run in runs}
        if len(lengths) > 1:
            raise ValueError(f"runs of {sorted(lengths)} measured calls cannot be stacked")
        return torch.stack(
            [torch.cat([run.posteriors[call][index] for run in runs]) for call in range(*lengths)]
        )

    def decided(self, name: str) -> int | None:
        """The denoiser call at which the group is decided.

        It is the first measured call at which the mean entropy over pictures is at most half of
        that at the first measured call; measure ``calls="all"`` for it.

        Returns:
            The number of the call, from 0; None if it is never decided.

        Raises:
            ValueError: As `shares`, or runs whose measured calls differ.
        """
        shares = self.shares(name)
        if len({tuple(run.measured) for run in self._runs}) > 1:
            raise ValueError("the runs were measured at different calls")
        entropy = torch.special.entr(shares).sum(-1).mean(-1)  # [calls]
        halved = (entropy <= entropy[0] / 2).nonzero().flatten().tolist()
        return self._runs[0].measured[halved[0]] if halved else None

    @contextmanager
    def _drawing(self, arguments: Arguments) -> Iterator[None]:
        self._run = _Run(arguments)
        try:
            yield
            self._runs.append(self._run)
        except BaseException as error:
            self._interrupted = type(error).__name__
            raise
        finally:
            self._run = None

    def _after_call(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Arguments, output: Any
    ) -> None:
        run = self._run
        if run is None or probing.get():
            return
        live = self._denoiser.named(args, kwargs)
        if run.text is None:
            run.text = self._begin(run, live)
        start, time = run.text.locate(live, len(self._prompts)), time_of(live)
        if start is None:
            if run.last is not None and run.last[0] == time:
                return  # the unconditional branch, in a call of its own
            raise ValueError(
                f"the pipeline's text changed before its denoiser call at time {time:g}: there is "
                "no one prompt to compare the probes with"
            )
        rows = range(start, start + run.text.images)
        latents = latents_of(live)
        latents = take(("x",), latents, rows, len(latents))
        if run.last is not None and run.last[0] == time and equal(run.last[1], latents):
            return  # a second look at the same latents, as skip-layer guidance takes
        run.index, run.last = run.index + 1, (time, latents)
        if run.index in run.measured:
            own = self._denoiser.prediction(output, live)[rows.start : rows.stop]
            self._measure(run, run.text, live, start, own)

    def _begin(self, run: _Run, live: Arguments) -> Conditionings:
        """Rehearses the probes' prompts with the arguments of this call of the pipeline."""
        self._denoiser.refuse()
        calls = [self._denoiser.rehearse(run.arguments, prompt) for prompt in self._prompts]
        text = Conditionings.of(calls)
        if self._images not in (None, text.images):
            raise ValueError(
                f"swaps are given for {self._images} images, and the pipeline draws {text.images}"
            )
        text.prompts.append(text_of(live, text.first, text.images))
        steps = getattr(self._pipe, "_num_timesteps", None)
        run.measured = measured_calls(self._calls, steps or len(self._pipe.scheduler.timesteps))
        return text

    def _measure(
        self, run: _Run, text: Conditionings, live: Arguments, start: int, own: torch.Tensor
    ) -> None:
        """Adds the effect maps and posteriors of one call."""
        swaps = self._swaps if self._images else self._swaps * text.images  # of each image
        found = self._predictions(text, live, start, own, swaps)
        own = torch.stack([found[len(self._prompts), image] for image in range(text.images)])
        maps, shares = [], []
        for index, name in enumerate(self.names):
            texts = zip(*(chosen[index].groups.values() for chosen in swaps), strict=True)
            groups = torch.stack(
                [
                    torch.stack([found[self._prompts.index(p), i] for i, p in enumerate(prompts)])
                    for prompts in texts
                ]
            )  # [G, B, C, h, w]
            if not differs(groups, self._denoiser.precision):
                run.same.add(name)
            effect = effect_map(groups)
            maps.append(effect / effect.mean((-2, -1), keepdim=True))
            shares.append(mixture(own, groups))
        stacked = torch.stack(maps, 1)
        run.sums = stacked if run.sums is None else run.sums + stacked
        run.posteriors.append(shares)

    def _predictions(
        self,
        text: Conditionings,
        live: Arguments,
        start: int,
        own: torch.Tensor,
        swaps: Sequence[Sequence[Swap]],
    ) -> dict[tuple[int, int], torch.Tensor]:
        """(Prompt, image) -> prediction, of the swaps' prompts and of the pipeline's own."""
        pipeline = len(self._prompts)
        wanted = dict.fromkeys(
            (self._prompts.index(prompt), image)
            for image, chosen in enumerate(swaps)
            for swap in chosen
            for prompt in swap.groups.values()
        )
        known = {(pipeline, image): own[image] for image in range(text.images)}
        if getattr(getattr(self._denoiser.module, "_diffusers_hook", None), "hooks", None):
            wanted.update(dict.fromkeys(known))  # a hook may have changed the live prediction
            known = {}
        else:
            for index, image in wanted:
                if text.prompts[index].same(text.prompts[pipeline], image):
                    known[index, image] = own[image]
        asked = [pair for pair in wanted if pair not in known]
        if asked:
            predictions = self._denoiser.predict(live, text, asked, start)
            known.update(zip(asked, predictions, strict=True))
        return known

    def _complete(self) -> list[_Run]:
        if self._interrupted is not None:
            raise RuntimeError(f"drawing ended with {self._interrupted}: the maps are incomplete")
        if not self._runs:
            raise RuntimeError("nothing was measured: call the pipeline inside the `with` block")
        for run in self._runs:
            if len(run.posteriors) < max(1, len(run.measured)):
                raise RuntimeError(
                    f"drawing ended after {run.index + 1} denoiser calls, before the measured "
                    f"calls {run.measured} were over"
                )
        return self._runs

    def _check_differs(self, runs: Sequence[_Run], name: str) -> None:
        if any(name in run.same for run in runs):
            raise ValueError(f"swap {name!r}: the words do not change the prediction")


def effect_map(groups: torch.Tensor) -> torch.Tensor:
    """Distance of predictions ``[G, B, C, h, w]`` from their mean, ``[B, h, w]``."""
    distance: torch.Tensor = (groups - groups.mean(0)).square().sum(2).mean(0).sqrt()
    return distance


def measured_calls(calls: int | str | Sequence[float], total: int) -> list[int]:
    """The numbers of the measured calls of a run of ``total``.

    Raises:
        ValueError: Not a positive number, ``"all"`` or fractions of 0 to 1.
    """
    if calls == "all":
        return list(range(total))
    if isinstance(calls, int) and calls > 0:
        fractions: list[float] = [(i + 1) / (calls + 1) for i in range(calls)]
    elif isinstance(calls, Sequence) and not isinstance(calls, str) and calls:
        fractions = list(calls)
    else:
        fractions = [-1.0]
    if not all(0 <= fraction <= 1 for fraction in fractions):
        raise ValueError(
            f"`calls` must be a positive number, 'all' or fractions of 0 to 1, got {calls!r}"
        )
    return sorted({min(int(fraction * total + 1e-9), total - 1) for fraction in fractions})


def _watched(plain: type, drawing: Any) -> type:
    """A class whose instances announce the arguments of their calls."""
    call: Any = plain.__call__
    signature = inspect.signature(call)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if probing.get():  # another probe's rehearsal
            return call(self, *args, **kwargs)
        bound = dict(signature.bind(self, *args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound.update(bound.pop(name, {}))
        bound.pop("self")
        with drawing(bound):
            return call(self, *args, **kwargs)

    body = {"__call__": __call__, "__module__": plain.__module__, "__doc__": plain.__doc__}
    __call__.__signature__ = signature  # type: ignore[attr-defined]
    return type(plain)(plain.__name__, (plain,), body)


def _checked(
    swaps: Sequence[Swap] | Sequence[Sequence[Swap]],
) -> tuple[list[list[Swap]], int | None]:
    """The swaps of each image, and of how many; one list for all images and None otherwise."""
    listed: list[Any] = list(swaps)
    nested = bool(listed) and not isinstance(listed[0], Swap)
    each: list[list[Swap]] = [list(own) for own in listed] if nested else [listed]
    if not each[0] or not all(isinstance(swap, Swap) for swap in itertools.chain(*each)):
        raise ValueError("expected swaps, or a sequence of swaps for each image, got none or both")
    layout = [[(swap.name, tuple(swap.groups)) for swap in own] for own in each]
    names = [name for name, _ in layout[0]]
    if len(set(names)) < len(names):
        raise ValueError(f"expected swaps of different names, got {names}")
    if any(own != layout[0] for own in layout):
        raise ValueError(f"every image's swaps must have the same names and labels, got {layout}")
    return each, len(each) if nested else None
