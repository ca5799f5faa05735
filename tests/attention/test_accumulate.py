"""Many attribution prompts at once: groups, keys, and prompts of single images."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import _C, accumulate, reference
from biasmap_fast.accumulate import PromptKeys, add_maps, grouped, prompt_keys
from biasmap_fast.unet import split_heads

ROOT = Path(__file__).resolve().parents[2]
DOCTOR = bm.AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))
NURSE = bm.AttributionPrompt("a photo of a nurse and woman", ("nurse", "woman"))
SHORT = bm.AttributionPrompt("a doctor", ("doctor",))


def test_groups_have_one_shape_and_one_set_of_images():
    shapes = [(2, 9), (2, 8), (2, 9), (1, 9), (2, 9)]
    images = [None, None, None, None, (1,)]
    found = grouped(shapes, images, [True] * 5)
    assert [group.prompts for group in found] == [(0, 2), (1,), (3,), (4,)]
    assert [group.concepts for group in found] == [2, 2, 1, 2]
    assert found[3].select([(0, 0), (1, 1), (2, 2)]) == [(1, 0)]
    assert found[0].select([(1, 0), (2, 1)]) == [(1, 0), (2, 1)]
    assert [group.detailed for group in found] == [2, 1, 1, 1]
    found = grouped(shapes, images, [False, False, True, False, True])
    assert [(group.prompts, group.detailed) for group in found] == [
        ((2, 0), 1), ((1,), 0), ((3,), 0), ((4,), 1),
    ]  # fmt: skip


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_prompts_without_the_kernel(prompts, dtype):
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    rows = torch.randn(2, 100, 4 * 8).to(dtype)
    keys = torch.randn(prompts, 4, 12, 8, dtype=wide)
    weights = torch.rand(prompts, 2, 12, dtype=wide)
    start = torch.rand(prompts, 2, 2, 100, dtype=wide)
    found = start.clone()
    add_maps([found], rows, PromptKeys(weights, {"layer": keys}), "layer")
    for index in range(prompts):
        expected = start[index].double() + exact_map(rows, keys[index], weights[index])
        torch.testing.assert_close(found[index].double(), expected, rtol=1e-5, atol=1e-5)


def exact_map(query, keys, weights):
    """In float64: query ``[B, n, heads * d]``."""
    heads = split_heads(query.double(), keys.shape[0])
    return reference.concept_map(heads, keys.double(), weights.double())


def prompts_case(images, heads, pixels, depth, scale):
    """Six prompts of nine tokens, of which the last two are their own."""
    torch.manual_seed(1)
    query = torch.randn(images, pixels, heads * depth)
    common, own = torch.randn(7, 32), torch.randn(6, 2, 32)
    states = [torch.cat([common, end]) for end in own]
    project = scale * torch.randn(heads, 32, depth) / 32**0.5
    keys = [(each @ project).contiguous() for each in states]  # [heads, T', d]
    weights = [torch.rand(2, 9) * (torch.rand(2, 9) < 0.5) for _ in states]
    group = prompt_keys(
        torch.stack(weights),
        torch.stack(states),
        lambda given: {"layer": given[:, None] @ project},  # [R, heads, T, d]
    )
    return query, group, keys, weights


# less than a tile of pixels; several; a part of one; queries in no order; deeper than any UNet's
@pytest.mark.parametrize(
    "shape", [(1, 2, 9, 4), (2, 8, 4096, 40), (3, 4, 100, 16), (2, 3, 64, 5), (1, 1, 1, 200)]
)
def test_one_kernel_for_prompts_that_share_tokens(shape):
    query, group, keys, weights = prompts_case(*shape, scale=1.0)
    assert group.by_layer["layer"].shape[1] == 7 + 6 * 2
    start = torch.rand(6, shape[0], 2, shape[2])
    by_column = query.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (query, torch.cat([query, query], dim=2)[..., : query.shape[2]], by_column):
        found = start.clone()
        add_maps([found], given, group, "layer")
        for index in range(6):
            exact = exact_map(query, keys[index], weights[index])
            torch.testing.assert_close(
                (found[index] - start[index]).double(), exact, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_queries_are_widened(dtype):
    query, group, keys, weights = prompts_case(2, 4, 64, 16, scale=1.0)
    found = torch.zeros(6, 2, 2, 64)
    add_maps([found], query.to(dtype).requires_grad_(), group, "layer")
    for index in range(6):
        heads = split_heads(query.to(dtype), 4)
        exact = reference.concept_map(heads, keys[index], weights[index])
        torch.testing.assert_close(found[index], exact)


def test_maps_of_a_batch_are_those_of_its_images_whatever_the_threads():
    query, group, *_ = prompts_case(5, 4, 300, 16, scale=1.0)
    wide = torch.zeros(6, 8, 2, 300)
    together = wide[:, 2:7]  # strided, as some images of a run are
    add_maps([together], query, group, "layer")
    assert not wide[:, :2].any()
    assert not wide[:, 7:].any()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for image in range(5):
            alone = torch.zeros(6, 1, 2, 300)
            add_maps([alone], query[image : image + 1], group, "layer")
            assert torch.equal(alone[:, 0], together[:, image])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tile_of_width(tmp_path_factory):
    """The kernel's work on one tile, in vectors of so many bytes."""
    if shutil.which("g++") is None:
        pytest.skip("compiling the kernel for other processors needs g++")
    target = tmp_path_factory.mktemp("widths") / "widths.so"
    command = ["g++", "-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno"]
    command += ["-fno-trapping-math", "-Wall", "-Wextra", "-Werror", "-Icsrc"]
    subprocess.run([*command, "tests/emulation/widths.cpp", "-o", target], check=True, cwd=ROOT)
    function = ctypes.CDLL(str(target)).map_of_tile
    function.restype = ctypes.c_bool

    def tile(width, query, group):
        own = group
        keys, (prompts, concepts, tokens) = own.by_layer["layer"], own.weights.shape
        maps = torch.full((prompts, concepts, 64), -1.0)
        sizes = [ctypes.c_int64(n) for n in (*keys.shape[::2], tokens, prompts, concepts)]
        given = (ctypes.c_void_p(t.data_ptr()) for t in (query, keys, own.members, own.weights))
        if not function(ctypes.c_int64(width), *given, *sizes, ctypes.c_void_p(maps.data_ptr())):
            pytest.skip("this processor has no vectors of 32 bytes")
        return maps

    return tile


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("depth", [4, 7, 40])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_vectors_of_every_width(tile_of_width, width, depth, scale):
    query, group, keys, weights = prompts_case(1, 3, 64, depth, scale=scale)
    found = tile_of_width(width, query, group)
    for index in range(6):
        exact = exact_map(query, keys[index], weights[index])[0]
        rough = 1e-5 if scale == 1.0 else 1e-3
        torch.testing.assert_close(found[index].double(), exact, rtol=rough, atol=rough)


