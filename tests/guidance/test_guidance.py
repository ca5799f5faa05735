"""The injected gradient against finite differences, and what guidance must leave alone."""

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


def as_double(pipe):
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.double()
    return pipe


def soft_masks(x, slope, fraction):
    """The masks of `soft_topk` from its formula, tau by bisection."""
    low, high = x.amin(-1, keepdim=True) - 20 / slope, x.amax(-1, keepdim=True) + 20 / slope
    for _ in range(200):
        middle = (low + high) / 2
        above = torch.sigmoid((x - middle) * slope).mean(-1, keepdim=True) > fraction
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.sigmoid((x - low) * slope)


def energy(maps, pairs, spans, fractions=None, temperature=0.2):
    """Mean SoftIoU, or mean containment, from the formulas; the maps' ranges are given."""
    x = maps.flatten(2)  # [B, K, N] float64
    slope = 2 / (temperature * spans)  # [B, K, 1]
    first, second = (soft_masks(x, slope, fraction) for fraction in fractions or (0.3, 0.3))
    a, b = first[:, [i for i, _ in pairs]], second[:, [j for _, j in pairs]]
    both = (a * b).sum(-1)
    if fractions:
        return (both / a.sum(-1)).mean(1)  # [B]
    return (both / (a.sum(-1) + b.sum(-1) - both)).mean(1)  # [B]


CASES = [(1, "cond"), (2, "cond"), (2, "uncond"), (3, "cond")]


@pytest.mark.parametrize(("chunks", "branch"), CASES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("accumulate", "containment"), [(False, None), (True, None), (False, (0.1, 0.25))]
)
def test_injected_delta_is_the_energy_gradient(
    make_sd, reference_of, chunks, branch, prediction, accumulate, containment
):
    """The hook's change of the prediction against central differences of an independent energy."""
    pipe = as_double(make_sd(prediction_type=prediction))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 16, 16, generator=generator, dtype=torch.float64)
    states = torch.randn(2 * chunks, 5, 32, generator=generator, dtype=torch.float64)
    timestep, scale, pairs = 601, 30.0, [(0, 1), (1, 2)]

    @torch.no_grad()
    def unet(latents, timestep=timestep):
        return pipe.unet(latents.repeat(chunks, 1, 1, 1), timestep, states).sample

    plain = unet(z)
    named = [(THREE.concepts[i], THREE.concepts[j]) for i, j in pairs]
    options = {"branch": branch, "chunks": chunks, "accumulate": accumulate, "clip": None}
    options["containment"] = containment
    with bm.guide(pipe, THREE, pairs=named, scale=scale, temperature=0.2, **options) as guidance:
        if accumulate:  # a first call, whose maps then count as constants
            unet(z.roll(1, 0), 801)
        guided = unet(z)
    rows = [row for row in guidance.ledger if row.timestep == timestep]

    alpha_bar = float(pipe.scheduler.alphas_cumprod[timestep])
    strength = scale * math.sqrt(1 - alpha_bar)
    if prediction == "v_prediction":
        strength /= math.sqrt(alpha_bar)
    deltas = (guided - plain).reshape(chunks, *z.shape) / strength
    for delta in deltas[1:]:  # the same in every chunk
        torch.testing.assert_close(delta, deltas[0], rtol=1e-6, atol=1e-12)
    gradient = deltas[0]
    norms = torch.tensor([row.gradient_norm for row in rows], dtype=torch.float64)
    torch.testing.assert_close(gradient.flatten(1).norm(dim=1), norms, rtol=1e-5, atol=0)

    reference = reference_of(pipe)
    first = 2 if branch == "cond" and chunks > 1 else 0

    def maps(latents, timestep=timestep):
        reference.seen.clear()
        unet(latents, timestep)
        return reference.maps(THREE, (16, 16), slice(first, first + 2))

    earlier = maps(z.roll(1, 0), 801) if accumulate else 0.0
    base = (maps(z) + earlier).flatten(2)
    spans = base.amax(-1, keepdim=True) - base.amin(-1, keepdim=True)
    found = torch.tensor([row.energy for row in rows], dtype=torch.float64)
    expected = energy(maps(z) + earlier, pairs, spans, containment)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for seed in range(2):
        direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).double()
        ahead, behind = (
            energy(maps(z + step * direction) + earlier, pairs, spans, containment)
            for step in (1e-5, -1e-5)
        )
        expected = (ahead - behind) / 2e-5
        along = (gradient * direction).flatten(1).sum(1)
        size = norms * direction.flatten(1).norm(dim=1)
        assert bool(((along - expected).abs() < 1e-4 * size).all()), (along, expected, size)


