"""How often a model would draw each group, from its denoiser alone.

By the law of total expectation a denoiser's prediction for "doctor" is the mean of its predictions
for the groups of doctors, weighted by how probable each is: ``f(doctor) = sum_g p_g f(doctor and
g)`` with ``p_g = P(g | doctor, z_t)``. Solved for p: at pure noise, which says nothing about the
group, p is the model's own share; along a drawing it is the posterior of this picture.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .conditioning import Conditionings
from .denoiser import Denoiser


class NoShareError(ValueError):
    """The groups' words do not change the prediction."""


@dataclass(frozen=True, eq=False)
class Share:
    """How often each group would be drawn for a prompt; made by `share`.

    Attributes:
        prompt: The prompt that leaves the group open.
        values: Group -> its share, the mean over draws of noise.
        intervals: Group -> the 95 % interval of that mean (Student's t over draws). It covers the
            noise's chance alone, not how far the model's predictions are from ideal ones.
        draws: The estimate of every draw, ``[draws, G]`` float64, G in the order of ``values``.
        rows: Images that went through the denoiser once.
        guidance: What the estimate says about classifier-free guidance.
    """

    prompt: str
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    draws: torch.Tensor = field(repr=False)
    rows: int
    guidance: str

    def __getitem__(self, group: str) -> float:
        """The share of one group."""
        return self.values[group]


