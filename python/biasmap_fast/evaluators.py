"""The energy of one UNet call and its gradient: by autograd, or by an engine's own graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .accumulate import PromptKeys, Size
from .concepts import AttributionPrompt
from .denoiser import probing
from .energy import Energy, Pair, Target
from .maps import resize
from .ops import concept_map, pairs_iou, soft_iou
from .overlap import pairs_soft_containment, percentile_of
from .sources import AttributionCache, LayerSource, States, engine_of
from .unet import CrossAttention, as_slice, present_rows, resolutions

Groups = Mapping[Target, list[int]]  # a target -> its b images of the batch
SizedMaps = dict[Size, torch.Tensor]  # the maps of a target's concepts: (h, w) -> [b, K, h, w]

_F = TypeVar("_F", bound=Callable[..., Any])


# A compiled UNet calls the hook from inside: its forward passes are to be compiled, and what is
# done around them is not.
def not_compiled(function: _F) -> _F:
    """Keeps a function, and what it calls, out of compiled graphs."""
    return torch.compiler.disable(function)  # type: ignore[no-untyped-call, no-any-return]


def around_forward(function: _F) -> _F:
    """Keeps a function out of compiled graphs, but not what it calls."""
    return torch.compiler.disable(function, recursive=False)  # type: ignore[no-untyped-call, no-any-return]


@dataclass(frozen=True)
class CallEnergy:
    """The energy of one UNet call, and what it is made of.

    Attributes:
        total: ``[B]``, with its graph.
        soft_iou: ``[B, P]``; NaN beyond an image's own pairs.
        iou: ``[B, P]``.
        pairs: The pairs of each image.
        maps: The maps of each target, without their graph.
    """

    total: torch.Tensor
    soft_iou: torch.Tensor
    iou: torch.Tensor
    pairs: tuple[tuple[Pair, ...], ...]
    maps: dict[Target, SizedMaps]


class _Evaluator:
    """What both evaluators share: targets, the maps of earlier calls, and the energy of maps."""

    def __init__(
        self, pipe: Any, cache: AttributionCache, targets: tuple[Target, ...], energy: Energy
    ) -> None:
        self._pipe, self._cache = pipe, cache
        self._targets = targets
        self._energy = energy
        self.prompts = list(dict.fromkeys(p for target in targets for p in target.prompts))
        for prompt in self.prompts:
            cache.tokens(pipe, prompt)  # refuses a concept that is not in its prompt
        self._weights: dict[Target, torch.Tensor] = {}  # [P], on the UNet's device
        self._earlier: dict[Target, SizedMaps] = {}

    def _move_weights(self) -> None:
        # Moved once: a list that goes to the GPU in every call waits for it.
        self._weights = {
            target: self._cache.states(self._pipe, target.prompts[0])[1].new_tensor(target.weights)
            for target in self._targets
        }

    def begin_run(self) -> None:
        """Forgets the maps of earlier calls."""
        self._earlier = {}

    def remember(self, energy: CallEnergy) -> None:
        """Keeps a call's maps for the energy of later ones, if they accumulate."""
        if self._energy.accumulate:
            self._earlier.update(energy.maps)

    def _groups(self, images: int) -> dict[Target, list[int]]:
        targets = self._targets if len(self._targets) > 1 else self._targets * images
        groups: dict[Target, list[int]] = {}
        for image, target in enumerate(targets):
            groups.setdefault(target, []).append(image)
        return groups

    def _evaluate(self, groups: Groups, maps_of: Callable[[Target], SizedMaps]) -> CallEnergy:
        """The energy of one UNet call's maps, and of the maps before them if they accumulate."""
        settings = self._energy
        most = max(len(target.pairs) for target in groups)
        totals: list[torch.Tensor] = []
        soft: list[torch.Tensor] = []
        hard: list[torch.Tensor] = []
        kept: dict[Target, SizedMaps] = {}
        for target in groups:
            earlier = self._earlier.get(target, {})
            by_size = {
                size: maps + earlier.get(size, 0.0) for size, maps in maps_of(target).items()
            }
            kept[target] = {size: maps.detach() for size, maps in by_size.items()}
            # each resolution's sum is resized once
            largest = max(by_size)
            large = torch.stack([resize(maps, largest) for maps in by_size.values()])
            maps = large.sum(0).flatten(2)  # [b, K, N]
            pairs = torch.tensor(target.indices)  # [P, 2]
            values = soft_iou(maps, pairs, settings.fraction, settings.temperature)  # [b, P]
            of = values
            if settings.containment:
                of = pairs_soft_containment(maps, pairs, settings.containment, settings.temperature)
            totals.append(of @ self._weights[target].to(of.dtype))
            padding = (0, most - len(target.pairs))
            masks = pairs_iou(maps, pairs, percentile_of(settings.fraction)).iou
            soft.append(torch.nn.functional.pad(values, padding, value=math.nan))
            hard.append(torch.nn.functional.pad(masks, padding, value=math.nan))
        names = {image: target.pairs for target, images in groups.items() for image in images}
        return CallEnergy(
            total=_in_batch_order(groups, totals),
            soft_iou=_in_batch_order(groups, soft),
            iou=_in_batch_order(groups, hard),
            pairs=tuple(names[image] for image in sorted(names)),
            maps=kept,
        )


