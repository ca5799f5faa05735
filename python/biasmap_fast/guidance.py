"""Energy guidance: sampling steered away from the overlap of two concepts.

``E = mean over pairs of SoftIoU(M_a, M_b)`` of the current UNet call's maps, and
``eps <- eps + scale * sqrt(1 - abar_t) * dE/dz_t`` before the scheduler's own step (BiasMap,
arXiv 2509.13496). The same delta on every chunk of the guidance batch adds exactly that delta to
the guided prediction, u + d + g ((t + d) - (u + d)) = u + g (t - u) + d, so one hook on the UNet is
enough, and any pipeline can be guided.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from types import TracebackType
from typing import Any, Literal, Self

import torch

from .attribution import AttributionKeys, Branch, attribution_keys, attribution_states
from .concepts import AttributionPrompt, tokenize_all
from .entanglement import check_soft
from .maps import resize
from .ops import soft_iou
from .reference import concept_map
from .unet import (
    CrossAttention,
    branch_rows,
    cross_attention_layers,
    engine_of,
    guidance_chunks,
    present_rows,
    resolutions,
)

_HOOK = "biasmap_fast.guidance"

# Sums of a run's earlier maps: prompt -> (h, w) -> [b, K, h, w]
_Running = dict[AttributionPrompt, dict[tuple[int, int], torch.Tensor]]


def guide(
    pipe: Any,
    prompt: AttributionPrompt | Sequence[AttributionPrompt],
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    weights: Sequence[float] | None = None,
    scale: float = 100.0,
    fraction: float = 0.3,
    temperature: float = 0.01,
    clip: float | Literal["skip"] | None = 1.0,
    start: float = 0.0,
    stop: float = 1.0,
    every: int = 1,
    accumulate: bool = False,
    branch: Branch = "cond",
    layers: Sequence[str] | None = None,
    chunks: int | None = None,
    strict: bool = True,
) -> Guidance:
    """Guides every picture drawn inside a ``with`` block towards less overlap of concept pairs.

    Args:
        pipe: any diffusers pipeline with a UNet and CLIP text encoders.
        prompt: the attribution prompt, or one for each image of the batch, in batch order.
        pairs: pairs of the prompt's concepts; default every pair.
        weights: one weight a pair; default their mean.
        scale: strength of the energy; not the classifier-free ``guidance_scale``.
        fraction: share of the pixels in a soft mask.
        temperature: width of a soft mask's edge, in units of the map's range.
        clip: largest L2 norm of an image's gradient: larger ones are rescaled to it. ``"skip"``
            drops a gradient of norm >= 1, as the published code does; None leaves all as they are.
        start: fraction of the sampling steps before which nothing is added.
        stop: fraction of the sampling steps from which on nothing is added.
        every: guide every n-th UNet call only.
        accumulate: energy of the sum of all maps so far instead of the current call's alone.
        branch: whose queries make the maps, ``"cond"`` or ``"uncond"``.
        layers: as in `attribute`. Fewer layers make the backward pass cheaper, and are another
            energy.
        chunks: as in `attribute`.
        strict: raise at the end if more than half of an image's guided calls had to be skipped.

    Returns:
        A context manager whose `Guidance.ledger` tells, also after the block, what was done.

    Raises:
        TypeError: ``pipe`` has no UNet or no CLIP text encoder.
        ValueError: an unknown concept, layer or option; a prediction type other than epsilon and
            v_prediction; a flow-matching scheduler; a UNet that is already guided.

    Example:
        >>> import biasmap_fast as bm
        >>> pipe = bm.testbed.pipeline()
        >>> prompt = bm.AttributionPrompt("a photo of a doctor and woman", ("doctor", "woman"))
        >>> with bm.guide(pipe, prompt, scale=50.0) as guidance:
        ...     images = pipe("a photo of a doctor", num_inference_steps=2).images
        >>> [row.applied for row in guidance.ledger]
        [True, True]
    """
    return Guidance(
        pipe,
        prompt,
        pairs=pairs,
        weights=weights,
        settings=Settings(
            scale=scale,
            fraction=fraction,
            temperature=temperature,
            clip=clip,
            start=start,
            stop=stop,
            every=every,
            accumulate=accumulate,
            branch=branch,
            chunks=chunks,
            strict=strict,
        ),
        layers=layers,
    )


@dataclass(frozen=True)
class Settings:
    """The numbers of `guide`, checked."""

    scale: float
    fraction: float
    temperature: float
    clip: float | Literal["skip"] | None
    start: float
    stop: float
    every: int
    accumulate: bool
    branch: Branch
    chunks: int | None
    strict: bool

    def __post_init__(self) -> None:
        check_soft(self.fraction, self.temperature)
        if not math.isfinite(self.scale):
            raise ValueError(f"`scale` must be finite, got {self.scale}")
        if not 0.0 <= self.start < self.stop <= 1.0:
            raise ValueError(
                "`start` and `stop` must be fractions 0 <= start < stop <= 1, got "
                f"{self.start} and {self.stop}"
            )
        if self.every < 1:
            raise ValueError(f"`every` must be at least 1, got {self.every}")
        if isinstance(self.clip, str) and self.clip != "skip":
            raise ValueError(f"`clip` must be a norm, 'skip' or None, got {self.clip!r}")
        if isinstance(self.clip, (int, float)) and not self.clip > 0:
            raise ValueError(f"`clip` must be positive, got {self.clip}")
        if self.branch not in ("cond", "uncond"):
            raise ValueError(f"`branch` must be 'cond' or 'uncond', got {self.branch!r}")


@dataclass(frozen=True)
class LedgerRow:
    """What guidance did to one image in one UNet call.

    Attributes:
        call: UNet call of the run, from 0.
        timestep: the call's timestep.
        image: index in the batch.
        energy: weighted mean of the pairs' SoftIoU; NaN where it was not computed.
        soft_iou: SoftIoU of each pair.
        gradient_norm: L2 norm of dE/dz_t before clipping.
        clip_factor: what the gradient was multiplied with, 1 if it was not clipped.
        applied: whether the prediction was changed.
        reason: why not, empty if it was.
    """

    call: int
    timestep: float
    image: int
    energy: float
    soft_iou: tuple[float, ...]
    gradient_norm: float
    clip_factor: float
    applied: bool
    reason: str


@dataclass(frozen=True)
class _Entry:
    """One guided call, still on the device: reading it earlier would stall the GPU."""

    call: int
    timestep: float
    alpha_bar: float
    soft_iou: torch.Tensor  # [B, P]; NaN beyond a prompt's own pairs
    energy: torch.Tensor  # [B]
    norm: torch.Tensor  # [B]; NaN where no gradient was taken
    factor: torch.Tensor  # [B]; 0 where the gradient is not applied


class Guidance:
    """Steers sampling between ``__enter__`` and ``__exit__``; made by `guide`."""

    def __init__(
        self,
        pipe: Any,
        prompt: AttributionPrompt | Sequence[AttributionPrompt],
        *,
        pairs: Sequence[tuple[str, str]] | None,
        weights: Sequence[float] | None,
        settings: Settings,
        layers: Sequence[str] | None,
    ) -> None:
        self._pipe = pipe
        self._settings = settings
        self._engine = engine_of(pipe)
        self._layers: list[CrossAttention] = []
        if self._engine is None:
            self._layers = cross_attention_layers(pipe, layers)
        else:
            _check_engine(self._engine, layers, settings)
        self._prompts = (prompt,) if isinstance(prompt, AttributionPrompt) else tuple(prompt)
        if not self._prompts:
            raise ValueError("expected at least one attribution prompt, got an empty sequence")
        self._tokenized = {each: tokenize_all(each, pipe) for each in self._prompts}
        self._pairs = {each: _pair_indices(each, pairs) for each in self._tokenized}
        self._weights = {
            each: _pair_weights(weights, len(found)) for each, found in self._pairs.items()
        }
        self._entries: list[_Entry] = []
        self._keys: dict[AttributionPrompt, AttributionKeys] = {}
        # of an engine: prompt -> hidden states [T', D], weights [K, T']
        self._states: dict[AttributionPrompt, tuple[torch.Tensor, torch.Tensor]] = {}
        self._handles: list[Any] = []
        self._frozen: list[torch.nn.Parameter] = []
        self._timesteps: Any = None
        self._calls = 0
        self._running: _Running = {}
        self._capture: _Capture | None = None

    def __enter__(self) -> Self:
        from diffusers.hooks import HookRegistry

        unet = self._pipe.unet
        registry = HookRegistry.check_if_exists_or_initialize(unet)
        if registry.get_hook(_HOOK) is not None:
            raise ValueError("this UNet is already guided; leave the other `with` block first")
        _check_scheduler(self._pipe.scheduler)
        self._entries, self._timesteps = [], None
        for prompt, tokens in self._tokenized.items():
            if self._engine is None:
                self._keys[prompt] = attribution_keys(self._pipe, self._layers, tokens)
            else:
                self._states[prompt] = attribution_states(self._pipe, tokens)
        registry.register_hook(_energy_hook(self), _HOOK)
        for layer in self._layers:
            self._handles.append(layer.module.to_q.register_forward_hook(self._query_hook(layer)))
        # Frozen weights: the backward pass to the latents then keeps nothing for their gradients.
        self._frozen = [p for p in unet.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        from diffusers.hooks import HookRegistry

        HookRegistry.check_if_exists_or_initialize(self._pipe.unet).remove_hook(_HOOK)
        for handle in self._handles:
            handle.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._handles.clear()
        self._frozen.clear()
        self._keys.clear()
        self._states.clear()
        self._running.clear()
        self._timesteps = None
        if kind is None and self._settings.strict:
            self._check_skipped()

    @property
    def ledger(self) -> list[LedgerRow]:
        """One row a guided UNet call and image, in that order."""
        rows = []
        for entry in self._entries:
            columns = zip(
                entry.soft_iou.tolist(),
                entry.energy.tolist(),
                entry.norm.tolist(),
                entry.factor.tolist(),
                strict=True,
            )
            for image, (overlaps, energy, norm, factor) in enumerate(columns):
                reason = self._reason(entry, norm, factor)
                rows.append(
                    LedgerRow(
                        call=entry.call,
                        timestep=entry.timestep,
                        image=image,
                        energy=energy,
                        soft_iou=tuple(value for value in overlaps if not math.isnan(value)),
                        gradient_norm=norm,
                        clip_factor=factor,
                        applied=not reason,
                        reason=reason,
                    )
                )
        return rows

    def _reason(self, entry: _Entry, norm: float, factor: float) -> str:
        if self._settings.scale == 0.0:
            return "scale is 0"
        if entry.alpha_bar <= 0.0:
            return "no signal left at this timestep (alpha_bar is 0)"
        if not math.isfinite(norm):
            return "gradient is not finite"
        if factor == 0.0:
            return "gradient norm >= 1 (clip='skip')"
        return ""

    def _check_skipped(self) -> None:
        rows = [row for row in self.ledger if row.reason != "scale is 0"]
        for image in sorted({row.image for row in rows}):
            own = [row for row in rows if row.image == image]
            skipped = [row.reason for row in own if not row.applied]
            if 2 * len(skipped) > len(own):
                raise RuntimeError(
                    f"guidance of image {image} was skipped in {len(skipped)} of {len(own)} calls "
                    f"({skipped[0]}): the picture is hardly a guided one. See `ledger`, or pass "
                    "strict=False"
                )

    def _call(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """One UNet call of the pipeline, guided."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "guidance needs gradients, which torch.inference_mode() forbids for good: use "
                "torch.no_grad()"
            )
        sample = args[0] if args else kwargs["sample"]  # [chunks * B, C, H, W]
        call = self._count(sample)
        rows = branch_rows(
            sample, self._settings.chunks or guidance_chunks(self._pipe), self._settings.branch
        )
        if len(self._prompts) not in (1, rows.stop - rows.start):
            raise ValueError(
                f"expected one attribution prompt or one an image ({rows.stop - rows.start}), got "
                f"{len(self._prompts)}"
            )
        if not self._active(call):
            return forward(*args, **kwargs)
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if self._settings.scale == 0.0:
            return self._measured(forward, args, kwargs, rows, call, timestep)
        return self._guided(forward, args, kwargs, rows, call, timestep)

    def _count(self, sample: torch.Tensor) -> int:
        """Index of this call in its run; a run begins with new timesteps."""
        timesteps = getattr(self._pipe.scheduler, "timesteps", None)
        if self._timesteps is None or timesteps is not self._timesteps:
            self._timesteps, self._calls = timesteps, 0
            self._running = {}
        self._calls += 1
        return self._calls - 1

    def _active(self, call: int) -> bool:
        planned = getattr(self._pipe, "_num_timesteps", None) or len(self._timesteps)
        progress = call / planned
        settings = self._settings
        return settings.start <= progress < settings.stop and call % settings.every == 0

    def _measured(
        self, forward: Any, args: Any, kwargs: Any, rows: slice, call: int, timestep: Any
    ) -> Any:
        """Energy without its gradient, from the pipeline's own forward pass."""
        with torch.no_grad():
            sample = args[0] if args else kwargs["sample"]
            with self._capturing(sample, rows) as capture:
                output = forward(*args, **kwargs)
            energy, overlaps = self._energy(capture)
        nothing = torch.full_like(energy, math.nan)
        self._note(call, timestep, overlaps, energy, nothing, torch.zeros_like(energy))
        return output

    def _guided(
        self, forward: Any, args: Any, kwargs: Any, rows: slice, call: int, timestep: Any
    ) -> Any:
        """The prediction with ``scale * sqrt(1 - abar) * dE/dz`` added to every chunk.

        The attributed chunk runs with gradients and on its own, the others without: the backward
        pass touches one chunk only.
        """
        sample = args[0] if args else kwargs["sample"]  # [chunks * B, C, H, W]
        batch, images = sample.shape[0], rows.stop - rows.start
        own = list(range(rows.start, rows.stop))
        others = [row for row in range(batch) if not rows.start <= row < rows.stop]

        latents = sample[rows].detach().clone().requires_grad_()  # [B, C, H, W]
        part_args, part_kwargs = _take((args, kwargs), own, batch)
        if args:
            part_args = (latents, *part_args[1:])
        else:
            part_kwargs = {**part_kwargs, "sample": latents}
        if self._engine is not None:
            output, energy, overlaps, gradient = self._by_engine(part_args, part_kwargs, own)
        else:
            with torch.enable_grad(), present_rows(own):
                with self._capturing(latents, slice(0, images)) as capture:
                    output = forward(*part_args, **part_kwargs)
                energy, overlaps = self._energy(capture)
                # Images do not meet in the UNet: the gradient of the sum is each image's own.
                (gradient,) = torch.autograd.grad(energy.sum(), latents)
        predicted = torch.empty_like(sample[:, : output[0].shape[1]], dtype=output[0].dtype)
        predicted[rows] = output[0].detach()
        if others:
            rest_args, rest_kwargs = _take((args, kwargs), others, batch)
            with torch.no_grad(), present_rows(others):
                predicted[others] = forward(*rest_args, **rest_kwargs)[0]

        alpha_bar = _alpha_bar(self._pipe.scheduler, timestep)
        delta, norm, factor = self._delta(gradient.float(), alpha_bar)
        self._note(call, timestep, overlaps.detach(), energy.detach(), norm, factor)
        chunks = batch // images
        predicted += delta.to(predicted.dtype).repeat(chunks, 1, 1, 1)
        if kwargs.get("return_dict", True) is False:
            return (predicted,)
        return type(output)(sample=predicted)

    def _by_engine(
        self, args: Any, kwargs: Any, own: list[int]
    ) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, energy ``[B]``, SoftIoU ``[B, P]`` and gradient ``[B, C, H, W]``, of the graph.

        One run a prompt: the gradient graph has room for one.
        """
        most = max(len(pairs) for pairs in self._pairs.values())
        outputs, energies, overlaps, gradients = [], [], [], []
        groups = self._groups(len(own))
        for prompt, images in groups.items():
            pairs, weights = self._pairs[prompt], self._weights[prompt]
            concepts = len(prompt.concepts)
            table = torch.zeros(concepts, concepts)
            table.index_put_((pairs[:, 0], pairs[:, 1]), weights, accumulate=True)
            part_args, part_kwargs = _take((args, kwargs), images, len(own))
            with present_rows([own[image] for image in images]):
                found = self._engine.energy_gradient(
                    part_args,
                    part_kwargs,
                    self._states[prompt],
                    table,
                    fraction=self._settings.fraction,
                    temperature=self._settings.temperature,
                )
            outputs.append(found.prediction)
            energies.append(found.energy)
            gradients.append(found.gradient)
            own_pairs = found.soft_iou[:, pairs[:, 0], pairs[:, 1]]  # [b, P]
            missing = most - own_pairs.shape[1]
            overlaps.append(torch.nn.functional.pad(own_pairs, (0, missing), value=math.nan))
        order = [image for images in groups.values() for image in images]
        back = torch.tensor(order, device=energies[0].device).argsort()
        joined = [torch.cat(each)[back] for each in (outputs, energies, overlaps, gradients)]
        return self._engine.output(joined[0]), joined[1], joined[2], joined[3]

    def _delta(
        self, gradient: torch.Tensor, alpha_bar: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What to add to the prediction ``[B, C, H, W]``, the gradient's norms, clip factors."""
        settings = self._settings
        norm = gradient.flatten(1).norm(dim=1)  # [B]
        if settings.clip is None:
            factor = torch.ones_like(norm)
        elif settings.clip == "skip":
            factor = (norm < 1.0).to(norm.dtype)
        else:
            factor = (settings.clip / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0)
        factor = torch.where(norm.isfinite(), factor, 0.0)
        if alpha_bar <= 0.0:
            factor = torch.zeros_like(factor)
        strength = settings.scale * math.sqrt(1.0 - alpha_bar)  # eps <- eps + this * gradient
        if self._pipe.scheduler.config.prediction_type == "v_prediction" and alpha_bar > 0.0:
            strength /= math.sqrt(alpha_bar)  # eps = sqrt(abar) v + sqrt(1 - abar) z
        steps = torch.where(factor > 0.0, strength * factor, 0.0)  # [B]
        usable = gradient.nan_to_num(0.0, 0.0, 0.0)
        return usable * steps[:, None, None, None], norm, factor

    def _note(
        self,
        call: int,
        timestep: Any,
        overlaps: torch.Tensor,
        energy: torch.Tensor,
        norm: torch.Tensor,
        factor: torch.Tensor,
    ) -> None:
        time = float(timestep.flatten()[0]) if torch.is_tensor(timestep) else float(timestep)
        alpha_bar = _alpha_bar(self._pipe.scheduler, time)
        self._entries.append(_Entry(call, time, alpha_bar, overlaps, energy, norm, factor))

    @contextmanager
    def _capturing(self, sample: torch.Tensor, rows: slice) -> Iterator[_Capture]:
        """Collects the queries of one forward pass; not of its recomputation in the backward."""
        groups = self._groups(rows.stop - rows.start)
        capture = _Capture(rows, resolutions(*sample.shape[-2:]), groups)
        if self._engine is not None:
            states = [self._states[prompt] for prompt in groups]
            handle = self._engine.register_attribution_hook(states, capture.add_parts)
            try:
                yield capture
            finally:
                handle.remove()
            return
        self._capture = capture
        try:
            yield capture
        finally:
            self._capture = None

    def _groups(self, images: int) -> dict[AttributionPrompt, list[int]]:
        """Every prompt and the images that it belongs to."""
        prompts = self._prompts if len(self._prompts) > 1 else self._prompts * images
        groups: dict[AttributionPrompt, list[int]] = {}
        for image, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(image)
        return groups

    def _query_hook(self, layer: CrossAttention) -> Any:
        def hook(module: torch.nn.Module, args: Any, query: torch.Tensor) -> None:
            if self._capture is not None:
                self._capture.add(layer, query)

        return torch.compiler.disable(hook)  # type: ignore[no-untyped-call]

    def _energy(self, capture: _Capture) -> tuple[torch.Tensor, torch.Tensor]:
        """Energy ``[B]`` and SoftIoU of every pair ``[B, P]``, float32."""
        settings = self._settings
        running = self._running if settings.accumulate else None
        most = max(len(pairs) for pairs in self._pairs.values())
        energies: list[torch.Tensor] = []
        overlaps: list[torch.Tensor] = []
        for prompt, maps in zip(capture.groups, capture.maps(self._keys, running), strict=True):
            pairs, weights = self._pairs[prompt], self._weights[prompt].to(maps.device)
            found = soft_iou(maps.flatten(2), pairs, settings.fraction, settings.temperature)
            energies.append(found @ weights.to(found.dtype))  # [b]
            missing = most - found.shape[1]
            overlaps.append(torch.nn.functional.pad(found, (0, missing), value=math.nan))
        order = [image for group in capture.groups.values() for image in group]
        back = torch.tensor(order, device=energies[0].device).argsort()
        return torch.cat(energies)[back], torch.cat(overlaps)[back]


