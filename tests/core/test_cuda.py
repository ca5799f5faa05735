"""The CUDA kernels against the reference: emulated on the CPU, and on a GPU if there is one.

The emulation (tests/emulation) runs the kernels' own source with every thread of a block a fiber:
it checks indices, barriers and arithmetic, not the GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import _C, accumulate, ops, reference

ROOT = Path(__file__).resolve().parents[2]
HAS_GPU = torch.cuda.is_available() and bool(_C.build_info()["cuda"])

# Of masks and SoftIoU against float64, and of gradients in the L2 norm (issue 4).
FORWARD, GRADIENT = 1e-5, 1e-4

PAIRS = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 1]])
SIZES = [1, 2, 3, 7, 31, 63, 64, 65, 400, 1023, 4096]
# The last does not fit into shared memory.
LARGE = [16384, 16387]
KINDS = ["normal", "ties", "attention", "huge", "denormal", "constant", "zeros", "offset", "gap"]
# Those whose gradient float32 holds.
SMOOTH = ["normal", "ties", "attention", "constant", "gap"]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The extension with its CUDA kernels emulated, and a table of tensors that sees GPUs."""
    if shutil.which("g++") is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("the emulation needs g++ and pybind11")
    import pybind11.commands

    target = tmp_path_factory.mktemp("emulation") / "_C.so"
    sources = ["tests/emulation/overlap.cpp", "tests/emulation/concept_map.cpp"]
    sources += ["csrc/concept_map_cpu.cpp", "csrc/overlap_cpu.cpp", "csrc/bindings.cpp"]
    python = f"{sys.base_prefix}/include/python{sys.version_info[0]}.{sys.version_info[1]}"
    definitions = {"VERSION": "0", "CUDA_TOOLKIT": "emulated", "CUDA_ARCHITECTURES": "none"}
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
    command += ["-fno-extern-tls-init", "-Itests/emulation", "-Icsrc", f"-I{python}"]
    command += [f"-I{pybind11.commands.get_include()}", "-o", str(target), *sources]
    command += [f'-DBIASMAP_{name}="{value}"' for name, value in definitions.items()]
    subprocess.run(command, cwd=ROOT, check=True)

    ops.soft_topk(torch.rand(1, 2), 0.3, 0.1)  # the real extension keeps the real table
    spec = importlib.util.spec_from_file_location("_C", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    library = ctypes.PyDLL(str(target))
    library.emulated_table.restype = ctypes.py_object
    library.emulated_table.argtypes = [ctypes.py_object]
    real = torch.Tensor.__dlpack_c_exchange_api__
    torch.Tensor.__dlpack_c_exchange_api__ = library.emulated_table(real)
    try:
        x = torch.rand(1, 2)
        module.soft_topk(x, 0.3, 0.1, torch.empty(1, 2), torch.empty(1, 4))
    finally:
        torch.Tensor.__dlpack_c_exchange_api__ = real
    return module, library


GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU")]
)


@pytest.fixture(params=["emulated", GPU])
def device(request, monkeypatch):
    if request.param == "cuda":
        return torch.device("cuda")
    monkeypatch.setattr(ops, "_C", request.getfixturevalue("emulated")[0])
    return torch.device("cpu")


