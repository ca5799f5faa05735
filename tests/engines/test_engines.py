"""Engines against torch: what the graphs compute."""

from __future__ import annotations

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import AttributionPrompt
from biasmap_fast.engines import errors
from biasmap_fast.engines import onnx as exporter
from biasmap_fast.engines.manifest import Manifest

DOCTOR = AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))
WOMAN = AttributionPrompt("a woman in a photo", ("photo", "woman", "a"))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("size", [(4, 4), (16, 16), (20, 12), (8, 64)])
@pytest.mark.parametrize(
    ("tokens", "prompts", "attribution_tokens", "concepts"),
    [(1, 1, 3, 1), (20, 2, 13, 5), (77, 3, 77, 2)],
)
def test_grid(
    sd_folder,
    sd_pipe,
    batch,
    size,
    tokens,
    prompts,
    attribution_tokens,
    concepts,
    assert_near,
    graph_of,
    run_both,
):
    engine = bm.load_engine(sd_folder)
    sizes = {
        "batch": batch,
        "height": size[0],
        "width": size[1],
        "tokens": tokens,
        "prompts": prompts,
        "attribution_tokens": attribution_tokens,
        "concepts": concepts,
    }
    computed, expected = run_both(
        engine, graph_of(sd_pipe.unet.requires_grad_(False)), sizes, batch
    )
    assert computed["maps"].shape == (batch, prompts, 4, concepts, *size)
    for name, values in expected.items():
        assert_near(computed[name], values)


@pytest.mark.parametrize("maps", ["reduced", "probabilities"])
def test_padding_counts_nothing_whatever_is_in_it(small_pipe, maps, graph_of):
    graph = graph_of(small_pipe.unet, maps)
    sizes = {
        "batch": 2, "height": 16, "width": 16, "tokens": 7, "prompts": 2,
        "attribution_tokens": 9, "concepts": 3,
    }  # fmt: skip
    given = dict(
        zip(
            (one.name for one in graph.inputs),
            exporter.example_inputs(graph.inputs, sizes, 5),
            strict=True,
        )
    )
    given["attribution_mask"][:, 6:] = 0.0
    given["attribution_hidden_states"][:, 6:] *= 1e4  # scores far beyond those of the tokens
    padded = graph(*given.values())[1:]
    given["attribution_hidden_states"] = given["attribution_hidden_states"][:, :6]
    for name in given.keys() & {"attribution_mask", "concept_weights"}:
        given[name] = given[name][..., :6]
    for computed, expected in zip(padded, graph(*given.values())[1:], strict=True):
        if maps == "probabilities":
            assert not computed[:, :, :, 6:].any()
            computed = computed[:, :, :, :6]
        torch.testing.assert_close(computed, expected)


@pytest.mark.parametrize("by", ["total", "block", "step", ("step", "block")])
@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_recorder_on_an_engine(sd_folder, sd_pipe, draw, assert_near, by, branch):
    def record():
        with bm.attribute(sd_pipe, [DOCTOR, WOMAN], by=by, branch=branch) as recorder:
            pictures = draw(sd_pipe)
        return torch.as_tensor(pictures), recorder.maps_by_prompt()

    pictures, expected = record()
    sd_pipe.unet = bm.load_engine(sd_folder, unet=sd_pipe.unet)
    again, computed = record()
    assert_near(again, pictures)
    for name, maps in expected.items():
        assert_near(computed[name].values, maps.values)
        assert computed[name].layers == maps.layers
        assert list(computed[name].parts) == list(maps.parts)
        for part, values in maps.parts.items():
            assert_near(computed[name].parts[part], values)


def test_nested_recorders_and_no_recorder(sd_folder, sd_pipe, draw, assert_near):
    sd_pipe.unet = bm.load_engine(sd_folder)
    alone = draw(sd_pipe)
    with bm.attribute(sd_pipe, DOCTOR) as outer, bm.attribute(sd_pipe, WOMAN) as inner:
        pictures = draw(sd_pipe)
    assert_near(torch.as_tensor(pictures), torch.as_tensor(alone))
    assert outer.maps().concepts == DOCTOR.concepts
    assert inner.maps().concepts == WOMAN.concepts
    with bm.attribute(sd_pipe, WOMAN) as recorder:
        draw(sd_pipe)
    assert_near(inner.maps().values, recorder.maps().values)
    assert not sd_pipe.unet._listeners


def test_layers_must_be_whole_blocks(sd_folder, sd_pipe, draw, assert_near):
    selection = ("up_blocks.1", "down_blocks")
    with bm.attribute(sd_pipe, DOCTOR, layers=selection) as recorder:
        draw(sd_pipe)
    expected = recorder.maps()
    sd_pipe.unet = bm.load_engine(sd_folder)
    with bm.attribute(sd_pipe, DOCTOR, layers=selection) as recorder:
        draw(sd_pipe)
    assert_near(recorder.maps().values, expected.values)
    assert recorder.layers == expected.layers
    for layers, by, message in (
        (("up_blocks.1.attentions.0",), "total", "must name all or none of them"),
        (("mid_block",), "total", "no layer that matches.*mid_block"),
        (None, "head", "`by` must be of"),
        (None, ("block", "layer"), "`by` must be of"),
    ):
        with pytest.raises(ValueError, match=message):
            bm.attribute(sd_pipe, DOCTOR, layers=layers, by=by)


