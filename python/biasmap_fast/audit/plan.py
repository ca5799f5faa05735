"""The plan of an audit: what is drawn, what is measured, with every default written out."""

from __future__ import annotations

import math
import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .. import presets
from ..concepts import AttributionPrompt
from ..energy import Energy
from ..pipelines import TESTBED
from .conditions import parse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from collections.abc import Set as AbstractSet

PLAIN: Literal["plain"] = "plain"
GUIDED: Literal["guided"] = "guided"

# What the published scripts fix (design, section 2): a conflicting setting is refused.
_PAPER: dict[str, Any] = {
    "branch": presets.PAPER.branch,
    "evaluation_size": presets.PAPER.size,
    "percentiles": (presets.PAPER.percentile,),
    "soft_mask": "paper",
    "measure": "iou",
}
# What they run with: defaults of the preset that a plan may change.
_PAPER_DEFAULTS: dict[str, Any] = {
    "seeds": tuple(range(100)),
    "steps": presets.PAPER.steps,
    "guidance_scale": presets.PAPER.guidance_scale,
}

_FIRST_ROUND = 10  # fewest seeds of it: of fewer, Student's quantile is far from the normal one


@dataclass(frozen=True)
class Pair:
    """One concept pair that is measured on every picture of a profession.

    Attributes:
        axis: name of the demographic axis.
        demographic: the axis' word.
        semantic_prompt: where the profession's map comes from.
        demographic_prompt: where the word's map comes from; the same prompt in the joint form.
    """

    axis: str
    demographic: str
    semantic_prompt: AttributionPrompt
    demographic_prompt: AttributionPrompt

    @property
    def texts(self) -> list[str]:
        """The attribution prompts' texts, without repetition."""
        return list(dict.fromkeys([self.semantic_prompt.text, self.demographic_prompt.text]))


@dataclass(frozen=True)
class Unit:
    """One picture to draw: a profession, the seed of its generator, and under which condition."""

    profession: str
    seed: int
    condition: str = PLAIN


class Containment(BaseModel):
    """Settings of the measure ``"containment"`` (`overlap.soft_containment`).

    The defaults are what recovered a planted overlap best (docs/validity.md).

    Attributes:
        fractions: share of the pixels in the profession's mask and in the demographic word's. Take
            masks about as large as what the words draw.
        layers: names or prefixes of the UNet blocks whose maps are used, of those that are
            recorded; ``None`` for the up blocks, or for all that the plan's own ``layers`` name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fractions: tuple[float, float] = (0.05, 0.1)
    layers: tuple[str, ...] | None = None

    @field_validator("fractions")
    @classmethod
    def _inside(cls, fractions: tuple[float, float]) -> tuple[float, float]:
        if wrong := [fraction for fraction in fractions if not 0 < fraction < 1]:
            raise ValueError(f"fractions must lie between 0 and 1, both excluded, got {wrong}")
        return fractions


class Controls(BaseModel):
    """What is measured beside every pair, on the same pictures (`audit.controls`).

    Attributes:
        words: kind -> the word that takes the demographic word's place. ``"function"`` a function
            word, ``"object"`` a thing that has nothing to do with the profession, ``"person"``.
        synonyms: profession -> another name of it; a profession without one has no such control.
        swapped: the pair with its words in each other's place, in the joint form.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    words: dict[str, str] = Field(default_factory=lambda: dict(presets.CONTROL_WORDS))
    synonyms: dict[str, str] = Field(default_factory=lambda: dict(presets.SYNONYMS))
    swapped: bool = True

    @field_validator("words")
    @classmethod
    def _kinds(cls, words: dict[str, str]) -> dict[str, str]:
        if unknown := sorted(words.keys() - presets.CONTROL_WORDS.keys()):
            kinds = sorted(presets.CONTROL_WORDS)
            raise ValueError(f"expected control words of the kinds {kinds}, got {unknown}")
        return words


