"""The plan of an audit: what is drawn and what is measured, with every default written out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator

from .. import presets
from ..concepts import AttributionPrompt
from ..pipelines import TESTBED
from . import conditions as texts
from .settings import GUIDED as GUIDED
from .settings import PLAIN as PLAIN
from .settings import PlanSettings

# What the published scripts fix (design, section 2): a conflicting setting is refused.
_PAPER: dict[str, Any] = {
    "branch": presets.PAPER.branch,
    "evaluation_size": presets.PAPER.size,
    "fractions": (presets.PAPER.fraction,),
    "soft_mask": "paper",
    "measure": "iou",
}
# Defaults of the preset that a plan may change.
_PAPER_DEFAULTS: dict[str, Any] = {
    "seeds": tuple(range(100)),
    "steps": presets.PAPER.steps,
    "guidance_scale": presets.PAPER.guidance_scale,
}

_FIRST_ROUND = 10  # fewest seeds of it: below, Student's quantile is far from the normal one


@dataclass(frozen=True)
class Pair:
    """Two concepts whose maps are compared on every picture of a profession.

    Attributes:
        axis: Name of the demographic axis; empty for control words.
        word: The word whose map is compared with the profession's.
        control: Empty for a demographic word, else ``"function"``, ``"object"``, ``"person"``,
            ``"synonym"`` or ``"swapped"``.
        profession_prompt: Attribution prompt of the profession's map.
        word_prompt: Attribution prompt of the word's map; the same one in the joint form.
    """

    axis: str
    word: str
    control: str
    profession_prompt: AttributionPrompt
    word_prompt: AttributionPrompt


@dataclass(frozen=True)
class Picture:
    """One picture to draw: its profession, the seed of its generator, its condition."""

    profession: str
    seed: int
    condition: str = PLAIN


class AuditPlan(PlanSettings):
    """Everything that decides the records of an audit: immutable, and complete once made.

    ``AuditPlan.model_fields[name].description`` says what each setting means.

    Raises:
        pydantic.ValidationError: A setting is out of range, unknown or contradicts another.

    Example:
        >>> plan = AuditPlan(professions=["doctor", "architect"], axes="gender", seeds=[0, 1])
        >>> plan.prompt("architect")
        'A photo of the face of an architect'
    """

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Writes out the defaults that depend on other settings."""
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        testbed = filled.get("model", TESTBED) == TESTBED
        filled["professions"] = texts.professions_of(filled.get("professions"), testbed=testbed)
        filled["axes"] = texts.axes_of(filled.get("axes", "gender"))
        if filled.get("device", "auto") == "auto":
            import torch

            filled["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        if filled.get("preset") == "paper":
            filled = {**_PAPER, **_PAPER_DEFAULTS, **filled}
        # The testbed reproduces its planted shares without guidance, and guidance amplifies them.
        filled.setdefault("guidance_scale", 1.0 if testbed else 7.5)
        filled.setdefault("batch_size", 16 if testbed and filled.get("engine") is None else 8)
        _fill_rounds(filled)
        given = filled.get("conditions", (PLAIN,))
        if isinstance(given, (str, list, tuple)):
            filled["conditions"], filled["interventions"] = texts.split_conditions(
                given, filled.get("interventions") or {}
            )
            if GUIDED in filled["conditions"] and filled.get("energy") is None:
                filled["energy"] = {}
        filled.setdefault("classifier", TESTBED if testbed else "none")
        if "controls" not in filled:
            template = filled.get("attribution_template", presets.ATTRIBUTION_TEMPLATE)
            filled["controls"] = texts.default_controls(
                template, filled["professions"], testbed=testbed
            )
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_preset(self)
        _check_rounds(self)
        self._check_conditions()
        for name, guided in (
            ("branch 'uncond'", self.branch == "uncond"),
            ("the sweep 'branch'", "branch" in self.sweeps),
        ):
            if guided and self.guidance_scale <= 1:
                raise ValueError(
                    f"{name} needs classifier-free guidance: expected guidance_scale > 1, got "
                    f"{self.guidance_scale:g}"
                )
        if self.revision is not None and self.model == TESTBED:
            raise ValueError(f"the testbed has no revisions, got {self.revision!r}")
        for profession in self.professions:
            for pair in (*self.pairs(profession), *self.control_pairs(profession)):
                if pair.control not in ("synonym", "swapped"):
                    for prompt in (pair.profession_prompt, pair.word_prompt):
                        for concept in prompt.concepts:
                            texts.check_once(prompt.text, concept)
        return self

    def _check_conditions(self) -> None:
        if self.energy is not None and self.energy.pairs is not None:
            raise ValueError("`energy.pairs` are those that the audit measures: leave them out")
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
        separate = [name for name in self.conditions if self.pipeline_of(name) is not None]
        if self.engine is not None and separate:
            raise ValueError(
                "an engine stands in the place of one UNet, got conditions with a pipeline of "
                f"their own: {separate}"
            )
        if self.compile and GUIDED in self.conditions:
            raise ValueError(
                "the condition 'guided' cannot be drawn with `compile`: the gradient of a UNet "
                "that torch 2.13's inductor compiled was wrong on the CPU (docs/guidance.md)"
            )
        if self.energy is not None and GUIDED not in self.conditions:
            raise ValueError(
                f"`energy` belongs to the condition 'guided', got conditions {self.conditions}"
            )

    def template(self, condition: str = PLAIN) -> str:
        """Returns the template of the prompts that draw under a condition."""
        text = self.interventions.get(condition, f"prompt:{self.prompt_template}")
        kind, target = texts.parse(text)
        return target if kind == "prompt" else self.prompt_template

    def prompt(self, profession: str, condition: str = PLAIN) -> str:
        """Returns the text that draws a picture of ``profession`` under a condition."""
        return self.template(condition).format(profession=presets.with_article(profession))

    def pipeline_of(self, condition: str) -> str | None:
        """Returns the condition whose pipeline draws, or ``None`` for the plan's model."""
        text = self.interventions.get(condition)
        return None if text is None or texts.parse(text)[0] == "prompt" else condition

    def pairs(self, profession: str) -> list[Pair]:
        """Returns the pairs of a profession with every demographic word."""
        return [
            self._pair(profession, axis, word)
            for axis, words in self.axes.items()
            for word in words
        ]

    def control_pairs(self, profession: str) -> list[Pair]:
        """Returns the control pairs of a profession; none if the plan turns them off.

        Example:
            >>> plan = AuditPlan(professions=["doctor"])
            >>> [(pair.control, pair.word) for pair in plan.control_pairs("doctor")][:3]
            [('function', 'in'), ('object', 'coat'), ('person', 'person')]
        """
        if self.controls is None:
            return []
        words = dict(self.controls.words)
        if profession in self.controls.synonyms:
            words["synonym"] = self.controls.synonyms[profession]
        pairs = [
            self._pair(profession, "", word, kind)
            for kind, word in words.items()
            if word != profession
        ]
        template = self.attribution_template
        if self.controls.swapped and isinstance(template, str):
            bare = {"demographic": profession, "a_demographic": presets.with_article(profession)}
            for axis, words_of_axis in self.axes.items():
                for word in words_of_axis:
                    text = template.format(profession=presets.with_article(word), **bare)
                    name = f"{text} [{profession}, {word}, swapped]"
                    prompt = AttributionPrompt(text, (profession, word), name)
                    pairs.append(Pair(axis, word, "swapped", prompt, prompt))
        return pairs

    def _pair(self, profession: str, axis: str, word: str, control: str = "") -> Pair:
        first = {"profession": presets.with_article(profession)}
        second = {"demographic": word, "a_demographic": presets.with_article(word)}
        template = self.attribution_template
        if isinstance(template, str):
            text = template.format(**first, **second)
            joint = AttributionPrompt(text, (profession, word), f"{text} [{profession}, {word}]")
            return Pair(axis, word, control, joint, joint)
        own, other = template[0].format(**first), template[1].format(**second)
        return Pair(
            axis,
            word,
            control,
            AttributionPrompt(own, (profession,), f"{own} [{profession}]"),
            AttributionPrompt(other, (word,), f"{other} [{word}]"),
        )

    @property
    def containment_layers(self) -> tuple[str, ...]:
        """Layers on whose maps containment is measured."""
        return self.containment.layers or self.layers or ("up_blocks",)

    @property
    def setting(self) -> str:
        """The main setting of the plan's measure, as the measurements name it."""
        if self.measure == "containment":
            return setting_of(self.containment.fractions)
        return setting_of(self.fractions[:1])

    @property
    def sequence(self) -> tuple[int, ...]:
        """The seeds that may be drawn, in order: every profession has a first part of them."""
        further = max(self.seeds) + 1
        count = (self.max_seeds or len(self.seeds)) - len(self.seeds)
        return self.seeds + tuple(range(further, further + count))

    def pictures(
        self, professions: Iterable[str] | None = None, seeds: Iterable[int] | None = None
    ) -> Iterator[Picture]:
        """Yields pictures in the plan's order: by condition, then profession, then seed.

        Args:
            professions: Default all of the plan.
            seeds: Default those of the plan, which with a precision are the first round's.
        """
        words = self.professions if professions is None else tuple(professions)
        numbers = self.seeds if seeds is None else tuple(seeds)
        for condition in self.conditions:
            for profession in words:
                for seed in numbers:
                    yield Picture(profession, seed, condition)

    def chunks(self, pictures: Iterable[Picture] | None = None) -> list[list[Picture]]:
        """Returns pictures in the batches they are drawn in.

        A batch goes over professions and over conditions that one pipeline draws in one way: those
        that change no more than the prompt.

        Args:
            pictures: Default all of the plan; with a precision those of the first round.
        """
        alike: dict[tuple[str | None, bool], list[Picture]] = {}
        for picture in self.pictures() if pictures is None else pictures:
            way = (self.pipeline_of(picture.condition), picture.condition == GUIDED)
            alike.setdefault(way, []).append(picture)
        return [
            together[i : i + self.batch_size]
            for together in alike.values()
            for i in range(0, len(together), self.batch_size)
        ]

    def differences(self, other: AuditPlan) -> list[str]:
        """Returns the fields in which two plans differ, each as ``"name: mine, theirs"``."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [f"{k}: {mine[k]!r}, {theirs[k]!r}" for k in mine if mine[k] != theirs[k]]

    def to_yaml(self) -> str:
        """Returns the complete plan as YAML; `from_yaml` reads it back unchanged."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, path: str | Path) -> AuditPlan:
        """Reads a plan, complete or partial, from a YAML file."""
        return cls(**read_settings(path))


def setting_of(fractions: Sequence[float]) -> str:
    """Returns fractions of a measure as the measurements name them: ``"0.05 in 0.1"``."""
    return " in ".join(f"{fraction:.10g}" for fraction in fractions)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads the settings in a YAML file, not yet checked."""
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} must hold a mapping of plan settings, got {type(settings).__name__}"
        )
    return settings


def explain(error: ValidationError) -> str:
    """Returns a validation error as one line: the setting, what was expected, what came."""
    lines = []
    for detail in error.errors():
        where = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        got = "" if "got" in message else f", got {detail['input']!r}"
        lines.append(f"{where}: {message}{got}" if where else message)
    return "; ".join(lines)


def _fill_rounds(settings: dict[str, Any]) -> None:
    """Writes out the first round and the most seeds of a plan with a precision."""
    try:
        precision = float(settings.get("precision", math.nan))
    except (TypeError, ValueError):  # none, or what the field refuses
        return
    if not 1e-4 <= precision < 0.5:
        return
    # no profession has enough before about 1 / precision pictures (`statistics.half_width`)
    about = math.ceil(1 / precision - 1e-9)  # 1 / 0.02 may lie above 50
    if settings.get("seeds") is None:
        settings["seeds"] = tuple(range(max(20, about)))
    if settings.get("max_seeds") is None and hasattr(settings["seeds"], "__len__"):
        settings["max_seeds"] = max(20 * about, len(settings["seeds"]))


def _check_preset(plan: AuditPlan) -> None:
    if plan.preset != "paper":
        return
    for name, value in _PAPER.items():
        if getattr(plan, name) != value:
            raise ValueError(
                f"preset 'paper' means {name}={value!r}, got {getattr(plan, name)!r}; "
                "leave it out or use preset 'default'"
            )
    if GUIDED in plan.conditions:
        raise ValueError(
            "preset 'paper' measures; its energy (per-row masks of 20 iterations) is not "
            "one that guides. Use preset 'default' for the condition 'guided'"
        )


def _check_rounds(plan: AuditPlan) -> None:
    if plan.precision is None:
        if plan.max_seeds is not None:
            raise ValueError(
                f"`max_seeds` belongs to a precision, got {plan.max_seeds} and no precision: "
                "`seeds` alone says how many"
            )
        return
    if len(plan.seeds) < _FIRST_ROUND:
        raise ValueError(
            "seeds: with a precision they are the first round, and the spread is judged by "
            f"them: expected at least {_FIRST_ROUND}, got {len(plan.seeds)}"
        )
    if plan.max_seeds is None or plan.max_seeds < len(plan.seeds):
        raise ValueError(
            f"max_seeds: expected at least the first round's {len(plan.seeds)}, got "
            f"{plan.max_seeds}"
        )
    if (last := max(plan.seeds) + plan.max_seeds - len(plan.seeds)) >= 2**63:
        raise ValueError(
            f"max_seeds: seeds must lie between 0 and 2**63 - 1, the last round would end at {last}"
        )
