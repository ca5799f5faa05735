"""What guidance does and notes in a run, and what it must leave alone."""

from __future__ import annotations

import csv
import math

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import AttributionPrompt

PROMPT = AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))
THREE = AttributionPrompt("a photo of a doctor and man", ("photo", "doctor", "man"))


def draw(pipe, prompt="a photo of a doctor", seeds=(1, 2), **options):
    settings = {"num_inference_steps": 4, "height": 32, "width": 32, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe([prompt] * len(seeds), generator=generators, **(settings | options)).images


def test_scale_zero_measures_and_leaves_pictures_bit_identical(sd_pipe):
    before = draw(sd_pipe)
    with bm.guide(sd_pipe, PROMPT, bm.Energy(scale=0.0)) as guidance:
        during = draw(sd_pipe)
    assert torch.equal(before, during)
    assert len(guidance.ledger) == 8
    assert {row.reason for row in guidance.ledger} == {"scale is 0"}
    assert all(0 < row.energy < 1 for row in guidance.ledger)


def test_leaving_restores_the_unet(sd_pipe):
    before = draw(sd_pipe)
    sd_pipe.unet.conv_in.weight.requires_grad_(False)
    trainable = [p.requires_grad for p in sd_pipe.unet.parameters()]
    for error in (None, KeyError):
        try:
            with bm.guide(sd_pipe, PROMPT):
                assert not torch.equal(before, draw(sd_pipe))
                if error:
                    raise error("stop")
        except KeyError:
            pass
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in sd_pipe.unet.modules())
        assert trainable == [p.requires_grad for p in sd_pipe.unet.parameters()]
        assert all(p.grad is None for p in sd_pipe.unet.parameters())
        assert torch.equal(before, draw(sd_pipe))


def test_an_image_does_not_depend_on_its_neighbours(sd_pipe):
    # at scale 100 the rounding of another batch size is amplified to .003 on some processors
    energy = bm.Energy(scale=20.0)
    with bm.guide(sd_pipe, PROMPT, energy) as together:
        batch = draw(sd_pipe, seeds=(1, 2, 3))
    with bm.guide(sd_pipe, PROMPT, energy) as alone:
        one = draw(sd_pipe, seeds=(2,))
    torch.testing.assert_close(one[0], batch[1], rtol=1e-3, atol=1e-3)
    assert (one - draw(sd_pipe, seeds=(2,))).abs().max() > 0.02  # what guidance changes
    own = [row for row in together.ledger if row.image == 1]
    for found, expected in zip(own, alone.ledger, strict=True):
        assert found.energy == pytest.approx(expected.energy, rel=1e-3)


def test_one_prompt_an_image(sd_pipe):
    other = AttributionPrompt("a photo and man", ("photo", "man"))
    with bm.guide(sd_pipe, [PROMPT, other, PROMPT]):
        mixed = draw(sd_pipe, seeds=(1, 2, 3))
    with bm.guide(sd_pipe, other):
        single = draw(sd_pipe, seeds=(2,))
    torch.testing.assert_close(single[0], mixed[1], rtol=1e-3, atol=1e-3)
    with (
        pytest.raises(ValueError, match=r"one attribution prompt or one per image \(2\), got 3"),
        bm.guide(sd_pipe, [PROMPT, other, PROMPT]),
    ):
        draw(sd_pipe)


def test_guidance_lowers_the_energy_over_a_run(sd_pipe):
    with bm.guide(sd_pipe, PROMPT, bm.Energy(scale=0.0)) as plain:
        draw(sd_pipe, num_inference_steps=10)
    with bm.guide(sd_pipe, PROMPT, bm.Energy(scale=20.0)) as guided:
        draw(sd_pipe, num_inference_steps=10)
    for image in (0, 1):
        before, after = (
            [row.energy for row in run.ledger if row.image == image] for run in (plain, guided)
        )
        assert before[0] == pytest.approx(after[0], rel=1e-4)
        assert after[-1] < before[-1]


def test_start_stop_and_every(sd_pipe):
    with bm.guide(sd_pipe, PROMPT, bm.Energy(start=0.25, stop=0.75, every=2)) as guidance:
        draw(sd_pipe, num_inference_steps=8)
    assert [row.call for row in guidance.ledger if row.image == 0] == [2, 4]


