"""Conditions of prompts, LoRA, checkpoints and pipeline factories."""

from __future__ import annotations

import hashlib
import inspect
import json
import textwrap

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast.audit import (
    AuditError,
    ConditionError,
    conditions,
    run_audit,
    worker,
)
from biasmap_fast.audit.records import part_path
from biasmap_fast.pipelines import ModelError

FACTORIES = """
    from contextlib import contextmanager

    import torch

    import biasmap_fast as bm

    entered = []


    def shifted(pipe):
        with torch.no_grad():
            pipe.unet.conv_out.bias.add_(0.05)
        return pipe


    @contextmanager
    def inside(pipe):
        entered.append("in")
        def shift(module, args, output):
            return output + 0.05 * torch.ones_like(output)
        handle = pipe.unet.conv_out.register_forward_hook(shift)
        try:
            yield
        finally:
            handle.remove()
            entered.append("out")


    def guided(pipe):
        prompt = bm.AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))
        return bm.guide(pipe, prompt, bm.Energy(scale=30.0))


    def raises(pipe):
        return 1 / 0


    def nothing(pipe):
        return None


    given = None


    def ready():
        return given
"""


@pytest.fixture
def make_plan(tiny_plan):
    """Makes a plan of the condition "plain" and the listed ones."""
    kept = {"save_maps": "none", "save_pictures": "none", "controls": None, "steps": 2}

    def make(*listed, **changes):
        settings = {"conditions": ["plain", *listed], "seeds": [0, 1], "batch_size": 3}
        return tiny_plan(**(settings | kept | changes))

    return make


@pytest.fixture(scope="module")
def pipe(make_sd):
    return make_sd()


