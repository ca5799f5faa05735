"""Pipelines whose UNet calls are laid out in another way: followed, or refused in words."""

from __future__ import annotations

import inspect

import pytest
import torch
from safetensors.torch import load_file, save_file

import biasmap_fast as bm
from biasmap_fast.pipelines import ModelError, load_pipeline
from biasmap_fast.unet import batch_layout, branch_rows

PROMPT = bm.AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))
DRAWN = "a photo of a doctor"


def build(kind, pipe, **more):
    """A pipeline of another class from the parts of a tiny one."""
    wanted = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in wanted}
    if "requires_safety_checker" in wanted:
        parts["requires_safety_checker"] = False
    made = kind(**(parts | more))
    made.set_progress_bar_config(disable=True)
    return made


def widened(make_sd, channels):
    """A tiny pipeline whose UNet takes more channels and looks at the latents alone."""
    wide = make_sd(unet_config={"in_channels": channels})
    weights = dict(make_sd().unet.state_dict())
    more = torch.zeros(16, channels - 4, 3, 3)
    weights["conv_in.weight"] = torch.cat((weights["conv_in.weight"], more), dim=1)
    wide.unet.load_state_dict(weights)
    return wide


def draw(pipe, **options):
    settings = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    return pipe(DRAWN, generator=generator, **(settings | options))[0]


def recorded(pipe, branch="cond", **options):
    with bm.attribute(pipe, PROMPT, branch=branch) as recorder:
        draw(pipe, **options)
    return recorder.maps().values


@pytest.fixture
def perturbed(sd_pipe):
    from diffusers import StableDiffusionPAGPipeline

    return build(StableDiffusionPAGPipeline, sd_pipe, pag_applied_layers=["down", "up"])


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_perturbed_attention_guidance(make_sd, perturbed, guidance_scale):
    """In the first call nothing is perturbed yet but the chunk of that name."""
    options = {"num_inference_steps": 1, "guidance_scale": guidance_scale}
    expected = recorded(make_sd(), **options)
    found = recorded(perturbed, pag_scale=2.0, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_perturbed_attention_has_no_other_branch_without_guidance(perturbed):
    with pytest.raises(ValueError, match="needs classifier-free guidance"):
        recorded(perturbed, branch="uncond", pag_scale=2.0, guidance_scale=1.0)


def test_perturbed_attention_cannot_be_guided(perturbed):
    with bm.guide(perturbed, PROMPT) as run:
        draw(perturbed, pag_scale=0.0)
    assert len(run.ledger) == 3
    with (
        pytest.raises(ValueError, match=r"StableDiffusionPAGPipeline draws with .* pag_scale=0"),
        bm.guide(perturbed, PROMPT),
    ):
        draw(perturbed, pag_scale=2.0)


@pytest.mark.parametrize("intervene", [bm.attribute, bm.guide])
def test_videos_are_refused(sd_pipe, intervene):
    from diffusers import AnimateDiffPipeline, MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=(16, 32, 32), motion_layers_per_block=1, motion_norm_num_groups=2,
        motion_num_attention_heads=2, motion_mid_block_layers_per_block=1,
    )  # fmt: skip
    pipe = build(AnimateDiffPipeline, sd_pipe, motion_adapter=adapter)
    with (
        pytest.raises(ValueError, match=r"got shape \(2, 4, 2, 16, 16\); .* videos"),
        intervene(pipe, PROMPT),
    ):
        draw(pipe, num_frames=2)


@pytest.mark.parametrize("intervene", [bm.attribute, bm.guide])
def test_skipped_text_layers_are_refused(sdxl_pipe, intervene):
    with pytest.raises(ValueError, match="clip_skip=1"), intervene(sdxl_pipe, PROMPT):
        draw(sdxl_pipe, clip_skip=1)
    with intervene(sdxl_pipe, PROMPT):
        draw(sdxl_pipe, clip_skip=0)


@pytest.mark.parametrize("intervene", [bm.attribute, bm.guide])
def test_a_lora_scaled_in_the_call_is_refused(sd_pipe, intervene):
    """Its keys at scale 1 would meet queries at another; set_adapters moves both."""
    from peft import LoraConfig

    scaled = {"cross_attention_kwargs": {"scale": 0.3}}
    with intervene(sd_pipe, PROMPT):  # there is nothing to scale
        draw(sd_pipe, **scaled)
    torch.manual_seed(0)
    sd_pipe.unet.add_adapter(
        LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]), "one"
    )
    with (
        pytest.raises(ValueError, match=r"'scale': 0.3.*set_adapters"),
        intervene(sd_pipe, PROMPT),
    ):
        draw(sd_pipe, **scaled)
    full = recorded(sd_pipe)
    sd_pipe.unet.set_adapters(["one"], [0.3])
    assert not torch.allclose(recorded(sd_pipe), full, rtol=1e-2)


