"""Which path an op takes, and that it holds under torch.func, autocast and fork."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from biasmap_fast import ops, reference

PAIRS = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 1]])


def soft_sum(x):
    """Of both soft ops, of one set ``[K, N]``."""
    iou = ops.soft_iou(x[None], PAIRS, 0.3, 0.05)
    return (iou * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum() + ops.soft_topk(x, 0.3, 0.05)[0, 0]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_function_transforms_have_first_derivatives(backend, monkeypatch):
    monkeypatch.setenv("BIASMAP_BACKEND", backend)
    sets = torch.rand(5, 3, 70)
    leaf = sets.clone().requires_grad_()
    values = torch.stack([soft_sum(x) for x in leaf])
    (expected,) = torch.autograd.grad(values.sum(), leaf)
    close = {"rtol": 1e-5, "atol": 1e-6}  # the reference's sums run over other shapes
    found = torch.func.grad(soft_sum)(sets[2])
    torch.testing.assert_close(found, expected[2], **close)
    for dim in (0, 1, 2):
        moved = sets.movedim(0, dim)
        torch.testing.assert_close(torch.func.vmap(soft_sum, dim)(moved), values.detach(), **close)
        per_sample = torch.func.vmap(torch.func.grad(soft_sum), dim)(moved)
        torch.testing.assert_close(per_sample, expected, **close)
    total = torch.func.grad(lambda x: torch.func.vmap(soft_sum)(x).sum())(sets)
    torch.testing.assert_close(total, expected, **close)


def test_second_derivatives_under_function_transforms_are_refused():
    def slope(x):
        return torch.func.grad(soft_sum)(x).square().sum()

    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.grad(slope)(torch.rand(3, 70))


def test_vmap_over_pairs_is_refused():
    maps, pairs = torch.rand(2, 3, 70), PAIRS.repeat(2, 1, 1)
    with pytest.raises(NotImplementedError, match="no vmap over `pairs`"):
        torch.func.vmap(lambda pairs: ops.soft_iou(maps, pairs, 0.3, 0.01))(pairs)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autocast_changes_nothing(backend, monkeypatch):
    monkeypatch.setenv("BIASMAP_BACKEND", backend)
    query, keys, weights = torch.randn(1, 2, 64, 40), torch.randn(2, 9, 40), torch.rand(3, 9)
    maps = torch.rand(1, 3, 64, requires_grad=True)

    def everything():
        hard = ops.pairs_iou(maps, PAIRS, 70.0).iou
        soft = ops.soft_iou(maps, PAIRS, 0.3, 0.01)
        mask = ops.soft_topk(maps[0], 0.3, 0.01)
        (grad,) = torch.autograd.grad(soft.sum() + mask[0, 0], maps)
        attention = ops.concept_map(query, keys, weights)
        sums = torch.zeros_like(attention)
        ops.add_concept_map(sums, query, keys, weights)
        return hard, soft.detach(), mask.detach(), grad, attention, sums

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        found = everything()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_ops_work_in_a_forked_process():
    code = """
import os, torch
from biasmap_fast import _C, ops
torch.set_num_threads(2)
maps, pairs = torch.rand(32, 3, 4096), torch.tensor([[0, 1]])
query, keys = torch.rand(4, 4096, 32), torch.rand(2, 6, 16)
def run():
    sums = torch.zeros(1, 4, 2, 4096)
    ops.add_prompt_maps([sums], query, keys, torch.ones(1, 6), torch.ones(1, 2, 6))
    return ops.soft_iou(maps, pairs, 0.3, 0.01), ops.pairs_iou(maps, pairs, 70.0).iou, sums
expected = run()
child = os.fork()
if child == 0:
    os._exit(0 if all(map(torch.equal, run(), expected)) else 1)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.stdout.strip() == "0", done.stderr


def gpu_fakes():
    """Maps and attention as on a GPU, without their values."""
    maps = torch.empty(2, 3, 64, device="cuda")
    query, keys = torch.empty(1, 2, 64, 8, device="cuda"), torch.empty(2, 5, 8, device="cuda")
    return maps, query, keys, torch.empty(3, 5, device="cuda")


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.native, self.reference = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "biasmap":
            self.native.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reason", ["", "no kernel image is available for execution on the device"])
def test_a_gpu_that_the_kernels_do_not_fit_takes_the_reference(reason, monkeypatch, request):
    monkeypatch.setattr(ops._C, "cuda_refusal", lambda gpu: reason)
    ops._refusal.cache_clear()
    request.addfinalizer(ops._refusal.cache_clear)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu = f"reference: {reason}" if reason else "native"
    assert ops.native_status() == {"cpu": "native", "cuda:0": gpu}
    calls = Calls()
    for name in ("concept_map", "soft_topk", "soft_iou"):  # torch has no arithmetic for this GPU
        monkeypatch.setattr(reference, name, lambda *_, name=name: calls.reference.add(name))
    with FakeTensorMode(allow_non_fake_inputs=True), calls:
        maps, query, keys, weights = gpu_fakes()
        assert ops.fused_attention(query, keys) is not bool(reason)
        ops.concept_map(query, keys, weights)
        ops.soft_topk(maps.flatten(0, 1), 0.3, 0.01)
        ops.soft_iou(maps, PAIRS, 0.3, 0.01)
    taken, other = (calls.reference, calls.native) if reason else (calls.native, calls.reference)
    assert (taken, other) == ({"concept_map", "soft_topk", "soft_iou"}, set())
    if reason:
        monkeypatch.setenv("BIASMAP_BACKEND", "native")
        with pytest.raises(ValueError, match="that `biasmap env` calls native"):
            ops.soft_topk(maps, 0.3, 0.01)
