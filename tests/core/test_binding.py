"""The extension: what it checks, what it says, and that importing the package stays cheap."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import _C


def call(**changed):
    """``pairs_iou`` on good arguments, but for those given."""
    arguments = {
        "maps": torch.rand(2, 3, 70),
        "pairs": torch.tensor([[0, 1], [0, 2]]),
        "percentile": 70.0,
        "iou": torch.empty(2, 2),
        "union": torch.empty(2, 2, dtype=torch.int32),
        "area": torch.empty(2, 3, dtype=torch.int32),
        "threshold": torch.empty(2, 3),
    }
    arguments |= changed
    _C.pairs_iou(**arguments)
    return arguments


def test_fills_outputs_in_place():
    out = call()
    masks = out["maps"] > torch.from_numpy(
        np.percentile(out["maps"].numpy(), 70.0, axis=-1, keepdims=True)
    )
    assert torch.equal(out["area"], masks.sum(-1).int())
    union = (masks[:, [0, 0]] | masks[:, [1, 2]]).sum(-1)
    assert torch.equal(out["union"], union.int())
    thresholds = np.percentile(out["maps"].numpy(), 70.0, axis=-1)
    np.testing.assert_array_equal(out["threshold"].numpy(), thresholds)


WRONG = [
    ("maps", [1.0], TypeError, "expected a torch tensor, got list"),
    ("maps", np.zeros((2, 3, 70), np.float32), TypeError, "expected a torch tensor, got numpy"),
    ("maps", None, TypeError, "expected a torch tensor, got NoneType"),
    (
        "maps",
        torch.zeros(4, 64, dtype=torch.int64),
        ValueError,
        r"`maps` must be \[B, K, N\] float32 contiguous on the CPU, got \[4, 64\] int64",
    ),
    ("maps", torch.rand(2, 3, 70).double(), ValueError, r"got \[2, 3, 70\] float64"),
    ("maps", torch.rand(2, 3, 70).bfloat16(), ValueError, r"got \[2, 3, 70\] bfloat16"),
    ("maps", torch.rand(2, 3, 70).cfloat(), ValueError, r"got \[2, 3, 70\] complex64"),
    ("maps", torch.rand(2, 3, 70) > 0, ValueError, r"got \[2, 3, 70\] bool"),
    (
        "maps",
        torch.rand(70, 3, 2).permute(2, 1, 0),
        ValueError,
        r"got \[2, 3, 70\] float32, not contiguous",
    ),
    ("maps", torch.rand(2, 3, 70, device="meta"), TypeError, "dense torch tensor .* got Tensor"),
    ("maps", torch.rand(2, 3, 70).to_sparse(), TypeError, "dense torch tensor .* got Tensor"),
    ("maps", torch.rand(2, 3, 0), ValueError, "at least one pixel"),
    ("pairs", torch.zeros(2, 3, dtype=torch.int64), ValueError, r"`pairs` must be \[P, 2\] int64"),
    ("pairs", torch.zeros(2, 2), ValueError, r"got \[2, 2\] float32"),
    (
        "pairs",
        torch.tensor([[0, 1], [1, 3]]),
        ValueError,
        r"pairs\[1\] names concept 3, but `maps` has K = 3 concepts",
    ),
    ("pairs", torch.tensor([[0, 1], [-1, 0]]), ValueError, r"pairs\[1\] names concept -1"),
    ("percentile", 100.0, ValueError, r"`percentile` must be in \[0, 100\), got 100"),
    ("percentile", math.nan, ValueError, "`percentile` .* got -?nan"),
    ("iou", torch.empty(2, 3), ValueError, r"`iou` must be \[B, P\] = \[2, 2\] .* got \[2, 3\]"),
    ("union", torch.empty(2, 2), ValueError, r"`union` must be .* int32 .* got \[2, 2\] float32"),
    ("area", torch.empty(2, dtype=torch.int32), ValueError, r"`area` .* \[2, 3\] .* got \[2\]"),
    ("threshold", torch.empty(2, 3, 1), ValueError, r"\[B, K\] = \[2, 3\] .* got \[2, 3, 1\]"),
    (
        "maps",
        torch.empty(2, 0, 70),
        ValueError,
        r"pairs\[0\] names concept 0, but `maps` has K = 0 concepts",
    ),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG)
def test_refuses(name, value, error, message):
    with pytest.raises(error, match=message):
        call(**{name: value})


def test_soft_ops_check_their_arguments():
    x, mask, state = torch.rand(4, 64), torch.empty(4, 64), torch.empty(4, 4)
    for fraction, temperature, message in (
        (0.0, 0.1, r"`fraction` must be in \(0, 1\), got 0"),
        (1.0, 0.1, "`fraction` .* got 1"),
        (math.nan, 0.1, "`fraction` .* got -?nan"),
        (0.3, 0.0, "`temperature` must be positive and finite, got 0"),
        (0.3, math.inf, "`temperature` .* got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.soft_topk(x, fraction, temperature, mask, state)
    with pytest.raises(ValueError, match=r"`state` must be \[M, 4\] = \[4, 4\] .* got \[4, 3\]"):
        _C.soft_topk(x, 0.3, 0.1, mask, torch.empty(4, 3))
    with pytest.raises(ValueError, match=r"`grad` must be \[M, N\] = \[4, 64\] .* got \[64\]"):
        _C.soft_topk_backward(x[0], x, 0.3, 0.1, mask, state, x)
    maps, pairs, iou = torch.rand(2, 3, 64), torch.tensor([[0, 3]]), torch.empty(2, 1)
    with pytest.raises(ValueError, match=r"pairs\[0\] names concept 3"):
        _C.soft_iou(maps, pairs, 0.3, 0.1, iou, torch.empty(2, 3, 4), torch.empty(2, 3, 3))
    with pytest.raises(ValueError, match=r"`iou` must be \[B, P\] = \[2, 1\]"):
        state, means = torch.rand(2, 3, 4), torch.rand(2, 3, 3)
        _C.soft_iou_backward(iou, maps, pairs // 2, 0.3, 0.1, torch.rand(1), state, means, maps)


def test_concept_maps_of_one_prompt_have_no_kernel_on_the_cpu():
    query, keys, weights = torch.rand(1, 2, 16, 8), torch.rand(2, 5, 8), torch.rand(3, 5)
    with pytest.raises(ValueError, match="kernels for GPUs only, got tensors on the CPU"):
        _C.concept_map(query, keys, weights, torch.empty(1, 3, 16))
    with pytest.raises(ValueError, match=r"`query` must be .* float32 on the CPU, got .* float16"):
        _C.concept_map(query.half(), keys, weights, torch.empty(1, 3, 16))


def test_views_leaves_and_parameters_are_tensors():
    base = torch.rand(4, 3, 70)
    for maps in (base[1:3], torch.nn.Parameter(base[:2].clone()), base[:2].requires_grad_()):
        assert torch.equal(call(maps=maps)["maps"], maps)
    offset = call(maps=base[2:])
    assert torch.equal(offset["iou"], call(maps=base[2:].clone())["iou"])


def test_tensors_of_a_generator_live_until_the_kernel_is_done():
    query, keys = torch.randn(2, 64, 16), torch.randn(2, 5, 8)
    members, weights = torch.ones(1, 5), torch.rand(1, 3, 5)
    base, expected = torch.zeros(4, 1, 2, 3, 64), torch.zeros(1, 2, 3, 64)
    _C.prompt_maps(query, keys, members, weights, [expected])
    _C.prompt_maps(query, keys, members, weights, (base[i] for i in range(4)))
    assert expected.any()
    assert all(torch.equal(maps, expected) for maps in base)
    with pytest.raises(TypeError, match="expected a torch tensor, got NoneType"):
        _C.prompt_maps(query, keys, members, weights, [None])


def test_versions_agree():
    assert _C.__version__ == bm.__version__ == metadata.version("biasmap-fast")


def test_build_info():
    info = _C.build_info()
    assert info["version"] == bm.__version__
    assert info["cuda"] is False or set(info["cuda"]) == {"toolkit", "architectures"}
    assert info["openmp"] >= 201511
    assert info["isa"] in {"x86-64-v4", "x86-64-v3", "baseline"}
    assert info["compiler"].split()[0] in {"gcc", "clang"}


def test_every_function_is_documented_with_named_arguments():
    functions = [value for value in vars(_C).values() if inspect.isroutine(value)]
    assert len(functions) == 10
    for function in functions:
        assert "arg0" not in function.__doc__
        assert function.__doc__.strip().endswith(".")


def test_import_is_cheap():
    code = """
import sys, torch
before = set(sys.modules)
import biasmap_fast as bm
bm.iou(torch.rand(1, 4, 4), torch.rand(1, 4, 4))
heavy = {"diffusers", "transformers", "matplotlib", "pyarrow", "onnx", "ray", "jinja2", "typer"}
print(sorted(heavy & {name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
