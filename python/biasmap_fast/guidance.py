"""Energy guidance: sampling steered away from the overlap of two concepts.

``E = mean over pairs of SoftIoU(M_a, M_b)`` of the current UNet call's maps, and
``eps <- eps + scale * sqrt(1 - abar_t) * dE/dz_t`` before the scheduler's own step (BiasMap,
arXiv 2509.13496). The same delta on every chunk of the guidance batch adds exactly that delta to
the guided prediction, u + d + g ((t + d) - (u + d)) = u + g (t - u) + d, so one hook on the UNet is
enough, and any pipeline can be guided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch

from .attribution import (
    AttributionCache,
    AttributionKeys,
    Branch,
    cached_keys,
    cached_states,
    layers_of,
    placement_of,
    tokens_of,
)
from .concepts import AttributionPrompt
from .denoiser import probing
from .energy import (
    Capture,
    GivenMaps,
    Pair,
    Prompts,
    Sums,
    Target,
    in_batch_order,
    make_targets,
    total_maps,
)
from .ledger import Entry, LedgerRow, check_skipped, write_csv
from .ops import pairs_iou, soft_iou
from .overlap import check_soft, pairs_soft_containment, two_values
from .unet import (
    CrossAttention,
    batch_layout,
    branch_rows,
    check_text,
    engine_of,
    guider_of,
    is_perturbed,
    present_rows,
    resolutions,
)

_HOOK = "biasmap_fast.guidance"

_F = TypeVar("_F", bound=Callable[..., Any])


# A compiled UNet calls the hook from inside: its forward passes are to be compiled, and what is
# done around them is not.
def _not_compiled(function: _F) -> _F:
    return torch.compiler.disable(function)  # type: ignore[no-untyped-call, no-any-return]


def _around_forward(function: _F) -> _F:
    return torch.compiler.disable(function, recursive=False)  # type: ignore[no-untyped-call, no-any-return]


def guide(
    pipe: Any,
    prompt: AttributionPrompt | Sequence[Prompts],
    *,
    pairs: Sequence[Pair] | Sequence[Sequence[Pair]] | None = None,
    weights: Sequence[float] | None = None,
    scale: float = 100.0,
    fraction: float = 0.3,
    temperature: float = 0.01,
    clip: float | Literal["skip"] | None = 1.0,
    start: float = 0.0,
    stop: float = 1.0,
    every: int = 1,
    inner_steps: int = 1,
    accumulate: bool = False,
    branch: Branch = "cond",
    layers: Sequence[str] | None = None,
    chunks: int | None = None,
    strict: bool = True,
    containment: tuple[float, float] | None = None,
    cache: AttributionCache | None = None,
) -> Guidance:
    """Guides every picture drawn inside a ``with`` block towards less overlap of concept pairs.

    Args:
        pipe: any diffusers pipeline with a UNet and CLIP text encoders.
        prompt: the attribution prompt, or one for each image of the batch, in batch order. An
            image may also have several prompts, as a sequence: ``[(first, second)]``.
        pairs: pairs of concepts, or a list of them for each image; default every pair inside a
            prompt, or, where each prompt has a single concept, every pair of them.
        weights: one weight a pair; default their mean.
        scale: strength of the energy; not the classifier-free ``guidance_scale``.
        fraction: share of the pixels in a soft mask.
        temperature: width of a soft mask's edge, in units of the map's range.
        clip: largest L2 norm of an image's gradient: larger ones are rescaled to it. ``"skip"``
            drops a gradient of norm >= 1, as the published code does; None leaves all as they are.
        start: fraction of the sampling steps before which nothing is added.
        stop: fraction of the sampling steps from which on nothing is added.
        every: guide every n-th UNet call only.
        inner_steps: take the gradient this many times a call, each time at the latents that the
            parts so far amount to, ``z - sqrt(1 - abar_t) delta``, and with the scale shared out: a
            descent in smaller steps, at so many times the cost.
        accumulate: energy of the sum of all maps so far instead of the current call's alone.
        branch: whose queries make the maps, ``"cond"`` or ``"uncond"``.
        layers: as in `attribute`. Fewer layers make the backward pass cheaper, and are another
            energy.
        chunks: as in `attribute`.
        strict: raise at the end if more than half of an image's guided calls had to be skipped.
        containment: shares of the pixels in the masks of a pair's first and second concept,
            ``(0.05, 0.1)`` say: the energy is then `soft_containment` with these instead of
            SoftIoU, which the ledger still reports with ``fraction``. Give the profession first.
        cache: as in `attribute`.

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
            inner_steps=inner_steps,
            accumulate=accumulate,
            branch=branch,
            chunks=chunks,
            strict=strict,
            containment=containment,
        ),
        layers=layers,
        cache=cache,
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
    inner_steps: int
    accumulate: bool
    branch: Branch
    chunks: int | None
    strict: bool
    containment: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_soft(self.fraction, self.temperature)
        for fraction in two_values("containment", self.containment) if self.containment else ():
            check_soft(fraction, self.temperature)
        if not math.isfinite(self.scale):
            raise ValueError(f"`scale` must be finite, got {self.scale}")
        if not 0.0 <= self.start < self.stop <= 1.0:
            raise ValueError(
                "`start` and `stop` must be fractions 0 <= start < stop <= 1, got "
                f"{self.start} and {self.stop}"
            )
        for name in ("every", "inner_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if isinstance(self.clip, str) and self.clip != "skip":
            raise ValueError(f"`clip` must be a norm, 'skip' or None, got {self.clip!r}")
        if isinstance(self.clip, (int, float)) and not self.clip > 0:
            raise ValueError(f"`clip` must be positive, got {self.clip}")
        if self.branch not in ("cond", "uncond"):
            raise ValueError(f"`branch` must be 'cond' or 'uncond', got {self.branch!r}")


class Guidance:
    """Steers sampling between ``__enter__`` and ``__exit__``; made by `guide`."""

    def __init__(
        self,
        pipe: Any,
        prompt: AttributionPrompt | Sequence[Prompts],
        *,
        pairs: Sequence[Pair] | Sequence[Sequence[Pair]] | None,
        weights: Sequence[float] | None,
        settings: Settings,
        layers: Sequence[str] | None,
        cache: AttributionCache | None = None,
    ) -> None:
        self._pipe = pipe
        self._cache = cache
        self._settings = settings
        self._engine = engine_of(pipe)
        self._layers: list[CrossAttention] = []
        if self._engine is None:
            self._layers = layers_of(cache, pipe, layers)
        else:
            _check_engine(self._engine, layers, settings)
        self._targets = make_targets(prompt, pairs, weights)
        self._tokenized = {
            each: tokens_of(cache, each, pipe)
            for target in self._targets
            for each in target.prompts
        }
        self._entries: list[Entry] = []
        self._keys: dict[AttributionPrompt, AttributionKeys] = {}
        # of an engine: prompt -> hidden states [T', D], weights [K, T']
        self._states: dict[AttributionPrompt, tuple[torch.Tensor, torch.Tensor]] = {}
        self._weights: dict[Target, torch.Tensor] = {}  # [P], on the UNet's device
        self._handles: list[Any] = []
        self._frozen: list[torch.nn.Parameter] = []
        self._timesteps: Any = None
        self._calls = 0
        self._earlier: dict[Target, Sums] = {}  # of this run, where `accumulate`
        self._capture: Capture | None = None
        self._delta: torch.Tensor | None = None  # [B, C, H, W] added to the latest prediction

    def __enter__(self) -> Self:
        from diffusers.hooks import HookRegistry

        unet = self._pipe.unet
        registry = HookRegistry.check_if_exists_or_initialize(unet)
        if registry.get_hook(_HOOK) is not None:
            raise ValueError("this UNet is already guided; leave the other `with` block first")
        _check_scheduler(self._pipe.scheduler)
        if guider_of(self._pipe) is not None and self._settings.branch == "uncond":
            raise ValueError(
                "branch='uncond' cannot guide a modular pipeline: its guider has the conditional "
                "prediction before the unconditional branch is run"
            )
        self._entries, self._timesteps, self._calls = [], None, 0
        concept_weights, placement = {}, placement_of(self._cache, self._pipe)
        for prompt, tokens in self._tokenized.items():
            if self._engine is None:
                self._keys[prompt] = cached_keys(
                    self._cache, self._pipe, self._layers, tokens, placement
                )
                concept_weights[prompt] = self._keys[prompt].weights
            else:
                self._states[prompt] = cached_states(self._cache, self._pipe, tokens, placement)
                concept_weights[prompt] = self._states[prompt][1]
        # Moved once: a list that goes to the GPU in every call waits for it.
        self._weights = {
            target: concept_weights[target.prompts[0]].new_tensor(target.weights)
            for target in self._targets
        }
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
        self._earlier.clear()
        self._timesteps = None
        if kind is None and self._settings.strict:
            if self._calls and not self._entries:
                raise RuntimeError(
                    f"none of {self._calls} UNet calls was guided: no call lies between "
                    f"start={self._settings.start:g} and stop={self._settings.stop:g} of the run. "
                    "Widen them, or pass strict=False"
                )
            check_skipped(self.ledger)

    @property
    def ledger(self) -> list[LedgerRow]:
        """One row a guided UNet call and image, in that order."""
        scaled = self._settings.scale != 0.0
        return [row for entry in self._entries for row in entry.rows(scaled=scaled)]

    def save_ledger(self, path: str | Path) -> None:
        """Writes the ledger as CSV, whole or not at all."""
        write_csv(self.ledger, path)

    @_around_forward
    def _call(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """One UNet call of the pipeline, guided."""
        if probing.get():
            return forward(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "guidance needs gradients, which torch.inference_mode() forbids for good: use "
                "torch.no_grad()"
            )
        guider = guider_of(self._pipe)
        if guider is not None and not guider.is_conditional:
            return self._shifted(forward(*args, **kwargs))
        self._delta = None
        call, rows = self._count(), self._rows(args[0] if args else kwargs["sample"], kwargs)
        if not self._active(call):
            return forward(*args, **kwargs)
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if self._settings.scale == 0.0:
            return self._measured(forward, args, kwargs, rows, call, timestep)
        return self._guided(forward, args, kwargs, rows, call, timestep)

    @_not_compiled
    def _rows(self, sample: torch.Tensor, kwargs: Mapping[str, Any]) -> slice:
        """The attributed branch's rows of the latents ``[chunks * B, C, H, W]``."""
        check_text(self._pipe, kwargs)
        if is_perturbed(self._pipe):
            raise ValueError(
                f"{type(self._pipe).__name__} draws with perturbed-attention guidance, whose "
                "chunks cannot run apart as guidance needs them to: set pag_scale=0"
            )
        layout = batch_layout(self._pipe, self._settings.chunks)
        latents = sample[:, : self._pipe.unet.config.out_channels]
        rows = branch_rows(latents, layout, self._settings.branch)
        if len(self._targets) not in (1, rows.stop - rows.start):
            raise ValueError(
                f"expected one attribution prompt or one an image ({rows.stop - rows.start}), got "
                f"{len(self._targets)}"
            )
        return rows

    @_not_compiled
    def _count(self) -> int:
        """Index of this call in its run; a run begins with new timesteps."""
        timesteps = getattr(self._pipe.scheduler, "timesteps", None)
        if self._timesteps is None or timesteps is not self._timesteps:
            self._timesteps, self._calls = timesteps, 0
            self._earlier = {}
        self._calls += 1
        return self._calls - 1

    @_not_compiled
    def _active(self, call: int) -> bool:
        planned = getattr(self._pipe, "_num_timesteps", None) or len(self._timesteps)
        progress = call / planned
        settings = self._settings
        return settings.start <= progress < settings.stop and call % settings.every == 0

    @_around_forward
    def _measured(
        self, forward: Any, args: Any, kwargs: Any, rows: slice, call: int, timestep: Any
    ) -> Any:
        """Energy without its gradient, from the pipeline's own forward pass."""
        with torch.no_grad():
            sample = args[0] if args else kwargs["sample"]
            with self._capturing(sample, rows) as capture:
                output = forward(*args, **kwargs)
            energy = self._energy(capture)
        self._remember(energy)
        nothing = torch.full_like(energy.total, math.nan)
        self._note(call, timestep, energy, nothing, torch.zeros_like(nothing))
        return output

    @_around_forward
    def _guided(
        self, forward: Any, args: Any, kwargs: Any, rows: slice, call: int, timestep: Any
    ) -> Any:
        """The prediction with ``scale * sqrt(1 - abar) * dE/dz`` added to every chunk.

        The attributed chunk runs with gradients and on its own, the others without: the backward
        pass touches one chunk only.
        """
        sample = args[0] if args else kwargs["sample"]  # [chunks * B, C, H, W]
        batch = sample.shape[0]
        own = list(range(rows.start, rows.stop))
        others = [row for row in range(batch) if not rows.start <= row < rows.stop]
        alpha_bar = _alpha_bar(self._pipe.scheduler, timestep)
        precision = torch.promote_types(sample.dtype, torch.float32)
        # Without the channels that a UNet of inpainting or editing is given beside the latents.
        channels = min(sample.shape[1], self._pipe.unet.config.out_channels)
        moved = sample[rows, :channels].detach().to(precision)  # [B, C, H, W]
        delta = torch.zeros_like(moved)  # of epsilon
        norms, factors = [], []
        for inner in range(self._settings.inner_steps):
            latents = moved.to(sample.dtype).requires_grad_()
            # Anew: the UNet takes a T2I adapter's features out of their list.
            own_args, own_kwargs = _take((args, kwargs), own, batch)
            found, energy, gradient = self._gradient(forward, own_args, own_kwargs, latents, own)
            step, norm, factor = self._step(gradient.to(precision), alpha_bar)
            delta += step
            moved = moved - math.sqrt(1.0 - alpha_bar) * step
            norms.append(norm)
            factors.append(factor)
            if inner == 0:
                output, first = found, energy
        self._remember(first)
        factor = torch.stack(factors).amin(0)
        self._note(call, timestep, first, torch.stack(norms).amax(0), factor)
        # an image with a skipped inner step is skipped whole
        delta = torch.where(factor[:, None, None, None] > 0.0, delta, 0.0)

        predicted = torch.empty_like(sample[:, : output[0].shape[1]], dtype=output[0].dtype)
        predicted[rows] = output[0].detach()
        if others:
            rest_args, rest_kwargs = _take((args, kwargs), others, batch)
            with torch.no_grad(), present_rows(others):
                predicted[others] = forward(*rest_args, **rest_kwargs)[0]
        if self._pipe.scheduler.config.prediction_type == "v_prediction" and alpha_bar > 0.0:
            delta = delta / math.sqrt(alpha_bar)  # eps = sqrt(abar) v + sqrt(1 - abar) z
        self._delta = delta.to(predicted.dtype)
        as_tuple = kwargs.get("return_dict", True) is False
        return self._shifted((predicted,) if as_tuple else type(output)(sample=predicted))

    @_not_compiled
    def _shifted(self, output: Any) -> Any:
        """A UNet's output with what this step adds to every chunk's prediction."""
        if self._delta is None:
            return output
        delta = self._delta.repeat(len(output[0]) // len(self._delta), 1, 1, 1)
        if isinstance(output, tuple):
            return (output[0] + delta, *output[1:])
        return type(output)(sample=output[0] + delta)

    @_around_forward
    def _gradient(
        self,
        forward: Any,
        args: Any,
        kwargs: Any,
        latents: torch.Tensor,
        own: list[int],
    ) -> tuple[Any, _Energy, torch.Tensor]:
        """The attributed chunk's output, its energy, and dE/dz ``[B, C, H, W]``."""
        given = args[0] if args else kwargs["sample"]
        whole = latents
        if latents.shape[1] < given.shape[1]:
            with torch.enable_grad():
                whole = torch.cat((latents, given[:, latents.shape[1] :]), dim=1)
        if args:
            args = (whole, *args[1:])
        else:
            kwargs = {**kwargs, "sample": whole}
        if self._engine is not None:
            output, energy, gradient = self._by_engine(args, kwargs, own)
            return output, energy, gradient[:, : latents.shape[1]]
        with torch.enable_grad(), present_rows(own):
            with self._capturing(latents, slice(0, len(own))) as capture:
                output = forward(*args, **kwargs)
            energy = self._energy(capture)
            gradient = _differentiate(energy.total, latents)
        return output, energy, gradient

    def _by_engine(
        self, args: Any, kwargs: Any, own: list[int]
    ) -> tuple[Any, _Energy, torch.Tensor]:
        """As `_gradient`, by the engine's graph of it: a run a target."""
        given = GivenMaps(slice(0, len(own)), self._groups(len(own)))
        predictions, gradients = [], []
        for target, images in given.groups.items():
            part_args, part_kwargs = _take((args, kwargs), images, len(own))
            with present_rows([own[image] for image in images]):
                found = self._engine.energy_gradient(
                    part_args,
                    part_kwargs,
                    [self._states[prompt] for prompt in target.prompts],
                    target.indices,
                    target.weights,
                    fraction=self._settings.fraction,
                    temperature=self._settings.temperature,
                )
            given.put(target, found.maps)
            predictions.append(found.prediction)
            gradients.append(found.gradient)
        output = self._engine.output(in_batch_order(given.groups, predictions))
        return output, self._energy(given), in_batch_order(given.groups, gradients)

    @_not_compiled
    def _step(
        self, gradient: torch.Tensor, alpha_bar: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What one gradient adds to epsilon ``[B, C, H, W]``, the norms, the clip factors."""
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
        strength = settings.scale * math.sqrt(1.0 - alpha_bar) / settings.inner_steps
        usable = gradient.nan_to_num(0.0, 0.0, 0.0)
        return usable * (strength * factor)[:, None, None, None], norm, factor

    @_not_compiled
    def _note(
        self,
        call: int,
        timestep: Any,
        energy: _Energy,
        norm: torch.Tensor,
        factor: torch.Tensor,
    ) -> None:
        time = float(timestep.flatten()[0]) if torch.is_tensor(timestep) else float(timestep)
        self._entries.append(
            Entry(
                call=call,
                timestep=time,
                alpha_bar=_alpha_bar(self._pipe.scheduler, time),
                pairs=energy.pairs,
                soft_iou=energy.soft_iou.detach(),
                iou=energy.iou,
                energy=energy.total.detach(),
                norm=norm,
                factor=factor,
            )
        )

    def _remember(self, energy: _Energy) -> None:
        if self._settings.accumulate:
            self._earlier.update(energy.sums)

    @contextmanager
    def _capturing(self, sample: torch.Tensor, rows: slice) -> Iterator[Capture | GivenMaps]:
        """Collects the queries of one forward pass; not of its recomputation in the backward."""
        groups = self._groups(rows.stop - rows.start)
        if self._engine is not None:
            given = GivenMaps(rows, groups)
            prompts = [self._states[prompt] for prompt in given.prompts]
            handle = self._engine.register_attribution_hook(prompts, given.add)
            try:
                yield given
            finally:
                handle.remove()
            return
        self._capture = Capture(rows, resolutions(*sample.shape[-2:]), groups)
        try:
            yield self._capture
        finally:
            self._capture = None

    def _groups(self, images: int) -> dict[Target, list[int]]:
        """Every target and the images that it belongs to."""
        targets = self._targets if len(self._targets) > 1 else self._targets * images
        groups: dict[Target, list[int]] = {}
        for image, target in enumerate(targets):
            groups.setdefault(target, []).append(image)
        return groups

    def _query_hook(self, layer: CrossAttention) -> Any:
        def hook(module: torch.nn.Module, args: Any, query: torch.Tensor) -> None:
            if self._capture is not None:
                self._capture.add(layer, query)

        return torch.compiler.disable(hook)  # type: ignore[no-untyped-call]

    @_not_compiled
    def _energy(self, capture: Capture | GivenMaps) -> _Energy:
        """The energy of one UNet call's maps, and of the maps before them where `accumulate`."""
        settings = self._settings
        groups = capture.groups
        most = max(len(target.pairs) for target in groups)
        totals: list[torch.Tensor] = []
        soft: list[torch.Tensor] = []
        hard: list[torch.Tensor] = []
        sums: dict[Target, Sums] = {}
        for target in groups:
            earlier = self._earlier.get(target, {})
            own = capture.sums(target, self._keys)
            own = {size: maps + earlier.get(size, 0.0) for size, maps in own.items()}
            sums[target] = {size: maps.detach() for size, maps in own.items()}
            maps = total_maps(own)  # [b, K, N]
            pairs = torch.tensor(target.indices)  # [P, 2]
            found = soft_iou(maps, pairs, settings.fraction, settings.temperature)  # [b, P]
            of = found
            if settings.containment:
                of = pairs_soft_containment(maps, pairs, settings.containment, settings.temperature)
            totals.append(of @ self._weights[target].to(of.dtype))
            percentile = 100.0 * (1.0 - settings.fraction)
            for values, kept in ((found, soft), (pairs_iou(maps, pairs, percentile).iou, hard)):
                padding = (0, most - len(target.pairs))
                kept.append(torch.nn.functional.pad(values, padding, value=math.nan))
        names = {image: target.pairs for target, images in groups.items() for image in images}
        return _Energy(
            total=in_batch_order(groups, totals),
            soft_iou=in_batch_order(groups, soft),
            iou=in_batch_order(groups, hard),
            pairs=tuple(names[image] for image in sorted(names)),
            sums=sums,
        )


@_not_compiled
def _differentiate(energy: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    # Images do not meet in the UNet: the gradient of the sum is each image's own.
    (gradient,) = torch.autograd.grad(energy.sum(), latents)
    return gradient


@dataclass(frozen=True)
class _Energy:
    """The energy of one UNet call, and what it is made of."""

    total: torch.Tensor  # [B], with its graph
    soft_iou: torch.Tensor  # [B, P]
    iou: torch.Tensor  # [B, P]
    pairs: tuple[tuple[Pair, ...], ...]  # an entry an image
    sums: dict[Target, Sums]  # without their graph


def _energy_hook(guidance: Guidance) -> Any:
    from diffusers.hooks import ModelHook

    class EnergyHook(ModelHook):  # type: ignore[misc]
        """Hands every UNet call to the guidance."""

        @_around_forward
        def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            return guidance._call(self.fn_ref.original_forward, *args, **kwargs)

    return EnergyHook()


def _check_engine(engine: Any, layers: Sequence[str] | None, settings: Settings) -> None:
    if engine.attribution_parts(layers, ("total",)) != engine.attribution_parts(None, ("total",)):
        raise ValueError(
            "the layers of an engine's energy are fixed; leave `layers` out, or export with it"
        )
    if settings.containment:
        raise ValueError("containment= needs the torch UNet: an engine's graph has SoftIoU only")
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


@_not_compiled
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


@_not_compiled
def _take(value: Any, rows: list[int], batch: int) -> Any:
    """The rows of everything in a UNet call's arguments that has the batch as first dimension."""
    if torch.is_tensor(value):
        return value[rows] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, Mapping):
        return {name: _take(item, rows, batch) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take(item, rows, batch) for item in value)
    return value
