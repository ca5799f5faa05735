"""Engines against torch: what the graphs compute."""

from __future__ import annotations

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import AttributionPrompt
from biasmap_fast.engines import errors, session
from biasmap_fast.engines import onnx as exporter
from biasmap_fast.engines.graph import prepared

DOCTOR = AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))
WOMAN = AttributionPrompt("a photo of a nurse and woman", ("photo", "woman", "a"))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("size", [(8, 8), (16, 16), (20, 12), (8, 64)])
@pytest.mark.parametrize(
    ("tokens", "prompts", "attribution_tokens", "concepts"),
    [(1, 1, 3, 1), (20, 2, 13, 5), (77, 3, 77, 2)],
)
def test_grid(
    testbed_folder,
    pipe,
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
    engine = bm.load_engine(testbed_folder)
    sizes = {
        "batch": batch,
        "height": size[0],
        "width": size[1],
        "tokens": tokens,
        "prompts": prompts,
        "attribution_tokens": attribution_tokens,
        "concepts": concepts,
    }
    computed, expected = run_both(engine, graph_of(pipe.unet.requires_grad_(False)), sizes, batch)
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
def test_recorder_on_an_engine(testbed_folder, pipe, draw, assert_near, by, branch):
    def record():
        with bm.attribute(pipe, [DOCTOR, WOMAN], by=by, branch=branch) as recorder:
            pictures = draw(pipe)
        return torch.as_tensor(pictures), recorder.maps_by_prompt()

    pictures, expected = record()
    pipe.unet = bm.load_engine(testbed_folder, unet=pipe.unet)
    again, computed = record()
    assert_near(again, pictures)
    for name, maps in expected.items():
        assert_near(computed[name].values, maps.values)
        assert computed[name].layers == maps.layers
        assert list(computed[name].parts) == list(maps.parts)
        for part, values in maps.parts.items():
            assert_near(computed[name].parts[part], values)


def test_nested_recorders_and_no_recorder(testbed_folder, pipe, draw, assert_near):
    pipe.unet = bm.load_engine(testbed_folder)
    alone = draw(pipe)
    with bm.attribute(pipe, DOCTOR) as outer, bm.attribute(pipe, WOMAN) as inner:
        pictures = draw(pipe)
    assert_near(torch.as_tensor(pictures), torch.as_tensor(alone))
    assert outer.maps().concepts == DOCTOR.concepts
    assert inner.maps().concepts == WOMAN.concepts
    with bm.attribute(pipe, WOMAN) as recorder:
        draw(pipe)
    assert_near(inner.maps().values, recorder.maps().values)
    assert not pipe.unet._listeners


def test_layers_must_be_whole_blocks(testbed_folder, pipe, draw, assert_near):
    selection = ("up_blocks.1", "down_blocks")
    with bm.attribute(pipe, DOCTOR, layers=selection) as recorder:
        draw(pipe)
    expected = recorder.maps()
    pipe.unet = bm.load_engine(testbed_folder)
    with bm.attribute(pipe, DOCTOR, layers=selection) as recorder:
        draw(pipe)
    assert_near(recorder.maps().values, expected.values)
    assert recorder.layers == expected.layers
    for layers, by, message in (
        (("up_blocks.1.attentions.0",), "total", "must name all or none of them"),
        (("mid_block",), "total", "no layer that matches.*mid_block"),
        (None, "head", "`by` must be of"),
        (None, ("block", "layer"), "`by` must be of"),
    ):
        with pytest.raises(ValueError, match=message):
            bm.attribute(pipe, DOCTOR, layers=layers, by=by)


def test_sdxl(sdxl_pipe, tmp_path, draw, assert_near, graph_of, run_both, mild, fixed):
    unet = mild(sdxl_pipe).unet.requires_grad_(False)
    folder = tmp_path / "sdxl"
    with bm.attribute(sdxl_pipe, [DOCTOR, WOMAN], by="block") as recorder:
        pictures = torch.as_tensor(draw(sdxl_pipe, num_inference_steps=1, height=32, width=32))
    expected = recorder.maps_by_prompt()
    bm.export_unet(sdxl_pipe, folder, shapes=fixed)
    sdxl_pipe.unet = bm.load_engine(folder, unet=sdxl_pipe.unet)
    with bm.attribute(sdxl_pipe, [DOCTOR, WOMAN], by="block") as recorder:
        # One step: in this random model, from sigma 14, rounding errors grow with every step.
        assert_near(
            torch.as_tensor(draw(sdxl_pipe, num_inference_steps=1, height=32, width=32)),
            pictures,
            1e-2,
        )
    for name, maps in recorder.maps_by_prompt().items():
        assert_near(maps.values, expected[name].values)
    names = ("batch", "tokens", "prompts", "attribution_tokens", "concepts")
    grid = [(3, 5, 2, 9, 4), (1, 1, 1, 3, 1), (2, 77, 3, 77, 2), (5, 20, 1, 12, 5)]
    for seed, values in enumerate(grid):
        sizes = {"height": 16, "width": 16, **dict(zip(names, values, strict=True))}
        computed, right = run_both(sdxl_pipe.unet, graph_of(unet), sizes, seed)
        batch, _, prompts, _, concepts = values
        # the largest attention is halved once
        assert computed["maps"].shape == (batch, prompts, 2, concepts, 8, 8)
        for name, tensor in right.items():
            assert_near(computed[name], tensor)
    with pytest.raises(errors.WrongModelError, match=r"added_cond_kwargs\['text_embeds'\]"):
        sdxl_pipe.unet(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 5, 80))


