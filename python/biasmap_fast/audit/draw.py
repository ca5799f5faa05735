"""One batch of an audit: drawn, attributed, and decoded where somebody looks at the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..attribution import AttributionCache, attribute
from ..guidance import Guidance, guide
from ..sources import engine_of
from .controls import Swept, sweeping
from .plan import GUIDED, Unit

if TYPE_CHECKING:
    from ..attribution import Recorder
    from ..concepts import AttributionPrompt
    from ..ledger import LedgerRow
    from ..maps import AttributionMaps
    from .plan import AuditPlan


@dataclass
class Cache:
    """What the prompts of a plan become in one pipeline, made once for all its batches."""

    attribution: AttributionCache = field(default_factory=AttributionCache)
    embeddings: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """What a batch of B pictures left.

    Attributes:
        arrays: ``[H, W, 3]`` in [0, 1] each, ``None`` where the picture was not decoded.
        size: height and width of the pictures.
        faults: why a picture that was not decoded cannot be one; ``None`` for no fault.
        filtered: whether a safety checker blanked it.
        maps: attribution maps by the prompt's name; `AttributionMaps.row` finds a picture's.
        ledger: what guidance did; empty without guidance.
        swept: maps of what the plan sweeps over.
    """

    arrays: list[np.ndarray[Any, Any] | None]
    size: tuple[int, int]
    faults: list[tuple[str, str] | None]
    filtered: list[bool]
    maps: dict[str, AttributionMaps]
    ledger: list[LedgerRow]
    swept: Swept


def draw(
    pipe: Any,
    plan: AuditPlan,
    units: Sequence[Unit],
    prompts: Sequence[Sequence[AttributionPrompt]],
    wanted: Sequence[bool],
    cache: Cache | None = None,
    swept: Sequence[Sequence[AttributionPrompt]] = (),
) -> Drawn:
    """Draws one batch and attributes it.

    Args:
        pipe: the pipeline, with the plan's scheduler, type and device.
        plan: what to draw.
        units: the pictures; all guided, or none.
        prompts: what is attributed on each picture.
        wanted: which pictures are looked at, and so decoded.
        cache: of this pipeline; ``None`` for none.
        swept: what the plan's sweeps attribute on each.
    """
    cache = cache or Cache()
    (guided,) = {unit.condition == GUIDED for unit in units}
    recorder = _recorder(pipe, plan, prompts, cache, swept)
    guidance = _guidance(pipe, plan, units, cache) if guided else nullcontext()
    everyone = all(wanted) or not _leaves_latents(pipe, any(wanted))
    with recorder, sweeping(pipe, plan, swept, recorder, cache.attribution) as beside, guidance:
        output = pipe(
            **_words(pipe, plan, units, cache),
            # One CPU generator an image: the picture depends on its seed, not on its batch.
            generator=[torch.Generator("cpu").manual_seed(unit.seed) for unit in units],
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance_scale,
            height=plan.height,
            width=plan.width,
            output_type="np" if everyone else "latent",
        )
    maps = recorder.maps_by_prompt()
    blocked = getattr(output, "nsfw_content_detected", None) or [False] * len(units)
    arrays, size, faults = (
        _all_decoded(output.images) if everyone else _some_decoded(pipe, output.images, wanted)
    )
    return Drawn(
        arrays=arrays,
        size=size,
        faults=faults,
        filtered=[bool(each) for each in blocked],
        maps=maps,
        ledger=guidance.ledger if isinstance(guidance, Guidance) else [],
        swept=beside,
    )


def _recorder(
    pipe: Any,
    plan: AuditPlan,
    prompts: Sequence[Sequence[AttributionPrompt]],
    cache: Cache,
    swept: Sequence[Sequence[AttributionPrompt]] = (),
) -> Recorder:
    return attribute(
        pipe,
        list(prompts),
        branch=plan.branch,
        layers=plan.layers,
        by=("block", *(by for by in plan.sweeps if by != "branch")),
        # a pipeline that does not say how many copies of the latents it guides may be told
        chunks=getattr(pipe, "attribution_chunks", None),
        detailed={prompt.name for own in swept for prompt in own},
        cache=cache.attribution,
    )


def check_drawable(pipe: Any, plan: AuditPlan, condition: str) -> None:
    """Refuses what would fail in every picture of a condition: layers, an engine's graphs.

    Raises:
        EngineError: the engine has no graph for the energy, or a smaller one.
        TypeError: the pipeline has no UNet or no CLIP text encoder.
        ValueError: an unknown layer, something that cannot be recorded or guided so.
    """
    cache, units = Cache(), [Unit(each, 0, condition) for each in plan.professions]
    _recorder(pipe, plan, [plan.prompts(units[0].profession)], cache)
    if condition != GUIDED:
        return
    _guidance(pipe, plan, units[:1], cache)
    engine = engine_of(pipe)
    if engine is None or plan.energy is None or plan.energy.scale == 0.0:
        return
    side = pipe.unet.config.sample_size  # of the latents, what diffusers draws by default
    height, width = (
        side if pixels is None else pixels // pipe.vae_scale_factor
        for pixels in (plan.height, plan.width)
    )
    for unit in units:
        engine.check_gradient(
            (height, width),
            [cache.attribution.tokens(pipe, prompt)[0] for prompt in plan.prompts(unit.profession)],
            fraction=plan.energy.fraction,
            temperature=plan.energy.temperature,
        )


_Decoded = tuple[list[np.ndarray[Any, Any] | None], tuple[int, int], list[tuple[str, str] | None]]


def _all_decoded(images: Any) -> _Decoded:
    arrays = np.asarray(images)  # [B, H, W, 3]
    return list(arrays), arrays.shape[1:3], [None] * len(arrays)


@torch.no_grad()
def _some_decoded(pipe: Any, latents: torch.Tensor, wanted: Sequence[bool]) -> _Decoded:
    """Decodes the wanted ones of the latents ``[B, C, h, w]`` as Stable Diffusion does."""
    arrays: list[np.ndarray[Any, Any] | None] = [None] * len(latents)
    places = [place for place, wants in enumerate(wanted) if wants]
    if places:
        scaled = latents[places] / pipe.vae.config.scaling_factor
        decoded = pipe.vae.decode(scaled, return_dict=False)[0]  # [b, 3, H, W]
        for place, array in zip(
            places, pipe.image_processor.postprocess(decoded, output_type="np"), strict=True
        ):
            arrays[place] = array
    height, width = (int(side) * pipe.vae_scale_factor for side in latents.shape[-2:])
    return arrays, (height, width), [_latents_fault(each) for each in latents]


def _latents_fault(latents: torch.Tensor) -> tuple[str, str] | None:
    """Of a picture that nobody decodes; the statuses are those of a decoded one."""
    finite = torch.isfinite(latents)
    if not bool(finite.all()):
        count = int((~finite).sum())
        return "non_finite_picture", f"{count} of the picture's latents are not finite"
    if bool(latents.max() == latents.min()):
        return "blank_picture", f"every latent of the picture is {float(latents.max()):g}"
    return None


def _leaves_latents(pipe: Any, some: bool) -> bool:
    """Whether a pipeline can stop before its decoder, and some of its latents be decoded here.

    Only what is known to the letter: a class of the user's may do more with a picture, and a
    safety checker has to see every one.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    if getattr(pipe, "safety_checker", None) is not None:
        return False
    if type(pipe) is StableDiffusionPipeline:
        return True
    return type(pipe) is StableDiffusionXLPipeline and not some