def test_clipping(sd_pipe):
    with bm.guide(sd_pipe, PROMPT, bm.Energy(clip=1e-3)) as guidance:
        draw(sd_pipe, num_inference_steps=1)
    for row in guidance.ledger:
        assert row.clip_factor * row.gradient_norm == pytest.approx(1e-3, rel=1e-4)
        assert row.applied
    with bm.guide(sd_pipe, PROMPT, bm.Energy(clip=None)) as guidance:
        draw(sd_pipe, num_inference_steps=1)
    assert all(row.clip_factor == 1.0 for row in guidance.ledger)


def test_published_skip_rule_is_counted(sd_pipe, monkeypatch):
    import biasmap_fast.evaluators as module

    original = module.soft_iou
    monkeypatch.setattr(module, "soft_iou", lambda *args: original(*args) * 1e6)
    before = draw(sd_pipe)
    with bm.guide(sd_pipe, PROMPT, bm.Energy(clip="skip"), strict=False) as guidance:
        after = draw(sd_pipe)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)  # split forward passes
    assert {row.reason for row in guidance.ledger} == {"gradient norm >= 1 (clip='skip')"}
    assert not any(row.applied for row in guidance.ledger)
    with (
        pytest.raises(RuntimeError, match=r"image 0 was skipped in 4 of 4 calls \(gradient norm"),
        bm.guide(sd_pipe, PROMPT, bm.Energy(clip="skip")),
    ):
        draw(sd_pipe)


def test_gradients_that_are_not_finite_are_counted_skips(sd_pipe, monkeypatch):
    import biasmap_fast.evaluators as module

    original = module.soft_iou
    factor = torch.tensor([[math.nan], [1.0]])  # the first image only
    monkeypatch.setattr(module, "soft_iou", lambda *args: original(*args) * factor)
    with bm.guide(sd_pipe, PROMPT, strict=False) as guidance:
        pictures = draw(sd_pipe)
    assert bool(pictures.isfinite().all())
    reasons = {
        image: {row.reason for row in guidance.ledger if row.image == image} for image in (0, 1)
    }
    assert reasons == {0: {"gradient is not finite"}, 1: {""}}


def test_recorder_sees_each_call_once_inside_guidance(sd_pipe):
    for nesting in ("outside", "inside"):
        guidance = bm.guide(sd_pipe, PROMPT, bm.Energy(scale=1e-9))
        recorder = bm.attribute(sd_pipe, PROMPT)
        first, second = (recorder, guidance) if nesting == "outside" else (guidance, recorder)
        with first, second:
            draw(sd_pipe)
        with bm.attribute(sd_pipe, PROMPT) as plain:
            draw(sd_pipe)
        found, expected = recorder.maps().values, plain.maps().values
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        for branch in ("uncond",):
            with bm.attribute(sd_pipe, PROMPT, branch=branch) as plain:
                draw(sd_pipe)
            other = bm.attribute(sd_pipe, PROMPT, branch=branch)
            with other, bm.guide(sd_pipe, PROMPT, bm.Energy(scale=1e-9)):
                draw(sd_pipe)
            torch.testing.assert_close(
                other.maps().values, plain.maps().values, rtol=1e-3, atol=1e-3
            )


def test_checkpointing_changes_neither_gradient_nor_maps(sd_pipe):
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            sd_pipe.unet.enable_gradient_checkpointing()
            sd_pipe.unet.train()
        with bm.attribute(sd_pipe, PROMPT) as recorder, bm.guide(sd_pipe, PROMPT) as guidance:
            pictures = draw(sd_pipe)
        norms = torch.tensor([row.gradient_norm for row in guidance.ledger])
        results.append((pictures, norms, recorder.maps().values))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-4)


def test_half_precision(sd_pipe):
    sd_pipe.unet.to(torch.bfloat16)
    sd_pipe.text_encoder.to(torch.bfloat16)
    sd_pipe.vae.to(torch.bfloat16)
    with bm.guide(sd_pipe, PROMPT) as guidance:
        pictures = draw(sd_pipe)
    assert pictures.dtype == torch.bfloat16
    assert all(row.applied for row in guidance.ledger)