def test_probabilities(probabilities_folder, pipe, draw, assert_near):
    with bm.attribute(pipe, [DOCTOR, WOMAN], by="layer") as recorder:
        draw(pipe)
    expected = recorder.maps_by_prompt()
    pipe.unet = bm.load_engine(probabilities_folder, unet=pipe.unet)
    with bm.attribute(pipe, [DOCTOR, WOMAN], by="layer") as recorder:
        draw(pipe)
    for name, maps in recorder.maps_by_prompt().items():
        assert list(maps.by_layer) == list(expected[name].by_layer)
        for layer, values in maps.by_layer.items():
            assert_near(values, expected[name].by_layer[layer])


def test_without_maps(small_pipe, tmp_path, draw, assert_near, fixed):
    pictures = draw(small_pipe, height=32, width=32)
    bm.export_unet(small_pipe, tmp_path / "n", shapes=fixed, maps="none", opset=23)
    small_pipe.unet = bm.load_engine(tmp_path / "n")
    assert small_pipe.unet.manifest.graph.opset == 23
    assert_near(torch.as_tensor(draw(small_pipe, height=32, width=32)), torch.as_tensor(pictures))
    with pytest.raises(errors.EngineError, match="gives no maps: export it with maps='reduced'"):
        bm.attribute(small_pipe, DOCTOR)


def test_float16(half_folder, pipe, assert_near):
    import onnx

    graph = onnx.load(half_folder / "unet.onnx", load_external_data=False).graph
    kinds = {one.name: one.type.tensor_type.elem_type for one in graph.value_info}
    softmaxes = [kinds[node.output[0]] for node in graph.node if node.op_type == "Softmax"]
    assert softmaxes
    assert set(softmaxes) == {onnx.TensorProto.FLOAT}
    norms = ("LayerNormalization", "InstanceNormalization")
    normed = [kinds[node.output[0]] for node in graph.node if node.op_type in norms]
    assert set(normed) == {onnx.TensorProto.FLOAT}
    unet = pipe.unet.to(torch.float16)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    states = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).half()
    with torch.no_grad():
        expected = unet(latents, 7, states).sample
    engine = bm.load_engine(half_folder, unet=unet)
    assert engine.manifest.dtype == "float16"
    computed = engine(latents, 7, states).sample
    assert computed.dtype == torch.float16
    assert_near(computed.float(), expected.float(), 2e-2)


def test_bfloat16(pipe, graph_of, assert_near):
    """ONNX Runtime's CPU has no convolution of it: the graph that is exported, in torch."""
    sizes = {
        "batch": 2, "height": 16, "width": 16, "tokens": 7, "prompts": 2,
        "attribution_tokens": 9, "concepts": 3,
    }  # fmt: skip
    exact = graph_of(pipe.unet.requires_grad_(False))
    half = graph_of(prepared(pipe.unet, torch.bfloat16, plain=True))
    expected = exact(*exporter.example_inputs(exact.inputs, sizes))
    noise, maps = half(*exporter.example_inputs(half.inputs, sizes))
    assert noise.dtype == torch.bfloat16
    assert maps.dtype == torch.float32
    assert pipe.unet.dtype == torch.float32
    for values, right in zip((noise, maps), expected, strict=True):
        assert_near(values.float(), right, 1e-1)


def test_a_back_end_is_a_class_with_one_method(testbed_folder, pipe, graph_of, draw, monkeypatch):
    """Plain torch as a back end: the pictures are those of the UNet, and maps come with them."""

    class TorchSession:
        def __init__(self, folder, manifest, graph, device):
            self.names = [tensor.name for tensor in graph.inputs]
            self.outputs = [tensor.name for tensor in graph.outputs]

        def run(self, inputs, sizes):
            with torch.no_grad():
                outputs = reference(*(inputs[name] for name in self.names))
            return dict(zip(self.outputs, outputs, strict=True))

    expected = draw(pipe)
    reference = graph_of(pipe.unet.requires_grad_(False))
    monkeypatch.setitem(session.BACKENDS, "torch", TorchSession)
    pipe.unet = bm.load_engine(testbed_folder, backend="torch", unet=pipe.unet)
    with bm.attribute(pipe, DOCTOR) as recorder:
        assert (draw(pipe) == expected).all()
    assert recorder.maps().concepts == DOCTOR.concepts
