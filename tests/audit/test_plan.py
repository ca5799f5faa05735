"""The plan: what is wrong is said, defaults follow the model, prompts and batches."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from biasmap_fast import testbed
from biasmap_fast.audit import AuditPlan, run_audit
from biasmap_fast.audit.plan import Picture, explain

LAYERS = ["up_blocks"]


def message(error) -> str:
    return explain(error.value) if isinstance(error.value, ValidationError) else str(error.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fractions": [0.3, 1]}, r"fractions\.1: .*less than 1, got 1"),
        ({"fractions": [0.3, 0.3]}, r"expected each one once, got \[0.3"),
        ({"professions": []}, "professions: expected at least one, got none"),
        ({"professions": ["doctor", " "]}, r"professions: expected words, got \[' '\]"),
        ({"professions": "doktor"}, r"one of the lists \['biasmap'\], got 'doktor'"),
        ({"seeds": [1, 1]}, r"seeds: expected each one once, got \[1\] more than once"),
        ({"seeds": [-1]}, r"seeds\.0: .*greater than or equal to 0, got -1"),
        ({"seeds": [2**63]}, r"seeds\.0: .*got 9223372036854775808"),
        ({"axes": ["colour"]}, r"expected one of \['gender', 'race'\] or .*, got 'colour'"),
        ({"axes": ["=man,woman"]}, "got '=man,woman'"),
        ({"axes": {}}, "at least one demographic axis, got none"),
        ({"axes": {"gender": []}}, "axis 'gender' needs at least one word"),
        ({"axes": ["gender", "gender"]}, "each axis once, got 'gender'"),
        ({"prompt_template": "a photo"}, r"needs \{profession\} and nothing else in braces"),
        ({"prompt_template": "a {noun}"}, r"needs \{profession\}.*got 'a \{noun\}'"),
        ({"prompt_template": "{profession:>300000000}"}, r"needs \{profession\} and nothing else"),
        ({"prompt_template": "{profession!r}"}, r"needs \{profession\} and nothing else"),
        ({"prompt_template": "photo of a {profession}"}, "brings its article"),
        ({"prompt_template": "{profession"}, "cannot be read"),
        ({"attribution_template": "{profession}"}, r"\{a_demographic\} or \{demographic\}"),
        ({"steps": 0}, "steps: .*greater than or equal to 1, got 0"),
        ({"dtype": "int8"}, "dtype: .*'float32', 'float16' or 'bfloat16', got 'int8'"),
        ({"steeps": 3}, "steeps: Extra inputs are not permitted, got 3"),
        ({"branch": "uncond", "guidance_scale": 1}, "expected guidance_scale > 1, got 1"),
        ({"sweeps": ["branch"], "guidance_scale": 1}, "'branch' needs classifier-free guidance"),
        ({"preset": "paper", "branch": "cond"}, "preset 'paper' means branch='uncond', got 'cond'"),
        ({"preset": "paper", "measure": "containment"}, "means measure='iou', got 'containment'"),
        ({"preset": "paper", "conditions": ["plain", "guided"]}, "preset 'paper' measures"),
        ({"model": "testbed", "revision": "main"}, "testbed has no revisions, got 'main'"),
        ({"professions": ["tall man"]}, "the concept 'man' once in .* got it 2 times"),
        ({"controls": {"words": {"object": "photo"}}}, "the concept 'photo' once"),
        ({"controls": {"words": {"animal": "cat"}}}, r"of the kinds \['function', .*got \['anima"),
        ({"temperature": 0}, "temperature: .*got 0"),
        ({"containment": {"fractions": (0.05, 1.0)}}, r"fractions\.1: .*less than 1"),
        ({"containment": {"fractions": (0.05,)}}, "fractions"),
        ({"containment": {"layer": LAYERS}}, "containment.layer: Extra inputs"),
        ({"conditions": []}, "conditions: expected at least one, got none"),
        ({"conditions": None}, "conditions: Input should be a valid tuple"),
        ({"conditions": ["plain", "plain"]}, r"got \['plain'\] more than once"),
        ({"conditions": ["fair"]}, r"conditions: expected 'plain', 'guided' or .*got 'fair'"),
        ({"conditions": ["fair=mine"]}, "'prompt:TEMPLATE', 'lora:PATH', 'model:ID' or 'module:"),
        ({"conditions": ["fair=lora:"]}, "got 'lora:'"),
        ({"conditions": ["a/b=mine:f"]}, "part of file names.*got 'a/b'"),
        ({"conditions": ["plain=mine:f"]}, "'plain' has a meaning already"),
        ({"conditions": ["fair=prompt:a doctor"]}, r"a template needs \{profession\}"),
        ({"conditions": ["fair=a:f", "fair=b:f"]}, "'fair' is given twice"),
        ({"interventions": {"fair": "mine:f"}}, "not asked for"),
        ({"conditions": ["x=mine:f"], "engine": "e"}, "in the place of one UNet.*'x'"),
        ({"energy": {"scale": 1}}, r"`energy` belongs to the condition 'guided', got conditions"),
        ({"conditions": ["guided"], "energy": {"scale": math.inf}}, r"energy\.scale: .*finite"),
        ({"conditions": ["guided"], "energy": {"strength": 1}}, r"energy\.strength: Extra inputs"),
        ({"conditions": ["guided"], "compile": True}, "cannot be drawn with `compile`"),
        ({"classifier": "clip"}, "expected 'none', 'testbed', 'clip:DIR'"),
        ({"precision": 0}, "precision: .*greater than or equal to 0.0001, got 0"),
        ({"precision": 5e-324}, "precision: .*greater than or equal to 0.0001"),
        ({"precision": 0.5}, "precision: .*less than 0.5, got 0.5"),
        ({"precision": math.nan}, "precision: .*got nan"),
        ({"precision": "fine"}, "precision: .*valid number.*got 'fine'"),
        ({"max_seeds": 20}, "`max_seeds` belongs to a precision, got 20 and no precision"),
        ({"precision": 0.1, "seeds": range(9)}, "the first round, .*: expected at least 10, got 9"),
        (
            {"precision": 0.1, "seeds": range(10), "max_seeds": 9},
            "max_seeds: expected at least the first round's 10, got 9",
        ),
        (
            {"precision": 0.1, "seeds": [2**63 - 9, *range(9)], "max_seeds": 20},
            r"between 0 and 2\*\*63 - 1, the last round would",
        ),
        (
            {"precision": 0.1, "seeds": range(10), "max_seeds": 10**12},
            "max_seeds: .*less than or equal to 10000000",
        ),
    ],
)
def test_plan_says_what_is_wrong(tiny_plan, changes, expected):
    with pytest.raises(ValidationError) as error:
        tiny_plan(**changes)
    text = message(error)
    assert re.search(expected, text), text
    assert "\n" not in text


def test_something_else_than_a_plan_is_refused(tmp_path):
    with pytest.raises(TypeError, match="expected an AuditPlan, got NoneType"):
        run_audit(None, tmp_path)


def test_plan_is_complete_and_survives_yaml(tiny_plan, tmp_path):
    plan = tiny_plan(
        layers=LAYERS,
        attribution_template=["{profession}", "{a_demographic}"],
        conditions=["plain", "guided", "drawn=prompt:a drawing of {profession}", "x=mine:shifted"],
    )
    path = tmp_path / "plan.yaml"
    path.write_text(plan.to_yaml(), encoding="utf-8")
    assert AuditPlan.from_yaml(path) == plan
    assert plan.energy.scale == 100.0
    with pytest.raises(ValidationError, match="frozen"):
        plan.steps = 3


def test_every_setting_says_what_it_means():
    fields = AuditPlan.model_fields
    assert len(fields) == len(AuditPlan().model_dump())
    assert [name for name, field in fields.items() if not field.description] == []


def test_plan_defaults_follow_the_model():
    bed = AuditPlan()
    assert bed.professions == tuple(row.profession for row in testbed.truth())
    assert (bed.guidance_scale, bed.batch_size, bed.fractions) == (1.0, 16, (0.3,))
    assert bed.controls.words["object"] == "coat"
    other = AuditPlan(model="some/model")
    assert (len(other.professions), other.guidance_scale) == (19, 7.5)
    paper = AuditPlan(model="some/model", preset="paper")
    assert (paper.branch, paper.evaluation_size, paper.soft_mask) == ("uncond", 512, "paper")
    assert (paper.steps, paper.guidance_scale, len(paper.seeds)) == (50, 7.0, 100)
    assert (paper.measure, paper.setting) == ("iou", "0.3")
    said = AuditPlan(
        model="tiny",
        prompt_template="{profession}",
        attribution_template="{profession} in {demographic}",
    )
    assert "function" not in said.controls.words  # the template has the word


def test_plan_writes_articles_and_prompts(tiny_plan):
    plan = tiny_plan(professions=["architect", "judge"])
    assert plan.prompt("architect") == "a photo of an architect"
    first, second = plan.pairs("judge")
    assert first.word_prompt.text == "a photo of a judge and man"
    assert second.profession_prompt is second.word_prompt
    apart = tiny_plan(
        attribution_template=["a photo of {profession}", "a photo of {a_demographic}"],
        axes="age=elder,child",
    )
    pair = apart.pairs("doctor")[0]
    assert pair.profession_prompt.text == "a photo of a doctor"
    assert pair.word_prompt.text == "a photo of an elder"
    assert (pair.profession_prompt.concepts, pair.word_prompt.concepts) == (("doctor",), ("elder",))
    swapped = [one for one in plan.control_pairs("judge") if one.control == "swapped"]
    assert [one.word_prompt.text for one in swapped] == [
        "a photo of a man and judge",
        "a photo of a woman and judge",
    ]
    assert [one.control for one in apart.control_pairs("doctor")].count("swapped") == 0


def test_chunks_depend_on_the_plan_alone(tiny_plan):
    plan = tiny_plan(professions=["doctor", "pilot", "judge"], seeds=[3, 0, 8], batch_size=4)
    chunks = plan.chunks()
    assert [len(chunk) for chunk in chunks] == [4, 4, 1]
    assert [picture for chunk in chunks for picture in chunk] == list(plan.pictures())
    assert chunks[0][:2] == [Picture("doctor", 3), Picture("doctor", 0)]


def test_batches_go_over_prompts_and_not_over_pipelines(tiny_plan):
    listed = ["plain", "guided", "drawn=prompt:a drawing of {profession}", "x=mine:shifted"]
    plan = tiny_plan(conditions=listed, seeds=[0, 1], batch_size=3)
    assert plan.conditions == ("plain", "guided", "drawn", "x")
    assert plan.prompt("doctor", "drawn") == "a drawing of a doctor"
    assert plan.prompt("doctor", "x") == "a photo of a doctor"
    assert [sorted({p.condition for p in chunk}) for chunk in plan.chunks()] == [
        ["plain"],
        ["drawn", "plain"],
        ["drawn"],
        ["guided"],
        ["guided"],
        ["x"],
        ["x"],
    ]


def test_many_seeds_take_no_longer_than_they_must():
    began = time.process_time()
    plan = AuditPlan(professions=["doctor"], precision=0.01, seeds=range(50_000), max_seeds=100_000)
    assert len(plan.sequence) == 100_000
    assert time.process_time() - began < 5  # 46 s when it was quadratic


@pytest.mark.parametrize(
    ("text", "expected"), [("[1, 2]", "must hold a mapping"), ("a: [", "is not valid YAML")]
)
def test_plan_file_that_is_no_plan(tmp_path, text, expected):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected):
        AuditPlan.from_yaml(path)


@pytest.mark.slow
def test_documented_calls_have_the_types_that_a_user_gives(tmp_path):
    pytest.importorskip("mypy")
    code = """
from __future__ import annotations

from biasmap_fast.audit import AuditPlan

plan = AuditPlan(professions=["doctor"], axes="gender", seeds=range(3))
AuditPlan(professions="biasmap", axes={"age": ["old", "young"]}, fractions=[0.3], sweeps=["step"])
AuditPlan(conditions=["plain", "guided"], energy={"scale": 3.0}, containment={"layers": ["up"]})
words: tuple[str, ...] = plan.professions
axes: dict[str, tuple[str, ...]] = plan.axes
AuditPlan(professions=3)  # type: ignore[arg-type]
AuditPlan(profession=["doctor"])  # type: ignore[call-arg]
"""
    (tmp_path / "user.py").write_text(code)
    package = Path(testbed.__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--config-file=",
    ]
    command += ["--ignore-missing-imports", f"--cache-dir={tmp_path}", str(tmp_path / "user.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"MYPYPATH": str(package), "PATH": ""}
    )
    assert done.returncode == 0, done.stdout + done.stderr