def draw(kind, n, seed=0, rows=3):
    """Float32 maps ``[rows, n]`` of one awkward kind, finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    if kind == "ties":
        x = (x * 3).round() / 3
    elif kind == "attention":
        x = torch.rand(rows, n, generator=generator, dtype=torch.float64) ** 4 * 7
    elif kind == "huge":
        x = (x * 1e38).clamp(-3.4e38, 3.4e38)
    elif kind == "denormal":
        x = x * 1e-42
    elif kind == "constant":
        x = x[:, :1].expand(rows, n)
    elif kind == "zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "offset":
        x = x * 20 + 1e6
    elif kind == "gap":
        x = x.sort(dim=1).values
        x[:, n - max(1, n // 4) :] += 40.0
    return x.float().contiguous()


def relative(found, expected):
    """L2 error over L2 norm, over an absolute floor where the gradient is nothing but rounding."""
    assert found.isfinite().all()
    error = (found.double() - expected.double()).norm()
    return float(error / expected.double().norm().clamp(min=1e-30))


def compare_hard(maps, pairs, percentile, device):
    """With the reference where the maps are."""
    found = ops.pairs_iou(maps.to(device), pairs, percentile)
    expected = reference.pairs_iou(maps, pairs, percentile)
    for mine, exact in zip(found, expected, strict=True):
        assert torch.equal(mine.cpu().nan_to_num(-7.0), exact.cpu().nan_to_num(-7.0))


def compare_soft(maps, pairs, temperature, device):
    """With the reference where the maps are; gives both gradients."""
    upstream = torch.randn(maps.shape[0], len(pairs), generator=torch.Generator().manual_seed(1))
    mine = maps.clone().to(device).requires_grad_()
    exact = maps.double().requires_grad_()
    found = ops.soft_iou(mine, pairs, 0.3, temperature)
    expected = reference.soft_iou(exact, pairs, 0.3, temperature)
    torch.testing.assert_close(
        found.detach().cpu().double(), expected.detach().cpu(), rtol=0, atol=FORWARD
    )
    (found * upstream.to(device)).sum().backward()
    (expected * upstream.double().to(maps.device)).sum().backward()
    compare_gradients(mine.grad.cpu(), exact.grad.cpu(), maps.cpu(), temperature)
    return mine.grad.cpu(), exact.grad.cpu()


def compare_gradients(found, expected, maps, temperature):
    """In units of 2 / (temperature * range), and relative where it is more than rounding."""
    unit = (maps.amax(-1, keepdim=True) - maps.amin(-1, keepdim=True)).double() * temperature / 2
    found, expected = found.double() * unit, expected * unit
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= 4e-6
    if expected.norm() > 0.1:
        assert (found - expected).norm() <= GRADIENT * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_hard_iou_is_exact(kind, device):
    for n in SIZES:
        for percentile in (0.0, 50.0, 70.0, 99.99):
            compare_hard(draw(kind, n, seed=n)[None], PAIRS, percentile, device)


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("temperature", [1e-3, 0.01, 1.0])
def test_soft_iou_and_its_gradient(kind, temperature, device):
    for n in SIZES:
        compare_soft(draw(kind, n, seed=n)[None], PAIRS, temperature, device)


@pytest.mark.parametrize("kind", KINDS)
def test_soft_topk_and_its_gradient(kind, device):
    for n in SIZES:
        for fraction in (0.05, 0.3, 0.9):
            x = draw(kind, n, seed=n)
            mine, exact = x.clone().to(device).requires_grad_(), x.double().requires_grad_()
            upstream = torch.randn(3, n, generator=torch.Generator().manual_seed(1))
            mask = ops.soft_topk(mine, fraction, 0.01)
            expected = reference.soft_topk(exact, fraction, 0.01)
            torch.testing.assert_close(
                mask.detach().cpu().double(), expected.detach(), rtol=0, atol=FORWARD
            )
            if kind in SMOOTH:
                (mask * upstream.to(device)).sum().backward()
                (expected * upstream.double()).sum().backward()
                compare_gradients(mine.grad.cpu(), exact.grad, x, 0.01)


@pytest.mark.parametrize("n", LARGE)
def test_maps_in_shared_memory_and_larger(n, device):
    maps = torch.stack((draw("attention", n), draw("ties", n, seed=1)))
    compare_hard(maps, PAIRS, 70.0, device)
    compare_soft(maps[:1], PAIRS[:2], 0.01, device)


@pytest.mark.parametrize("concepts", [4, 5, 9, 15, 16])
def test_many_concepts(concepts, device):
    maps = draw("attention", 70, rows=2 * concepts).view(2, concepts, 70)
    pairs = torch.combinations(torch.arange(concepts))[:: max(1, concepts // 8)].flip(1)
    compare_hard(maps, pairs, 70.0, device)
    compare_soft(maps, pairs, 0.05, device)


def test_more_concepts_are_refused_by_the_kernels_and_go_to_the_reference(device):
    maps = torch.rand(1, 17, 64, device=device)
    if device.type == "cuda":
        compare_hard(maps.cpu(), PAIRS, 70.0, device)
        compare_soft(maps.cpu(), PAIRS, 0.05, device)
    with pytest.raises(ValueError, match="`maps` on a GPU may have 16 concepts .* got 17 and 4"):
        torch.ops.biasmap.soft_iou(maps, PAIRS, 0.3, 0.05)


def test_every_pair_and_more_than_a_launch_holds(device):
    every = torch.arange(16)
    pairs = torch.cartesian_prod(every, every)
    maps = draw("attention", 65, rows=16)[None]
    compare_hard(maps, pairs, 70.0, device)
    compare_soft(maps, pairs, 0.05, device)
    many = pairs.repeat(5, 1)
    if device.type == "cuda":  # the reference's
        compare_hard(maps, many, 70.0, device)
    with pytest.raises(ValueError, match="1024 pairs at most, got 16 and 1280"):
        torch.ops.biasmap.soft_iou(maps.to(device), many, 0.3, 0.05)


def awkward_sets(n):
    """Sets of two maps: ordinary, tied, constant, and one with a NaN."""
    maps = torch.stack([draw(k, n, rows=2) for k in ("attention", "ties", "constant", "normal")])
    maps[3, 1, 17] = math.nan
    return maps


def overlaps(maps):
    """Hard IoU, masks, SoftIoU and its gradient of the two maps of each set."""
    x = maps.detach().requires_grad_()
    soft = ops.soft_iou(x, PAIRS[:1], 0.3, 0.05)
    (gradient,) = torch.autograd.grad(soft.sum(), x)
    masks = ops.soft_topk(maps.flatten(0, 1), 0.3, 0.05)
    return ops.pairs_iou(maps, PAIRS[:1], 70.0).iou, masks, soft.detach(), gradient


def compare_overlaps(found, maps):
    hard, masks, soft, gradient = (one.cpu() for one in found)
    exact = maps.double().requires_grad_()
    expected = reference.soft_iou(exact, PAIRS[:1], 0.3, 0.05)
    (wanted,) = torch.autograd.grad(expected[:3].sum(), exact)
    torch.testing.assert_close(
        hard, reference.pairs_iou(maps, PAIRS[:1], 70.0)[0], rtol=0, atol=0, equal_nan=True
    )
    for mine, right in (
        (masks, reference.soft_topk(maps.double().flatten(0, 1), 0.3, 0.05)),
        (soft, expected.detach()),
    ):
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=FORWARD, equal_nan=True)
    assert soft.isnan().flatten().tolist() == [False, False, False, True]
    compare_gradients(gradient[:3], wanted[:3], maps[:3], 0.05)
    assert relative(gradient[:2], wanted[:2]) <= GRADIENT
    assert (gradient[2] == 0).all()
    assert gradient[3].isnan().all()


@pytest.mark.parametrize("n", [1024, 16384])
def test_awkward_sets_beside_others(n, device):
    maps = awkward_sets(n)
    compare_overlaps(overlaps(maps.to(device)), maps)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_map_that_is_not_finite_never_gives_a_number(value, device):
    maps = torch.rand(2, 3, 100)
    maps[1, 2, 17] = value
    compare_hard(maps, PAIRS, 70.0, device)
    mask = ops.soft_topk(maps[1].to(device), 0.3, 0.01)
    assert mask[2].isnan().all()
    assert mask[:2].isfinite().all()
    soft = ops.soft_iou(maps.to(device), PAIRS, 0.3, 0.01)
    assert soft[1].isnan().tolist() == [False, True, True, False]
    assert soft[0].isfinite().all()


def test_nan_reaches_the_gradient_of_its_partners_alone(device):
    maps = torch.rand(1, 5, 100)
    maps[0, 0, 3] = maps[0, 4, 5] = math.nan
    x = maps.to(device).requires_grad_()
    ops.soft_iou(x, torch.tensor([[0, 1], [2, 3]]), 0.3, 0.01).sum().backward()
    assert x.grad[0, :2].isnan().all()
    assert x.grad[0, 2:4].isfinite().all()
    assert (x.grad[0, 2:4] != 0).any()
    assert (x.grad[0, 4] == 0).all()  # no pair names it


def test_constant_map_has_the_fraction_everywhere_and_no_gradient(device):
    x = torch.full((2, 50), 3.0, device=device, requires_grad=True)
    mask = ops.soft_topk(x, 0.3, 0.01)
    torch.testing.assert_close(mask.cpu(), torch.full((2, 50), 0.3))
    mask.sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_read_as_they_are(dtype, device):
    op = torch.ops.biasmap
    maps = (torch.rand(2, 3, 333) * 60).to(dtype).to(device)
    full = maps.float()
    for half, wide in zip(
        op.pairs_iou(maps, PAIRS, 70.0), op.pairs_iou(full, PAIRS, 70.0), strict=True
    ):
        assert torch.equal(half, wide)
    forward = op.soft_iou(maps, PAIRS, 0.3, 0.01)
    iou = forward[0]
    assert iou.dtype == torch.float32
    assert torch.equal(iou, op.soft_iou(full, PAIRS, 0.3, 0.01)[0])
    upstream = torch.rand(2, 4, device=device)
    grad = op.soft_iou_backward(upstream, maps, PAIRS, 0.3, 0.01, *forward)
    wide = op.soft_iou_backward(upstream, full, PAIRS, 0.3, 0.01, *forward)
    assert grad.dtype == dtype
    assert torch.equal(grad, wide.to(dtype))
    forward = op.soft_topk(maps[0], 0.3, 0.01)
    assert torch.equal(forward[0], op.soft_topk(full[0], 0.3, 0.01)[0])
    upstream = torch.rand(3, 333, device=device)
    grad = op.soft_topk_backward(upstream, maps[0], 0.3, 0.01, *forward)
    wide = op.soft_topk_backward(upstream, full[0], 0.3, 0.01, *forward)
    assert torch.equal(grad, wide.to(dtype))


def test_empty_batches_and_no_pairs(device):
    for maps, pairs in ((torch.rand(0, 3, 10), PAIRS), (torch.rand(2, 3, 10), PAIRS[:0])):
        x = maps.to(device).requires_grad_()
        assert ops.pairs_iou(x, pairs, 70.0).iou.shape == (maps.shape[0], len(pairs))
        ops.soft_iou(x, pairs, 0.3, 0.01).sum().backward()
        assert torch.equal(x.grad, torch.zeros_like(x))
    assert ops.soft_topk(torch.rand(0, 10, device=device), 0.3, 0.01).shape == (0, 10)


def test_the_same_bits_every_time(device):
    maps = torch.rand(2, 3, 1000, device=device)
    results = []
    for _ in range(2):
        x = maps.clone().requires_grad_()
        soft = ops.soft_iou(x, PAIRS, 0.3, 0.01)
        soft.sum().backward()
        results.append((soft.detach(), x.grad, ops.pairs_iou(maps, PAIRS, 70.0).iou))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# ---- concept maps ----------------------------------------------------------------------------


def attention_case(batch, heads, n, depth, tokens, concepts, dtype=torch.float32, seed=0):
    """Queries as `to_q` leaves them, keys, weights."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, n, heads * depth, generator=generator).to(dtype)
    keys = torch.randn(heads, tokens, depth, generator=generator) / depth**0.5
    weights = (torch.rand(concepts, tokens, generator=generator) > 0.6).float()
    return query.view(batch, n, heads, depth).transpose(1, 2), keys, weights


