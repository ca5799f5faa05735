"""What an export, a folder and a call are refused for."""

from __future__ import annotations

import types

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import AttributionPrompt, engines
from biasmap_fast.engines import Gradient, Range, Shapes, errors, session

DOCTOR = AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))


def test_wrong_model(testbed_folder, pipe, make_sd, draw):
    with pytest.raises(errors.WrongModelError, match="different: .*block_out_channels"):
        bm.load_engine(testbed_folder, unet=make_sd().unet)
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] += 1e-3
    with pytest.raises(errors.WrongModelError, match="other weights"):
        bm.load_engine(testbed_folder, unet=pipe.unet)
    wide = make_sd(text_width=48)
    wide.unet = bm.load_engine(testbed_folder)
    with (
        pytest.raises(errors.WrongModelError, match="width 64, the pipeline's text.*gives 48"),
        bm.attribute(wide, DOCTOR),
    ):
        pass
    with pytest.raises(errors.ShapeError, match="must have 64 as size 2.*another kind of model"):
        draw(wide, height=32, width=32)


@pytest.mark.parametrize(
    ("sample", "states", "message"),
    [
        ((1, 4, 18, 16), (1, 5, 64), "height of 8 to 64 in steps of 4, got 18"),
        ((1, 4, 16, 68), (1, 5, 64), "width of 8 to 64 in steps of 4, got 68"),
        ((64, 4, 8, 8), (64, 5, 64), "batch of 1 to 63, got 64"),
        ((2, 4, 16, 16), (1, 5, 64), "`encoder_hidden_states` must have the batch of `sample`"),
    ],
)
def test_shapes(testbed_folder, sample, states, message):
    engine = bm.load_engine(testbed_folder)
    with pytest.raises(errors.ShapeError, match=message):
        engine(torch.zeros(sample), 1, torch.zeros(states))


def test_inputs_that_no_engine_has(testbed_folder):
    engine = bm.load_engine(testbed_folder)
    given = torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 5, 64)
    with pytest.raises(errors.EngineError, match="no input for `mid_block_additional_residual`"):
        engine(*given, mid_block_additional_residual=torch.zeros(1))
    with pytest.raises(errors.EngineError, match="no input for `cross_attention_kwargs`"):
        engine(*given, cross_attention_kwargs={"scale": 0.5})
    (found,) = engine(*given, cross_attention_kwargs={}, return_dict=False)
    assert torch.equal(found, engine(*given).sample)


def test_devices(testbed_folder, monkeypatch):
    if "onnxruntime" in session._DISTRIBUTIONS and not torch.cuda.is_available():
        with pytest.raises(errors.DeviceError, match="no CUDAExecutionProvider.*onnx-gpu"):
            bm.load_engine(testbed_folder, device="cuda")
    with pytest.raises(errors.DeviceError, match="run on cpu and cuda, got meta"):
        bm.load_engine(testbed_folder, device="meta")
    engine = bm.load_engine(testbed_folder)
    with pytest.raises(errors.EngineError, match="runs on cpu, got latents on meta"):
        engine(torch.zeros(1, 4, 16, 16, device="meta"), 1, torch.zeros(1, 5, 64))
    with pytest.raises(ValueError, match="`backend` must be"):
        bm.load_engine(testbed_folder, backend="openvino")


def test_a_silent_fallback_is_an_error(testbed_folder, monkeypatch):
    """As onnxruntime-gpu behaves without a GPU: CUDA is listed, the session runs on the CPU."""
    import onnxruntime

    class Fallen:
        def __init__(self, *args, **kwargs):
            pass

        def get_providers(self):
            return ["CPUExecutionProvider"]

    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    with pytest.raises(errors.DeviceError, match="cannot use cuda:0: it offers CPUExecutio"):
        bm.load_engine(testbed_folder, device="cuda")


def test_two_runtimes(testbed_folder, monkeypatch):
    monkeypatch.setattr(session, "installed", lambda name: "1.0" * ("directml" not in name))
    with pytest.raises(errors.EngineError, match="onnxruntime and onnxruntime-gpu.*both inst"):
        bm.load_engine(testbed_folder)


def test_missing_extras(testbed_folder, sd_pipe, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(errors.MissingExtraError, match=r"biasmap-fast\[onnx\]"):
        bm.load_engine(testbed_folder)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"extra `onnx`.*biasmap-fast\[onnx\]"):
        bm.export_unet(sd_pipe, tmp_path / "e")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "openvino"}, "`format` must be one of"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"maps": "all"}, "`maps` must be one of"),
        ({"opset": 9}, "`opset` must be one of"),
        ({"shapes": "sd9"}, "`shapes` must be a Shapes or one of"),
        ({"maps": "none", "gradients": [Gradient(16, 16)]}, "need maps='reduced'"),
        ({"gradients": [Gradient(18, 16)]}, "multiples of 4, got 18 x 16"),
    ],
)
def test_bad_options(sd_pipe, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        bm.export_unet(sd_pipe, tmp_path / "e", **options)
    assert not list(tmp_path.iterdir())


def test_unsupported_unets(sd_pipe, make_sd, tmp_path):
    with pytest.raises(errors.UnsupportedUNetError, match="expected a UNet2DConditionModel"):
        bm.export_unet(
            types.SimpleNamespace(unet=torch.nn.Linear(2, 2)), tmp_path / "e", dtype="float32"
        )
    pipe = make_sd(unet_config={"time_cond_proj_dim": 8})
    with pytest.raises(errors.UnsupportedUNetError, match="no input for time_cond_proj_dim=8"):
        bm.export_unet(pipe, tmp_path / "e")
    with pytest.raises(ValueError, match="no cross-attention layer matches"):
        bm.export_unet(sd_pipe, tmp_path / "e", layers=["up_blocks.9"])


def test_bounds():
    assert Range(4, 16, 64, 4) == Shapes(height=Range(3, 15, 66)).on_grid(4).height
    with pytest.raises(ValueError, match="at most 63"):
        Shapes(batch=Range(1, 1, 64))
    with pytest.raises(ValueError, match="1 <= low <= best <= high"):
        Range(4, 2, 8)
    with pytest.raises(ValueError, match="no multiple of 8 lies between"):
        Shapes(height=Range(9, 10, 11)).on_grid(8)
    for shapes in engines.PRESETS.values():
        assert Shapes.from_json(shapes.to_json()) == shapes