class AuditPlan(BaseModel):
    """Everything that decides the records of an audit; immutable, and complete once made.

    Attributes:
        model: ``"testbed"``, a directory in diffusers' layout, or a model id of the hub.
        revision: commit, tag or branch of a hub model.
        dtype: of the weights.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; ``"auto"`` becomes one of them.
        engine: folder of an engine that was exported from the model's UNet and takes its place;
            ``None`` to draw with torch.
        compile: compile the UNet with ``torch.compile``: some minutes at the start, faster calls.
        scheduler: class name in diffusers; ``None`` for the checkpoint's own.
        professions: the semantic words, or the name of a list in `presets.PROFESSIONS`; default
            the testbed's own, else the published scripts'.
        axes: axis -> its demographic words; a name or a list of names in `presets.AXES` is looked
            up. All axes are measured on the same pictures.
        prompt_template: text that draws the picture; ``{profession}`` comes with its article.
        attribution_template: one text with ``{profession}`` and ``{demographic}`` (the joint form
            of the published code), or two, the first with ``{profession}``, the second with
            ``{demographic}``, so that the words do not share one softmax. ``{a_demographic}``
            comes with an article.
        negative_prompt: what not to draw.
        conditions: ``"plain"``, ``"guided"`` (by the energy) and those of ``interventions``, all on
            the same seeds; what is first is what the others are compared with. ``"name=..."``
            names a condition and gives its intervention in one.
        interventions: condition -> what it changes: ``"prompt:TEMPLATE"``, ``"lora:PATH"``,
            ``"model:ID"`` or ``"module:function"`` (`conditions.parse`).
        energy: settings of the condition ``"guided"``.
        seeds: one picture a profession, seed and condition. With a precision these are the first
            round's (ten at least, default 20 or ``1 / precision``), and the numbers after the
            greatest may be drawn too.
        precision: half-width that the 95 % interval of each profession's mean of ``measure`` must
            come to, with every word and under every condition: drawing goes on in rounds until it
            does (`rounds`). ``None`` to draw ``seeds`` and no more.
        max_seeds: with a precision, how many seeds a profession may take; default
            ``20 / precision``.
        steps: inference steps.
        guidance_scale: classifier-free guidance; 1 for none. Default 7.5, on the testbed 1.
        height: of the pictures in pixels; ``None`` for the model's default.
        width: of the pictures in pixels; ``None`` for the model's default.
        batch_size: pictures drawn at once. Default 8; 16 on the testbed, whose UNet is small,
            without an engine.
        measure: what the report opens with: ``"containment"``, the part of the profession's mask
            that lies inside the demographic word's, with IoU beside it, or ``"iou"`` alone.
        containment: settings of that measure.
        percentiles: of the masks of IoU; each gives its own records.
        temperature: of the soft mask, in units of a map's range.
        branch: guidance branch whose queries are attributed.
        layers: layer names or prefixes; ``None`` for the default.
        controls: what is measured beside every pair on the same pictures; ``None`` for nothing.
        curve: measure every pair at the percentiles 50 to 95 too, beside the records.
        sweeps: overlaps of parts of the maps: ``"step"`` (each UNet call), ``"layer"``,
            ``"branch"`` (the other guidance branch); at the first percentile.
        classifier: reads profession and demographic words in the pictures: ``"clip:DIR"`` (or a
            hub id), ``"module:function"`` (pictures to `Reading`), ``"none"``; the testbed has its
            own.
        evaluation_size: the hard masks are taken of maps resized to this square, as in the
            published evaluation; ``None`` for the largest layer's size.
        soft_mask: ``"exact"``, or ``"paper"`` for the published row-wise 20 iterations.
        preset: ``"default"``, or ``"paper"`` to reproduce the published scripts' settings.
        save_pictures: keep none, the first seed of each profession, or all.
        save_maps: the same for attribution maps.

    Raises:
        pydantic.ValidationError: a setting is out of range, unknown or contradicts another.

    Example:
        >>> plan = AuditPlan(professions=["doctor", "architect"], axes="gender", seeds=[0, 1])
        >>> plan.prompt("architect")
        'A photo of the face of an architect'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(TESTBED, min_length=1)
    revision: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"
    engine: str | None = None
    compile: bool = False
    scheduler: str | None = None
    professions: tuple[str, ...] = Field(default_factory=tuple)
    axes: dict[str, tuple[str, ...]] = Field(default_factory=lambda: _axes("gender"))
    prompt_template: str = presets.PROMPT_TEMPLATE
    attribution_template: str | tuple[str, str] = presets.ATTRIBUTION_TEMPLATE
    negative_prompt: str | None = None
    conditions: tuple[str, ...] = (PLAIN,)
    interventions: dict[str, str] = Field(default_factory=dict)
    energy: Energy | None = None
    seeds: tuple[int, ...] = tuple(range(20))
    precision: float | None = Field(None, gt=0, lt=0.5, allow_inf_nan=False)
    max_seeds: int | None = None
    steps: int = Field(25, ge=1)
    guidance_scale: float = Field(7.5, ge=0, allow_inf_nan=False)
    height: int | None = Field(None, ge=8)
    width: int | None = Field(None, ge=8)
    batch_size: int = Field(8, ge=1)
    measure: Literal["containment", "iou"] = "containment"
    containment: Containment = Field(default_factory=Containment)
    percentiles: tuple[float, ...] = (70.0,)
    temperature: float = Field(0.01, ge=1e-6, allow_inf_nan=False)
    branch: Literal["cond", "uncond"] = "cond"
    layers: tuple[str, ...] | None = None
    controls: Controls | None = None
    curve: bool = True
    sweeps: tuple[Literal["step", "layer", "branch"], ...] = ("step",)
    classifier: str = "none"
    evaluation_size: int | None = Field(None, ge=2)
    soft_mask: Literal["exact", "paper"] = "exact"
    preset: Literal["default", "paper"] = "default"
    save_pictures: Literal["none", "sample", "all"] = "sample"
    save_maps: Literal["none", "sample", "all"] = "sample"

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Writes out the defaults that depend on other settings."""
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        testbed = filled.get("model", TESTBED) == TESTBED
        filled["professions"] = _professions(filled.get("professions"), testbed=testbed)
        filled["axes"] = _axes(filled.get("axes", "gender"))
        filled["device"] = _device(filled.get("device", "auto"))
        # The testbed reproduces its planted shares without guidance, and guidance amplifies them.
        if filled.get("preset") == "paper":
            filled = {**_PAPER, **_PAPER_DEFAULTS, **filled}
        filled.setdefault("guidance_scale", 1.0 if testbed else 7.5)
        small = testbed and filled.get("engine") is None
        filled.setdefault("batch_size", 16 if small else 8)
        _fill_rounds(filled)
        _name_interventions(filled)
        if GUIDED in filled.get("conditions", ()) and filled.get("energy") is None:
            filled["energy"] = {}
        filled.setdefault("classifier", TESTBED if testbed else "none")
        if "controls" not in filled:
            filled["controls"] = _controls(filled, testbed=testbed)
        return filled

    @field_validator("professions", "conditions", "seeds", "percentiles")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values:
            raise ValueError("expected at least one, got none")
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
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

    @field_validator("seeds")
    @classmethod
    def _seed_range(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if wrong := [seed for seed in seeds if not 0 <= seed < 2**63]:
            raise ValueError(f"seeds must lie between 0 and 2**63 - 1, got {wrong}")
        return seeds

    @model_validator(mode="after")
    def _check_rounds(self) -> Self:
        if self.precision is None:
            if self.max_seeds is not None:
                raise ValueError(
                    f"`max_seeds` belongs to a precision, got {self.max_seeds} and no precision: "
                    "`seeds` alone says how many"
                )
            return self
        if len(self.seeds) < _FIRST_ROUND:
            raise ValueError(
                "seeds: with a precision they are the first round, and the spread is judged by "
                f"them: expected at least {_FIRST_ROUND}, got {len(self.seeds)}"
            )
        if self.max_seeds is None or self.max_seeds < len(self.seeds):
            raise ValueError(
                f"max_seeds: expected at least the first round's {len(self.seeds)}, got "
                f"{self.max_seeds}"
            )
        if self.sequence[-1] >= 2**63:
            raise ValueError(
                "max_seeds: seeds must lie between 0 and 2**63 - 1, the last round would end at "
                f"{self.sequence[-1]}"
            )
        return self

    @field_validator("sweeps")
    @classmethod
    def _sweeps_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) != len(values):
            raise ValueError(f"expected each one once, got {list(values)}")
        return values

    @field_validator("classifier")
    @classmethod
    def _classifier_kind(cls, value: str) -> str:
        kind, colon, rest = value.partition(":")
        if value not in ("none", TESTBED) and not (kind and colon and rest):
            raise ValueError(
                f"expected 'none', 'testbed', 'clip:DIR' or 'module:function', got {value!r}"
            )
        return value

    @field_validator("percentiles")
    @classmethod
    def _percentile_range(cls, percentiles: tuple[float, ...]) -> tuple[float, ...]:
        if wrong := [q for q in percentiles if not 0 < q < 100]:
            raise ValueError(f"percentiles must lie between 0 and 100, both excluded, got {wrong}")
        return percentiles

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
            kind, target = parse(text)
            if kind == "prompt":
                _checked_template(target, {"profession"}, {"profession"})
        return interventions

    @field_validator("prompt_template")
    @classmethod
    def _prompt_placeholder(cls, template: str) -> str:
        return _checked_template(template, {"profession"}, {"profession"})

    @field_validator("attribution_template")
    @classmethod
    def _attribution_placeholders(cls, template: str | tuple[str, str]) -> str | tuple[str, str]:
        word = {"demographic", "a_demographic"}
        if isinstance(template, str):
            return _checked_template(template, {"profession"}, {"profession"} | word, one_of=word)
        first = _checked_template(template[0], {"profession"}, {"profession"})
        return first, _checked_template(template[1], set(), word, one_of=word)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.preset == "paper":
            for name, value in _PAPER.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"preset 'paper' means {name}={value!r}, got {getattr(self, name)!r}; "
                        "leave it out or use preset 'default'"
                    )
            if GUIDED in self.conditions:
                raise ValueError(
                    "preset 'paper' measures; its energy (per-row masks of 20 iterations) is not "
                    "one that guides. Use preset 'default' for the condition 'guided'"
                )
        self._check_conditions()
        if self.compile and GUIDED in self.conditions:
            raise ValueError(
                "the condition 'guided' cannot be drawn with `compile`: the gradient of a UNet "
                "that torch 2.13's inductor compiled was wrong on the CPU (docs/guidance.md)"
            )
        if self.energy is not None and self.energy.pairs is not None:
            raise ValueError("`energy.pairs` are those that the audit measures: leave them out")
        if self.energy is not None and GUIDED not in self.conditions:
            raise ValueError(
                f"`energy` belongs to the condition 'guided', got conditions {self.conditions}"
            )
        if self.branch == "uncond" and self.guidance_scale <= 1:
            raise ValueError(
                "branch 'uncond' needs classifier-free guidance: expected guidance_scale > 1, "
                f"got {self.guidance_scale:g}"
            )
        if "branch" in self.sweeps and self.guidance_scale <= 1:
            raise ValueError(
                "the sweep 'branch' needs classifier-free guidance: expected guidance_scale > 1, "
                f"got {self.guidance_scale:g}"
            )
        if self.revision is not None and self.model == TESTBED:
            raise ValueError(f"the testbed has no revisions, got {self.revision!r}")
        for profession in self.professions:
            for pair in self.pairs(profession):
                for prompt in (pair.semantic_prompt, pair.demographic_prompt):
                    _check_single(prompt)
            for kind, word in (self.controls.words if self.controls else {}).items():
                if word != profession:
                    _check_single(self.pair(profession, kind, word).demographic_prompt)
        return self

    def _check_conditions(self) -> None:
        for name in self.conditions:
            if name not in (PLAIN, GUIDED, *self.interventions):
                raise ValueError(
                    "conditions: expected 'plain', 'guided' or 'name=intervention' "
                    f"('name=module:function'), got {name!r}"
                )
        if unused := [name for name in self.interventions if name not in self.conditions]:
            raise ValueError(f"interventions of conditions that are not asked for: {unused}")
        if self.engine is not None and self.compile:
            raise ValueError("an engine stands in the UNet's place: there is nothing to compile")
        own = [name for name in self.conditions if self.pipeline_of(name) is not None]
        if self.engine is not None and own:
            raise ValueError(
                f"an engine stands in the place of one UNet, got conditions with their own: {own}"
            )

    @property
    def containment_layers(self) -> tuple[str, ...]:
        """Layers on whose maps containment is measured."""
        return self.containment.layers or self.layers or ("up_blocks",)

    def template(self, condition: str = PLAIN) -> str:
        """The template of the prompts that draw under a condition."""
        kind, target = parse(self.interventions.get(condition, f"prompt:{self.prompt_template}"))
        return target if kind == "prompt" else self.prompt_template

    def prompt(self, profession: str, condition: str = PLAIN) -> str:
        """The text that draws a picture of ``profession`` under a condition."""
        return self.template(condition).format(profession=presets.with_article(profession))

    def pipeline_of(self, condition: str) -> str | None:
        """The condition whose pipeline draws, or ``None`` for the plan's model."""
        text = self.interventions.get(condition)
        return None if text is None or parse(text)[0] == "prompt" else condition

    def pairs(self, profession: str) -> list[Pair]:
        """Every concept pair measured on the pictures of ``profession``."""
        return [
            self.pair(profession, axis, word) for axis, words in self.axes.items() for word in words
        ]

    def prompts(self, profession: str) -> list[AttributionPrompt]:
        """The attribution prompts of those pairs, each once."""
        found = [(p.semantic_prompt, p.demographic_prompt) for p in self.pairs(profession)]
        return list(dict.fromkeys(prompt for pair in found for prompt in pair))

    @property
    def sequence(self) -> tuple[int, ...]:
        """The seeds that may be drawn, in order: every profession has a first part of them."""
        further = max(self.seeds) + 1
        count = (self.max_seeds or len(self.seeds)) - len(self.seeds)
        return self.seeds + tuple(range(further, further + count))

    def units(
        self, professions: Iterable[str] | None = None, seeds: Iterable[int] | None = None
    ) -> Iterator[Unit]:
        """Pictures in the plan's order: by condition, then profession, then seed.

        Args:
            professions: whose; default all.
            seeds: of which seeds; default the plan's, which with a precision are the first round's.
        """
        nouns = self.professions if professions is None else tuple(professions)
        numbers = self.seeds if seeds is None else tuple(seeds)
        for condition in self.conditions:
            for profession in nouns:
                for seed in numbers:
                    yield Unit(profession, seed, condition)

    def chunks(self, units: Iterable[Unit] | None = None) -> list[list[Unit]]:
        """Pictures in the batches they are drawn in.

        A batch goes over professions and over conditions that one pipeline draws in one way: those
        that change no more than the prompt.

        Args:
            units: the pictures; default all of the plan, of the first round with a precision.
        """
        alike: dict[tuple[str | None, bool], list[Unit]] = {}
        for unit in self.units() if units is None else units:
            way = (self.pipeline_of(unit.condition), unit.condition == GUIDED)
            alike.setdefault(way, []).append(unit)
        return [
            together[i : i + self.batch_size]
            for together in alike.values()
            for i in range(0, len(together), self.batch_size)
        ]

    @property
    def pictures(self) -> int:
        """How many pictures the plan asks for; of the first round with a precision."""
        return len(self.conditions) * len(self.professions) * len(self.seeds)

    def differences(self, other: AuditPlan) -> list[str]:
        """Fields in which two plans differ, each as ``"name: mine, theirs"``."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [f"{k}: {mine[k]!r}, {theirs[k]!r}" for k in mine if mine[k] != theirs[k]]

    def to_yaml(self) -> str:
        """The complete plan as YAML; `from_yaml` reads it back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, path: str | Path) -> AuditPlan:
        """Reads a plan, complete or partial, from a YAML file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no YAML mapping, or a setting is wrong.
        """
        return cls(**read_settings(path))

    def pair(self, profession: str, axis: str, word: str) -> Pair:
        """The pair of a profession and any word in the demographic word's place."""
        noun = presets.with_article(profession)
        words = {"demographic": word, "a_demographic": presets.with_article(word)}
        if isinstance(self.attribution_template, str):
            text = self.attribution_template.format(profession=noun, **words)
            joint = AttributionPrompt(text, (profession, word), f"{text} [{profession}, {word}]")
            return Pair(axis, word, joint, joint)
        texts = self.attribution_template
        semantic = texts[0].format(profession=noun)
        demographic = texts[1].format(**words)
        return Pair(
            axis,
            word,
            AttributionPrompt(semantic, (profession,), f"{semantic} [{profession}]"),
            AttributionPrompt(demographic, (word,), f"{demographic} [{word}]"),
        )


