"""Guidance on pipelines that nobody here wrote, with other interventions beside it."""

from __future__ import annotations

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import AttributionPrompt

PROMPT = AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))


def draw(pipe, prompt="a photo of a doctor", seeds=(1, 2), **options):
    settings = {"num_inference_steps": 4, "height": 32, "width": 32, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe([prompt] * len(seeds), generator=generators, **(settings | options)).images


def test_sdxl(sdxl_pipe):
    before = draw(sdxl_pipe)
    with bm.guide(sdxl_pipe, PROMPT, bm.Energy(scale=0.0)):
        assert torch.equal(before, draw(sdxl_pipe))
    with bm.guide(sdxl_pipe, PROMPT) as guidance:
        assert not torch.equal(before, draw(sdxl_pipe))
    assert all(row.applied for row in guidance.ledger)


def test_img2img_and_no_guidance_chunk(sd_pipe):
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline.from_pipe(sd_pipe)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with bm.guide(pipe, PROMPT) as guidance:
        pipe(
            "a doctor", image=image, strength=0.5, num_inference_steps=8, guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        )  # fmt: skip
    assert [row.call for row in guidance.ledger] == [0, 1, 2, 3]


def test_controlnet(sd_pipe):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(sd_pipe.unet, conditioning_embedding_out_channels=(8, 8))
    parts = {k: v for k, v in sd_pipe.components.items() if k != "image_encoder"}
    pipe = StableDiffusionControlNetPipeline(
        **parts, controlnet=controlnet, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with bm.guide(pipe, PROMPT) as guidance:
        draw(pipe, image=image)
    assert all(row.applied for row in guidance.ledger)
    assert len(guidance.ledger) == 8


def test_semantic_guidance_says_its_chunks(tokenizer, sd_pipe):
    from diffusers import SemanticStableDiffusionPipeline

    pipe = SemanticStableDiffusionPipeline(
        **{k: v for k, v in sd_pipe.components.items() if k != "image_encoder"},
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    options = {
        "editing_prompt": ["a man", "a woman"], "reverse_editing_direction": [True, False],
        "edit_warmup_steps": 1, "edit_guidance_scale": 4, "edit_threshold": 0.9,
        "num_inference_steps": 4, "height": 32, "width": 32, "output_type": "latent",
    }  # fmt: skip
    with (
        pytest.raises(ValueError, match=r"does not say whether its UNet batch is guided"),
        bm.guide(pipe, PROMPT),
    ):
        pipe("a doctor", **options)
    with bm.attribute(pipe, PROMPT, chunks=4) as recorder, bm.guide(pipe, PROMPT, chunks=4) as run:
        pipe("a doctor", generator=torch.Generator().manual_seed(0), **options)
    assert len(run.ledger) == 4
    assert len(recorder.maps()) == 1


def test_several_images_per_prompt(sd_pipe):
    """Two prompts with two images each are four images, each guided as it is alone."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    with bm.guide(sd_pipe, PROMPT) as together:
        images = sd_pipe(
            ["a photo of a doctor", "a man"], num_images_per_prompt=2, generator=generators,
            num_inference_steps=3, height=32, width=32, output_type="latent",
        ).images  # fmt: skip
    with bm.guide(sd_pipe, PROMPT):
        alone = draw(sd_pipe, "a man", seeds=(2,), num_inference_steps=3)
    assert {row.image for row in together.ledger} == {0, 1, 2, 3}
    torch.testing.assert_close(images[2], alone[0], rtol=1e-3, atol=1e-3)


def test_lora_weights(sd_pipe):
    """The gradient passes LoRA layers: with weights of their own they change energy and picture."""
    from peft import LoraConfig

    torch.manual_seed(0)
    with bm.guide(sd_pipe, PROMPT) as plain:
        before = draw(sd_pipe)
    sd_pipe.unet.add_adapter(
        LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
    )
    trainable = [p.requires_grad for p in sd_pipe.unet.parameters()]
    with bm.attribute(sd_pipe, PROMPT) as recorder, bm.guide(sd_pipe, PROMPT) as adapted:
        after = draw(sd_pipe)
    assert all(row.applied for row in adapted.ledger)
    assert adapted.ledger[0].energy != pytest.approx(plain.ledger[0].energy, rel=1e-3)
    assert not torch.allclose(before, after, rtol=1e-3)
    assert len(recorder.maps()) == 2
    assert trainable == [p.requires_grad for p in sd_pipe.unet.parameters()]
    assert all(p.grad is None for p in sd_pipe.unet.parameters())


# torch.compile's own code looks at `.grad` of tensors between two graphs
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("wrapped", [True, False])
def test_compiled_unet(sd_pipe, wrapped):
    """Graph capture alone: the UNet is compiled, what guidance does around it is not."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.code))
        return graph.forward

    with bm.guide(sd_pipe, PROMPT) as eager:
        expected = draw(sd_pipe)
    torch.compiler.reset()
    if wrapped:
        sd_pipe.unet = torch.compile(sd_pipe.unet, backend=backend)
    else:
        sd_pipe.unet.compile(backend=backend)
    with bm.guide(sd_pipe, PROMPT) as compiled:
        found = draw(sd_pipe)
    torch.compiler.reset()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(compiled.ledger, eager.ledger, strict=True):
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-3)
    assert any("conv2d" in code for code in graphs)
    assert not [line for code in graphs for line in code.splitlines() if "biasmap" in line]


@pytest.fixture
def modular_pipe(sdxl_pipe):
    """SDXL in small as a modular pipeline: its guider calls the UNet once for each branch."""
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipe.update_components(
        **{name: getattr(sdxl_pipe, name) for name in (*names, "unet", "vae", "scheduler")}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_modular(pipe, seeds=(1, 2)):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        prompt=["a photo of a doctor"] * len(seeds), generator=generators, num_inference_steps=4,
        height=32, width=32, output_type="latent", output="images",
    )  # fmt: skip


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_a_guider_gives_the_pictures_of_the_pipeline(sdxl_pipe, modular_pipe, guidance_scale):
    """Guided alike, the modular pipeline and the one with a guidance batch draw the same."""
    modular_pipe.update_components(guider=modular_pipe.guider.new(guidance_scale=guidance_scale))
    plain = draw_modular(modular_pipe)
    with bm.attribute(sdxl_pipe, PROMPT) as recorder, bm.guide(sdxl_pipe, PROMPT) as run:
        expected = draw(sdxl_pipe, guidance_scale=guidance_scale)
    with bm.attribute(modular_pipe, PROMPT) as modular, bm.guide(modular_pipe, PROMPT) as guided:
        found = draw_modular(modular_pipe)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-3)
    assert len(guided.ledger) == len(run.ledger) == 8
    torch.testing.assert_close(modular.maps().values, recorder.maps().values, rtol=1e-3, atol=1e-3)


def test_a_guider_and_the_unconditional_branch(modular_pipe):
    with bm.attribute(modular_pipe, PROMPT, branch="uncond") as recorder:
        draw_modular(modular_pipe)
    with bm.attribute(modular_pipe, PROMPT) as conditional:
        draw_modular(modular_pipe)
    assert not torch.allclose(recorder.maps().values, conditional.maps().values)
    with (
        pytest.raises(ValueError, match="branch='uncond' cannot guide a modular pipeline"),
        bm.guide(modular_pipe, PROMPT, branch="uncond"),
    ):
        pass


def test_a_guider_of_another_kind_is_refused(modular_pipe):
    from diffusers import AdaptiveProjectedGuidance

    modular_pipe.update_components(guider=AdaptiveProjectedGuidance())
    with (
        pytest.raises(ValueError, match="ClassifierFreeGuidance, got AdaptiveProjectedGuidance"),
        bm.guide(modular_pipe, PROMPT),
    ):
        pass
