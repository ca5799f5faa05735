"""What `probe` promises beside its numbers: rows, calls, batches, other hooks, refusals."""

from __future__ import annotations

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast.probes import measured_calls

DOCTOR, MAN = "a photo of a doctor", "a photo of a man"
ROLE = bm.Swap("profession", {"doctor": DOCTOR, "person": "a photo of a person"})
GENDER = bm.Swap("gender", {"woman": "a doctor and woman", "man": "a doctor and man"})
WORD = bm.AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))


# a UNet of one level: enough for what is compiled or exported
SMALL = {
    "block_out_channels": (8, 16), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "mid_block_type": None,
}  # fmt: skip


def draw(pipe, prompt=(DOCTOR, MAN), seeds=(1, 2), **options):
    settings = {
        "num_inference_steps": 4, "height": 32, "width": 24, "output_type": "latent",
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }  # fmt: skip
    prompt = list(prompt) if isinstance(prompt, tuple) else prompt
    return pipe(prompt, **(settings | options)).images


def close(first, second, tolerance=1e-4):
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


def test_which_calls():
    assert measured_calls(3, 25) == [6, 12, 18]
    assert measured_calls(1, 4) == [2]
    assert measured_calls(3, 1) == [0]
    assert measured_calls("all", 3) == [0, 1, 2]
    assert measured_calls([0.0, 0.5, 1.0], 25) == [0, 12, 24]
    for wrong in (0, -1, "some", [], [1.5]):
        with pytest.raises(ValueError, match="`calls` must be"):
            measured_calls(wrong, 25)


