"""What a recorder refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import AttributionPrompt

DOCTOR = AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))
STEPS = 3


def draw(pipe, prompt="a photo of a doctor", seeds=(1, 2), **options):
    prompts = [prompt] * len(seeds) if isinstance(prompt, str) else prompt
    settings = {"num_inference_steps": STEPS, "height": 32, "width": 32, "output_type": "np"}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=generators, **(settings | options)).images


def test_layer_that_is_never_seen_is_an_error(sd_pipe):
    """As in a UNet that was compiled before the hooks came: its graphs do not have them."""
    attention = sd_pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    projection = attention.to_q
    with bm.attribute(sd_pipe, DOCTOR) as recorder:
        attention.to_q = torch.nn.Linear(16, 16, bias=False)  # takes the hook's place
        with pytest.raises(RuntimeError, match=r"layer down_blocks.0.*not seen in UNet call 0"):
            draw(sd_pipe)
        with pytest.raises(RuntimeError, match=r"call torch.compiler.reset\(\) first"):
            recorder.maps()
    attention.to_q = projection


def test_refused_layers_are_named(sd_pipe):
    first = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    attention = sd_pipe.unet.get_submodule(first)
    attention.norm_q = torch.nn.LayerNorm(8)
    with pytest.raises(ValueError, match=f"cannot attribute layer {first}: it normalises"):
        bm.attribute(sd_pipe, DOCTOR)
    assert bm.attribute(sd_pipe, DOCTOR, layers=("up_blocks",)).layers
    attention.norm_q, attention.added_kv_proj_dim = None, 8
    with pytest.raises(ValueError, match=f"{first}: it attends to added keys"):
        bm.attribute(sd_pipe, DOCTOR)
    attention.added_kv_proj_dim, attention.norm_cross = None, torch.nn.GroupNorm(4, 32)
    with pytest.raises(ValueError, match=r"normalises the text's states over all tokens"):
        bm.attribute(sd_pipe, DOCTOR)
    attention.norm_cross = None
    attention.processor.to_k_custom_diffusion = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"its processor AttnProcessor2_0 has keys of its own"):
        bm.attribute(sd_pipe, DOCTOR)
    sd_pipe.unet.register_to_config(encoder_hid_dim_type="text_proj")
    with pytest.raises(ValueError, match="projects its text states .*'text_proj'; expected none"):
        bm.attribute(sd_pipe, DOCTOR, layers=("up_blocks",))


def test_sequence_that_is_no_halved_image_is_refused_by_name(sd_pipe):
    with bm.attribute(sd_pipe, DOCTOR):
        layer = sd_pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
        with pytest.raises(RuntimeError, match=r"layer down_blocks.0.*saw 7 queries.*\[256, 64"):
            draw(sd_pipe, callback_on_step_end=lambda *a: layer.to_q(torch.zeros(4, 7, 16)))


class Flux:
    transformer = object()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"branch": "both"}, ValueError, "`branch` must be 'cond' or 'uncond', got 'both'"),
        ({"by": "pixel"}, ValueError, "`by` must be 'total', 'block'.*got 'pixel'"),
        ({"by": ("step", "head")}, ValueError, "several of them but 'head', got .*'step', 'head'"),
        ({"by": ()}, ValueError, "`by` must be 'total', 'block'.*got \\(\\)"),
        (
            {"layers": ("up_blocks.7",)},
            ValueError,
            "no cross-attention layer matches 'up_blocks.7'; there are: down",
        ),
        ({"layers": "up_blocks"}, TypeError, "sequence of names or prefixes, got the string"),
        ({"layers": ()}, ValueError, "at least one layer, got none"),
        ({"size": 0}, ValueError, "`size` must be positive, got 0"),
        ({"chunks": 0}, ValueError, "`chunks` must be at least 1, got 0"),
    ],
)
def test_bad_options(sd_pipe, options, error, message):
    with pytest.raises(error, match=message):
        bm.attribute(sd_pipe, DOCTOR, **options)


def test_bad_prompts(sd_pipe):
    with pytest.raises(ValueError, match="two attribution prompts have the same name"):
        bm.attribute(sd_pipe, [DOCTOR, DOCTOR])
    with pytest.raises(ValueError, match="got an empty sequence"):
        bm.attribute(sd_pipe, [])
    with pytest.raises(TypeError, match=r"expected an AttributionPrompt, got str 'a doctor'"):
        bm.attribute(sd_pipe, ["a doctor"])
    with pytest.raises(ValueError, match="'gender' is not in the attribution prompt"):
        bm.attribute(sd_pipe, AttributionPrompt("a doctor", ("gender",)))


def test_bad_pipelines():
    with pytest.raises(TypeError, match="with a UNet, got Flux; use probes for models with a tra"):
        bm.attribute(Flux(), DOCTOR)
    with pytest.raises(TypeError, match="expected a diffusers pipeline with a UNet, got NoneType$"):
        bm.attribute(None, DOCTOR)


def test_uncond_needs_guidance(sd_pipe):
    with (
        pytest.raises(ValueError, match="needs classifier-free guidance"),
        bm.attribute(sd_pipe, DOCTOR, branch="uncond"),
    ):
        draw(sd_pipe, guidance_scale=1.0)


def test_unet_called_by_hand_needs_chunks(sd_pipe):
    latents, states = torch.randn(3, 4, 16, 16), torch.randn(3, 5, 32)
    with (
        pytest.raises(ValueError, match=r"does not say whether.*chunks=1"),
        bm.attribute(sd_pipe, DOCTOR),
        torch.no_grad(),
    ):
        sd_pipe.unet(latents, 10, states)
    with bm.attribute(sd_pipe, DOCTOR, chunks=1) as recorder:
        sd_pipe.unet(latents, 10, states)
    assert recorder.maps().values.shape == (3, 2, 16, 16)
    assert not recorder.maps().values.requires_grad
    with (
        pytest.raises(ValueError, match="3 copies of the same latents"),
        bm.attribute(sd_pipe, DOCTOR, chunks=3),
        torch.no_grad(),
    ):
        sd_pipe.unet(latents, 10, states)


def test_nothing_recorded_and_double_entry(sd_pipe):
    recorder = bm.attribute(sd_pipe, DOCTOR)
    with recorder:
        with pytest.raises(RuntimeError, match="already recording"):
            recorder.__enter__()
        with pytest.raises(RuntimeError, match="no UNet call was recorded"):
            recorder.maps()