SCHEDULERS = {
    "DDIMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "LMSDiscreteScheduler": {},
    "UniPCMultistepScheduler": {},
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_small_step_lowers_the_energy_with_every_scheduler(make_sd, kind, prediction):
    """One sampling step, plain and guided: the guided latents, seen at the same time, overlap less.

    The latents' energy is taken where the gradient was: at the first timestep, in the network's
    own (variance-preserving) frame. A scheduler whose frame were mistaken, or whose sign, fails.
    """
    pipe = as_double(make_sd(kind=kind, prediction_type=prediction, **SCHEDULERS[kind]))
    options = {"temperature": 0.2, "clip": None, "accumulate": False}
    states, start = {}, {}

    def run(scale):
        def remember(pipe, step, timestep, kwargs):
            if step == 0:
                states[scale] = kwargs["latents"].clone()
                start["t"] = timestep
            return kwargs

        with bm.guide(pipe, THREE, scale=scale, stop=0.01, **options) as guidance:
            draw(pipe, num_inference_steps=8, callback_on_step_end=remember)
        return guidance.ledger

    rows = run(0.05)
    assert [row.call for row in rows] == [0, 0]
    assert all(row.applied for row in rows)
    run(0.0)
    moved = states[0.05] - states[0.0]
    assert 0 < float(moved.abs().max()) < 0.5

    # the direction in which guidance moved the latents, tried at the start of the run
    embeds = pipe.encode_prompt("a photo of a doctor", "cpu", 2, True)
    text = torch.cat([embeds[1], embeds[0]])
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    noise = torch.cat(
        [torch.randn(1, 4, 16, 16, generator=g, dtype=torch.float64) for g in generators]
    )

    def energies(z):
        with bm.guide(pipe, THREE, scale=0.0, chunks=2, **options) as guidance, torch.no_grad():
            pipe.unet(z.repeat(2, 1, 1, 1), start["t"], text)
        return torch.tensor([row.energy for row in guidance.ledger])

    # the network's input at the first step: unit variance whatever the scheduler's own frame
    step = 0.05 * moved / moved.flatten(1).norm(dim=1)[:, None, None, None]
    assert bool((energies(noise + step) < energies(noise - step)).all())


def test_scale_zero_measures_and_leaves_pictures_bit_identical(sd_pipe):
    before = draw(sd_pipe)
    with bm.guide(sd_pipe, PROMPT, scale=0.0) as guidance:
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
    with bm.guide(sd_pipe, PROMPT) as together:
        batch = draw(sd_pipe, seeds=(1, 2, 3))
    with bm.guide(sd_pipe, PROMPT) as alone:
        one = draw(sd_pipe, seeds=(2,))
    torch.testing.assert_close(one[0], batch[1], rtol=1e-3, atol=1e-3)
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
        pytest.raises(ValueError, match=r"one attribution prompt or one an image \(2\), got 3"),
        bm.guide(sd_pipe, [PROMPT, other, PROMPT]),
    ):
        draw(sd_pipe)