def test_sdxl(sdxl_pipe, tmp_path, draw, assert_near, graph_of, run_both, mild, shapes):
    unet = mild(sdxl_pipe).unet.requires_grad_(False)
    folder = tmp_path / "sdxl"
    with bm.attribute(sdxl_pipe, [DOCTOR, WOMAN], by="block") as recorder:
        pictures = torch.as_tensor(draw(sdxl_pipe, num_inference_steps=1))
    expected = recorder.maps_by_prompt()
    bm.export_unet(sdxl_pipe, folder, shapes=shapes)
    sdxl_pipe.unet = bm.load_engine(folder, unet=sdxl_pipe.unet)
    with bm.attribute(sdxl_pipe, [DOCTOR, WOMAN], by="block") as recorder:
        # One step: in this random model, from sigma 14, rounding errors grow with every step.
        assert_near(torch.as_tensor(draw(sdxl_pipe, num_inference_steps=1)), pictures, 1e-2)
    for name, maps in recorder.maps_by_prompt().items():
        assert_near(maps.values, expected[name].values)
    names = ("batch", "height", "width", "tokens", "prompts", "attribution_tokens", "concepts")
    grid = [
        (3, 20, 8, 5, 2, 9, 4), (1, 4, 4, 1, 1, 3, 1), (2, 16, 64, 77, 3, 77, 2),
        (5, 12, 12, 20, 1, 12, 5), (1, 64, 64, 9, 2, 7, 3),
    ]  # fmt: skip
    for seed, values in enumerate(grid):
        sizes = dict(zip(names, values, strict=True))
        computed, right = run_both(sdxl_pipe.unet, graph_of(unet), sizes, seed)
        batch, height, width, _, prompts, _, concepts = values
        # the largest attention is halved once
        expected_shape = (batch, prompts, 2, concepts, height // 2, width // 2)
        assert computed["maps"].shape == expected_shape
        for name, tensor in right.items():
            assert_near(computed[name], tensor)
    with pytest.raises(errors.WrongModelError, match=r"added_cond_kwargs\['text_embeds'\]"):
        sdxl_pipe.unet(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 5, 80))


def test_probabilities(small_pipe, tmp_path, draw, assert_near, fixed):
    with bm.attribute(small_pipe, [DOCTOR, WOMAN], by="layer") as recorder:
        draw(small_pipe)
    expected = recorder.maps_by_prompt()
    bm.export_unet(small_pipe, tmp_path / "p", shapes=fixed, maps="probabilities")
    small_pipe.unet = bm.load_engine(tmp_path / "p")
    with bm.attribute(small_pipe, [DOCTOR, WOMAN], by="layer") as recorder:
        draw(small_pipe)
    for name, maps in recorder.maps_by_prompt().items():
        assert list(maps.by_layer) == list(expected[name].by_layer)
        for layer, values in maps.by_layer.items():
            assert_near(values, expected[name].by_layer[layer])


def test_without_maps(small_pipe, tmp_path, draw, assert_near, fixed):
    pictures = draw(small_pipe)
    bm.export_unet(small_pipe, tmp_path / "n", shapes=fixed, maps="none", opset=23)
    small_pipe.unet = bm.load_engine(tmp_path / "n")
    assert small_pipe.unet.manifest.graph.opset == 23
    assert_near(torch.as_tensor(draw(small_pipe)), torch.as_tensor(pictures))
    with pytest.raises(errors.EngineError, match="gives no maps: export it with maps='reduced'"):
        bm.attribute(small_pipe, DOCTOR)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(small_pipe, tmp_path, dtype, assert_near, fixed):
    unet = small_pipe.unet
    runs = dtype == "float16"  # ONNX Runtime's CPU has no convolution of bfloat16
    bm.export_unet(small_pipe, tmp_path / "h", shapes=fixed, dtype=dtype, verify=runs)
    assert unet.dtype == torch.float32
    manifest = Manifest.read(tmp_path / "h")
    assert manifest.dtype == dtype
    assert bool(manifest.graph.parity) is runs
    import onnx

    graph = onnx.load(tmp_path / "h" / "unet.onnx", load_external_data=False).graph
    kinds = {one.name: one.type.tensor_type.elem_type for one in graph.value_info}
    softmaxes = [kinds[node.output[0]] for node in graph.node if node.op_type == "Softmax"]
    assert softmaxes
    assert set(softmaxes) == {onnx.TensorProto.FLOAT}
    norms = ("LayerNormalization", "InstanceNormalization")
    normed = [kinds[node.output[0]] for node in graph.node if node.op_type in norms]
    assert set(normed) == {onnx.TensorProto.FLOAT}
    if not runs:
        return
    small_pipe.to(torch.float16)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).half()
    with torch.no_grad():
        expected = unet(latents, 7, states).sample
    small_pipe.unet = bm.load_engine(tmp_path / "h", unet=unet)
    computed = small_pipe.unet(latents, 7, states).sample
    assert computed.dtype == torch.float16
    assert_near(computed.float(), expected.float(), 2e-2)
