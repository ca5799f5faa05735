"""Energy guidance: sampling steered away from the overlap of two concepts.

``E = mean over pairs of SoftIoU(M_a, M_b)`` of the current UNet call's maps, and
``eps <- eps + scale * sqrt(1 - abar_t) * dE/dz_t`` before the scheduler's own step (BiasMap,
arXiv 2509.13496). The same delta on every chunk of the guidance batch adds exactly that delta to
the guided prediction, u + d + g ((t + d) - (u + d)) = u + g (t - u) + d, so one hook on the UNet is
enough, and any pipeline can be guided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from .attribution import Branch
from .denoiser import probing
from .energy import Energy, GuidedPrompts, make_targets
from .evaluators import CallEnergy, around_forward, evaluator_of, not_compiled, take_rows
from .ledger import Entry, LedgerRow, check_skipped, write_csv
from .sources import AttributionCache
from .unet import batch_layout, branch_rows, check_text, guider_of, is_perturbed, present_rows

_HOOK = "biasmap_fast.guidance"


def guide(
    pipe: Any,
    prompts: GuidedPrompts,
    energy: Energy | None = None,
    *,
    branch: Branch = "cond",
    chunks: int | None = None,
    strict: bool = True,
    cache: AttributionCache | None = None,
) -> Guidance:
    """Guides every picture drawn inside a ``with`` block towards less overlap of concept pairs.

    Args:
        pipe: Any diffusers pipeline with a UNet and CLIP text encoders.
        prompts: The attribution prompt, or one per image of the batch, in batch order. An image
            may also have several prompts, as a sequence: ``[(first, second)]``.
        energy: Which pairs are kept apart, how strongly, and when; `Energy` with its defaults if
            not given.
        branch: The branch whose queries make the maps, ``"cond"`` or ``"uncond"``.
        chunks: As in `attribute`.
        strict: Raise at the end if more than half of an image's guided calls had to be skipped.
        cache: As in `attribute`.

    Returns:
        A context manager whose `Guidance.ledger` tells, also after the block, what was done.

    Raises:
        TypeError: ``pipe`` has no UNet or no CLIP text encoder.
        ValueError: An unknown concept, layer or branch; a prediction type other than epsilon and
            v_prediction; a flow-matching scheduler; a UNet that is already guided.

    Example:
        >>> import biasmap_fast as bm
        >>> pipe = bm.testbed.pipeline()
        >>> prompt = bm.AttributionPrompt("a photo of a doctor and woman", ("doctor", "woman"))
        >>> with bm.guide(pipe, prompt, bm.Energy(scale=50.0)) as guidance:
        ...     images = pipe("a photo of a doctor", num_inference_steps=2).images
        >>> [row.applied for row in guidance.ledger]
        [True, True]
    """
    return Guidance(
        pipe, prompts, energy or Energy(), branch=branch, chunks=chunks, strict=strict, cache=cache
    )


class Guidance:
    """Steers sampling between ``__enter__`` and ``__exit__``; made by `guide`."""

    def __init__(
        self,
        pipe: Any,
        prompts: GuidedPrompts,
        energy: Energy,
        *,
        branch: Branch,
        chunks: int | None,
        strict: bool,
        cache: AttributionCache | None,
    ) -> None:
        if branch not in ("cond", "uncond"):
            raise ValueError(f"`branch` must be 'cond' or 'uncond', got {branch!r}")
        self._pipe = pipe
        self._energy = energy
        self._branch, self._chunks, self._strict = branch, chunks, strict
        # A cache of its own is emptied after each block: the model may change until the next.
        self._private = cache is None
        self._cache = AttributionCache() if cache is None else cache
        self._targets = make_targets(prompts, energy)
        self._evaluator = evaluator_of(pipe, self._cache, self._targets, energy)
        self._entries: list[Entry] = []
        self._handles: list[Any] = []
        self._frozen: list[torch.nn.Parameter] = []
        self._timesteps: Any = None
        self._calls = 0
        self._delta: torch.Tensor | None = None  # [B, C, H, W] added to the latest prediction

    def __enter__(self) -> Self:
        from diffusers.hooks import HookRegistry

        unet = self._pipe.unet
        registry = HookRegistry.check_if_exists_or_initialize(unet)
        if registry.get_hook(_HOOK) is not None:
            raise ValueError("this UNet is already guided; leave the other `with` block first")
        _check_scheduler(self._pipe.scheduler)
        if guider_of(self._pipe) is not None and self._branch == "uncond":
            raise ValueError(
                "branch='uncond' cannot guide a modular pipeline: its guider has the conditional "
                "prediction before the unconditional branch is run"
            )
        self._entries, self._timesteps, self._calls = [], None, 0
        self._handles = self._evaluator.attach()
        registry.register_hook(_energy_hook(self), _HOOK)
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
        self._evaluator.detach()
        if self._private:
            self._cache.clear()
        self._timesteps = None
        if kind is None and self._strict:
            if self._calls and not self._entries:
                raise RuntimeError(
                    f"none of {self._calls} UNet calls was guided: no call lies between "
                    f"start={self._energy.start:g} and stop={self._energy.stop:g} of the run. "
                    "Widen them, or pass strict=False"
                )
            check_skipped(self.ledger)

    @property
    def ledger(self) -> list[LedgerRow]:
        """One row per guided UNet call and image, in that order."""
        scaled = self._energy.scale != 0.0
        return [row for entry in self._entries for row in entry.rows(scaled=scaled)]

    def save_ledger(self, path: str | Path) -> None:
        """Writes the ledger as CSV, complete or not at all."""
        write_csv(self.ledger, path)

    @around_forward
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
        if self._energy.scale > 0.0:
            return self._guided(forward, args, kwargs, rows, call, timestep)
        output, energy = self._evaluator.measure(forward, args, kwargs, rows)
        self._evaluator.remember(energy)
        nothing = torch.full_like(energy.total, math.nan)
        self._note(call, timestep, energy, nothing, torch.zeros_like(nothing))
        return output

    @not_compiled
    def _rows(self, sample: torch.Tensor, kwargs: Mapping[str, Any]) -> slice:
        """The attributed branch's rows of the latents ``[chunks * B, C, H, W]``."""
        check_text(self._pipe, kwargs)
        if is_perturbed(self._pipe):
            raise ValueError(
                f"{type(self._pipe).__name__} draws with perturbed-attention guidance, whose "
                "chunks cannot run apart as guidance needs them to: set pag_scale=0"
            )
        layout = batch_layout(self._pipe, self._chunks)
        rows = branch_rows(sample[:, : self._pipe.unet.config.out_channels], layout, self._branch)
        images = rows.stop - rows.start
        if len(self._targets) not in (1, images):
            raise ValueError(
                f"expected one attribution prompt or one per image ({images}), got "
                f"{len(self._targets)}"
            )
        return rows

    @not_compiled
    def _count(self) -> int:
        """Index of this call in its run; a run begins with new timesteps."""
        timesteps = getattr(self._pipe.scheduler, "timesteps", None)
        if self._timesteps is None or timesteps is not self._timesteps:
            self._timesteps, self._calls = timesteps, 0
            self._evaluator.begin_run()
        self._calls += 1
        return self._calls - 1

    @not_compiled
    def _active(self, call: int) -> bool:
        planned = getattr(self._pipe, "_num_timesteps", None) or len(self._timesteps)
        in_window = self._energy.start <= call / planned < self._energy.stop
        return in_window and call % self._energy.every == 0

    @around_forward
    def _guided(
        self, forward: Any, args: Any, kwargs: Any, rows: slice, call: int, timestep: Any
    ) -> Any:
        """The prediction with ``scale * sqrt(1 - abar) * dE/dz`` added to every chunk.

        The attributed chunk runs with gradients and on its own, the others without: the backward
        pass touches one chunk only.
        """
        sample = args[0] if args else kwargs["sample"]  # [chunks * B, C, H, W]
        batch = sample.shape[0]
        attributed = list(range(rows.start, rows.stop))
        others = [row for row in range(batch) if not rows.start <= row < rows.stop]
        alpha_bar = _alpha_bar(self._pipe.scheduler, timestep)
        precision = torch.promote_types(sample.dtype, torch.float32)
        # Without the channels that a UNet of inpainting or editing is given beside the latents.
        channels = min(sample.shape[1], self._pipe.unet.config.out_channels)
        moved = sample[rows, :channels].detach().to(precision)  # [B, C, H, W]
        delta = torch.zeros_like(moved)  # of epsilon
        norms, factors = [], []
        for inner in range(self._energy.inner_steps):
            latents = moved.to(sample.dtype).requires_grad_()
            # Anew: the UNet takes a T2I adapter's features out of their list.
            part_args, part_kwargs = take_rows((args, kwargs), attributed, batch)
            inner_output, inner_energy, gradient = self._evaluator.gradient(
                forward, part_args, part_kwargs, latents, attributed
            )
            step, norm, factor = _step(self._energy, gradient.to(precision), alpha_bar)
            delta += step
            moved = moved - math.sqrt(1.0 - alpha_bar) * step
            norms.append(norm)
            factors.append(factor)
            if inner == 0:
                output, energy = inner_output, inner_energy
        self._evaluator.remember(energy)
        factor = torch.stack(factors).amin(0)
        self._note(call, timestep, energy, torch.stack(norms).amax(0), factor)
        # an image with a skipped inner step is skipped entirely
        delta = torch.where(factor[:, None, None, None] > 0.0, delta, 0.0)

        predicted = torch.empty_like(sample[:, : output[0].shape[1]], dtype=output[0].dtype)
        predicted[rows] = output[0].detach()
        if others:
            rest_args, rest_kwargs = take_rows((args, kwargs), others, batch)
            with torch.no_grad(), present_rows(others):
                predicted[others] = forward(*rest_args, **rest_kwargs)[0]
        if self._pipe.scheduler.config.prediction_type == "v_prediction" and alpha_bar > 0.0:
            delta = delta / math.sqrt(alpha_bar)  # eps = sqrt(abar) v + sqrt(1 - abar) z
        self._delta = delta.to(predicted.dtype)
        as_tuple = kwargs.get("return_dict", True) is False
        return self._shifted((predicted,) if as_tuple else type(output)(sample=predicted))

    @not_compiled
    def _shifted(self, output: Any) -> Any:
        """A UNet's output with what this step adds to every chunk's prediction."""
        if self._delta is None:
            return output
        delta = self._delta.repeat(len(output[0]) // len(self._delta), 1, 1, 1)
        if isinstance(output, tuple):
            return (output[0] + delta, *output[1:])
        return type(output)(sample=output[0] + delta)

    @not_compiled
    def _note(
        self,
        call: int,
        timestep: Any,
        energy: CallEnergy,
        norm: torch.Tensor,
        factor: torch.Tensor,
    ) -> None:
        time = _time(timestep)
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


@not_compiled
def _step(
    settings: Energy, gradient: torch.Tensor, alpha_bar: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What one gradient adds to epsilon ``[B, C, H, W]``, the norms, the clip factors."""
    norm = gradient.flatten(1).norm(dim=1)  # [B]
    if settings.clip is None:
        factor = torch.ones_like(norm)
    elif isinstance(settings.clip, str):
        factor = (norm < 1.0).to(norm.dtype)
    else:
        factor = (settings.clip / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0)
    factor = torch.where(norm.isfinite(), factor, 0.0)
    if alpha_bar <= 0.0:
        factor = torch.zeros_like(factor)
    strength = settings.scale * math.sqrt(1.0 - alpha_bar) / settings.inner_steps
    usable = gradient.nan_to_num(0.0, 0.0, 0.0)
    return usable * (strength * factor)[:, None, None, None], norm, factor


def _energy_hook(guidance: Guidance) -> Any:
    from diffusers.hooks import ModelHook

    class EnergyHook(ModelHook):  # type: ignore[misc]
        """Hands every UNet call to the guidance."""

        @around_forward
        def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            return guidance._call(self.fn_ref.original_forward, *args, **kwargs)

    return EnergyHook()


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


def _time(timestep: Any) -> float:
    return float(timestep.flatten()[0]) if torch.is_tensor(timestep) else float(timestep)


@not_compiled
def _alpha_bar(scheduler: Any, timestep: Any) -> float:
    """The schedule's cumulative alpha at a timestep; between two, sigma is interpolated."""
    time = _time(timestep)
    table = scheduler.alphas_cumprod
    below = min(max(math.floor(time), 0), len(table) - 1)
    above = min(below + 1, len(table) - 1)
    first, second = float(table[below]), float(table[above])
    share = time - below
    if share <= 0.0 or second <= 0.0:
        return first
    sigma = (1 - share) * math.sqrt(1 / first - 1) + share * math.sqrt(1 / second - 1)
    return 1.0 / (1.0 + sigma**2)