def compare_concept_map(query, keys, weights, device, forward=FORWARD, gradient=GRADIENT):
    """A query that is on the device already keeps its strides and its offset."""
    exact = query.detach().cpu().double().requires_grad_()
    expected = reference.concept_map(exact, keys.double(), weights.double())
    mine = query.detach().to(device)
    keys, weights = keys.to(device), weights.to(device)
    found = ops._KERNELS["concept_map"](mine, keys, weights)
    heads = query.shape[1]
    torch.testing.assert_close(found.cpu().double(), expected, rtol=forward, atol=forward * heads)

    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (wanted,) = torch.autograd.grad(expected, exact, upstream.double())
    grad = ops._KERNELS["concept_map_backward"](upstream.to(device), mine, keys, weights)
    assert grad.dtype == query.dtype
    if wanted.norm() > 0:
        assert relative(grad.cpu(), wanted) <= gradient

    sums = torch.rand(expected.shape)
    total = sums.clone().to(device)
    ops._C.concept_map(ops._dense(mine), keys, weights, total, add=True)
    torch.testing.assert_close(total.cpu(), sums + found.cpu())


@pytest.mark.parametrize(
    "shape",
    [
        # batch, heads, n, d, T', K
        (1, 8, 64, 40, 12, 2),
        (2, 8, 65, 80, 8, 3),
        (1, 5, 31, 64, 16, 8),
        (1, 20, 16, 128, 17, 9),
        (1, 8, 9, 160, 32, 1),
        (2, 4, 100, 16, 10, 2),
        (1, 2, 33, 48, 33, 16),
        (1, 1, 1, 8, 1, 1),
        (1, 3, 70, 24, 5, 2),
        (1, 8, 36, 40, 77, 2),
        (1, 2, 40, 32, 80, 16),
        (0, 2, 40, 32, 8, 2),
    ],
)
def test_concept_map_and_its_gradient(shape, device):
    compare_concept_map(*attention_case(*shape), device)