def _fill_rounds(settings: dict[str, Any]) -> None:
    """Writes out the first round and the most seeds of a plan with a precision, if it is one."""
    try:
        precision = float(settings.get("precision", math.nan))
    except (TypeError, ValueError):  # none, or what the field refuses
        return
    if not 0 < precision < 0.5:
        return
    # no profession has enough before about 1 / precision images (`statistics.half_width`)
    about = math.ceil(1 / precision - 1e-9)  # 1 / 0.02 may lie above 50
    if settings.get("seeds") is None:
        settings["seeds"] = tuple(range(max(20, about)))
    if settings.get("max_seeds") is None and hasattr(settings["seeds"], "__len__"):
        settings["max_seeds"] = max(20 * about, len(settings["seeds"]))


def _name_interventions(settings: dict[str, Any]) -> None:
    """Moves what follows ``name=`` in the conditions to the interventions."""
    given = settings.get("conditions", ())
    if isinstance(given, str):
        given = (given,)
    if not isinstance(given, (list, tuple)):
        return
    interventions = dict(settings.get("interventions") or {})
    names = []
    for entry in given:
        name, explicit, text = str(entry).partition("=")
        names.append(name)
        if explicit:
            if interventions.get(name, text) != text:
                raise ValueError(
                    f"conditions: {name!r} is given twice, {interventions[name]!r} and {text!r}"
                )
            interventions[name] = text
    if given:
        settings["conditions"] = tuple(names)
        settings["interventions"] = interventions


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, not yet checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML mapping.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} must hold a mapping of plan settings, got {type(settings).__name__}"
        )
    return settings