@pytest.fixture
def folder(tmp_path, monkeypatch, quick):
    """A working directory with a user's module."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(FACTORIES), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def plain(make_plan, folder, pipe):
    """The run without interventions."""
    return run_audit(make_plan(), "plain", pipe=pipe, progress=False)


def soft(result, condition):
    rows = result.measurements
    chosen = (rows["condition"] == condition) & (rows["measure"] == "soft_iou")
    return torch.tensor(rows.loc[chosen, "value"].to_numpy())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("lora:a/b.safetensors@0.5", ("lora", "a/b.safetensors@0.5")),
        ("prompt:a drawing of {profession}", ("prompt", "a drawing of {profession}")),
        ("model:some/model@main", ("model", "some/model@main")),
        ("mine.factories:fair", ("function", "mine.factories:fair")),
        ("a/model.py:fair", ("function", "a/model.py:fair")),
    ],
)
def test_forms_of_an_intervention(given, expected):
    assert conditions.parse(given) == expected


def test_a_prompt_draws_what_it_says(make_plan, folder, pipe):
    found = run_audit(
        make_plan("drawn=prompt:a drawing of {profession}"), "run", pipe=pipe, progress=False
    )
    alone = run_audit(
        make_plan(conditions=["plain"], prompt_template="a drawing of {profession}"),
        "alone",
        pipe=pipe,
        progress=False,
    )
    torch.testing.assert_close(soft(found, "drawn"), soft(alone, "plain"), rtol=1e-4, atol=1e-5)
    drawn = found.pictures[found.pictures["condition"] == "drawn"]
    assert set(drawn["prompt"]) == {"a drawing of a doctor", "a drawing of a pilot"}


def test_a_report_of_a_condition_without_energy(make_plan, tmp_path, pipe):
    plan = make_plan("drawn=prompt:a drawing of {profession}")
    assert run_audit(plan, tmp_path, pipe=pipe, progress=False).report.exists()


def test_functions_get_a_pipeline_of_their_own(make_plan, folder, pipe, plain):
    weights = [p.clone() for p in pipe.unet.parameters()]
    found = run_audit(
        # the one that changes weights in place comes first
        make_plan(conditions=["x=mine:shifted", "y=mine.py:inside", "z=mine:guided", "plain"]),
        "run",
        pipe=pipe,
        progress=False,
    )
    assert all(map(torch.equal, pipe.unet.parameters(), weights))
    assert soft(found, "plain").equal(soft(plain, "plain"))
    # weights and a hook that do the same
    torch.testing.assert_close(soft(found, "x"), soft(found, "y"), rtol=1e-3, atol=1e-4)
    assert (soft(found, "x") - soft(plain, "plain")).abs().max() > 1e-3
    assert (soft(found, "z") - soft(plain, "plain")).abs().max() > 1e-3
    said = {
        name: json.loads((folder / "run" / "conditions" / f"{name}.json").read_text())
        for name in ("x", "y", "z")
    }
    assert said["x"]["intervention"] == "mine:shifted"
    assert len(said["x"]["source_sha256"]) == 64
    base = json.loads((folder / "run" / "environment.json").read_text())["weights_sha256"]
    assert said["y"]["weights_sha256"] == base != said["x"]["weights_sha256"]
    inside = inspect.unwrap(conditions.find("mine.py:inside", str(folder)))
    assert inside.__globals__["entered"] == ["in", "out"] * 2  # checked before drawing
    source = (folder / "mine.py").read_bytes()
    assert said["y"]["source_sha256"] == hashlib.sha256(source).hexdigest()


def test_a_function_without_parameters_brings_a_pipeline(make_plan, folder, pipe, make_sd):
    import mine

    mine.given = make_sd(unet_config={"layers_per_block": 2})
    plan = make_plan("other=mine:ready")
    found = run_audit(plan, "run", pipe=pipe, progress=False)
    plain = run_audit(make_plan(), "alone", pipe=mine.given, progress=False)
    assert soft(found, "other").equal(soft(plain, "plain"))
    # the same plan with other weights under the same name does not go on
    part_path(folder / "run", "pictures", 2).unlink()
    mine.given = make_sd()
    with pytest.raises(AuditError, match="another weights_sha256 of the condition 'other'"):
        run_audit(plan, "run", pipe=pipe, progress=False)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("x=mine:raises", "mine:raises raised ZeroDivisionError: division by zero"),
        ("x=model:none/there@main", "none/there"),
        ("x=mine:nothing", "must return a pipeline with a UNet or a context manager, got NoneType"),
        ("x=mine:shift", r"mine has no function 'shift'; it has \["),
        ("x=none.there:f", "cannot be imported from .*: ModuleNotFoundError"),
        ("x=there.py:f", "cannot be imported from .*there.py"),
        ("x=lora:none.safetensors", "the LoRA 'none.safetensors' cannot be loaded"),
    ],
)
def test_conditions_that_cannot_be_made_are_found_before_the_first_is_drawn(
    make_plan, folder, pipe, stops, monkeypatch, listed, expected
):
    monkeypatch.setattr(worker, "load_pipeline", no_model)
    drawn = stops(9)
    with pytest.raises((ConditionError, ModelError), match=expected):
        run_audit(make_plan(listed), "run", pipe=pipe, progress=False)
    assert drawn == []


def no_model(name, **options):
    raise ModelError(f"there is no model {name}")


def test_lora_and_another_checkpoint(make_plan, folder, pipe, make_sd, monkeypatch):
    from peft import LoraConfig

    trained = make_sd()
    trained.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in trained.unet.named_parameters():
            if "lora" in name:
                # small ones: batches of one and three then differ by rounding alone
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained.unet))
    trained.save_lora_weights("lora", unet_lora_layers=layers)
    other = make_sd(unet_config={"layers_per_block": 2})

    def load(model, **options):
        assert model == "some/model"
        assert options["revision"] == "main"
        return other

    monkeypatch.setattr(worker, "load_pipeline", load)
    listed = ["full=lora:lora", "none=lora:lora@0", "other=model:some/model@main"]
    found = run_audit(make_plan(*listed), "run", pipe=pipe, progress=False)
    plain = soft(found, "plain")
    torch.testing.assert_close(soft(found, "none"), plain, rtol=1e-4, atol=1e-5)
    assert (soft(found, "full") - plain).abs().max() > 1e-3
    prompt = bm.AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))
    with bm.attribute(trained, prompt) as recorder:
        trained(  # the same batch: random LoRA weights amplify the last bits
            ["a photo of a doctor", "a photo of a doctor", "a photo of a pilot"],
            generator=[torch.Generator().manual_seed(seed) for seed in (0, 1, 0)],
            num_inference_steps=2,
            output_type="latent",
        )
    maps = recorder.maps()
    expected = bm.soft_iou(maps["doctor"], maps["man"])[:1]
    torch.testing.assert_close(soft(found, "full")[:1], expected.double(), rtol=1e-3, atol=1e-4)
    alone = run_audit(make_plan(), "alone", pipe=other, progress=False)
    assert soft(found, "other").equal(soft(alone, "plain"))