def _words(pipe: Any, plan: AuditPlan, units: Sequence[Unit], cache: Cache) -> dict[str, Any]:
    """The arguments that say what to draw: embeddings where the pipeline is known to take them."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    texts = [plan.prompt(unit.profession, unit.condition) for unit in units]
    if type(pipe) not in (StableDiffusionPipeline, StableDiffusionXLPipeline):
        words: dict[str, Any] = {"prompt": texts}
        if plan.negative_prompt is not None:
            words["negative_prompt"] = [plan.negative_prompt] * len(units)
        return words
    for text in texts:
        if text not in cache.embeddings:
            device = cache.attribution.device(pipe)
            cache.embeddings[text] = _embedded(pipe, plan, text, device)
    found = [cache.embeddings[text] for text in texts]
    return {name: torch.cat([each[name] for each in found]) for name in found[0]}


@torch.no_grad()
def _embedded(
    pipe: Any, plan: AuditPlan, text: str, device: torch.device
) -> dict[str, torch.Tensor]:
    """Text embeddings ``[1, T, D]`` by the name of the pipeline's argument."""
    guided = plan.guidance_scale > 1 and pipe.unet.config.time_cond_proj_dim is None
    names = ["prompt_embeds", "negative_prompt_embeds"]
    names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]  # of SDXL
    embedded = pipe.encode_prompt(
        prompt=[text],
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=None if plan.negative_prompt is None else [plan.negative_prompt],
    )
    # `strict=False`: Stable Diffusion gives the first two
    pairs = zip(names, embedded, strict=False)
    return {name: tensor for name, tensor in pairs if tensor is not None}


def _guidance(pipe: Any, plan: AuditPlan, units: Sequence[Unit], cache: Cache) -> Guidance:
    """Guidance of every picture by the pairs that are measured on it."""
    if plan.energy is None:
        raise ValueError("the condition 'guided' needs `energy`")
    return guide(
        pipe,
        [plan.prompts(unit.profession) for unit in units],
        plan.energy.model_copy(
            update={
                "pairs": tuple(
                    tuple(
                        (unit.profession, pair.demographic) for pair in plan.pairs(unit.profession)
                    )
                    for unit in units
                )
            }
        ),
        branch=plan.branch,
        strict=False,  # a picture that was hardly guided becomes a row that says so
        cache=cache.attribution,
    )