def test_several_prompts_an_image_and_pairs_between_them(sd_pipe):
    """One concept a prompt: the energy is that of the maps recorded with the same prompts."""
    apart = [AttributionPrompt("a doctor", ("doctor",)), AttributionPrompt("a man", ("man",))]
    with (
        bm.guide(sd_pipe, [apart], bm.Energy(scale=0.0)) as run,
        bm.attribute(sd_pipe, apart) as recorder,
    ):
        draw(sd_pipe, seeds=(1,), num_inference_steps=1)
    maps = {name: one.values for name, one in recorder.maps_by_prompt().items()}
    expected = bm.soft_iou(*(values[:, 0] for values in maps.values()))
    (row,) = run.ledger
    assert row.energy == pytest.approx(float(expected), rel=1e-5)
    assert row.pairs == (("doctor", "man"),)
    hard = bm.iou(*(values[:, 0] for values in maps.values()), fraction=0.3)
    assert row.iou == (pytest.approx(float(hard)),)


def test_pairs_for_each_image(sd_pipe):
    with bm.guide(
        sd_pipe,
        [THREE, THREE],
        bm.Energy(pairs=[[("photo", "man")], [("doctor", "man"), ("photo", "doctor")]], scale=0.0),
    ) as run:
        draw(sd_pipe, num_inference_steps=1)
    first, second = run.ledger
    assert first.pairs == (("photo", "man"),)
    assert len(first.soft_iou) == len(first.iou) == 1
    assert second.pairs == (("doctor", "man"), ("photo", "doctor"))
    assert second.energy == pytest.approx(sum(second.soft_iou) / 2, rel=1e-6)


def test_the_ledger_as_a_table(sd_pipe, tmp_path):
    with bm.guide(
        sd_pipe, THREE, bm.Energy(pairs=[("photo", "man"), ("doctor", "man")])
    ) as guidance:
        draw(sd_pipe, num_inference_steps=2)
    guidance.save_ledger(tmp_path / "ledger.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.csv"]
    with (tmp_path / "ledger.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(guidance.ledger) == 4
    for found, row in zip(rows, guidance.ledger, strict=True):
        assert float(found["energy"]) == row.energy
        assert found["pairs"] == "photo+man;doctor+man"
        assert [float(x) for x in found["soft_iou"].split(";")] == list(row.soft_iou)
        assert found["applied"] == "True"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": math.inf}, r"scale\n.*finite number.*input_value=inf"),
        ({"scale": -1.0}, r"scale\n.*greater than or equal to 0.*input_value=-1.0"),
        ({"start": 0.5, "stop": 0.5}, "expected start < stop, got 0.5 and 0.5"),
        ({"every": 0}, r"every\n.*greater than or equal to 1"),
        ({"inner_steps": 0}, r"inner_steps\n.*greater than or equal to 1"),
        ({"clip": "drop"}, "expected a positive norm, 'skip' or None, got 'drop'"),
        ({"clip": 0.0}, "expected a positive norm, 'skip' or None, got 0.0"),
        ({"clip": math.nan}, "expected a positive norm, 'skip' or None, got nan"),
        ({"fraction": 1.0}, r"fraction\n.*less than 1"),
        ({"temperature": 0.0}, r"temperature\n.*greater than or equal to 0.000001"),
        ({"containment": (0.05, 1.0)}, r"containment.1\n.*less than 1"),
        ({"containment": (0.05,)}, r"containment.1\n.*Field required"),
        ({"pairs": [("doctor", "doctor")]}, "two different concepts, got .'doctor', 'doctor'"),
        ({"pairs": [("doctor",)]}, "two different concepts, got .'doctor'"),
        ({"pairs": ("doctor", "man")}, "two different concepts, got 'doctor'"),
        ({"pairs": 3}, "expected pairs of concepts, got 3"),
        ({"weights": [math.nan]}, r"weights.0\n.*finite number"),
        ({"layers": "up_blocks"}, "not allowed as a Sequence"),
        ({"strength": 1.0}, r"strength\n.*not permitted"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        bm.Energy(**options)


def test_settings_are_immutable_and_described():
    energy = bm.Energy(pairs=[["doctor", "man"]], layers=["up_blocks"], weights=[2])
    assert energy.pairs == (("doctor", "man"),)
    assert (energy.layers, energy.weights) == (("up_blocks",), (2.0,))
    assert bm.Energy.model_validate_json(energy.model_dump_json()) == energy
    by_image = bm.Energy(pairs=[[("a", "b")], [("c", "d"), ("a", "b")]])
    assert bm.Energy(**by_image.model_dump()) == by_image
    assert all(field.description for field in bm.Energy.model_fields.values())
    with pytest.raises(ValueError, match="frozen"):
        energy.scale = 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": [("doctor", "nurse")]}, r"names 'nurse', which is no concept of .*; there are"),
        ({"pairs": []}, "guidance needs a pair of concepts, got an empty list of pairs"),
        ({"pairs": [[]]}, "guidance needs a pair of concepts, got an empty list of pairs"),
        ({"pairs": [[("doctor", "man")]] * 3}, "list of pairs for each of 1 images, got 3 lists"),
        ({"weights": [1.0, 2.0]}, "`weights` must be 1 numbers, one per pair"),
    ],
)
def test_settings_that_do_not_fit_the_prompt(sd_pipe, options, message):
    with pytest.raises(ValueError, match=message):
        bm.guide(sd_pipe, PROMPT, bm.Energy(**options))
    with pytest.raises(ValueError, match="`branch` must be 'cond' or 'uncond', got 'both'"):
        bm.guide(sd_pipe, PROMPT, branch="both")