def test_the_own_prediction_is_reused_where_its_prompt_is_a_probe(sd_pipe):
    with bm.probe(sd_pipe, [ROLE, GENDER], calls="all") as probes:
        draw(sd_pipe)
    # of four prompts one is the first image's own
    assert probes.rows == 4 * (4 + 3)
    with bm.probe(sd_pipe, [ROLE], calls="all") as again:
        draw(sd_pipe, DOCTOR, seeds=(1,))
    assert again.rows == 4
    close(again.effects()["profession"][0], probes.effects()["profession"][0])


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_embeds": None, "guidance_rescale": 0.5}, {"guidance_scale": 1.0},
        {"negative_prompt": ["man", "person"]},
        {"num_images_per_prompt": 1, "eta": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_prompts_are_encoded_with_the_arguments_of_the_call(sd_pipe, options):
    before = draw(sd_pipe, **options)
    with bm.probe(sd_pipe, [ROLE], calls="all") as probes:
        assert torch.equal(before, draw(sd_pipe, **options))
    assert probes.rows == 4 * 3  # the rehearsal of the own prompt gave exactly its states


def test_prompt_embeds_and_lora(sd_pipe):
    from peft import LoraConfig

    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v"]
    sd_pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
    states, negative = sd_pipe.encode_prompt([DOCTOR, MAN], "cpu", 1, True)
    options = {"cross_attention_kwargs": {"scale": 0.3}}
    given = {"prompt_embeds": states, "negative_prompt_embeds": negative} | options
    before = draw(sd_pipe, None, **given)
    with bm.probe(sd_pipe, [ROLE], calls="all") as embedded:
        assert torch.equal(before, draw(sd_pipe, None, **given))
    with bm.probe(sd_pipe, [ROLE], calls="all") as named:
        draw(sd_pipe, **options)
    with bm.probe(sd_pipe, [ROLE], calls="all") as unscaled:
        draw(sd_pipe)
    assert embedded.rows == named.rows == 4 * 3
    assert torch.equal(embedded.effects().values, named.effects().values)
    assert not torch.allclose(unscaled.effects().values, named.effects().values, rtol=1e-2)


def test_swaps_of_each_image(sd_pipe):
    other = bm.Swap("profession", {"doctor": MAN, "person": "a photo of a woman"})
    with bm.probe(sd_pipe, [[ROLE], [other]]) as probes:
        draw(sd_pipe)
    for image, swap in enumerate((ROLE, other)):
        with bm.probe(sd_pipe, [swap]) as alone:
            draw(sd_pipe)
        close(probes.effects().values[image], alone.effects().values[image])
        close(probes.shares("profession")[:, image], alone.shares("profession")[:, image])
    with (
        pytest.raises(ValueError, match="swaps are given for 2 images, and the pipeline draws 1"),
        bm.probe(sd_pipe, [[ROLE], [other]]),
    ):
        draw(sd_pipe, DOCTOR, seeds=(1,))


def test_pipeline_calls_are_stacked(sd_pipe):
    with bm.probe(sd_pipe, [ROLE, GENDER]) as probes:
        draw(sd_pipe)
        draw(sd_pipe, DOCTOR, seeds=(3,))
    assert probes.effects().values.shape == (3, 2, 16, 12)
    assert probes.shares("gender").shape == (3, 3, 2)
    with bm.probe(sd_pipe, [ROLE]) as probes:
        draw(sd_pipe)
        draw(sd_pipe, height=48)
    with pytest.raises(ValueError, match="measure them in separate blocks"):
        probes.effects()


def test_rows_limit_and_memory(sd_pipe):
    with bm.probe(sd_pipe, [ROLE, GENDER]) as probes:
        draw(sd_pipe)
    sizes = []

    def scarce(module, args, kwargs):
        sizes.append(len(args[0] if args else kwargs["sample"]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("scarce")

    handle = sd_pipe.unet.register_forward_pre_hook(scarce, with_kwargs=True)
    with bm.probe(sd_pipe, [ROLE, GENDER]) as halved:
        draw(sd_pipe)
    handle.remove()
    assert 7 in sizes
    assert sizes.count(4) == 4  # the drawing's own
    assert sizes.count(3) == 6
    close(halved.effects().values, probes.effects().values)


def test_everything_is_undone_after_an_exception(sd_pipe):
    kind = type(sd_pipe)
    probes = bm.probe(sd_pipe, [ROLE])
    with pytest.raises(RuntimeError, match="stop"), probes:
        draw(sd_pipe)
        raise RuntimeError("stop")
    assert type(sd_pipe) is kind
    assert not sd_pipe.unet._forward_hooks
    assert not sd_pipe.unet._forward_pre_hooks
    with pytest.raises(RuntimeError, match="ended with RuntimeError"):
        probes.effects()
    with pytest.raises(RuntimeError, match="nothing was measured"), probes:
        probes.effects()


def test_interrupted_drawings_give_no_maps(sd_pipe):
    def stop(pipe, step, timestep, values):
        pipe._interrupt = True
        return values

    with bm.probe(sd_pipe, [ROLE]) as probes:
        draw(sd_pipe, callback_on_step_end=stop)
    with pytest.raises(RuntimeError, match="ended after 1 denoiser calls, before the measured"):
        probes.effects()


@pytest.mark.parametrize("outside", [True, False])
def test_beside_attribution(sd_pipe, outside):
    with bm.attribute(sd_pipe, WORD) as alone:
        draw(sd_pipe)
    with bm.probe(sd_pipe, [ROLE], calls="all") as probes:
        before = draw(sd_pipe)
    blocks = [bm.attribute(sd_pipe, WORD), bm.probe(sd_pipe, [ROLE], calls="all")]
    first, second = blocks if outside else blocks[::-1]
    with first, second:
        assert torch.equal(before, draw(sd_pipe))
    assert torch.equal(blocks[0].maps().values, alone.maps().values)
    assert torch.equal(blocks[1].effects().values, probes.effects().values)


def test_beside_guidance(sd_pipe):
    """The guided picture is as it is without probes, which see predictions without guidance."""
    with bm.guide(sd_pipe, WORD, bm.Energy(scale=10.0)):
        before = draw(sd_pipe)
    with bm.probe(sd_pipe, [ROLE, GENDER], calls=[0.0]) as plain:
        draw(sd_pipe)
    with (
        bm.probe(sd_pipe, [ROLE, GENDER], calls=[0.0]) as guided,
        bm.guide(sd_pipe, WORD, bm.Energy(scale=10.0)),
    ):
        assert torch.equal(before, draw(sd_pipe))
    close(guided.effects().values, plain.effects().values)
    close(guided.shares("gender"), plain.shares("gender"), 1e-3)
    assert guided.rows == 2 * 4 + 2


def test_nested_probes(sd_pipe):
    with bm.probe(sd_pipe, [ROLE]) as alone:
        draw(sd_pipe)
    with bm.probe(sd_pipe, [ROLE]) as first, bm.probe(sd_pipe, [GENDER]) as second:
        draw(sd_pipe)
    assert torch.equal(first.effects().values, alone.effects().values)
    assert second.effects().names == ("gender",)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:The .grad attribute")
@pytest.mark.parametrize("how", ["module", "wrapper"])
def test_compiled(make_sd, how):
    torch._dynamo.reset()
    pipe = make_sd(unet_config=SMALL)
    with bm.probe(pipe, [ROLE]) as plain:
        draw(pipe)
    if how == "module":
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    before = draw(pipe)
    with bm.probe(pipe, [ROLE]) as probes:
        assert torch.equal(before, draw(pipe))
    close(probes.effects().values, plain.effects().values)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks(sd_pipe, dtype):
    with bm.probe(sd_pipe, [GENDER]) as exact:
        draw(sd_pipe)
    sd_pipe.to(dtype)
    with bm.probe(sd_pipe, [GENDER]) as probes:
        draw(sd_pipe)
    assert probes.effects().values.dtype == torch.float32
    assert probes.shares("gender").dtype == torch.float64
    maps = torch.stack([probes.effects().values.flatten(), exact.effects().values.flatten()])
    assert float(torch.corrcoef(maps)[0, 1]) > 0.9


def test_second_order_schedulers_and_skipped_layers(make_sd, family):
    pipe = make_sd(kind="HeunDiscreteScheduler")
    with bm.probe(pipe, [ROLE], calls="all") as probes:
        draw(pipe)
    assert len(probes.shares("profession")) == 7  # 2 * 4 - 1 calls, some at the same time
    sd3 = family("sd3")
    with bm.probe(sd3.pipe, [ROLE], calls="all") as probes:
        sd3.draw(skip_guidance_layers=[0], skip_layer_guidance_start=0.0, seeds=(1,), prompts=[MAN])
    assert len(probes.shares("profession")) == 3


def test_guidance_that_ends_early(family):
    z_image = family("z_image")
    before = z_image.draw(cfg_truncation=0.4)
    with bm.probe(z_image.pipe, [ROLE], calls="all") as probes:
        assert torch.equal(before, z_image.draw(cfg_truncation=0.4))
    assert probes.shares("profession").shape == (3, 2, 2)


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
    options = {"image": image, "height": 32, "width": 32}
    before = draw(pipe, **options)
    with bm.probe(pipe, [ROLE], calls="all") as probes:
        assert torch.equal(before, draw(pipe, **options))
    assert probes.rows == 4 * 3


def test_img2img(sd_pipe):
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline.from_pipe(sd_pipe)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def drawn():
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 8, "output_type": "latent", "generator": generator}
        return pipe(DOCTOR, image=image, strength=0.5, **options).images

    before = drawn()
    with bm.probe(pipe, [ROLE], calls="all") as probes:
        assert torch.equal(before, drawn())
    assert len(probes.shares("profession")) == 4
    with pytest.raises(ValueError, match="starts from a picture"):
        bm.share(pipe, DOCTOR, GENDER.groups)


def test_text_that_changes_between_calls_is_refused(sd_pipe):
    def change(pipe, step, timestep, values):
        return {"prompt_embeds": values["prompt_embeds"] * 0.5}

    with pytest.raises(ValueError, match="text changed"), bm.probe(sd_pipe, [ROLE]):
        draw(
            sd_pipe,
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )


def test_step_caches_are_refused(family):
    from diffusers import FirstBlockCacheConfig

    flux = family("flux")
    flux.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="disable_cache"), bm.probe(flux.pipe, [ROLE]):
        flux.draw()
    with pytest.raises(ValueError, match="disable_cache"):
        bm.share(flux.pipe, DOCTOR, GENDER.groups)


def test_perturbed_attention_is_refused(sd_pipe):
    from diffusers import StableDiffusionPAGPipeline

    pipe = StableDiffusionPAGPipeline.from_pipe(sd_pipe)
    pipe.set_progress_bar_config(disable=True)
    pipe.set_pag_applied_layers("mid")
    with pytest.raises(ValueError, match="pag_scale=0"), bm.probe(pipe, [ROLE]):
        draw(pipe)


def test_wrong_pipelines_and_swaps(sd_pipe):
    with pytest.raises(TypeError, match="under `unet` or `transformer`, got list"):
        bm.probe([], [ROLE])
    with pytest.raises(ValueError, match="two different prompts"):
        bm.Swap("gender", {"woman": DOCTOR, "man": DOCTOR})
    with pytest.raises(ValueError, match="different names"):
        bm.probe(sd_pipe, [ROLE, ROLE])
    with pytest.raises(ValueError, match="same names and labels"):
        bm.probe(sd_pipe, [[ROLE], [GENDER]])
    with pytest.raises(ValueError, match="expected swaps"):
        bm.probe(sd_pipe, [])


def test_words_that_change_nothing(sd_pipe):
    """The tokenizer lower-cases; and a network may ignore its text."""
    with (
        pytest.raises(ValueError, match="do not change what the pipeline gives its denoiser"),
        bm.probe(sd_pipe, [bm.Swap("case", {"a": DOCTOR, "b": DOCTOR.upper()})]),
    ):
        draw(sd_pipe)
    for name, weight in sd_pipe.unet.named_parameters():
        if "attn2.to_v" in name:
            weight.data.zero_()
    with bm.probe(sd_pipe, [ROLE]) as probes:
        draw(sd_pipe)
    for result in (probes.effects, lambda: probes.shares("profession")):
        with pytest.raises(ValueError, match="the words do not change the prediction"):
            result()
    with pytest.raises(ValueError, match="the words do not change the prediction"):
        bm.share(sd_pipe, DOCTOR, GENDER.groups, draws=2)


def test_effect_maps_as_a_value(sd_pipe, tmp_path):
    with bm.probe(sd_pipe, [ROLE, GENDER]) as probes:
        images = draw(sd_pipe, output_type="pil")
    effects = probes.effects()
    assert effects["gender"].mean((1, 2)).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    effects.save(tmp_path / "maps.safetensors")
    again = bm.EffectMaps.load(tmp_path / "maps.safetensors")
    assert again.names == ("profession", "gender")
    assert torch.equal(again.values, effects.values)
    assert [image.size for image in effects.overlay(images, "gender")] == [(24, 32)] * 2
    with pytest.raises(KeyError, match="no swap 'age'"):
        effects["age"]
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        bm.EffectMaps.load(tmp_path / "other")


@pytest.mark.slow
def test_engine(make_sd, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from biasmap_fast.engines import Range, Shapes

    pipe = make_sd(unet_config=SMALL)
    with bm.probe(pipe, [ROLE, GENDER]) as plain:
        draw(pipe)
    shapes = Shapes(batch=Range(1, 2, 8), height=Range(16, 16, 16), width=Range(12, 12, 12))
    bm.export_unet(pipe, tmp_path / "engine", shapes=shapes)
    pipe.unet = bm.load_engine(tmp_path / "engine", unet=pipe.unet)
    before = draw(pipe)
    with bm.probe(pipe, [ROLE, GENDER], rows=8) as probes:
        assert torch.equal(before, draw(pipe))
    close(probes.effects().values, plain.effects().values, 1e-2)
