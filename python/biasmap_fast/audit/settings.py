"""Every setting of an audit, said once: its type, its default, and what it means to a user."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, Self, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .. import presets
from ..energy import Energy
from ..pipelines import TESTBED
from . import conditions as texts

PLAIN: Literal["plain"] = "plain"
GUIDED: Literal["guided"] = "guided"

_MOST_SEEDS = 10_000_000

Kept = TypeVar("Kept")
Given = TypeVar("Given", contravariant=True)

if TYPE_CHECKING:

    class Accepts(Generic[Kept, Given]):
        """A field that is given in one of several forms and kept in one, for type checkers."""

        @overload
        def __get__(self, instance: None, owner: Any) -> Self: ...
        @overload
        def __get__(self, instance: object, owner: Any) -> Kept: ...
        def __get__(self, instance: object, owner: Any) -> Any: ...
        def __set__(self, instance: object, value: Given) -> None: ...
else:

    class Accepts:
        """``Accepts[kept, given]`` is ``kept`` at run time: pydantic converts what is given."""

        def __class_getitem__(cls, types):
            return types[0]


def _kept(default: Any) -> Any:
    # `Field` takes its default for the field's type, which for type checkers is `Accepts`
    return default


Fraction = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Words = Accepts[tuple[str, ...], Sequence[str] | str]
Layers = Accepts[tuple[str, ...] | None, Sequence[str] | None]
Keep = Literal["none", "sample", "all"]
Part = Literal["step", "layer", "branch"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Containment(_Settings):
    """Settings of the measure ``"containment"`` (`biasmap_fast.soft_containment`)."""

    fractions: Accepts[tuple[Fraction, Fraction], Sequence[float]] = Field(
        default=_kept((0.05, 0.1))
    )
    """Fractions of the pixels in the profession's mask and in the word's. Take masks about as
    large as what the words draw; the default recovered a planted overlap best."""
    layers: Layers = Field(default=_kept(None))
    """Names or prefixes of the UNet blocks whose maps are used, of those that are recorded.
    [default: the up blocks, or the plan's `layers`]"""


class Controls(_Settings):
    """What is measured beside every pair, on the same pictures and from the same UNet calls.

    An IoU says little alone: on one centred face any two words overlap more than unrelated masks
    do. Negative controls are words without demographic meaning; a synonym of the profession is the
    positive control; in a causal text encoder the later word has seen the earlier one, so a
    finding that turns with the order belongs to the prompt.
    """

    words: Accepts[dict[str, str], Mapping[str, str]] = Field(
        default_factory=_kept(lambda: dict(presets.CONTROL_WORDS))
    )
    """Kind -> word in the demographic word's place: 'function' a function word, 'object' a thing
    that has nothing to do with the profession, 'person'."""
    synonyms: Accepts[dict[str, str], Mapping[str, str]] = Field(
        default_factory=_kept(lambda: dict(presets.SYNONYMS))
    )
    """Profession -> another name of it; a profession without one has no such control."""
    swapped: bool = True
    """Measure every pair with its words in each other's place too (joint form)."""

    @field_validator("words")
    @classmethod
    def _kinds(cls, words: dict[str, str]) -> dict[str, str]:
        if unknown := sorted(words.keys() - presets.CONTROL_WORDS.keys()):
            kinds = sorted(presets.CONTROL_WORDS)
            raise ValueError(f"expected control words of the kinds {kinds}, got {unknown}")
        return words


class PlanSettings(_Settings):
    """The settings of `AuditPlan`, each checked by itself."""

    model: str = Field(default=TESTBED, min_length=1)
    """'testbed' (embedded, needs no network), a directory in diffusers' layout, or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub model."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number type of the weights: float32, float16 or bfloat16."""
    device: str = "auto"
    """cpu, cuda or cuda:1. [default: cuda if present]"""
    engine: str | None = None
    """Draw with the engine in this folder, exported from the model's UNet."""
    compile: bool = False
    """Compile the UNet with torch.compile: minutes at the start, faster calls."""
    scheduler: str | None = None
    """Class name of a scheduler of diffusers. [default: the checkpoint's]"""
    professions: Words = Field(default_factory=_kept(tuple))
    """Words with commas ('doctor,judge'), or the name of a list ('biasmap'). [default: the
    testbed's own; 'biasmap' for other models]"""
    axes: Accepts[dict[str, tuple[str, ...]], Mapping[str, Sequence[str]] | Sequence[str] | str] = (
        Field(default_factory=lambda: texts.axes_of("gender"))
    )
    """Demographic axes: names ('gender', 'race') or 'name=word,word'. All are measured on the
    same pictures. [default: gender]"""
    prompt_template: str = presets.PROMPT_TEMPLATE
    """Text that draws the picture; {profession} brings its article."""
    attribution_template: Accepts[str | tuple[str, str], str | Sequence[str]] = Field(
        default=_kept(presets.ATTRIBUTION_TEMPLATE)
    )
    """Text that is attributed, with {profession} and {demographic} (the joint form of the
    published code); or two texts, one with each, so that the words do not share one softmax.
    {a_demographic} brings an article."""
    negative_prompt: str | None = None
    """What not to draw."""
    conditions: Words = Field(default=_kept((PLAIN,)))
    """'plain', 'guided' (by the energy), or NAME=INTERVENTION, one of NAME=prompt:TEMPLATE,
    NAME=lora:PATH[@WEIGHT], NAME=model:ID[@REVISION], NAME=module:function (a pipeline factory).
    All are drawn on the same seeds and compared with the first. [default: plain]"""
    interventions: Accepts[dict[str, str], Mapping[str, str]] = Field(default_factory=_kept(dict))
    """Condition -> its intervention, if `conditions` does not have it."""
    energy: Accepts[Energy | None, Energy | Mapping[str, Any] | None] = Field(default=_kept(None))
    """Settings of the condition 'guided'."""
    seeds: Accepts[tuple[Seed, ...], Sequence[int]] = Field(
        default=_kept(tuple(range(20))), max_length=_MOST_SEEDS
    )
    """One picture is drawn per profession, seed and condition. On the command line a count ('20':
    0 to 19), a range ('5-24') or a list. With a precision they are the first round, at least 10.
    [default: 20; with a precision 1 / precision if that is more]"""
    precision: float | None = Field(default=None, ge=1e-4, lt=0.5)
    """Draw as many seeds as needed: in rounds, until the 95 % interval of each profession's mean
    measure is within plus and minus this, with every word and under every condition.
    [default: `seeds` and no more]"""
    max_seeds: int | None = Field(default=None, le=_MOST_SEEDS)
    """With a precision: most seeds of one profession; one that needs more is reported as not
    reached. [default: 20 / precision]"""
    steps: int = Field(default=25, ge=1)
    """Inference steps."""
    guidance_scale: float = Field(default=7.5, ge=0, allow_inf_nan=False)
    """Classifier-free guidance, 1 for none. [default: 7.5; testbed: 1]"""
    height: int | None = Field(default=None, ge=8)
    """Height of the pictures in pixels. [default: the model's]"""
    width: int | None = Field(default=None, ge=8)
    """Width of the pictures in pixels. [default: the model's]"""
    batch_size: int = Field(default=8, ge=1)
    """Pictures drawn at once. [default: 8; testbed without an engine: 16]"""
    measure: Literal["containment", "iou"] = "containment"
    """What the report opens with: 'containment', the part of the profession's mask that lies
    inside the word's, with IoU beside it, or 'iou' alone."""
    containment: Accepts[Containment, Containment | Mapping[str, Any]] = Field(
        default_factory=_kept(Containment)
    )
    """Settings of the measure containment."""
    fractions: Accepts[tuple[Fraction, ...], Sequence[float]] = Field(default=_kept((0.3,)))
    """Fractions of the pixels in the masks of IoU. The first is the report's main one."""
    temperature: float = Field(default=0.01, ge=1e-6, allow_inf_nan=False)
    """Width of a soft mask's edge, in units of the map's range."""
    branch: Literal["cond", "uncond"] = "cond"
    """Guidance branch that is attributed: cond or uncond."""
    layers: Layers = Field(default=_kept(None))
    """Names or prefixes of the layers that are attributed. [default: all cross-attention of the
    down and up blocks]"""
    controls: Accepts[Controls | None, Controls | Mapping[str, Any] | None] = Field(
        default=_kept(None)
    )
    """What is measured beside every pair on the same pictures; null for nothing. [default: control
    words, synonyms and the swapped prompt]"""
    curve: bool = True
    """Measure the IoU of every pair at the fractions .5 to .05 too."""
    sweeps: Accepts[tuple[Part, ...], Sequence[Part]] = Field(default=_kept(("step",)))
    """IoU of parts of the maps, at the first fraction: step (each UNet call), layer, branch (the
    other guidance branch)."""
    classifier: str = "none"
    """Reads profession and demographic words in the pictures: 'clip:DIR' (or a hub id),
    'module:function', 'none'. [default: none; the testbed has its own]"""
    evaluation_size: int | None = Field(default=None, ge=2)
    """Side of the square to which maps are resized before the hard masks of IoU. [default: the
    largest layer's size]"""
    soft_mask: Literal["exact", "paper"] = "exact"
    """'exact', or 'paper' for the published row-wise mask of 20 iterations."""
    preset: Literal["default", "paper"] = "default"
    """'paper' reproduces the published scripts' settings."""
    save_pictures: Keep = "sample"
    """Pictures to keep: none, sample (the first seed of each profession) or all. What is not kept
    is not decoded, unless a classifier reads it."""
    save_maps: Keep = "sample"
    """Attribution maps to keep: none, sample or all."""

    @field_validator("professions", "conditions", "seeds", "fractions", "sweeps")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...], info: Any) -> tuple[Any, ...]:
        if not values and info.field_name != "sweeps":
            raise ValueError("expected at least one, got none")
        if repeated := sorted(value for value, count in Counter(values).items() if count > 1):
            raise ValueError(f"expected each one once, got {repeated} more than once")
        return values

    @field_validator("professions")
    @classmethod
    def _words(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if blank := [value for value in values if not value.strip()]:
            raise ValueError(f"expected words, got {blank}")
        return values

    @field_validator("axes")
    @classmethod
    def _axis_words(cls, axes: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        if not axes:
            raise ValueError("expected at least one demographic axis, got none")
        for name, words in axes.items():
            if not words or any(not word.strip() for word in words):
                raise ValueError(f"axis {name!r} needs at least one word, got {list(words)}")
            if len(set(words)) != len(words):
                raise ValueError(f"axis {name!r} must name each word once, got {list(words)}")
        return axes

    @field_validator("classifier")
    @classmethod
    def _classifier_kind(cls, value: str) -> str:
        kind, colon, rest = value.partition(":")
        if value not in ("none", TESTBED) and not (kind and colon and rest):
            raise ValueError(
                f"expected 'none', 'testbed', 'clip:DIR' or 'module:function', got {value!r}"
            )
        return value

    @field_validator("interventions")
    @classmethod
    def _readable(cls, interventions: dict[str, str]) -> dict[str, str]:
        for name, text in interventions.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise ValueError(
                    "a condition's name is part of file names: expected letters, digits, '-', '_' "
                    f"and '.', got {name!r}"
                )
            if name in (PLAIN, GUIDED):
                raise ValueError(f"the condition {name!r} has a meaning already: give another name")
            kind, target = texts.parse(text)
            if kind == "prompt":
                texts.check_template(target, ("profession",))
        return interventions

    @field_validator("prompt_template")
    @classmethod
    def _prompt_field(cls, template: str) -> str:
        return texts.check_template(template, ("profession",))

    @field_validator("attribution_template")
    @classmethod
    def _attribution_fields(cls, template: str | tuple[str, str]) -> str | tuple[str, str]:
        word = ("a_demographic", "demographic")
        if isinstance(template, str):
            return texts.check_template(template, ("profession",), word)
        first = texts.check_template(template[0], ("profession",))
        return first, texts.check_template(template[1], one_of=word)