@pytest.mark.parametrize(("dtype", "gradient"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_concept_map_of_half_queries(dtype, gradient, device):
    """Scores, softmax and sums are float32: only the gradient is rounded to the queries' type."""
    for shape in ((1, 8, 64, 40, 12, 2), (1, 3, 33, 24, 20, 2)):
        compare_concept_map(*attention_case(*shape, dtype=dtype), device, gradient=gradient)


@pytest.mark.parametrize(("dtype", "gradient"), [(torch.float32, GRADIENT), (torch.float16, 1e-3)])
def test_concept_map_of_strided_queries(dtype, gradient, device):
    query, keys, weights = attention_case(4, 4, 50, 16, 9, 2, dtype)
    query = query.to(device)  # before slicing: what is moved becomes dense
    for strided, strides, offset in (  # the last two are copied
        (query[1:3], (3200, 16, 64, 1), 3200),
        (query[::2], (6400, 16, 64, 1), 0),
        (query.contiguous(), (3200, 800, 16, 1), 0),
        (query.transpose(2, 3).contiguous().transpose(2, 3), (3200, 800, 1, 50), 0),  # d apart
        (torch.cat((query, query), dim=3)[..., 3:19], (6400, 1600, 32, 1), 3),  # not aligned
    ):
        assert (strided.stride(), strided.storage_offset()) == (strides, offset)
        assert (strided.data_ptr() % 16 == 0) == (offset != 3)
        compare_concept_map(strided, keys, weights, device, gradient=gradient)


def test_concept_map_of_a_query_that_is_not_finite(device):
    query, keys, weights = attention_case(1, 2, 64, 16, 9, 2)
    query = query.clone()
    query[0, 0, 5, 3] = math.nan
    query[0, 1, 7, 2] = math.inf
    arguments = (x.to(device) for x in (query, keys, weights))
    found = ops._KERNELS["concept_map"](*arguments).cpu()
    bad = found[0].isnan().any(dim=0)
    assert bad.nonzero().flatten().tolist() == [5, 7]


def test_concept_map_checks_its_arguments(device):
    query, keys, weights = (x.to(device) for x in attention_case(1, 2, 16, 8, 5, 2))
    maps = torch.empty(1, 2, 16, device=device)
    extension = ops._C
    for arguments, message in (
        ((query.double(), keys, weights, maps), r"`query` must be .* float32, float16 or bfloat16"),
        ((query, keys[..., :4], weights, maps), r"`keys` must be \[heads, T', d\]"),
        ((query, keys, weights[:, :4], maps), r"`weights` must be \[K, T'\]"),
        ((query, keys, weights, maps[..., :15]), r"`maps` must be \[B, K, n\] = \[1, 2, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            extension.concept_map(*arguments)
    long, many = torch.rand(2, 81, 8, device=device), torch.rand(17, 5, device=device)
    with pytest.raises(ValueError, match="1 to 80 tokens .* got 81 and 2"):
        extension.concept_map(query, long, torch.rand(2, 81, device=device), maps)
    with pytest.raises(ValueError, match="at most 16 concepts, got 5 and 17"):
        extension.concept_map(query, keys, many, torch.rand(1, 17, 16, device=device))
    for odd in (query.flatten()[1:241].view(1, 2, 15, 8), query.mT.contiguous().mT):
        with pytest.raises(ValueError, match="aligned to 16 bytes .* multiples of 8"):
            extension.concept_map(odd, keys, weights, maps[..., : odd.shape[2]].contiguous())


def test_recorder_and_guidance_through_the_kernels(sd_pipe, emulated, monkeypatch):
    """Real queries, slices of batches and accumulators; the ops as on a GPU."""
    prompt = bm.AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))

    def run():
        settings = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        with bm.attribute(sd_pipe, prompt) as recorder, bm.guide(sd_pipe, prompt) as guidance:
            sd_pipe(["a photo of a doctor"] * 2, generator=generators, **settings)
        return recorder.maps().values, torch.tensor([row.energy for row in guidance.ledger])

    maps, energy = run()
    monkeypatch.setattr(ops, "_C", emulated[0])
    monkeypatch.setattr(accumulate, "fused_prompts", lambda *_: False)
    monkeypatch.setattr(ops, "fused_attention", lambda *_: True)
    library = torch.library.Library("biasmap", "FRAGMENT")
    for name in ("concept_map", "concept_map_backward"):
        library.impl(name, ops._KERNELS[name], "CPU")
    calls = []
    kernel = emulated[0].concept_map_backward
    monkeypatch.setattr(
        emulated[0], "concept_map_backward", lambda *a: (calls.append(1), kernel(*a))[1]
    )
    found, found_energy = run()
    library._destroy()
    assert calls
    torch.testing.assert_close(found, maps, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found_energy, energy, rtol=1e-3, atol=1e-3)


def test_a_device_without_kernels_of_its_architecture_says_so(emulated):
    module, library = emulated
    assert module.cuda_refusal(0) == ""
    library.emulated_usable(0)
    try:
        assert "cudaErrorNoKernelImageForDevice" in module.cuda_refusal(0)
    finally:
        library.emulated_usable(1)


# ---- the GPU itself --------------------------------------------------------------------------


@pytest.fixture
def gpu():
    if not HAS_GPU:
        pytest.skip("no GPU, or built without CUDA")
    return torch.device("cuda")


def step(maps, query, keys, weights):
    """Everything once: maps of queries, energy, gradient."""
    found = ops.concept_map(query, keys, weights)
    energy = ops.soft_iou(maps + found, PAIRS[:1], 0.3, 0.05).sum()
    hard = ops.pairs_iou((maps + found).detach(), PAIRS[:1], 70.0)
    mask = ops.soft_topk((maps + found).flatten(0, 1), 0.3, 0.05)
    (gradient,) = torch.autograd.grad(energy + mask[:, 0].sum(), query)
    return energy.detach(), hard.iou, gradient


def step_inputs(device, n=1024):
    query, keys, weights = attention_case(2, 8, n, 40, 12, 2)
    query = query.to(device).detach().requires_grad_()
    return torch.rand(2, 2, n, device=device), query, keys.to(device), weights.to(device)


@pytest.mark.gpu
def test_a_step_equals_the_reference(gpu, monkeypatch):
    inputs = step_inputs(gpu)
    energy, hard, gradient = step(*inputs)
    monkeypatch.setenv("BIASMAP_BACKEND", "reference")
    expected, exact, wanted = step(*inputs)
    # The maps of either path differ in their last bits, which a mask's edge multiplies by 40, and
    # which move a pixel across the percentile.
    torch.testing.assert_close(energy, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hard, exact, rtol=0, atol=1e-2)
    assert relative(gradient, wanted) <= 1e-3


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")  # the debug mode is a prototype, it says
def test_nothing_waits_for_the_gpu(gpu):
    inputs = step_inputs(gpu)
    step(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_callers_stream(gpu):
    inputs = step_inputs(gpu)
    expected = step(*inputs)
    stream = torch.cuda.Stream()
    slow = torch.empty(64 * 1024 * 1024, device=gpu)
    maps = torch.zeros_like(inputs[0])
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            slow.normal_()  # on another stream the kernels would read `maps` before this is over
        maps.copy_(inputs[0])
        found = step(maps, *inputs[1:])
    stream.synchronize()
    for mine, exact in zip(found, expected, strict=True):
        assert torch.equal(mine, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1024, 128 * 128])  # the second asks for more shared memory
def test_a_captured_graph(gpu, n):
    inputs, awkward = step_inputs(gpu, n), awkward_sets(n)
    maps = torch.rand(awkward.shape, device=gpu)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*inputs)
            overlaps(maps)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, found_overlaps = step(*inputs), overlaps(maps)
    with torch.no_grad():  # replays have to see what changes after the capture
        inputs[0].copy_(torch.rand_like(inputs[0]))
        inputs[1].mul_(0.5)
        maps.copy_(awkward)
    overlaps(torch.rand(1, 2, 9000, device=gpu))  # fewer bytes of shared memory, in between
    graph.replay()
    torch.cuda.synchronize()
    for mine, exact in zip(found, step(*inputs), strict=True):
        assert torch.equal(mine, exact)
    compare_overlaps(found_overlaps, awkward)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 16, 512 * 512), (256, 16, 8 * 8), (256, 8, 33 * 31)])
