"""TensorRT-RTX builds a plan of every graph without a GPU; what both libraries refuse."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import engines
from biasmap_fast.engines import errors, tensorrt
from biasmap_fast.engines.manifest import Manifest
from biasmap_fast.engines.onnx import Export

DATA = Path(__file__).parent / "data"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx_bindings")
    return tensorrt.require("tensorrt-rtx")


@pytest.fixture(scope="module")
def built(rtx, testbed_folder, tmp_path_factory):
    """The embedded model's engine with its plans."""
    folder = shutil.copytree(testbed_folder, tmp_path_factory.mktemp("built") / "engine")
    tensorrt.build(folder, "tensorrt-rtx")
    return folder


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "engine")


def check_plans(rtx, folder, manifest):
    """Every graph has a plan whose header the library takes, and the manifest names it."""
    assert Manifest.read(folder) == manifest
    assert [plan.graph for plan in manifest.plans] == [graph.file for graph in manifest.graphs]
    runtime = rtx.Runtime(rtx.Logger(rtx.Logger.ERROR))
    for plan in manifest.plans:
        assert (plan.library, plan.version) == ("tensorrt-rtx", rtx.__version__)
        assert "tensorrt-rtx" in plan.file
        data = (folder / plan.file).read_bytes()
        assert len(data) > 1_000_000
        _, diagnostics = runtime.get_engine_validity(data)
        assert not diagnostics & int(rtx.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
        assert not diagnostics & int(rtx.EngineInvalidityDiagnostics.VERSION_MISMATCH)


def test_rtx_builds_reduced_maps_and_gradient_in_float32(rtx, built):
    check_plans(rtx, built, Manifest.read(built))


@pytest.mark.parametrize("name", ["half", "probabilities"])
def test_rtx_builds_other_graphs(rtx, request, tmp_path, name):
    """Reduced maps and gradient in float16, probabilities in float32."""
    folder = shutil.copytree(request.getfixturevalue(f"{name}_folder"), tmp_path / "engine")
    check_plans(rtx, folder, tensorrt.build(folder, "tensorrt-rtx"))


def test_an_export_builds_the_plan(rtx, pipe, tmp_path, fixed):
    """Of probabilities in float16; at opset 23, whose Attention must not be in the graph."""
    folder = tmp_path / "e"
    manifest = bm.export_unet(
        pipe, folder, format="tensorrt-rtx", dtype="float16", shapes=fixed, maps="probabilities",
        opset=23,
    )  # fmt: skip
    check_plans(rtx, folder, manifest)
    assert Export(pipe, tmp_path / "none", "tensorrt-rtx", "float32", opset=23).plain


def test_a_refused_graph_is_named_with_its_node_and_reason(rtx, folder):
    """As the gradient graph was before: LayerNormalization with a second output."""
    import onnx

    path = folder / "unet.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    node.output.append("mean")
    onnx.save(model, path)
    with pytest.raises(
        errors.ExportError,
        match=rf"does not take unet.onnx: node \d+, LayerNormalization '{node.name}': .*outputs",
    ):
        tensorrt._built(rtx, path, None)


def test_a_malformed_plan_is_refused(rtx):
    runtime = rtx.Runtime(rtx.Logger(rtx.Logger.INTERNAL_ERROR))
    with pytest.raises(errors.EngineError, match="does not take the plan of e: MALFORMED_ENGINE"):
        tensorrt._check_header(rtx, runtime, b"x" * 100_000, "e")


@without_gpu
def test_no_plan_is_run_without_a_gpu(rtx, folder):
    for backend in ("tensorrt-rtx", "tensorrt"):
        with pytest.raises(errors.DeviceError, match=f"{backend} engines run on cuda, got cpu"):
            bm.load_engine(folder, backend=backend)
    with pytest.raises(errors.DeviceError, match="tensorrt-rtx needs a CUDA device"):
        bm.load_engine(folder, backend="tensorrt-rtx", device="cuda")


class TestDevices:
    """As on a machine with a GPU, up to where the plan would be deserialized."""

    @pytest.fixture
    def gpu(self, monkeypatch):
        def install(capability):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")

        return install

    @pytest.mark.parametrize("capability", [(7, 5), (9, 0), (10, 0)])
    def test_rtx_refuses_other_capabilities(self, gpu, capability):
        gpu(capability)
        with pytest.raises(errors.DeviceError, match=r"8.0, 8.6, 8.9, 12.0 and later, got .*a GPU"):
            tensorrt.target_of("tensorrt-rtx", 0)

    @pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)])
    def test_rtx_takes_its_own(self, gpu, capability):
        gpu(capability)
        assert tensorrt.target_of("tensorrt-rtx", 0) == tensorrt.target_of("tensorrt-rtx", None)

    def test_a_plan_of_the_other_library_is_never_loaded(self, rtx, gpu, folder, monkeypatch):
        gpu((8, 9))
        manifest = Manifest.read(folder)
        module = types.ModuleType("tensorrt")
        module.__version__ = "10.9.0"
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        with pytest.raises(
            errors.ManifestError,
            match=r"no plan of unet.onnx for tensorrt 10.9.0 a GPU, 8.9; there are: tensorrt-rtx",
        ):
            bm.load_engine(folder, backend="tensorrt", device="cuda")
        older = [dataclasses.replace(plan, version="1.6.0.1") for plan in manifest.plans]
        dataclasses.replace(manifest, plans=tuple(older)).write(folder)
        with pytest.raises(
            errors.ManifestError, match=rf"for tensorrt-rtx {rtx.__version__} .*1.6"
        ):
            bm.load_engine(folder, backend="tensorrt-rtx", device="cuda")

    def test_a_changed_plan_is_refused(self, rtx, gpu, folder):
        gpu((8, 9))
        plan = folder / Manifest.read(folder).plans[0].file
        data = bytearray(plan.read_bytes())
        data[len(data) // 2] ^= 1
        plan.write_bytes(data)
        with pytest.raises(errors.ManifestError, match="plan is not the file that was exported"):
            bm.load_engine(folder, backend="tensorrt-rtx", device="cuda")


def test_every_name_is_in_both_libraries(rtx):
    """Names that `tensorrt.py` takes of a library's objects, against the real bindings.

    The lists of TensorRT 10 and 11 are made by export/tensorrt_names.py from the bindings' wheels.
    """
    objects = {"builder", "config", "engine", "error", "limits", "parser", "runtime", "trt"}
    objects |= {"_context", "_runtime", "_cache", "kinds"}
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(tensorrt))):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            if name in objects:
                names.add(node.attr)
    assert {"execute_async_v3", "set_shape", "build_serialized_network", "node_operator"} <= names
    members = {member for owner in dir(rtx) for member in [owner, *dir(getattr(rtx, owner))]}
    assert not names - members
    of_rtx = {
        "EngineInvalidityDiagnostics", "EngineValidity", "INVALID", "create_runtime_cache",
        "create_runtime_config", "deserialize", "get_engine_validity", "is_file", "serialize",
        "set_runtime_cache", "ILogger", "__version__", "__name__", "__members__",
    }  # fmt: skip
    for version in ("10.16.1.11", "11.4.0.106"):
        text = (DATA / f"tensorrt-{version}.txt").read_text()
        known = {part for line in text.split() for part in line.split(".")}
        assert not names - known - of_rtx