class _Capture:
    """The queries of one UNet call, and for each prompt the images that it belongs to.

    Maps are computed when the call is over: under activation checkpointing a hook that computes
    inside the checkpointed part would have to do so again, uncounted, when that is recomputed.
    """

    def __init__(
        self,
        rows: slice,
        sizes: dict[int, tuple[int, int]],
        groups: dict[AttributionPrompt, list[int]],
    ) -> None:
        self.groups = groups
        self._rows = rows
        self._sizes = sizes
        self._queries: dict[str, tuple[CrossAttention, torch.Tensor]] = {}
        self._given: list[dict[tuple[int, int], torch.Tensor]] = []  # an engine's sums a prompt

    def add(self, layer: CrossAttention, query: torch.Tensor) -> None:
        """Keeps one layer's queries ``[rows, n, heads * d]``."""
        self._queries.setdefault(layer.name, (layer, query[self._rows]))

    def add_parts(self, found: Mapping[Any, Sequence[torch.Tensor]]) -> None:
        """Keeps an engine's maps: part -> for every prompt ``[rows, K, h, w]``."""
        self._given = [{} for _ in self.groups]
        for by_prompt in found.values():
            for sums, maps, images in zip(
                self._given, by_prompt, self.groups.values(), strict=True
            ):
                size = (maps.shape[-2], maps.shape[-1])
                own = maps[self._rows][images]
                sums[size] = sums[size] + own if size in sums else own

    def maps(
        self,
        keys: Mapping[AttributionPrompt, AttributionKeys],
        running: _Running | None,
    ) -> list[torch.Tensor]:
        """One ``[b, K, H, W]`` a prompt: summed over heads and layers, at the largest resolution.

        Args:
            keys: every prompt's attribution keys.
            running: earlier calls' sums, to be added as constants and brought up to date.
        """
        found = []
        for index, (prompt, images) in enumerate(self.groups.items()):
            sums = self._given[index] if self._given else self._sums(keys[prompt], images)
            if running is not None:
                earlier = running.get(prompt, {})
                sums = {size: maps + earlier.get(size, 0.0) for size, maps in sums.items()}
                running[prompt] = {size: maps.detach() for size, maps in sums.items()}
            largest = max(sums)
            found.append(torch.stack([resize(maps, largest) for maps in sums.values()]).sum(0))
        return found

    def _sums(
        self, keys: AttributionKeys, images: list[int]
    ) -> dict[tuple[int, int], torch.Tensor]:
        sums: dict[tuple[int, int], torch.Tensor] = {}
        for layer, query in self._queries.values():
            size = layer.resolution(query, self._sizes)
            rows = layer.split_heads(query)[images]  # [b, heads, n, d]
            maps = concept_map(rows, keys.by_layer[layer.name], keys.weights)  # [b, K, n]
            maps = maps.view(*maps.shape[:2], *size)
            sums[size] = sums[size] + maps if size in sums else maps
        return sums


