"""What there is to test of TensorRT without it: names, profiles, keys, files and errors."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import types
from pathlib import Path

import pytest
import torch

from biasmap_fast import engines
from biasmap_fast.engines import Range, Shapes, errors, tensorrt
from biasmap_fast.engines.manifest import GraphFile, Manifest
from biasmap_fast.engines.shapes import Tensor

DATA = Path(__file__).parent / "data"
GPU = {"name": "a GPU", "capability": "9.0"}


@pytest.fixture
def manifest():
    inputs = (
        Tensor("sample", "float16", ("batch", 4, "height", "width")),
        Tensor("attribution_mask", "float32", ("prompts", "attribution_tokens")),
    )
    outputs = (Tensor("noise_pred", "float16", ("batch", 4, "height", "width")),)
    graph = GraphFile("unet.onnx", "abc", "", 0, "", 20, inputs, outputs, {}, {})
    return Manifest(
        dtype="float16",
        maps="reduced",
        layers=(),
        blocks=(),
        shapes=Shapes().on_grid(8),
        config={},
        config_sha256="c",
        weights_sha256="w",
        graph=graph,
        created="",
    )


@pytest.mark.parametrize("version", ["10.16.1.11", "11.4.0.106"])
def test_every_name_is_in_the_bindings(version):
    """The lists are made by export/tensorrt_names.py from the bindings' wheels."""
    known = (DATA / f"tensorrt-{version}.txt").read_text().split()
    assert not set(tensorrt.API) - set(known)


def test_the_list_of_names_is_complete():
    """Every attribute that the module takes of the library's objects is in `API`."""
    listed = {part for name in tensorrt.API for part in name.split(".")}
    own = {"Logger", "Builder", "OnnxParser", "Runtime", "Refitter", "Weights", "__version__"}
    objects = {
        "builder", "cache", "config", "context", "limits", "network", "parser", "prototype",
        "refitter", "trt", "_engine", "_runtime", "_trt",
    }  # fmt: skip

    def root(node):
        while isinstance(node, ast.Attribute):
            if node.attr in objects:
                return True
            node = node.value
        return isinstance(node, ast.Name) and node.id in objects

    found = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(tensorrt)))
        if isinstance(node, ast.Attribute) and root(node.value)
    }
    assert {"execute_async_v3", "set_shape", "build_serialized_network"} <= found
    assert not found - listed - own


def test_profile(manifest):
    found = tensorrt.profile(manifest.graph, manifest.shapes)
    assert found["sample"] == ((1, 4, 8, 8), (2, 4, 64, 64), (32, 4, 128, 128))
    assert found["attribution_mask"] == ((1, 1), (1, 12), (64, 77))


def test_key_changes_with_everything_that_changes_a_plan(manifest):
    def made(manifest=manifest, version="10.1", gpu=GPU, **options):
        built = tensorrt.Options(**options)
        return tensorrt.key(manifest, manifest.graph, version, gpu, built)

    replace = dataclasses.replace
    others = [
        made(version="11.0"),
        made(gpu={**GPU, "capability": "8.0"}),
        made(gpu={**GPU, "name": "another"}),
        made(level=5),
        made(refit=True),
        made(workspace=1),
        made(replace(manifest, weights_sha256="x")),
        made(replace(manifest, graph=replace(manifest.graph, sha256="x"))),
        made(replace(manifest, shapes=Shapes(batch=Range(1, 1, 2)).on_grid(8))),
    ]
    assert len({made(), *others}) == 10
    assert made() == made()


def test_absent(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(errors.MissingExtraError, match=r"biasmap-fast\[tensorrt\]"):
        tensorrt.require()
    with pytest.raises(ImportError, match=r"biasmap-fast\[tensorrt\]"):
        tensorrt.build(tmp_path)
    with pytest.raises(errors.MissingExtraError, match=r"biasmap-fast\[tensorrt\]"):
        engines.export_unet(None, tmp_path / "e", dtype="float16", format="tensorrt", shapes="sd15")
    assert not list(tmp_path.iterdir())


def test_half_installed(monkeypatch, tmp_path):
    """The bindings without the libraries, as pip leaves them where those cannot be had."""
    (tmp_path / "tensorrt.py").write_text(
        "raise ImportError('libnvinfer.so.11: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(errors.MissingExtraError, match=r"libnvinfer.*the bindings alone do not"):
        tensorrt.require()


def _stand_in(names):
    module = types.ModuleType("tensorrt")
    module.__version__ = "9.9"
    for name in names:
        owner, _, member = name.partition(".")
        if not hasattr(module, owner):
            setattr(module, owner, type(owner, (), {}))
        setattr(getattr(module, owner), member, 0)
    return module


def test_other_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", _stand_in(tensorrt.API))
    assert tensorrt.require().__version__ == "9.9"
    fewer = [name for name in tensorrt.API if name != "BuilderFlag.REFIT"]
    monkeypatch.setitem(sys.modules, "tensorrt", _stand_in(fewer))
    with pytest.raises(errors.EngineError, match="9.9 lacks BuilderFlag.REFIT; expected version"):
        tensorrt.require()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(monkeypatch, manifest, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt", _stand_in(tensorrt.API))
    with pytest.raises(errors.DeviceError, match="needs a CUDA device"):
        tensorrt.PlanSession(tmp_path, manifest, manifest.graph, torch.device("cuda"))
    with pytest.raises(errors.DeviceError, match="run on cuda, got cpu"):
        tensorrt.PlanSession(tmp_path, manifest, manifest.graph, torch.device("cpu"))


def test_no_plan(monkeypatch, manifest, tmp_path):
    library = _stand_in(tensorrt.API)
    library.Logger = type("Logger", (), {"WARNING": 0, "__init__": lambda self, level: None})
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr(tensorrt, "device", lambda index: GPU)
    with pytest.raises(errors.ManifestError, match="has no plan for this GPU.*tensorrt.build"):
        tensorrt.PlanSession(tmp_path, manifest, manifest.graph, torch.device("cuda"))