def explain(error: ValidationError) -> str:
    """A validation error as one line: the setting, what was expected, what came."""
    lines = []
    for detail in error.errors():
        where = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        got = "" if "got" in message else f", got {detail['input']!r}"
        lines.append(f"{where}: {message}{got}" if where else message)
    return "; ".join(lines)


def _professions(given: Any, *, testbed: bool) -> Any:
    if given is None or given == () or given == "testbed":
        if testbed:
            from .. import testbed as bed

            return tuple(row.profession for row in bed.truth())
        given = "biasmap"
    if not isinstance(given, str):
        return given
    if given in presets.PROFESSIONS:
        return tuple(presets.PROFESSIONS[given])
    words = tuple(word.strip() for word in given.split(",") if word.strip())
    if "," in given or not words:
        return words
    raise ValueError(
        f"professions: expected a list of words or one of the lists {sorted(presets.PROFESSIONS)}, "
        f"got {given!r}; write {given + ','!r} for that one profession"
    )


def _controls(settings: dict[str, Any], *, testbed: bool) -> dict[str, Any]:
    """The default controls, without words that the attribution prompt says anyway."""
    template = settings.get("attribution_template", presets.ATTRIBUTION_TEMPLATE)
    texts = " ".join([template] if isinstance(template, str) else map(str, template))
    said = re.findall(r"\w+", texts.lower())
    # the embedded model knows few words; a coat is in all of its pictures, whoever wears it
    words = {**presets.CONTROL_WORDS, **({"object": "coat"} if testbed else {})}
    professions = settings["professions"]
    named = professions if isinstance(professions, (list, tuple)) else ()
    return {
        "words": {kind: word for kind, word in words.items() if word not in said},
        "synonyms": {
            noun: other
            for noun, other in presets.SYNONYMS.items()
            if noun in named and other not in named and not testbed
        },
    }