def test_guidance_moves_the_latents_of_an_inpainting_unet(make_sd):
    """One that does not look at mask and picture is guided as it is without them."""
    from diffusers import StableDiffusionInpaintPipeline

    plain = make_sd()
    pipe = build(StableDiffusionInpaintPipeline, widened(make_sd, 9))
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    inpainting = {"image": picture, "mask_image": (picture[:, :1] > 0.5).float(), "strength": 1.0}
    with bm.guide(plain, PROMPT, bm.Energy(scale=30.0, inner_steps=2)) as expected:
        target = draw(plain)
    with bm.guide(pipe, PROMPT, bm.Energy(scale=30.0, inner_steps=2)) as found:
        torch.testing.assert_close(draw(pipe, **inpainting), target, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(draw(pipe, **inpainting), target, rtol=1e-2)
    for one, other in zip(found.ledger, expected.ledger, strict=True):
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-3)
        assert one.applied


@pytest.fixture
def editing(make_sd):
    """InstructPix2Pix with a UNet that does not look at the picture."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    plain = make_sd()
    pipe = build(StableDiffusionInstructPix2PixPipeline, widened(make_sd, 8))
    options = {"image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))}

    def run(**more):
        settings = {"num_inference_steps": 3, "output_type": "latent"} | options | more
        return pipe(DRAWN, generator=torch.Generator().manual_seed(0), **settings)[0]

    return plain, pipe, run


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_editing_by_instructions_has_three_chunks(editing, branch):
    plain, pipe, run = editing
    with bm.attribute(plain, PROMPT, branch=branch) as expected:
        latents = draw(plain, guidance_scale=7.5)
    with bm.attribute(pipe, PROMPT, branch=branch) as found:
        torch.testing.assert_close(run(guidance_scale=7.5), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.maps().values, expected.maps().values)
    with bm.attribute(pipe, PROMPT, branch=branch, chunks=3) as told:
        run(guidance_scale=7.5)
    assert torch.equal(told.maps().values, found.maps().values)
    if branch == "cond":
        with bm.attribute(pipe, PROMPT) as alone:
            run(guidance_scale=1.0)
        assert alone.maps().values.shape == found.maps().values.shape


@pytest.mark.parametrize(("branch", "has_picture"), [("cond", True), ("uncond", False)])
def test_editing_by_instructions_takes_the_chunk_of_the_branch(editing, branch, has_picture):
    _, pipe, run = editing
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(guidance_scale=7.5)
    rows = branch_rows(seen[0][:, :4], batch_layout(pipe), branch)
    assert bool(seen[0][rows, 4:].any()) == has_picture


def test_editing_by_instructions_is_guided(editing):
    plain, pipe, run = editing
    with bm.guide(plain, PROMPT, bm.Energy(scale=30.0)):
        target = draw(plain, guidance_scale=7.5)
    with bm.guide(pipe, PROMPT, bm.Energy(scale=30.0)):
        torch.testing.assert_close(run(guidance_scale=7.5), target, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run(guidance_scale=7.5), target, rtol=1e-2)


def test_every_inner_step_has_the_features_of_a_t2i_adapter(sd_pipe):
    from diffusers import StableDiffusionAdapterPipeline, T2IAdapter

    torch.manual_seed(0)
    adapter = T2IAdapter(in_channels=3, channels=[16, 32, 32], num_res_blocks=1, downscale_factor=2)
    pipe = build(StableDiffusionAdapterPipeline, sd_pipe, adapter=adapter)
    forward, features = pipe.unet.forward, []

    def counted(*args, **kwargs):
        features.append(len(kwargs["down_intrablock_additional_residuals"]))
        return forward(*args, **kwargs)

    pipe.unet.forward = counted
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with bm.guide(pipe, PROMPT, bm.Energy(scale=20.0, inner_steps=2)):
        draw(pipe, image=picture)
    assert features == [3] * 9  # two inner steps and the other chunk, three times


@pytest.mark.parametrize("network", ["text_encoder", "unet", "vae"])
def test_weights_that_lack_a_tensor_are_refused(tmp_path, network):
    """diffusers and transformers would draw it at random: other figures in every process."""
    bm.testbed.pipeline().save_pretrained(tmp_path)
    assert type(load_pipeline(str(tmp_path))).__name__ == "StableDiffusionPipeline"
    (file,) = (tmp_path / network).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors["renamed"] = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 tensors are missing or of another shape.*{name}"):
        load_pipeline(str(tmp_path))