@pytest.mark.parametrize("scale", [200.0, 1e10])
def test_prompts_far_apart(scale):
    # one prompt's own tokens outshine all others by more than float32's exponents can tell
    query, group, keys, weights = prompts_case(2, 4, 64, 16, scale=scale)
    found = torch.zeros(6, 2, 2, 64)
    add_maps([found], query, group, "layer")
    for index in range(6):
        exact = exact_map(query, keys[index], weights[index])
        torch.testing.assert_close(found[index].double(), exact, rtol=1e-3, atol=1e-3)


def test_not_finite_where_the_reference_is_not():
    query, group, keys, weights = prompts_case(2, 4, 64, 16, scale=1.0)
    heads = split_heads(query, 4)
    heads[0, 1, 5], heads[1, 2, 7] = float("nan"), float("inf")
    own = group.by_layer["layer"]
    (token,) = (group.members[3] * (group.members.sum(0) == 1)).nonzero()[:1, 0]
    own[0, token] = float("nan")  # of the fourth prompt alone
    found = torch.zeros(6, 2, 2, 64)
    add_maps([found], query, group, "layer")
    assert found[3].isnan().all()
    for index in (0, 1, 2, 4, 5):
        exact = reference.concept_map(heads, keys[index], weights[index])
        assert exact.isnan().any()
        torch.testing.assert_close(found[index], exact, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_a_repeated_token_counts_twice():
    states = torch.randn(12, 16)
    which = torch.tensor(
        [[0, 1, 1, 2, 3, 4, 5, 6], [0, 1, 1, 2, 3, 4, 5, 7], [0, 1, 2, 3, 4, 5, 6, 7]]
    )
    prompts = [states[own] for own in which.repeat(3, 1)]
    keys = [each.view(8, 2, 8).transpose(0, 1).contiguous() for each in prompts]  # [heads, T', d]
    weights = [torch.rand(1, 8) for _ in prompts]
    group = prompt_keys(
        torch.stack(weights), torch.stack(prompts), lambda given: {"layer": split_heads(given, 2)}
    )
    assert group.by_layer["layer"].shape == (2, 8, 8)
    query, found = torch.randn(1, 5, 16), torch.zeros(9, 1, 1, 5)
    add_maps([found], query, group, "layer")
    for index, own in enumerate(keys):
        exact = reference.concept_map(split_heads(query, 2), own, weights[index])
        torch.testing.assert_close(found[index], exact)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_parts_of_the_first_prompts_alone(backend, monkeypatch):
    monkeypatch.setenv("BIASMAP_BACKEND", backend)
    query, group, keys, weights = prompts_case(2, 4, 100, 16, scale=1.0)
    every, some, none = (
        torch.zeros(6, 2, 2, 100),
        torch.ones(2, 2, 2, 100),
        torch.zeros(0, 2, 2, 100),
    )
    add_maps([every, some, none], query, group, "layer")
    for index in range(6):
        exact = exact_map(query, keys[index], weights[index]).float()
        torch.testing.assert_close(every[index], exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(some, 1 + every[:2])


def test_the_reference_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("BIASMAP_BACKEND", "reference")
    assert prompts_case(1, 2, 9, 4, scale=1.0)[1].members is None


def test_what_the_kernel_refuses():
    query, keys = torch.rand(2, 9, 12), torch.rand(3, 5, 4)
    members, weights, maps = torch.ones(2, 5), torch.rand(2, 1, 5), torch.zeros(2, 2, 1, 9)
    good = {"query": query, "keys": keys, "members": members, "weights": weights, "maps": [maps]}
    _C.prompt_maps(**good)
    for name, bad, said in (
        ("query", query.double(), r"`query` must be .* float32 on the CPU, got .* float64"),
        ("query", query[0], r"`query` must be \[B, n, heads \* d\] float32"),
        ("query", query[..., :11], r"the heads \* d = 3 \* 4 columns of `keys`, got 11"),
        ("keys", keys[:, :, :3], r"`keys` must be \[heads, U, d\] float32 contiguous"),
        ("members", members[:, :4].contiguous(), r"`members` must be \[P, U\]"),
        ("members", members * torch.tensor([[1.0], [0.0]]), r"members\[1\] names no token"),
        ("weights", weights[:1], r"`weights` must be \[P, K, U\]"),
        ("maps", [maps, maps[..., :8]], r"`maps` must be \[P', B, K, n\]"),
        ("maps", [maps.repeat(2, 1, 1, 1)], "`maps` must be of 2 prompts at most, got 4"),
        ("maps", [torch.zeros(2, 2, 1, 18)[..., ::2]], "pixels in a row"),
    ):
        with pytest.raises(ValueError, match=said):
            _C.prompt_maps(**{**good, name: bad})


def test_prompts_of_single_images_are_those_of_the_batch():
    pipe = bm.testbed.pipeline()
    seeds, texts = (1, 2, 3), ["a photo of a doctor", "a photo of a nurse", "a doctor"]

    def draw() -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        pipe(texts, num_inference_steps=2, generator=generators)

    with bm.attribute(pipe, [DOCTOR, NURSE, SHORT], by="block") as everything:
        draw()
    nested = [[DOCTOR, SHORT], [NURSE], [SHORT, DOCTOR]]
    with bm.attribute(pipe, nested, by="block") as own:
        draw()
        draw()
    all_maps, maps = everything.maps_by_prompt(), own.maps_by_prompt()
    assert {name: found.images for name, found in maps.items()} == {
        DOCTOR.name: (0, 2, 3, 5),
        SHORT.name: (0, 2, 3, 5),
        NURSE.name: (1, 4),
    }
    for name, found in maps.items():
        for row, image in enumerate(found.images):
            assert found.row(image) == row
            expected = all_maps[name]
            torch.testing.assert_close(found.values[row], expected.values[image % 3])
            for block, part in found.by_block.items():
                torch.testing.assert_close(part[row], expected.by_block[block][image % 3])
    with pytest.raises(KeyError, match=r"no maps of image 0; there are those of \[1, 4\]"):
        maps[NURSE.name].row(0)


def test_images_are_saved(tmp_path):
    maps = bm.AttributionMaps(torch.rand(2, 1, 4, 4), ("doctor",), images=(0, 3))
    maps.resize(8).save(tmp_path / "maps.safetensors")
    assert bm.AttributionMaps.load(tmp_path / "maps.safetensors").images == (0, 3)
    with pytest.raises(ValueError, match="`images` must name the 2 images of `values`, got 1"):
        bm.AttributionMaps(torch.rand(2, 1, 4, 4), ("doctor",), images=(0,))


def test_bad_prompts_of_images():
    pipe = bm.testbed.pipeline()
    with pytest.raises(TypeError, match="or a sequence of them for each image, got both mixed"):
        bm.attribute(pipe, [DOCTOR, [NURSE]])
    with pytest.raises(ValueError, match="for image 1, got none"):
        bm.attribute(pipe, [[DOCTOR], []])
    with pytest.raises(ValueError, match="two attribution prompts have the same name"):
        bm.attribute(pipe, [[DOCTOR, DOCTOR]])
    with (
        pytest.raises(ValueError, match="given for 2 images, and the UNet draws 1"),
        bm.attribute(pipe, [[DOCTOR], [NURSE]]),
    ):
        pipe("a doctor", num_inference_steps=1)


def test_the_kernel_is_given_what_it_reads(monkeypatch):
    """On a GPU with its kernels: prompt by prompt, maps and keys without gaps."""
    pipe, seen = bm.testbed.pipeline(), []

    def add(maps, query, keys, weights):
        assert maps.is_contiguous()
        assert keys.is_contiguous()
        assert weights.is_contiguous()
        seen.append(tuple(maps.shape[:2]))
        maps += reference.concept_map(query, keys, weights)

    def draw():
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        pipe(["a doctor", "a nurse", "a doctor"], num_inference_steps=1, generator=generators)

    nested = [[DOCTOR, SHORT], [DOCTOR, NURSE], [DOCTOR, NURSE]]
    with bm.attribute(pipe, nested) as expected:
        draw()
    monkeypatch.setattr(accumulate, "fused_prompts", lambda *args: False)
    monkeypatch.setattr(accumulate, "add_concept_map", add)
    with bm.attribute(pipe, nested) as found:
        draw()
    assert set(seen) == {(3, 2), (1, 1), (2, 2)}
    for name, maps in expected.maps_by_prompt().items():
        torch.testing.assert_close(found.maps_by_prompt()[name].values, maps.values)
