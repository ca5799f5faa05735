"""Exports that several files of tests share: each takes most of a minute, and is written once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast.engines import Gradient, Range, Shapes
from biasmap_fast.engines import onnx as exporter
from biasmap_fast.engines.graph import AttributionGraph, attributed_layers

# Height and width as constants: an export of half the time, for what does not depend on them.
FIXED = Shapes(batch=Range(1, 2, 63), height=Range(16, 16, 16), width=Range(16, 16, 16))
# A UNet of one level fewer: enough if only the writing is tested.
SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "mid_block_type": None,
}


@pytest.fixture(scope="session")
def fixed():
    return FIXED


def softened(pipe):
    """Milder attention than the fixtures': theirs amplifies rounding past what is compared here.

    In SDXL's, torch's own float32 maps are 5e-3 off float64.
    """
    for name, weight in pipe.unet.named_parameters():
        if "attn2.to_q" in name or "attn2.to_k" in name:
            weight.data.div_(4.0)
    return pipe


@pytest.fixture(scope="session")
def mild():
    return softened


@pytest.fixture
def small_pipe(make_sd):
    return softened(make_sd(unet_config=SMALL))


@pytest.fixture(scope="session")
def testbed_folder(tmp_path_factory):
    """The embedded model with a gradient graph, written by the README's line in its own process."""
    folder = tmp_path_factory.mktemp("engines") / "testbed"
    script = Path(__file__).resolve().parents[2] / "export" / "export_unet.py"
    command = [sys.executable, script, "--model", "testbed", "--gradient", "16x16"]
    done = subprocess.run(
        [*command, "--gradient-prompts", "1", "--out", folder, "--json"],
        capture_output=True,
        text=True,
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)
    assert written["shapes"] == "testbed"
    assert written["opset"] == 20
    assert max(written["difference_from_torch"]["unet.onnx"].values()) < 1e-4
    assert "compare unet with torch" in done.stderr
    assert "Warning" not in done.stderr
    return folder


@pytest.fixture(scope="session")
def half_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "half"
    gradient = Gradient(16, 16, tokens=20, attribution_tokens=12, concepts=2)
    pipe = bm.testbed.pipeline()
    bm.export_unet(pipe, folder, dtype="float16", shapes=FIXED, gradients=[gradient])
    return folder


@pytest.fixture(scope="session")
def probabilities_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "probabilities"
    bm.export_unet(bm.testbed.pipeline(), folder, shapes=FIXED, maps="probabilities")
    return folder


@pytest.fixture
def pipe():
    return bm.testbed.pipeline()


@pytest.fixture(scope="session")
def program(make_sd, tmp_path_factory):
    """A UNet and its translation to ONNX, which takes most of an export's time."""
    unet = make_sd(unet_config=SMALL).unet
    translations = []
    translate = torch.onnx.export

    def keep(*args, **kwargs):
        translations.append(translate(*args, **kwargs))
        return translations[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", keep)
        bm.export_unet(unet, tmp_path_factory.mktemp("once") / "e", shapes=FIXED)
    return unet, translations[0]


@pytest.fixture(scope="session")
def draw():
    def images(pipe, seeds=(1, 2), **options):
        settings = {"num_inference_steps": 3, "output_type": "np"}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        prompts = ["a photo of a doctor"] * len(seeds)
        return pipe(prompts, generator=generators, **(settings | options)).images

    return images


@pytest.fixture(scope="session")
def assert_near():
    def check(values, expected, tolerance=1e-4):
        assert values.shape == expected.shape
        assert exporter.relative(values, expected) < tolerance

    return check


@pytest.fixture(scope="session")
def graph_of():
    def graph(unet, maps="reduced"):
        return AttributionGraph(unet, attributed_layers(unet, None), maps).eval()

    return graph


@pytest.fixture(scope="session")
def run_both():
    """The same random inputs through an engine's file and through torch."""

    def run(engine, graph, sizes, seed):
        given = exporter.example_inputs(graph.inputs, sizes, seed)
        with torch.no_grad():
            expected = graph(*given)
        names = [tensor.name for tensor in graph.inputs]
        outputs = engine._session.run(dict(zip(names, given, strict=True)), sizes)
        return outputs, dict(zip((one.name for one in graph.outputs), expected, strict=True))

    return run
