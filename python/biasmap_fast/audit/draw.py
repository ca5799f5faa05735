"""One batch of an audit: drawn, attributed, and decoded if somebody looks at the pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..attribution import AttributionCache, attribute
from ..guidance import guide
from ..sources import engine_of
from .plan import Picture
from .settings import GUIDED

if TYPE_CHECKING:
    from ..attribution import Recorder
    from ..concepts import AttributionPrompt
    from ..guidance import Guidance
    from ..ledger import LedgerRow
    from ..maps import AttributionMaps
    from .plan import AuditPlan

Fault = tuple[str, str]  # status and reason
Images = list[np.ndarray[Any, Any] | None]
_Decoded = tuple[Images, tuple[int, int], list[Fault | None]]


@dataclass
class Cache:
    """What the prompts of a plan become in one pipeline, made once for all its batches."""

    attribution: AttributionCache = field(default_factory=AttributionCache)
    embeddings: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """What a batch of B pictures left.

    Attributes:
        images: ``[H, W, 3]`` in [0, 1] each; ``None`` for one that was not decoded.
        size: Height and width of the pictures.
        faults: Why a picture that was not decoded cannot be one; ``None`` for no fault.
        filtered: Whether a safety checker blanked it.
        maps: ``"block"`` and what the plan sweeps over -> name of the prompt -> its maps.
        ledger: What guidance did; empty without guidance.
    """

    images: Images
    size: tuple[int, int]
    faults: list[Fault | None]
    filtered: list[bool]
    maps: dict[str, Mapping[str, AttributionMaps]]
    ledger: list[LedgerRow]


def draw(
    pipe: Any,
    plan: AuditPlan,
    pictures: Sequence[Picture],
    prompts: Sequence[Sequence[AttributionPrompt]],
    swept: Sequence[Sequence[AttributionPrompt]],
    wanted: Sequence[bool],
    cache: Cache,
) -> Drawn:
    """Draws one batch and attributes it.

    Args:
        pipe: The pipeline, with the plan's scheduler, dtype and device.
        plan: What to draw.
        pictures: All guided, or none.
        prompts: What is attributed on each picture.
        swept: What the plan's sweeps attribute on each.
        wanted: Which pictures are looked at, and so decoded.
        cache: Of this pipeline.
    """
    (guided,) = {picture.condition == GUIDED for picture in pictures}
    detailed = {prompt.name for listed in swept for prompt in listed}
    all_decoded = all(wanted) or not _leaves_latents(pipe, any(wanted))
    other = guidance = None
    with ExitStack() as stack:
        recorder = _recorder(pipe, plan, prompts, cache, detailed)
        stack.enter_context(recorder)
        if "branch" in plan.sweeps:
            other = stack.enter_context(_recorder(pipe, plan, swept, cache, other_branch=True))
        if guided:
            guidance = stack.enter_context(_guidance(pipe, plan, pictures, cache))
        output = pipe(
            **_words(pipe, plan, pictures, cache),
            # One CPU generator per picture: it depends on its seed, not on its batch.
            generator=[torch.Generator("cpu").manual_seed(p.seed) for p in pictures],
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance_scale,
            height=plan.height,
            width=plan.width,
            output_type="np" if all_decoded else "latent",
        )
    maps: dict[str, Mapping[str, AttributionMaps]] = {
        by: recorder.maps_by_prompt(by) for by in _kept_apart(plan)
    }
    if other is not None:
        maps["branch"] = other.maps_by_prompt()
    blocked = getattr(output, "nsfw_content_detected", None) or [False] * len(pictures)
    if all_decoded:
        arrays = np.asarray(output.images)  # [B, H, W, 3]
        decoded: _Decoded = list(arrays), arrays.shape[1:3], [None] * len(arrays)
    else:
        decoded = _some_decoded(pipe, output.images, wanted)
    images, size, faults = decoded
    return Drawn(
        images=images,
        size=size,
        faults=faults,
        filtered=[bool(filtered) for filtered in blocked],
        maps=maps,
        ledger=[] if guidance is None else guidance.ledger,
    )


def check_drawable(pipe: Any, plan: AuditPlan, condition: str) -> None:
    """Refuses what would fail in every picture of a condition: layers, an engine's graphs."""
    cache, first = Cache(), plan.professions[0]
    _recorder(pipe, plan, [prompts_of(plan, first)], cache)
    if condition != GUIDED:
        return
    _guidance(pipe, plan, [Picture(first, 0, condition)], cache)
    engine = engine_of(pipe)
    if engine is None or plan.energy is None or plan.energy.scale == 0.0:
        return
    side = pipe.unet.config.sample_size  # of the latents, what diffusers draws by default
    height, width = (
        side if pixels is None else pixels // pipe.vae_scale_factor
        for pixels in (plan.height, plan.width)
    )
    for profession in plan.professions:
        engine.check_gradient(
            (height, width),
            [cache.attribution.tokens(pipe, prompt)[0] for prompt in prompts_of(plan, profession)],
            fraction=plan.energy.fraction,
            temperature=plan.energy.temperature,
        )