def _axes(given: Any) -> Any:
    """Axis names, lists of them and ``"name=word,word"`` become a mapping to words."""
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, (list, tuple)):
        return given
    axes: dict[str, tuple[str, ...]] = {}
    for entry in given:
        name, explicit, words = str(entry).partition("=")
        if name in axes:
            raise ValueError(f"axes: expected each axis once, got {name!r} more than once")
        if explicit:
            axes[name] = tuple(word.strip() for word in words.split(",") if word.strip())
        elif name in presets.AXES:
            axes[name] = tuple(presets.AXES[name].words)
        else:
            raise ValueError(
                f"axes: expected one of {sorted(presets.AXES)} or 'name=word,word', got {name!r}"
            )
    return axes


def _device(given: Any) -> Any:
    if given != "auto":
        return given
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_single(prompt: AttributionPrompt) -> None:
    """Refuses a concept that its prompt has twice: the map would mix both places."""
    words = re.findall(r"\w+", prompt.text.lower())
    for concept in prompt.concepts:
        wanted = re.findall(r"\w+", concept.lower())
        starts = range(len(words) - len(wanted) + 1)
        count = sum(words[i : i + len(wanted)] == wanted for i in starts)
        if count != 1:
            raise ValueError(
                f"expected the concept {concept!r} once in the attribution prompt "
                f"{prompt.text!r}, got it {count} times; choose other words"
            )


def _checked_template(
    template: str,
    required: set[str],
    allowed: set[str],
    *,
    one_of: AbstractSet[str] = frozenset(),
) -> str:
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"the template {template!r} cannot be read: {error}") from error
    wanted = [f"{{{name}}}" for name in sorted(required)]
    if one_of:
        wanted.append(" or ".join(f"{{{name}}}" for name in sorted(one_of)))
    complete = required <= fields and (not one_of or fields & one_of)
    if not complete or fields - allowed:
        raise ValueError(
            f"a template needs {' and '.join(wanted)} and nothing else in braces, got {template!r}"
        )
    for article in ("a ", "an "):
        if f" {article}{{profession}}" in f" {template.lower()}":
            raise ValueError(
                f"{{profession}} brings its own article: write {{profession}} without "
                f"{article.strip()!r}, got {template!r}"
            )
    return template