def test_profile(testbed_folder):
    manifest = Manifest.read(testbed_folder)
    bounds = tensorrt.profile(manifest.graph, manifest.shapes)
    assert bounds["sample"] == ((1, 4, 8, 8), (8, 4, 16, 16), (63, 4, 64, 64))
    assert bounds["attribution_mask"] == ((1, 1), (1, 12), (64, 77))


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt-rtx"])
def test_absent(monkeypatch, tmp_path, sd_pipe, library):
    monkeypatch.setitem(sys.modules, tensorrt.LIBRARIES[library].module, None)
    with pytest.raises(errors.MissingExtraError, match=rf"biasmap-fast\[{library}\]"):
        tensorrt.require(library)
    with pytest.raises(ImportError, match=rf"biasmap-fast\[{library}\]"):
        tensorrt.build(tmp_path, library)
    with pytest.raises(errors.MissingExtraError, match=rf"biasmap-fast\[{library}\]"):
        engines.export_unet(sd_pipe, tmp_path / "e", format=library)
    assert not list(tmp_path.iterdir())


def test_half_installed(monkeypatch, tmp_path):
    """The bindings without the libraries, as pip leaves them if those cannot be had."""
    (tmp_path / "tensorrt.py").write_text(
        "raise ImportError('libnvinfer.so.11: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(errors.MissingExtraError, match=r"libnvinfer.*the bindings alone do not"):
        tensorrt.require("tensorrt")


def test_other_version(monkeypatch):
    module = types.ModuleType("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    for version in ("10.16.1.11", "11.4.0.106"):
        module.__version__ = version
        assert tensorrt.require("tensorrt") is module
    for version in ("9.9", "10.7.0", "12.0"):
        module.__version__ = version
        with pytest.raises(errors.EngineError, match="expected tensorrt from 10.8 up to 12.0, got"):
            tensorrt.require("tensorrt")
