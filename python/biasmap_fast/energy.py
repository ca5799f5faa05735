"""The energy of guidance: its settings, and which concepts must not overlap in which image.

``E = weighted mean over concept pairs of SoftIoU(M_a, M_b)`` (BiasMap, arXiv 2509.13496), on the
maps of one UNet call, or of all calls so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .concepts import AttributionPrompt

Pair = tuple[str, str]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
# one prompt for all images, or per image of the batch one prompt or several
GuidedPrompts = AttributionPrompt | Sequence[AttributionPrompt | Sequence[AttributionPrompt]]


class Energy(BaseModel):
    """Settings of energy guidance: which concepts are kept apart, how strongly, and when.

    Raises:
        pydantic.ValidationError: A setting is unknown or out of range (it is a ``ValueError``).

    Example:
        >>> Energy(pairs=[("doctor", "woman")], scale=50.0).stop
        1.0
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: Sequence[Pair] | Sequence[Sequence[Pair]] | None = Field(
        default=None,
        description="Pairs of concepts, or a list of them per image. If not given, every pair "
        "inside a prompt, or, if each prompt has a single concept, every pair of them.",
    )
    weights: Sequence[Finite] | None = Field(
        default=None, description="One weight per pair; their mean if not given."
    )
    scale: float = Field(
        default=100.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Strength of the energy; 0 measures without guiding. Not the classifier-free "
        "guidance scale.",
    )
    fraction: Fraction = Field(
        default=0.3, description="Fraction of the pixels in a soft mask, between 0 and 1."
    )
    temperature: float = Field(
        default=0.01,
        ge=1e-6,
        allow_inf_nan=False,
        description="Width of a soft mask's edge, in units of the map's range.",
    )
    clip: float | Literal["skip"] | None = Field(
        default=1.0,
        description="Largest L2 norm of an image's gradient: larger ones are rescaled to it. "
        "'skip' drops a gradient of norm >= 1, as the published code does; None leaves all.",
    )
    start: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="Fraction of the steps before guidance begins."
    )
    stop: float = Field(
        default=1.0, gt=0.0, le=1.0, description="Fraction of the steps at which guidance ends."
    )
    every: int = Field(default=1, ge=1, description="Guide every n-th UNet call only.")
    inner_steps: int = Field(
        default=1,
        ge=1,
        description="Gradients per UNet call, each at the latents that the parts so far amount to, "
        "with the scale shared out: a descent in smaller steps, at that many times the cost.",
    )
    accumulate: bool = Field(
        default=False,
        description="Energy of the sum of all maps so far, not of the current call's alone.",
    )
    layers: Sequence[str] | None = Field(
        default=None,
        description="Names or prefixes of cross-attention layers; all of the down and up blocks if "
        "not given. Fewer make the backward pass cheaper, and are another energy.",
    )
    containment: tuple[Fraction, Fraction] | None = Field(
        default=None,
        description="Fractions of the pixels in the masks of a pair's first and second concept, "
        "(0.05, 0.1) say: the energy is then soft containment, not SoftIoU, which the ledger "
        "still reports. Give the profession first.",
    )

    @field_validator("pairs", mode="before")
    @classmethod
    def _pairs(cls, pairs: Any) -> Any:
        if pairs is None:
            return None
        try:
            if all(isinstance(name, str) for pair in pairs for name in pair) and any(pairs):
                return tuple(_pair(pair) for pair in pairs)
            return tuple(tuple(_pair(pair) for pair in image) for image in pairs)
        except TypeError:
            raise ValueError(f"expected pairs of concepts, got {pairs!r}") from None

    @field_validator("pairs", "weights", "layers")
    @classmethod
    def _immutable(cls, values: Sequence[Any] | None) -> tuple[Any, ...] | None:
        if values is None:
            return None
        return tuple(tuple(value) if isinstance(value, list) else value for value in values)

    @field_validator("clip", mode="before")
    @classmethod
    def _norm(cls, clip: Any) -> Any:
        if clip in ("skip", None) or (isinstance(clip, (int, float)) and clip > 0):
            return clip
        raise ValueError(f"expected a positive norm, 'skip' or None, got {clip!r}")

    @model_validator(mode="after")
    def _window(self) -> Self:
        if not self.start < self.stop:
            raise ValueError(f"expected start < stop, got {self.start} and {self.stop}")
        return self