def test_the_largest_shapes(gpu, shape):
    batch, concepts, n = shape
    maps = draw("attention", n, rows=batch * concepts).view(shape).to(gpu)
    first = torch.arange(concepts)
    pairs = torch.stack((first, first.roll(1)), dim=1)
    compare_hard(maps, pairs, 70.0, gpu)
    assert relative(*compare_soft(maps, pairs, 0.01, gpu)) <= GRADIENT


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's own, of several kinds
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph_with_its_gradient(gpu, backend):
    maps, query, keys, weights = step_inputs(gpu)

    def energy(query):
        found = ops.concept_map(query, keys, weights) + maps
        return ops.soft_iou(found, PAIRS[:1], 0.3, 0.05).sum()

    expected = torch.autograd.grad(energy(query), query)[0]
    compiled = torch.compile(energy, fullgraph=True, backend=backend)
    found = torch.autograd.grad(compiled(query), query)[0]
    assert relative(found, expected) <= 1e-3


@pytest.mark.gpu
def test_opcheck_on_the_gpu(gpu):
    maps, query, keys, weights = step_inputs(gpu, n=70)
    op = torch.ops.biasmap
    forward = op.soft_iou(maps, PAIRS[:1], 0.3, 0.01)
    query = query.detach()
    for name, arguments in {
        "pairs_iou": (maps, PAIRS[:1], 70.0),
        "soft_topk": (maps[0], 0.3, 0.01),
        "soft_iou": (maps, PAIRS[:1], 0.3, 0.01),
        "soft_iou_backward": (torch.rand_like(forward[0]), maps, PAIRS[:1], 0.3, 0.01, *forward),
        "concept_map": (query, keys, weights),
        "concept_map_backward": (torch.rand_like(maps), query, keys, weights),
    }.items():
        torch.library.opcheck(getattr(op, name).default, arguments)


