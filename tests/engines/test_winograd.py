"""Winograd's convolutions: their matrices, the module against the direct one, and in an engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import biasmap_fast as bm
from biasmap_fast.engines import Range, Shapes
from biasmap_fast.engines import onnx as exporter
from biasmap_fast.engines import winograd as module
from biasmap_fast.engines.graph import AttributionGraph, attributed_layers, level_of
from biasmap_fast.engines.manifest import Manifest
from biasmap_fast.engines.winograd import WinogradConv2d, applicable, transformations, use_winograd

# Two levels: sizes are even, and those of the lower level may be odd.
SMALL = {
    "block_out_channels": (8, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "mid_block_type": None,
}
SHAPES = Shapes(
    batch=Range(1, 2, 8),
    height=Range(4, 64, 64),
    width=Range(4, 64, 64),
    tokens=Range(9, 9, 9),
    prompts=Range(2, 2, 2),
    attribution_tokens=Range(7, 7, 7),
    concepts=Range(2, 2, 2),
)


@pytest.mark.parametrize("tile", [2, 4])
def test_matrices_give_the_correlation(tile):
    generator = np.random.default_rng(tile)
    signal, kernel = generator.standard_normal(tile + 2), generator.standard_normal(3)
    output, weight, of_input = transformations(tile)
    found = output @ ((weight @ kernel) * (of_input @ signal))
    np.testing.assert_allclose(found, np.correlate(signal, kernel, "valid"), rtol=1e-12)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1), (4, 18), (3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_module_equals_the_direct_convolution(tile, size, bias):
    torch.manual_seed(0)
    direct = torch.nn.Conv2d(6, 5, 3, padding=1, bias=bias).double()
    images = torch.randn(2, 6, *size, dtype=torch.float64)
    found = WinogradConv2d(direct, tile)(images)
    torch.testing.assert_close(found, direct(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("tile", "limit"), [(2, 2e-6), (4, 1e-5)])
def test_rounding_in_float32(tile, limit):
    torch.manual_seed(0)
    direct = torch.nn.Conv2d(320, 16, 3, padding=1)
    images = torch.randn(1, 320, 32, 32)
    with torch.no_grad():
        found = WinogradConv2d(direct, tile)(images)
        assert exporter.relative(found, direct.double()(images.double())) < limit


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1, "padding": 0},
        {"stride": 2},
        {"padding": 0},
        {"dilation": 2, "padding": 2},
        {"groups": 2},
        {"padding_mode": "reflect"},
        {"in_channels": 4},
        {"out_channels": 4},
    ],
)
def test_what_stays_direct(options):
    given = {"in_channels": 256, "out_channels": 256, "kernel_size": 3, "padding": 1}
    assert applicable(torch.nn.Conv2d(**given))
    assert not applicable(torch.nn.Conv2d(**(given | options)))
    assert not applicable(torch.nn.Linear(256, 256))


def test_levels():
    names = {
        "conv_in": 0,
        "down_blocks.2.resnets.1.conv1": 2,
        "mid_block.resnets.0.conv2": 3,
        "up_blocks.0.resnets.2.conv1": 3,
        "up_blocks.0.upsamplers.0.conv": 2,
        "up_blocks.3.resnets.0.conv2": 0,
    }
    assert {name: level_of(name, 4) for name in names} == names


@pytest.fixture(scope="module")
def exported(make_sd, tmp_path_factory):
    """A pipeline's UNet, and the folder that was written of it with every tile in it."""
    pipe = make_sd(unet_config=SMALL)
    folder = tmp_path_factory.mktemp("winograd") / "e"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEWEST_CHANNELS", 8)
        bm.export_unet(pipe, folder, shapes=SHAPES, convolutions="winograd")
    return pipe.unet.requires_grad_(False), folder


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(4, 4), (12, 20), (64, 32), (6, 10)])
def test_equals_torch(exported, batch, size):
    unet, folder = exported
    graph = AttributionGraph(unet, attributed_layers(unet, None), "reduced").eval()
    engine = bm.load_engine(folder, unet=unet)
    sizes = {
        "batch": batch, "height": size[0], "width": size[1], "tokens": 9, "prompts": 2,
        "attribution_tokens": 7, "concepts": 2,
    }  # fmt: skip
    given = exporter.example_inputs(graph.inputs, sizes, batch)
    with torch.no_grad():
        expected = graph(*given)
    names = [each.name for each in graph.inputs]
    found = engine._session.run(dict(zip(names, given, strict=True)), sizes)
    for each, right in zip(graph.outputs, expected, strict=True):
        assert exporter.relative(found[each.name], right) < 1e-4


def test_what_is_written(exported):
    """Both tiles, and the UNet's own weights under the names they have there."""
    import onnx

    unet, folder = exported
    manifest = Manifest.read(folder)
    assert manifest.convolutions == "winograd"
    graph = onnx.load(folder / "unet.onnx", load_external_data=False).graph
    steps = [
        list(attribute.ints)
        for node in graph.node
        if node.op_type == "Conv"
        for attribute in node.attribute
        if attribute.name == "strides"
    ]
    assert [4, 4] in steps  # tiles of 4 x 4 on the latents' level, 2 x 2 below
    assert [2, 2] in steps
    large = {
        f"unet.{name}" for name, one in unet.state_dict().items() if one.numel() >= 32 * 32 * 9
    }
    assert any("resnets" in name for name in large)
    # Smaller ones the exporter folds by itself.
    assert large <= {one.name for one in graph.initializer}


def test_the_unet_is_as_it_was(exported):
    unet, _ = exported
    assert not any(isinstance(one, WinogradConv2d) for one in unet.modules())


def test_small_unets_say_that_nothing_is_gained(sd_pipe, caplog):
    use_winograd(sd_pipe.unet, 4096)
    assert "no 3 x 3 convolution of at least 256 channels" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convolutions": "fft"}, "`convolutions` must be one of .*'winograd'.*got 'fft'"),
        ({"convolutions": "winograd", "dtype": "float16"}, "dtype='float32', got .*'float16'"),
        ({"convolutions": "winograd", "format": "tensorrt"}, "format='onnx'.*got .*'tensorrt'"),
    ],
)
def test_refusals(sd_pipe, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        bm.export_unet(sd_pipe, tmp_path / "e", **options)
    assert not list(tmp_path.iterdir())