def _pair(pair: Any) -> Pair:
    if isinstance(pair, str) or len(pair) != 2 or pair[0] == pair[1]:
        raise ValueError(f"a pair must be two different concepts, got {pair!r}")
    return pair[0], pair[1]


@dataclass(frozen=True)
class Target:
    """What is kept apart in one image.

    Attributes:
        prompts: The attribution prompts; their concepts, one prompt after another, are the K
            concepts of the target.
        pairs: The P pairs, by name.
        indices: The same pairs, by index among the K concepts.
        weights: One weight per pair; they need not sum to 1.
    """

    prompts: tuple[AttributionPrompt, ...]
    pairs: tuple[Pair, ...]
    indices: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]


def make_targets(prompts: GuidedPrompts, energy: Energy) -> tuple[Target, ...]:
    """One target per image, or a single one for all of them.

    Raises:
        TypeError: Something else than attribution prompts.
        ValueError: No prompt; a pair that no prompt, or more than one, has; weights or lists of
            pairs of another number.
    """
    if isinstance(prompts, AttributionPrompt):
        images: list[tuple[Any, ...]] = [(prompts,)]
    else:
        images = [
            (image,) if isinstance(image, AttributionPrompt) else tuple(image) for image in prompts
        ]
    if not images or not all(images):
        raise ValueError("expected at least one attribution prompt, got an empty sequence")
    for prompt in (prompt for image in images for prompt in image):
        if not isinstance(prompt, AttributionPrompt):
            raise TypeError(
                f"expected an AttributionPrompt, got {type(prompt).__name__} {prompt!r}"
            )
    given: Any = energy.pairs
    if not given or (given[0] and isinstance(given[0][0], str)):
        given = [given] * len(images)
    if len(given) != len(images):
        raise ValueError(
            f"expected pairs for all images, or a list of pairs for each of {len(images)} images, "
            f"got {len(given)} lists"
        )
    return tuple(
        _target(image, pairs, energy.weights) for image, pairs in zip(images, given, strict=True)
    )


def _target(
    prompts: tuple[AttributionPrompt, ...],
    pairs: Sequence[Pair] | None,
    weights: Sequence[float] | None,
) -> Target:
    concepts = [concept for prompt in prompts for concept in prompt.concepts]
    starts = list(accumulate((len(prompt.concepts) for prompt in prompts), initial=0))
    if pairs is None:
        inside = [
            pair for first, last in pairwise(starts) for pair in combinations(range(first, last), 2)
        ]
        # one concept per prompt: the pairs are between prompts
        indices = inside or list(combinations(range(len(concepts)), 2))
    else:
        indices = [_find(pair, prompts, starts) for pair in pairs]
    if not indices:
        got = f"{concepts} alone" if pairs is None else "an empty list of pairs"
        raise ValueError(f"guidance needs a pair of concepts, got {got}")
    if weights is None:
        weights = (1.0 / len(indices),) * len(indices)
    if len(weights) != len(indices):
        raise ValueError(f"`weights` must be {len(indices)} numbers, one per pair, got {weights}")
    return Target(
        prompts=prompts,
        pairs=tuple((concepts[a], concepts[b]) for a, b in indices),
        indices=tuple(indices),
        weights=tuple(float(weight) for weight in weights),
    )


def _find(
    pair: Pair, prompts: tuple[AttributionPrompt, ...], starts: Sequence[int]
) -> tuple[int, int]:
    """Indices of a pair among all prompts' concepts: in the prompt that has both, if one has."""
    both = [i for i, prompt in enumerate(prompts) if set(pair) <= set(prompt.concepts)]
    indices = []
    for concept in pair:
        holders = both or [i for i, prompt in enumerate(prompts) if concept in prompt.concepts]
        texts = [prompt.text for prompt in prompts]
        if not holders:
            known = [concept for prompt in prompts for concept in prompt.concepts]
            raise ValueError(
                f"the pair {pair!r} names {concept!r}, which is no concept of "
                f"{texts[0] if len(texts) == 1 else texts!r}; there are {known}"
            )
        if len(holders) > 1:
            raise ValueError(
                f"the pair {pair!r} is ambiguous: {concept!r} is a concept of "
                f"{[texts[i] for i in holders]}"
            )
        indices.append(starts[holders[0]] + prompts[holders[0]].concepts.index(concept))
    return indices[0], indices[1]
