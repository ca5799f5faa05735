"""Attribution maps against an independent reference, and what a recorder must not do."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import AttributionPrompt
from biasmap_fast.denoiser import probing
from biasmap_fast.unet import as_slice

DOCTOR = AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))
WOMAN = AttributionPrompt("a woman in a photo", ("photo", "woman", "a"))
STEPS = 3


def draw(pipe, prompt="a photo of a doctor", seeds=(1, 2), **options):
    prompts = [prompt] * len(seeds) if isinstance(prompt, str) else prompt
    settings = {"num_inference_steps": STEPS, "height": 32, "width": 32, "output_type": "np"}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=generators, **(settings | options)).images


def assert_maps(maps, expected, tolerance=1e-5):
    assert maps.dtype == torch.float32
    assert maps.shape == expected.shape
    relative = (maps.double() - expected).abs().max() / expected.abs().max()
    assert relative < tolerance, f"relative difference {relative:.2e}"


COND, UNCOND = slice(2, 4), slice(0, 2)


@pytest.mark.parametrize("branch", ["cond", "uncond"])
@pytest.mark.parametrize("layers", [None, ("up_blocks.1", "mid_block"), ("down_blocks",)])
def test_maps_equal_the_reference(sd_pipe, branch, layers, reference_of):
    reference = reference_of(sd_pipe)
    with bm.attribute(sd_pipe, DOCTOR, branch=branch, layers=layers) as recorder:
        draw(sd_pipe)
    rows = COND if branch == "cond" else UNCOND
    assert_maps(recorder.maps().values, reference.maps(DOCTOR, (16, 16), rows, layers))


def test_default_layers_are_all_but_the_mid_block(sd_pipe):
    with bm.attribute(sd_pipe, DOCTOR) as recorder:
        pass
    assert len(recorder.layers) == 6
    assert not any("mid_block" in name for name in recorder.layers)
    every = ("down_blocks", "mid_block", "up_blocks")
    with bm.attribute(sd_pipe, DOCTOR, layers=every) as recorder:
        pass
    assert len(recorder.layers) == 7


def test_without_guidance_the_whole_batch_is_conditional(sd_pipe, reference_of):
    reference = reference_of(sd_pipe)
    with bm.attribute(sd_pipe, DOCTOR) as recorder:
        draw(sd_pipe, guidance_scale=1.0)
    assert_maps(recorder.maps().values, reference.maps(DOCTOR, (16, 16), slice(None)))


@pytest.mark.parametrize("height_width", [(32, 48), (24, 64), (40, 40), (56, 40)])
def test_non_square_and_odd_latents(sd_pipe, height_width, reference_of):
    height, width = height_width
    reference = reference_of(sd_pipe)
    with bm.attribute(sd_pipe, DOCTOR) as recorder:
        draw(sd_pipe, height=height, width=width)
    latents = (height // 2, width // 2)
    assert recorder.maps().values.shape[-2:] == latents
    assert_maps(recorder.maps().values, reference.maps(DOCTOR, latents, COND))


def test_size_resizes_the_sum(sd_pipe, reference_of):
    reference = reference_of(sd_pipe)
    with bm.attribute(sd_pipe, DOCTOR, size=(64, 40)) as recorder:
        draw(sd_pipe)
    assert_maps(recorder.maps().values, reference.maps(DOCTOR, (16, 16), COND, size=(64, 40)))


def test_sdxl(sdxl_pipe, reference_of):
    reference = reference_of(sdxl_pipe)
    with bm.attribute(sdxl_pipe, DOCTOR, by="head") as recorder:
        draw(sdxl_pipe)
    maps = recorder.maps()
    assert_maps(maps.values, reference.maps(DOCTOR, (16, 16), COND))
    assert {
        len([n for n in maps.by_head if n.startswith(layer + ":")]) for layer in maps.layers
    } == {4}


def test_sd2_with_heads_that_differ_by_block_and_v_prediction(make_sd, reference_of):
    config = {"attention_head_dim": (1, 2, 4), "use_linear_projection": True}
    pipe = make_sd(unet_config=config, prediction_type="v_prediction")
    reference = reference_of(pipe)
    with bm.attribute(pipe, DOCTOR, by="head") as recorder:
        draw(pipe)
    assert_maps(recorder.maps().values, reference.maps(DOCTOR, (16, 16), COND))
    heads = [name.split(":")[1] for name in recorder.maps().by_head if name.startswith("down")]
    assert heads == ["0", "0", "1"]


@pytest.mark.parametrize("by", ["block", "layer", "step", "head"])
def test_parts_equal_the_reference_and_sum_to_the_total(sd_pipe, by, reference_of):
    reference = reference_of(sd_pipe)
    with bm.attribute(sd_pipe, DOCTOR, by=by) as recorder:
        draw(sd_pipe)
    maps = recorder.maps()
    parts = getattr(maps, f"by_{by}")
    assert_maps(maps.values, reference.maps(DOCTOR, (16, 16), COND))
    torch.testing.assert_close(torch.stack(list(parts.values())).sum(0), maps.values)
    keep = {
        "block": lambda part: lambda name, head, call: name.startswith(part + "."),
        "layer": lambda part: lambda name, head, call: name == part,
        "step": lambda part: lambda name, head, call: call == int(part),
        "head": lambda part: lambda name, head, call: f"{name}:{head}" == part,
    }[by]
    expected_count = {"block": 4, "layer": 6, "step": STEPS, "head": 12}[by]
    assert len(parts) == expected_count
    for part, values in parts.items():
        assert_maps(values, reference.maps(DOCTOR, (16, 16), COND, keep=keep(part)))


@pytest.mark.parametrize("own_prompts", [False, True])
def test_several_things_are_kept_apart_in_one_pass(sd_pipe, own_prompts):
    prompts = [[DOCTOR, WOMAN], [WOMAN]] if own_prompts else [DOCTOR, WOMAN]
    choices = ("block", "step", "layer", "total")

    def record(by):
        with bm.attribute(sd_pipe, prompts, by=by) as recorder:
            draw(sd_pipe)
        return recorder

    recorder = record(choices)
    for by in choices:
        for name, expected in record(by).maps_by_prompt().items():
            found = recorder.maps_by_prompt(by)[name]
            assert found.by == by
            assert found.images == expected.images
            assert list(found.parts) == list(expected.parts)
            for part in expected.parts:
                assert torch.equal(found.parts[part], expected.parts[part])
            assert torch.equal(found.values, expected.values)
    assert recorder.maps_by_prompt()[DOCTOR.name].by == "block"
    with pytest.raises(ValueError, match="recorded by block and step.*not by 'head'"):
        recorder.maps_by_prompt("head")


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("own_prompts", [False, True])
def test_parts_of_some_prompts_alone(sd_pipe, backend, own_prompts, monkeypatch):
    monkeypatch.setenv("BIASMAP_BACKEND", backend)
    prompts = [[DOCTOR, WOMAN], [DOCTOR, WOMAN]] if own_prompts else [DOCTOR, WOMAN]

    def record(**options):
        with bm.attribute(sd_pipe, prompts, by=("block", "step"), **options) as recorder:
            draw(sd_pipe)
        return recorder

    everything, second = record(), record(detailed=[WOMAN.name])
    for name, expected in everything.maps_by_prompt().items():
        assert torch.equal(second.maps_by_prompt()[name].values, expected.values)
    (found,) = second.maps_by_prompt("step").items()
    expected = everything.maps_by_prompt("step")[WOMAN.name]
    assert found[0] == WOMAN.name
    assert list(found[1].parts) == list(expected.parts)
    for part in expected.parts:
        assert torch.equal(found[1].parts[part], expected.parts[part])
    assert second.nbytes["maps"] < everything.nbytes["maps"]
    assert record(detailed=[]).maps_by_prompt("step") == {}
    with bm.attribute(sd_pipe, DOCTOR, by=("block", "step"), detailed=[]) as single:
        draw(sd_pipe)
    assert single.maps().by_block
    with pytest.raises(ValueError, match="maps by 'step' were not kept"):
        single.maps("step")
    with pytest.raises(ValueError, match=r"no attribution prompt is called \['nobody'\]"):
        record(detailed=["nobody"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_summed_in_float32(sd_pipe, dtype, reference_of):
    sd_pipe.unet.to(dtype)
    sd_pipe.text_encoder.to(dtype)
    sd_pipe.vae.to(dtype)
    reference = reference_of(sd_pipe)
    with bm.attribute(sd_pipe, DOCTOR) as recorder:
        draw(sd_pipe, num_inference_steps=6)
    # the queries and keys are the half-precision network's; everything after is float32
    assert_maps(recorder.maps().values, reference.maps(DOCTOR, (16, 16), COND))


def test_two_prompts_share_one_pass(sd_pipe, reference_of):
    reference = reference_of(sd_pipe)
    with bm.attribute(sd_pipe, [DOCTOR, WOMAN]) as recorder:
        draw(sd_pipe)
    with pytest.raises(ValueError, match=r"2 attribution prompts were recorded: use maps_by_pro"):
        recorder.maps()
    maps = recorder.maps_by_prompt()
    assert list(maps) == [DOCTOR.name, WOMAN.name]
    for prompt in (DOCTOR, WOMAN):
        assert_maps(maps[prompt.name].values, reference.maps(prompt, (16, 16), COND))


def test_nested_recorders_do_not_see_each_other(sd_pipe):
    with bm.attribute(sd_pipe, DOCTOR) as alone:
        draw(sd_pipe)
    with (
        bm.attribute(sd_pipe, WOMAN) as outer,
        bm.attribute(sd_pipe, DOCTOR, branch="uncond") as other,
        bm.attribute(sd_pipe, DOCTOR) as inner,
    ):
        draw(sd_pipe)
    assert torch.equal(alone.maps().values, inner.maps().values)
    assert not torch.equal(alone.maps().values, other.maps().values)
    assert outer.maps().concepts == WOMAN.concepts


def test_several_calls_are_stacked(sd_pipe):
    with bm.attribute(sd_pipe, DOCTOR, by="block") as recorder:
        draw(sd_pipe, seeds=(1, 2))
        draw(sd_pipe, seeds=(3,), num_inference_steps=1)
        draw(sd_pipe, seeds=(3,), num_inference_steps=1)
    maps = recorder.maps()
    assert len(maps) == 4
    assert torch.equal(maps.values[2], maps.values[3])
    with bm.attribute(sd_pipe, DOCTOR) as single:
        draw(sd_pipe, seeds=(3,), num_inference_steps=1)
    torch.testing.assert_close(single.maps().values[0], maps.values[2])


def test_calls_of_different_sizes_need_a_size(sd_pipe):
    for size in (None, 16):
        with bm.attribute(sd_pipe, DOCTOR, size=size) as recorder:
            draw(sd_pipe)
            draw(sd_pipe, width=48)
        if size is None:
            with pytest.raises(ValueError, match=r"different sizes \[\(16, 16\), \(16, 24\)\]"):
                recorder.maps()
        else:
            assert recorder.maps().values.shape == (4, 2, 16, 16)


def test_entering_again_starts_afresh(sd_pipe):
    recorder = bm.attribute(sd_pipe, DOCTOR)
    results = []
    for _ in range(2):
        with recorder:
            draw(sd_pipe)
        results.append(recorder.maps().values)
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", ["PNDMScheduler", "HeunDiscreteScheduler", "DDIMScheduler"])
def test_schedulers_that_call_the_unet_more_than_once_a_step(make_sd, kind, reference_of):
    options = {"skip_prk_steps": True} if kind == "PNDMScheduler" else {}
    pipe = make_sd(kind=kind, **options)
    reference = reference_of(pipe)
    with bm.attribute(pipe, DOCTOR) as recorder:
        draw(pipe)
    maps = recorder.maps()
    assert len(maps) == 2
    assert_maps(maps.values, reference.maps(DOCTOR, (16, 16), COND))


def test_batch_equals_single_runs_for_mixed_prompts(sd_pipe):
    texts = ["a photo of a doctor", "a man", "a woman and a doctor", "photo"] * 2
    seeds = tuple(range(8))
    with bm.attribute(sd_pipe, [DOCTOR, WOMAN]) as recorder:
        draw(sd_pipe, texts, seeds)
    batched = recorder.maps_by_prompt()
    for index, (text, seed) in enumerate(zip(texts, seeds, strict=True)):
        with bm.attribute(sd_pipe, [DOCTOR, WOMAN]) as recorder:
            draw(sd_pipe, [text], (seed,))
        for name, maps in recorder.maps_by_prompt().items():
            torch.testing.assert_close(
                maps.values[0], batched[name].values[index], rtol=1e-4, atol=1e-4
            )


def test_several_images_per_prompt(sd_pipe):
    with bm.attribute(sd_pipe, DOCTOR) as recorder:
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        sd_pipe(
            ["a doctor", "a man"],
            num_images_per_prompt=2,
            generator=generators,
            num_inference_steps=2,
            height=32,
            width=32,
        )
    batched = recorder.maps()
    with bm.attribute(sd_pipe, DOCTOR) as recorder:
        draw(sd_pipe, "a man", (3,), num_inference_steps=2)
    torch.testing.assert_close(recorder.maps().values[0], batched.values[3], rtol=1e-4, atol=1e-4)


def test_pictures_are_bit_identical_and_hooks_are_gone(sd_pipe, sdxl_pipe):
    for pipe in (sd_pipe, sdxl_pipe):
        processors = dict(pipe.unet.attn_processors)
        before = draw(pipe)
        with bm.attribute(pipe, [DOCTOR, WOMAN], by="head"):
            during = draw(pipe)
        assert (before == during).all()
        assert (before == draw(pipe)).all()
        assert all(pipe.unet.attn_processors[name] is p for name, p in processors.items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


def test_exception_inside_the_block(sd_pipe):
    recorder = bm.attribute(sd_pipe, DOCTOR)
    with pytest.raises(KeyError), recorder:
        draw(sd_pipe)
        raise KeyError("stop")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sd_pipe.unet.modules())
    with pytest.raises(RuntimeError, match="block ended with KeyError: its maps are incomplete"):
        recorder.maps()
    with recorder:
        draw(sd_pipe)
    assert len(recorder.maps()) == 2


def test_memory_does_not_grow_with_steps(sd_pipe):
    held = []
    for steps in (1, 2, 8):
        with bm.attribute(sd_pipe, DOCTOR) as recorder:
            draw(sd_pipe, num_inference_steps=steps)
            held.append(recorder.nbytes)
    assert held[0] == held[1] == held[2]
    pixels = 16 * 16 + 8 * 8
    assert held[0]["maps"] == 2 * 2 * pixels * 4  # images x concepts x pixels x float32


def test_nothing_keeps_queries_alive(sd_pipe):
    alive = []

    def watch(module, args, query):
        alive.append(weakref.ref(query))

    handle = sd_pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_q
    hook = handle.register_forward_hook(watch)
    with bm.attribute(sd_pipe, DOCTOR):
        draw(sd_pipe)
        gc.collect()
        assert len(alive) == STEPS
        assert all(reference() is None for reference in alive)
    hook.remove()


def test_guidance_switched_off_during_the_run(sd_pipe):
    def stop_guidance(pipe, step, timestep, kwargs):
        if step == 0:
            pipe._guidance_scale = 1.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    options = {
        "callback_on_step_end": stop_guidance,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    with bm.attribute(sd_pipe, DOCTOR, by="step") as recorder:
        draw(sd_pipe, **options)
    assert recorder.maps().values.shape == (2, 2, 16, 16)
    assert all(bool((part > 0).all()) for part in recorder.maps().by_step.values())


def test_other_processors_leave_maps_as_they_are(sd_pipe):
    from diffusers.models.attention_processor import AttnProcessor

    with bm.attribute(sd_pipe, DOCTOR) as recorder:
        draw(sd_pipe)
    expected = recorder.maps().values
    for change in (
        lambda: sd_pipe.unet.set_attn_processor(AttnProcessor()),
        lambda: sd_pipe.enable_attention_slicing(1),
        lambda: sd_pipe.fuse_qkv_projections(vae=False),
    ):
        change()
        with bm.attribute(sd_pipe, DOCTOR) as recorder:
            draw(sd_pipe)
        torch.testing.assert_close(recorder.maps().values, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wrapped", [True, False])
def test_compiled_unet(sd_pipe, wrapped):
    """The wrapper that torch.compile makes, and compilation in place; graph capture alone."""
    with bm.attribute(sd_pipe, DOCTOR, by="block") as recorder:
        draw(sd_pipe)
    torch.compiler.reset()
    if wrapped:
        sd_pipe.unet = torch.compile(sd_pipe.unet, backend="eager")
    else:
        sd_pipe.unet.compile(backend="eager")
    with bm.attribute(sd_pipe, DOCTOR, by="block") as compiled:
        draw(sd_pipe)
    torch.testing.assert_close(recorder.maps().values, compiled.maps().values)
    assert list(recorder.maps().by_block) == list(compiled.maps().by_block)
    torch.compiler.reset()


def test_calls_of_probes_are_ignored(sd_pipe):
    """Of the denoiser, while the pipeline's own call runs and between two of them."""
    with bm.attribute(sd_pipe, DOCTOR, by="step") as plain, bm.guide(sd_pipe, DOCTOR) as guidance:
        expected = draw(sd_pipe)

    def probe(*args, **kwargs):
        if not probing.get():
            token = probing.set(True)
            sd_pipe.unet(torch.randn(3, 4, 16, 16), 10, torch.randn(3, 5, 32))
            probing.reset(token)

    with (
        bm.attribute(sd_pipe, DOCTOR, by="step") as recorder,
        bm.guide(sd_pipe, DOCTOR) as guided,
        torch.no_grad(),
    ):
        inside = sd_pipe.unet.mid_block.register_forward_hook(probe)
        before = sd_pipe.unet.register_forward_pre_hook(probe)
        pictures = draw(sd_pipe)
        inside.remove()
        before.remove()
    assert (pictures == expected).all()
    assert torch.equal(recorder.maps().values, plain.maps().values)
    assert guided.ledger == guidance.ledger


def test_consecutive_places_are_a_slice():
    everything = list(range(10))
    for places in ([0], [3, 4, 5], [0, 2], [2, 1], []):
        found = as_slice(places)
        assert isinstance(found, slice) is (places in ([0], [3, 4, 5]))
        taken = everything[found] if isinstance(found, slice) else [everything[i] for i in found]
        assert taken == places