def share(
    pipe: Any,
    prompt: str,
    groups: Mapping[str, str],
    *,
    draws: int = 64,
    seed: int = 0,
    rows: int = 32,
    **call: Any,
) -> Share:
    """Estimates how often a model draws each group for a prompt, without drawing a picture.

    The denoiser is called once at the first time of a drawing, for the prompt and for every
    group. What is estimated is the share *without* classifier-free guidance; guidance moves what
    is drawn further towards the more frequent group. Groups that were rare in training are
    predicted less well, so estimates of small models lie nearer to one half than what they draw.

    Args:
        pipe: A diffusers text-to-image pipeline.
        prompt: The prompt that leaves the group open, as ``"a photo of a doctor"``.
        groups: Label -> the same prompt with the group named; at least two.
        draws: Draws of noise; at least two. Draw i comes from a CPU generator with seed + i, so
            results do not depend on ``rows``.
        seed: Seed of the first draw.
        rows: Images in one forward pass at most; halved when memory runs out.
        **call: Further arguments of the pipeline's call, as ``height`` or ``num_inference_steps``.

    Raises:
        TypeError: The pipeline has no known denoiser or takes no prompt.
        NoShareError: The words do not change the prediction (a ``ValueError``).
        ValueError: Fewer than two groups or draws, or a pipeline that does not start from noise.

    Example:
        >>> import biasmap_fast as bm
        >>> pipe = bm.testbed.pipeline()
        >>> groups = {word: f"a photo of a doctor and {word}" for word in ("woman", "man")}
        >>> doctor = bm.share(pipe, "a photo of a doctor", groups, draws=4)
        >>> round(sum(doctor.values.values()), 6)
        1.0
    """
    if len(groups) < 2:
        raise ValueError(f"`groups` must name at least two groups, got {list(groups)}")
    if draws < 2:
        raise ValueError(f"`draws` must be at least 2 for an interval, got {draws}")
    plain = type(pipe).__call__
    denoiser = Denoiser(pipe, plain, rows)
    if "strength" in inspect.signature(plain).parameters:
        raise ValueError(
            f"a share needs pure noise, and {type(pipe).__name__} starts from a picture: use the "
            "text-to-image pipeline of the same model"
        )
    denoiser.refuse()
    if taken := sorted({"generator", "latents", "num_images_per_prompt"} & set(call)):
        raise ValueError(f"`share` draws its own noise: it takes no {taken}")
    prompts = [prompt, *groups.values()]
    size = max(1, rows // len(prompts))  # draws in one batch
    estimates = []
    text: Conditionings | None = None
    for start in range(0, draws, size):
        count = min(size, draws - start)
        seeds = range(seed + start, seed + start + count)
        arguments = {
            **call,
            "prompt": [prompt] * count,
            "generator": [torch.Generator().manual_seed(number) for number in seeds],
        }
        live = denoiser.rehearse(arguments, prompt)
        if text is None or text.images != count:
            others = [denoiser.rehearse(arguments, other) for other in groups.values()]
            text = Conditionings.of([live, *others])
        wanted = [(index, image) for index in range(len(prompts)) for image in range(count)]
        predictions = denoiser.predict(live, text, wanted, text.first)
        predictions = predictions.view(len(prompts), count, *predictions.shape[1:])
        if not differs(predictions[1:], denoiser.precision):
            raise NoShareError("the words do not change the prediction: there is no share")
        estimates.append(mixture(predictions[0], predictions[1:], clip=False))
    values = torch.cat(estimates)  # [draws, G]
    mean = values.mean(0)
    half = student(draws - 1) * values.std(0) / math.sqrt(draws)
    return Share(
        prompt=prompt,
        values={label: float(p) for label, p in zip(groups, mean, strict=True)},
        intervals={
            label: (float(p - h), float(p + h))
            for label, p, h in zip(groups, mean, half, strict=True)
        },
        draws=values,
        rows=denoiser.forwarded,
        guidance=_guidance(live),
    )


def mixture(prediction: torch.Tensor, groups: torch.Tensor, *, clip: bool = True) -> torch.Tensor:
    """The weights with which predictions of groups add up to the prediction of their mixture.

    Least squares over all pixels and channels, with weights that sum to one: for two groups the
    projection ``<f - f_b, f_a - f_b> / ||f_a - f_b||^2``; for more on the simplex.

    Args:
        prediction: ``[B, ...]`` of the mixture.
        groups: ``[G, B, ...]`` of the groups.
        clip: Whether two weights are kept within 0 and 1. A mean over draws of noise must not be
            clipped draw by draw: that would push small shares up.

    Returns:
        ``[B, G]`` float64.
    """
    differences = (groups - prediction).double().flatten(2).transpose(0, 1)  # [B, G, n]
    gram = differences @ differences.mT  # the error of weights p is p' gram p
    if len(groups) == 2:
        a, b, cross = gram[:, 0, 0], gram[:, 1, 1], gram[:, 0, 1]
        first = (b - cross) / (a + b - 2 * cross)
        weights = torch.stack([first, 1 - first], 1)
        return weights.clamp(0, 1) if clip else weights
    return _simplex(gram)


def _simplex(gram: torch.Tensor, steps: int = 5000, tolerance: float = 1e-12) -> torch.Tensor:
    """Minimises ``p' gram p`` over ``p >= 0``, ``sum p = 1``: accelerated projected gradient."""
    gram = gram / gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    count = gram.shape[-1]
    rate = 1 / torch.linalg.matrix_norm(gram, 2)[:, None]
    weights = gram.new_full(gram.shape[:2], 1 / count)
    ahead, momentum = weights, 1.0
    for _ in range(steps):
        slope = (gram @ ahead[:, :, None])[:, :, 0]
        following = _onto_simplex(ahead - rate * slope)
        moved = following - weights
        # restart where the momentum points uphill
        if bool(((ahead - following) * moved).sum() > 0):
            momentum = 1.0
        grown = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = following + (momentum - 1) / grown * moved
        weights, momentum = following, grown
        if float(moved.abs().max()) < tolerance:
            break
    return weights


def _onto_simplex(values: torch.Tensor) -> torch.Tensor:
    """The nearest points of the simplex to ``[B, G]``."""
    ordered = values.sort(1, descending=True).values
    excess = (ordered.cumsum(1) - 1) / torch.arange(1, values.shape[1] + 1).to(values)
    last = (ordered > excess).sum(1, keepdim=True) - 1
    return (values - excess.gather(1, last)).clamp(min=0)


def differs(groups: torch.Tensor, precision: float) -> bool:
    """Whether predictions ``[G, B, ...]`` of groups differ by more than rounding, on all images."""
    spread = (groups - groups.mean(0)).double().flatten(2).norm(dim=2).amax(0)  # [B]
    size = groups.double().flatten(2).norm(dim=2).amax(0)
    return bool((spread > precision * size).all())


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Cornish and Fisher's expansion, from 4 on to 1e-3)."""
    exact = {1: 12.7062, 2: 4.30265, 3: 3.18245}
    z = 1.959964
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    expansion: float = sum(term / freedom**i for i, term in enumerate(terms))
    return exact.get(freedom, expansion)


def _guidance(live: Mapping[str, Any]) -> str:
    guided = [live.get("guidance"), live.get("timestep_cond")]
    if any(value is not None for value in guided):
        return (
            "the model takes its guidance scale as an input: this is its share at the scale of "
            "the call"
        )
    return (
        "without classifier-free guidance; with it, the more frequent group is drawn more often "
        "than this"
    )