def _energy_hook(guidance: Guidance) -> Any:
    from diffusers.hooks import ModelHook

    class EnergyHook(ModelHook):  # type: ignore[misc]
        """Hands every UNet call to the guidance."""

        def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            return guidance._call(self.fn_ref.original_forward, *args, **kwargs)

    return EnergyHook()


def _pair_indices(
    prompt: AttributionPrompt, pairs: Sequence[tuple[str, str]] | None
) -> torch.Tensor:
    """Indices ``[P, 2]`` of the pairs among the prompt's concepts."""
    if pairs is None:
        pairs = list(combinations(prompt.concepts, 2))
    if not pairs:
        raise ValueError(f"guidance needs a pair of concepts, got {list(prompt.concepts)} alone")
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1]:
            raise ValueError(f"a pair must be two different concepts, got {pair!r}")
        for concept in pair:
            if concept not in prompt.concepts:
                raise ValueError(
                    f"the pair {pair!r} names {concept!r}, which is no concept of "
                    f"{prompt.text!r}; there are {list(prompt.concepts)}"
                )
    return torch.tensor([[prompt.concepts.index(concept) for concept in pair] for pair in pairs])


def _pair_weights(weights: Sequence[float] | None, count: int) -> torch.Tensor:
    if weights is None:
        return torch.full((count,), 1.0 / count)
    if len(weights) != count or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"`weights` must be {count} finite numbers, one a pair, got {weights}")
    return torch.tensor([float(weight) for weight in weights])