class LayerEvaluator(_Evaluator):
    """Energy and gradient of a torch UNet, from the queries of one call."""

    def __init__(
        self, pipe: Any, cache: AttributionCache, targets: tuple[Target, ...], energy: Energy
    ) -> None:
        self._source = LayerSource(pipe, cache, energy.layers)
        super().__init__(pipe, cache, targets, energy)
        self._keys: dict[AttributionPrompt, PromptKeys] = {}
        self._queries: dict[str, tuple[CrossAttention, torch.Tensor]] | None = None

    def attach(self) -> list[Any]:
        """Makes the keys and has the queries of every call shown."""
        groups = [(prompt,) for prompt in self.prompts]
        handles = self._source.attach(groups, self._receive, apart=True)
        self._keys = dict(zip(self.prompts, self._source.keys, strict=True))
        self._move_weights()
        return handles

    def detach(self) -> None:
        """Lets go of keys and maps."""
        self._keys.clear()
        self._source.keys.clear()
        self._earlier.clear()

    @around_forward
    def measure(
        self, forward: Any, args: Any, kwargs: Mapping[str, Any], rows: slice
    ) -> tuple[Any, CallEnergy]:
        """The output of the pipeline's own forward pass, and the energy of some rows of it."""
        sample = args[0] if args else kwargs["sample"]
        with torch.no_grad():
            with self._collecting() as queries:
                output = forward(*args, **kwargs)
            return output, self._of_queries(queries, rows, sample)

    @around_forward
    def gradient(
        self, forward: Any, args: Any, kwargs: Any, latents: torch.Tensor, rows: list[int]
    ) -> tuple[Any, CallEnergy, torch.Tensor]:
        """The output of the attributed rows, their energy, and dE/dz ``[B, C, H, W]``.

        Args:
            forward: The UNet's own forward pass.
            args: Positional arguments of the attributed rows.
            kwargs: Keyword arguments of them.
            latents: The latents in place of those in the arguments, requiring a gradient.
            rows: The attributed rows of the pipeline's batch.
        """
        args, kwargs = _with_latents(args, kwargs, latents)
        with torch.enable_grad(), present_rows(rows):
            with self._collecting() as queries:
                output = forward(*args, **kwargs)
            energy = self._of_queries(queries, slice(0, len(rows)), latents)
            return output, energy, _differentiate(energy.total, latents)

    def _receive(self, layer: CrossAttention, query: torch.Tensor) -> None:
        if self._queries is not None and not probing.get():
            self._queries.setdefault(layer.name, (layer, query))

    @contextmanager
    def _collecting(self) -> Iterator[dict[str, tuple[CrossAttention, torch.Tensor]]]:
        """Collects the queries of one forward pass; not of its recomputation in the backward.

        Maps are computed when the call is over: under activation checkpointing a hook that computes
        inside the checkpointed part would have to do so again when that is recomputed.
        """
        queries: dict[str, tuple[CrossAttention, torch.Tensor]] = {}
        self._queries = queries
        try:
            yield queries
        finally:
            self._queries = None

    @not_compiled
    def _of_queries(
        self,
        queries: Mapping[str, tuple[CrossAttention, torch.Tensor]],
        rows: slice,
        sample: torch.Tensor,
    ) -> CallEnergy:
        groups = self._groups(rows.stop - rows.start)
        sizes = resolutions(*sample.shape[-2:])

        def maps_of(target: Target) -> SizedMaps:
            by_size: SizedMaps = {}
            for layer, query in queries.values():
                size = layer.resolution(query, sizes)
                split = layer.split_heads(query[rows])[as_slice(groups[target])]  # [b, heads, n, d]
                keys = [self._keys[prompt] for prompt in target.prompts]
                parts = [concept_map(split, k.by_layer[layer.name][0], k.weights[0]) for k in keys]
                maps = torch.cat(parts, dim=1)  # [b, K, n]
                maps = maps.view(*maps.shape[:2], *size)
                by_size[size] = by_size[size] + maps if size in by_size else maps
            return by_size

        return self._evaluate(groups, maps_of)


