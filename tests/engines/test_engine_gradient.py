"""Guidance through an engine: the graph with the gradient of the energy against autograd."""

from __future__ import annotations

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import AttributionPrompt
from biasmap_fast.concepts import tokenize
from biasmap_fast.engines import errors

DOCTOR = AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))
WOMAN = AttributionPrompt("a photo of a nurse and woman", ("nurse", "woman"))


@pytest.mark.parametrize("prompts", [DOCTOR, [WOMAN, DOCTOR]])
def test_guidance(testbed_folder, pipe, prompts, draw):
    """The whole of guidance, over steps, with one prompt and with one an image."""

    def guided():
        with bm.guide(pipe, prompts, bm.Energy(scale=1.0)) as guidance:
            pictures = draw(pipe)
        return torch.as_tensor(pictures), guidance.ledger

    pictures, expected = guided()
    pipe.unet = bm.load_engine(testbed_folder, unet=pipe.unet)
    again, found = guided()
    assert len(found) == len(expected) == 6
    for row, right in zip(found, expected, strict=True):
        assert row.applied
        assert (row.call, row.image, row.timestep) == (right.call, right.image, right.timestep)
        # a gradient's rounding is in the next call's latents, and masks are sharp
        near = 1e-4 if row.call == 0 else 1e-2
        assert row.energy == pytest.approx(right.energy, rel=near)
        assert row.soft_iou == pytest.approx(right.soft_iou, rel=near)
        assert row.gradient_norm == pytest.approx(right.gradient_norm, rel=10 * near)
    assert float((again - pictures).abs().max()) < 1e-3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("images", [1, 3])
def test_gradient_equals_autograd(testbed_folder, pipe, seed, images, assert_near, graph_of):
    engine = bm.load_engine(testbed_folder)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(images, 4, 16, 16, generator=generator)
    text = torch.randn(images, 20, 64, generator=generator)
    states = torch.randn(9, 64, generator=generator)
    weights = torch.zeros(2, 9)
    weights[0, 4] = weights[1, 6:8] = 1.0
    found = engine.energy_gradient(
        (latents, 500, text), {}, [(states, weights)], [(0, 1)], [1.0],
        fraction=0.3, temperature=0.01,
    )  # fmt: skip
    graph = graph_of(pipe.unet.requires_grad_(False))
    leaf = latents.clone().requires_grad_()
    times, mask = torch.full((images,), 500.0), torch.ones(1, 9)
    noise, maps = graph(leaf, times, text, states[None], mask, weights[None])
    total = maps.sum(2)[:, 0].flatten(2)  # [B, K, N]
    energy = bm.reference.soft_iou(total, torch.tensor([[0, 1]]), 0.3, 0.01)[:, 0]
    (expected,) = torch.autograd.grad(energy.sum(), leaf)
    assert_near(found.prediction, noise.detach())
    assert_near(found.energy, energy.detach())
    error = (found.gradient - expected).flatten(1).norm(dim=1)
    assert float((error / expected.flatten(1).norm(dim=1)).max()) < 1e-4


def test_measuring_and_recording_while_guiding(testbed_folder, pipe, draw, assert_near):
    def both(scale):
        with (
            bm.guide(pipe, DOCTOR, bm.Energy(scale=scale)) as guidance,
            bm.attribute(pipe, WOMAN, by="block") as recorder,
        ):
            draw(pipe)
        return guidance.ledger, recorder.maps()

    expected = [both(scale) for scale in (0.0, 1.0)]
    pipe.unet = bm.load_engine(testbed_folder)
    for scale, (ledger, maps) in zip((0.0, 1.0), expected, strict=True):
        rows, found = both(scale)
        assert [row.reason for row in rows] == [row.reason for row in ledger]
        assert [row.energy for row in rows] == pytest.approx(
            [row.energy for row in ledger], rel=1e-2
        )
        assert_near(found.values, maps.values, 1e-3)


def test_other_shapes_and_options_are_refused(testbed_folder, pipe, draw):
    pipe.unet = bm.load_engine(testbed_folder)
    with (
        pytest.raises(errors.EngineError, match="no gradient graph for latents of 16 x 24"),
        bm.guide(pipe, DOCTOR, bm.Energy(scale=1.0)),
    ):
        draw(pipe, height=64, width=96)
    with (
        pytest.raises(errors.EngineError, match="fraction 0.2.*there are: 16 x 16 with frac"),
        bm.guide(pipe, DOCTOR, bm.Energy(scale=1.0, fraction=0.2)),
    ):
        draw(pipe)
    with pytest.raises(ValueError, match="accumulate=True needs the torch UNet"):
        bm.guide(pipe, DOCTOR, bm.Energy(accumulate=True))
    with pytest.raises(ValueError, match="containment= needs the torch UNet"):
        bm.guide(pipe, DOCTOR, bm.Energy(containment=(0.05, 0.1)))
    with pytest.raises(ValueError, match="layers of an engine's energy are fixed"):
        bm.guide(pipe, DOCTOR, bm.Energy(layers=("up_blocks",)))
    engine, masks = pipe.unet, {"fraction": 0.3, "temperature": 0.01}
    tokens = {prompt: tokenize(prompt, pipe.tokenizer) for prompt in (DOCTOR, WOMAN)}
    engine.check_gradient((16, 16), [tokens[DOCTOR]], **masks)
    with pytest.raises(
        errors.ShapeError, match=r"at most {'prompts': 1}, and {'prompts': 2} are needed"
    ):
        engine.check_gradient((16, 16), list(tokens.values()), **masks)
    text = "a photo of a doctor and man and a photo of a nurse and woman"
    with (
        pytest.raises(errors.ShapeError, match="must have attribution_tokens of 16, got 17"),
        bm.guide(pipe, AttributionPrompt(text, ("doctor", "man")), bm.Energy(scale=1.0)),
    ):
        draw(pipe)