@pytest.mark.gpu
def test_public_functions_take_gpu_tensors(gpu):
    a, b = torch.rand(2, 4, 16, 16, device=gpu)
    assert bm.iou(a, b).device.type == "cuda"
    torch.testing.assert_close(bm.iou(a, b).cpu(), bm.iou(a.cpu(), b.cpu()))
    torch.testing.assert_close(bm.soft_iou(a, b).cpu(), bm.soft_iou(a.cpu(), b.cpu()))
    maps = torch.rand(2, 3, 16, 16, device=gpu)
    torch.testing.assert_close(bm.pairwise_iou(maps).cpu(), bm.pairwise_iou(maps.cpu()))
    with pytest.raises(ValueError, match="`maps` must be finite"):
        bm.pairwise_iou(maps / 0.0)


@pytest.mark.gpu
def test_tensors_of_two_devices_are_refused(gpu):
    maps, pairs = torch.rand(1, 3, 64, device=gpu), PAIRS[:1]
    outputs = {"iou": (1, 1), "union": (1, 1), "area": (1, 3), "threshold": (1, 3)}
    dtypes = {"union": torch.int32, "area": torch.int32}
    for name in outputs:
        made = {
            other: torch.empty(
                shape, dtype=dtypes.get(other), device="cpu" if other == name else gpu
            )
            for other, shape in outputs.items()
        }
        with pytest.raises(ValueError, match=f"`{name}` must be .* on cuda:0, got .*, on the CPU"):
            _C.pairs_iou(maps, pairs, 70.0, *made.values())
    assert torch.equal(
        ops.pairs_iou(maps, pairs.to(gpu), 70.0).iou, ops.pairs_iou(maps, pairs, 70.0).iou
    )
    with pytest.raises(ValueError, match=r"pairs\[0\] names concept 3"):
        ops.pairs_iou(maps, torch.tensor([[0, 3]]), 70.0)