def test_an_ambiguous_pair_and_no_prompt(sd_pipe):
    other = AttributionPrompt("a doctor and photo", ("doctor", "photo"))
    with pytest.raises(ValueError, match=r"is ambiguous: 'doctor' is a concept of \['a doctor"):
        bm.guide(sd_pipe, [(other, THREE)], bm.Energy(pairs=[("doctor", "photo")]))
    bm.guide(sd_pipe, [(other, PROMPT)], bm.Energy(pairs=[("doctor", "man")]))  # PROMPT has both
    for prompts in ([], [()]):
        with pytest.raises(ValueError, match="at least one attribution prompt, got an empty"):
            bm.guide(sd_pipe, prompts)
    with pytest.raises(TypeError, match="expected an AttributionPrompt, got str 'a doctor'"):
        bm.guide(sd_pipe, [["a doctor"]])


def test_a_single_concept_has_no_pair(sd_pipe):
    with pytest.raises(ValueError, match=r"guidance needs a pair of concepts, got \['doctor'\]"):
        bm.guide(sd_pipe, AttributionPrompt("a doctor", ("doctor",)))


def test_refusals_by_name(make_sd, sd_pipe):
    import diffusers

    flow = make_sd()
    flow.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with (
        pytest.raises(ValueError, match="cannot guide with FlowMatchEulerDiscreteScheduler"),
        bm.guide(flow, PROMPT),
    ):
        pass
    sample = make_sd(prediction_type="sample")
    with (
        pytest.raises(ValueError, match="prediction type 'sample' of DDIMScheduler; expected"),
        bm.guide(sample, PROMPT),
    ):
        pass
    with (
        bm.guide(sd_pipe, PROMPT),
        pytest.raises(ValueError, match="this UNet is already guided"),
        bm.guide(sd_pipe, PROMPT),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="inference_mode"),
        bm.guide(sd_pipe, PROMPT),
        torch.inference_mode(),
    ):
        draw(sd_pipe)


def test_no_signal_is_a_counted_skip(make_sd):
    pipe = make_sd(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    with bm.guide(pipe, PROMPT) as guidance:
        pictures = draw(pipe)
    assert bool(pictures.isfinite().all())
    first = [row for row in guidance.ledger if row.call == 0]
    assert {row.reason for row in first} == {"no signal left at this timestep (alpha_bar is 0)"}
    assert all(row.applied for row in guidance.ledger if row.call > 0)


def test_a_window_without_a_call_is_an_error(sd_pipe):
    with (
        pytest.raises(RuntimeError, match=r"none of 4 UNet calls was guided.*start=0.9 and stop"),
        bm.guide(sd_pipe, PROMPT, bm.Energy(start=0.9, stop=0.95)),
    ):
        draw(sd_pipe, num_inference_steps=4)
    with bm.guide(sd_pipe, PROMPT, bm.Energy(start=0.9, stop=0.95), strict=False) as guidance:
        draw(sd_pipe, num_inference_steps=4)
    assert guidance.ledger == []