class EngineEvaluator(_Evaluator):
    """Energy and gradient of an engine in the UNet's place, from its outputs."""

    def __init__(
        self, pipe: Any, cache: AttributionCache, targets: tuple[Target, ...], energy: Energy
    ) -> None:
        self._engine = pipe.unet
        parts = [
            self._engine.attribution_parts(names, ("total",)) for names in (energy.layers, None)
        ]
        if parts[0] != parts[1]:
            raise ValueError(
                "the layers of an engine's energy are fixed; leave `layers` out, or export with it"
            )
        if energy.containment:
            raise ValueError(
                "containment= needs the torch UNet: an engine's graph has SoftIoU only"
            )
        if energy.accumulate:
            raise ValueError("accumulate=True needs the torch UNet: engines know one call's energy")
        super().__init__(pipe, cache, targets, energy)
        self._states: dict[AttributionPrompt, States] = {}

    def attach(self) -> list[Any]:
        """Makes the prompts' states; the engine is told of them in every call."""
        self._states = {prompt: self._cache.states(self._pipe, prompt) for prompt in self.prompts}
        self._move_weights()
        return []

    def detach(self) -> None:
        """Lets go of the states."""
        self._states.clear()

    def measure(
        self, forward: Any, args: Any, kwargs: Mapping[str, Any], rows: slice
    ) -> tuple[Any, CallEnergy]:
        """As `LayerEvaluator.measure`."""
        shown: list[Mapping[Any, Sequence[torch.Tensor]]] = []

        def receive(maps: Mapping[Any, Sequence[torch.Tensor]]) -> None:
            if not probing.get():
                shown.append(maps)

        handle = self._engine.register_attribution_hook(list(self._states.values()), receive)
        try:
            output = forward(*args, **kwargs)
        finally:
            handle.remove()
        groups = self._groups(rows.stop - rows.start)
        indices = [[self.prompts.index(prompt) for prompt in target.prompts] for target in groups]
        maps: dict[Target, SizedMaps] = {}
        for (target, images), numbers in zip(groups.items(), indices, strict=True):
            by_size = maps.setdefault(target, {})
            for prompts in shown[0].values():  # of a part: [rows, K, h, w] of every prompt
                part = torch.cat([prompts[number] for number in numbers], dim=1)
                part = part[rows][as_slice(images)]
                size = (part.shape[-2], part.shape[-1])
                by_size[size] = by_size[size] + part if size in by_size else part
        return output, self._evaluate(groups, maps.__getitem__)

    def gradient(
        self, forward: Any, args: Any, kwargs: Any, latents: torch.Tensor, rows: list[int]
    ) -> tuple[Any, CallEnergy, torch.Tensor]:
        """As `LayerEvaluator.gradient`, by the engine's graph of it: one run per target."""
        args, kwargs = _with_latents(args, kwargs, latents)
        groups = self._groups(len(rows))
        results = {}
        for target, images in groups.items():
            part_args, part_kwargs = take_rows((args, kwargs), images, len(rows))
            with present_rows([rows[image] for image in images]):
                results[target] = self._engine.energy_gradient(
                    part_args,
                    part_kwargs,
                    [self._states[prompt] for prompt in target.prompts],
                    target.indices,
                    target.weights,
                    fraction=self._energy.fraction,
                    temperature=self._energy.temperature,
                )
        maps = {target: {tuple(r.maps.shape[-2:]): r.maps} for target, r in results.items()}
        prediction = _in_batch_order(groups, [r.prediction for r in results.values()])
        gradient = _in_batch_order(groups, [r.gradient for r in results.values()])
        energy = self._evaluate(groups, maps.__getitem__)
        return self._engine.output(prediction), energy, gradient[:, : latents.shape[1]]


def evaluator_of(
    pipe: Any, cache: AttributionCache, targets: tuple[Target, ...], energy: Energy
) -> LayerEvaluator | EngineEvaluator:
    """The evaluator of a pipeline's UNet.

    Raises:
        TypeError: The pipeline has no UNet, or no CLIP text encoder.
        ValueError: An unknown layer or concept, or what the engine's graphs have not.
    """
    kind = LayerEvaluator if engine_of(pipe) is None else EngineEvaluator
    return kind(pipe, cache, targets, energy)


@not_compiled
def take_rows(value: Any, rows: list[int], batch: int) -> Any:
    """The rows of everything in a UNet call's arguments that has the batch as first dimension."""
    if torch.is_tensor(value):
        return value[rows] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, Mapping):
        return {name: take_rows(item, rows, batch) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(take_rows(item, rows, batch) for item in value)
    return value


@not_compiled
def _with_latents(
    args: Any, kwargs: Mapping[str, Any], latents: torch.Tensor
) -> tuple[Any, Mapping[str, Any]]:
    """A UNet call's arguments with other latents, and its further channels as they are."""
    given = args[0] if args else kwargs["sample"]
    sample = latents
    if latents.shape[1] < given.shape[1]:
        with torch.enable_grad():
            sample = torch.cat((latents, given[:, latents.shape[1] :]), dim=1)
    return ((sample, *args[1:]), kwargs) if args else (args, {**kwargs, "sample": sample})


@not_compiled
def _differentiate(energy: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    # Images do not meet in the UNet: the gradient of the sum is each image's own.
    (gradient,) = torch.autograd.grad(energy.sum(), latents)
    return gradient


def _in_batch_order(groups: Groups, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor over the batch from the parts ``[b, ...]`` of every group."""
    order = [image for images in groups.values() for image in images]
    # A slice if images are in order already: a list of indices goes to the GPU, and waits.
    return torch.cat(list(parts))[as_slice(sorted(range(len(order)), key=order.__getitem__))]