def test_guidance_lowers_the_energy_over_a_run(sd_pipe):
    with bm.guide(sd_pipe, PROMPT, scale=0.0) as plain:
        draw(sd_pipe, num_inference_steps=10)
    with bm.guide(sd_pipe, PROMPT, scale=20.0) as guided:
        draw(sd_pipe, num_inference_steps=10)
    for image in (0, 1):
        before, after = (
            [row.energy for row in run.ledger if row.image == image] for run in (plain, guided)
        )
        assert before[0] == pytest.approx(after[0], rel=1e-4)
        assert after[-1] < before[-1]


def test_start_stop_and_every(sd_pipe):
    with bm.guide(sd_pipe, PROMPT, start=0.25, stop=0.75, every=2) as guidance:
        draw(sd_pipe, num_inference_steps=8)
    assert [row.call for row in guidance.ledger if row.image == 0] == [2, 4]


def test_clipping(sd_pipe):
    with bm.guide(sd_pipe, PROMPT, clip=1e-3) as guidance:
        draw(sd_pipe, num_inference_steps=1)
    for row in guidance.ledger:
        assert row.clip_factor * row.gradient_norm == pytest.approx(1e-3, rel=1e-4)
        assert row.applied
    with bm.guide(sd_pipe, PROMPT, clip=None) as guidance:
        draw(sd_pipe, num_inference_steps=1)
    assert all(row.clip_factor == 1.0 for row in guidance.ledger)


def test_published_skip_rule_is_counted(sd_pipe, monkeypatch):
    import biasmap_fast.guidance as module

    original = module.soft_iou
    monkeypatch.setattr(module, "soft_iou", lambda *args: original(*args) * 1e6)
    before = draw(sd_pipe)
    with bm.guide(sd_pipe, PROMPT, clip="skip", strict=False) as guidance:
        after = draw(sd_pipe)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)  # split forward passes
    assert {row.reason for row in guidance.ledger} == {"gradient norm >= 1 (clip='skip')"}
    assert not any(row.applied for row in guidance.ledger)
    with (
        pytest.raises(RuntimeError, match=r"image 0 was skipped in 4 of 4 calls \(gradient norm"),
        bm.guide(sd_pipe, PROMPT, clip="skip"),
    ):
        draw(sd_pipe)


def test_gradients_that_are_not_finite_are_counted_skips(sd_pipe, monkeypatch):
    import biasmap_fast.guidance as module

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
        guidance = bm.guide(sd_pipe, PROMPT, scale=1e-9)
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
            with other, bm.guide(sd_pipe, PROMPT, scale=1e-9):
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


def test_inner_steps_descend_where_the_parts_lead(make_sd):
    """Two inner steps: the second gradient is taken at the latents that the first amounts to."""
    pipe = as_double(make_sd())
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 4, 16, 16, generator=generator, dtype=torch.float64)
    states = torch.randn(1, 5, 32, generator=generator, dtype=torch.float64)
    options = {"chunks": 1, "clip": None, "temperature": 0.2}

    @torch.no_grad()
    def delta(latents, scale, inner_steps=1):
        plain = pipe.unet(latents, 601, states).sample
        with bm.guide(pipe, THREE, scale=scale, inner_steps=inner_steps, **options) as guidance:
            guided = pipe.unet(latents, 601, states).sample
        return guided - plain, guidance.ledger

    sigma = math.sqrt(1 - float(pipe.scheduler.alphas_cumprod[601]))
    first, rows = delta(z, 20.0)
    second, _ = delta(z - sigma * first, 20.0)
    both, together = delta(z, 40.0, inner_steps=2)
    torch.testing.assert_close(both, first + second, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(both, 2 * first, rtol=1e-3)
    assert together[0].energy == rows[0].energy

    def energies(inner_steps):  # of two calls, the second with the maps of the first
        with bm.guide(
            pipe, THREE, scale=1e-9, inner_steps=inner_steps, accumulate=True, **options
        ) as guidance:
            for timestep in (801, 601):
                pipe.unet(z, timestep, states)
        return [row.energy for row in guidance.ledger]

    assert energies(3) == pytest.approx(energies(1), rel=1e-6)


def test_several_prompts_an_image_and_pairs_between_them(sd_pipe):
    """One concept a prompt: the energy is that of the maps recorded with the same prompts."""
    apart = [AttributionPrompt("a doctor", ("doctor",)), AttributionPrompt("a man", ("man",))]
    with bm.guide(sd_pipe, [apart], scale=0.0) as run, bm.attribute(sd_pipe, apart) as recorder:
        draw(sd_pipe, seeds=(1,), num_inference_steps=1)
    maps = {name: one.values for name, one in recorder.maps().items()}
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
        pairs=[[("photo", "man")], [("doctor", "man"), ("photo", "doctor")]],
        scale=0.0,
    ) as run:
        draw(sd_pipe, num_inference_steps=1)
    first, second = run.ledger
    assert first.pairs == (("photo", "man"),)
    assert len(first.soft_iou) == len(first.iou) == 1
    assert second.pairs == (("doctor", "man"), ("photo", "doctor"))
    assert second.energy == pytest.approx(sum(second.soft_iou) / 2, rel=1e-6)