def prompts_of(
    plan: AuditPlan, profession: str, *, controls: bool = False
) -> list[AttributionPrompt]:
    """Returns the attribution prompts of a profession's pairs, each once."""
    pairs = plan.pairs(profession) + (plan.control_pairs(profession) if controls else [])
    prompts = [prompt for pair in pairs for prompt in (pair.profession_prompt, pair.word_prompt)]
    return list(dict.fromkeys(prompts))


def _kept_apart(plan: AuditPlan) -> tuple[Any, ...]:
    return ("block", *(by for by in plan.sweeps if by != "branch"))


def _recorder(
    pipe: Any,
    plan: AuditPlan,
    prompts: Sequence[Sequence[AttributionPrompt]],
    cache: Cache,
    detailed: Collection[str] | None = None,
    *,
    other_branch: bool = False,
) -> Recorder:
    return attribute(
        pipe,
        list(prompts),
        branch="uncond" if (plan.branch == "cond") == other_branch else "cond",
        layers=plan.layers,
        by="total" if other_branch else _kept_apart(plan),
        # a pipeline that does not say how many copies of the latents it guides may be told
        chunks=getattr(pipe, "attribution_chunks", None),
        detailed=detailed,
        cache=cache.attribution,
    )


@torch.no_grad()
def _some_decoded(pipe: Any, latents: torch.Tensor, wanted: Sequence[bool]) -> _Decoded:
    """Decodes the wanted ones of the latents ``[B, C, h, w]`` as Stable Diffusion does."""
    images: Images = [None] * len(latents)
    indices = [index for index, wants in enumerate(wanted) if wants]
    if indices:
        scaled = latents[indices] / pipe.vae.config.scaling_factor
        decoded = pipe.vae.decode(scaled, return_dict=False)[0]  # [b, 3, H, W]
        arrays = pipe.image_processor.postprocess(decoded, output_type="np")
        for index, array in zip(indices, arrays, strict=True):
            images[index] = array
    height, width = (int(side) * pipe.vae_scale_factor for side in latents.shape[-2:])
    return images, (height, width), [_latents_fault(latent) for latent in latents]


def _latents_fault(latents: torch.Tensor) -> Fault | None:
    # of a picture that nobody decodes; the statuses are those of a decoded one
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


def _words(pipe: Any, plan: AuditPlan, pictures: Sequence[Picture], cache: Cache) -> dict[str, Any]:
    """The arguments that say what to draw: embeddings if the pipeline is known to take them."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    prompts = [plan.prompt(picture.profession, picture.condition) for picture in pictures]
    if type(pipe) not in (StableDiffusionPipeline, StableDiffusionXLPipeline):
        words: dict[str, Any] = {"prompt": prompts}
        if plan.negative_prompt is not None:
            words["negative_prompt"] = [plan.negative_prompt] * len(pictures)
        return words
    for prompt in prompts:
        if prompt not in cache.embeddings:
            device = cache.attribution.device(pipe)
            cache.embeddings[prompt] = _embedded(pipe, plan, prompt, device)
    embeddings = [cache.embeddings[prompt] for prompt in prompts]
    return {name: torch.cat([one[name] for one in embeddings]) for name in embeddings[0]}


@torch.no_grad()
def _embedded(
    pipe: Any, plan: AuditPlan, prompt: str, device: torch.device
) -> dict[str, torch.Tensor]:
    """Text embeddings ``[1, T, D]`` by the name of the pipeline's argument."""
    guided = plan.guidance_scale > 1 and pipe.unet.config.time_cond_proj_dim is None
    names = ["prompt_embeds", "negative_prompt_embeds"]
    names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]  # of SDXL
    embedded = pipe.encode_prompt(
        prompt=[prompt],
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=None if plan.negative_prompt is None else [plan.negative_prompt],
    )
    # `strict=False`: Stable Diffusion gives the first two
    pairs = zip(names, embedded, strict=False)
    return {name: tensor for name, tensor in pairs if tensor is not None}


def _guidance(pipe: Any, plan: AuditPlan, pictures: Sequence[Picture], cache: Cache) -> Guidance:
    """Guidance of every picture by the pairs that are measured on it."""
    if plan.energy is None:
        raise ValueError("the condition 'guided' needs `energy`")
    pairs = tuple(
        tuple((picture.profession, pair.word) for pair in plan.pairs(picture.profession))
        for picture in pictures
    )
    return guide(
        pipe,
        [prompts_of(plan, picture.profession) for picture in pictures],
        plan.energy.model_copy(update={"pairs": pairs}),
        branch=plan.branch,
        strict=False,  # a picture that was hardly guided becomes a row that says so
        cache=cache.attribution,
    )