def _check_engine(engine: Any, layers: Sequence[str] | None, settings: Settings) -> None:
    if engine.attribution_parts(layers, "total") != engine.attribution_parts(None, "total"):
        raise ValueError(
            "the layers of an engine's energy are fixed; leave `layers` out, or export with it"
        )
    if settings.accumulate:
        raise ValueError("accumulate=True needs the torch UNet: engines know one call's energy")


def _check_scheduler(scheduler: Any) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    if not hasattr(scheduler, "alphas_cumprod") or getattr(config, "use_flow_sigmas", False):
        raise ValueError(
            f"cannot guide with {name}: it has no variance-preserving noise schedule "
            "(alphas_cumprod); flow matching and EDM are not supported"
        )
    prediction = config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"cannot guide the prediction type {prediction!r} of {name}; expected 'epsilon' or "
            "'v_prediction'"
        )


def _alpha_bar(scheduler: Any, timestep: Any) -> float:
    """The schedule's cumulative alpha at a timestep; between two, sigma is interpolated."""
    time = float(timestep.flatten()[0]) if torch.is_tensor(timestep) else float(timestep)
    table = scheduler.alphas_cumprod
    below = min(max(math.floor(time), 0), len(table) - 1)
    above = min(below + 1, len(table) - 1)
    first, second = float(table[below]), float(table[above])
    share = time - below
    if share <= 0.0 or second <= 0.0:
        return first
    sigma = (1 - share) * math.sqrt(1 / first - 1) + share * math.sqrt(1 / second - 1)
    return 1.0 / (1.0 + sigma**2)


def _take(value: Any, rows: list[int], batch: int) -> Any:
    """The rows of everything in a UNet call's arguments that has the batch as first dimension."""
    if torch.is_tensor(value):
        return value[rows] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, Mapping):
        return {name: _take(item, rows, batch) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take(item, rows, batch) for item in value)
    return value