def test_the_ledger_as_a_table(sd_pipe, tmp_path):
    with bm.guide(sd_pipe, THREE, pairs=[("photo", "man"), ("doctor", "man")]) as guidance:
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
        ({"scale": math.inf}, "`scale` must be finite, got inf"),
        ({"start": 0.5, "stop": 0.5}, "0 <= start < stop <= 1, got 0.5 and 0.5"),
        ({"every": 0}, "`every` must be at least 1, got 0"),
        ({"inner_steps": 0}, "`inner_steps` must be at least 1, got 0"),
        ({"clip": "drop"}, "`clip` must be a norm, 'skip' or None, got 'drop'"),
        ({"clip": 0.0}, "`clip` must be positive, got 0.0"),
        ({"branch": "both"}, "`branch` must be 'cond' or 'uncond', got 'both'"),
        ({"fraction": 1.0}, "`fraction` must be in"),
        ({"containment": (0.05, 1.0)}, "`fraction` must be in"),
        ({"containment": (0.05,)}, "`containment` must be two numbers"),
        ({"pairs": [("doctor", "nurse")]}, r"names 'nurse', which is no concept of .*; there are"),
        ({"pairs": [("doctor", "doctor")]}, "two different concepts"),
        ({"pairs": []}, "guidance needs a pair of concepts, got an empty list of pairs"),
        ({"pairs": [[]]}, "guidance needs a pair of concepts, got an empty list of pairs"),
        ({"pairs": [[("doctor", "man")]] * 3}, "list of pairs for each of 1 images, got 3 lists"),
        ({"weights": [1.0, 2.0]}, "`weights` must be 1 finite numbers, one a pair"),
    ],
)
def test_bad_options(sd_pipe, options, message):
    with pytest.raises(ValueError, match=message):
        bm.guide(sd_pipe, PROMPT, **options)


def test_an_ambiguous_pair_and_no_prompt(sd_pipe):
    other = AttributionPrompt("a doctor and photo", ("doctor", "photo"))
    with pytest.raises(ValueError, match=r"is ambiguous: 'doctor' is a concept of \['a doctor"):
        bm.guide(sd_pipe, [(other, THREE)], pairs=[("doctor", "photo")])
    bm.guide(sd_pipe, [(other, PROMPT)], pairs=[("doctor", "man")])  # PROMPT has both
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
        bm.guide(sd_pipe, PROMPT, start=0.9, stop=0.95),
    ):
        draw(sd_pipe, num_inference_steps=4)
    with bm.guide(sd_pipe, PROMPT, start=0.9, stop=0.95, strict=False) as guidance:
        draw(sd_pipe, num_inference_steps=4)
    assert guidance.ledger == []
