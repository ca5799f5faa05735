"""The injected gradient against finite differences, under every scheduler."""

from __future__ import annotations

import math

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import AttributionPrompt

THREE = AttributionPrompt("a photo of a doctor and man", ("photo", "doctor", "man"))


def draw(pipe, prompt="a photo of a doctor", seeds=(1, 2), **options):
    settings = {"num_inference_steps": 4, "height": 32, "width": 32, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe([prompt] * len(seeds), generator=generators, **(settings | options)).images


def as_double(pipe):
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.double()
    return pipe


def soft_masks(x, slope, fraction):
    """The masks of `soft_topk` from its formula, tau by bisection."""
    low, high = x.amin(-1, keepdim=True) - 20 / slope, x.amax(-1, keepdim=True) + 20 / slope
    for _ in range(200):
        middle = (low + high) / 2
        above = torch.sigmoid((x - middle) * slope).mean(-1, keepdim=True) > fraction
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.sigmoid((x - low) * slope)


def energy(maps, pairs, spans, fractions=None, temperature=0.2):
    """Mean SoftIoU, or mean containment, from the formulas; the maps' ranges are given."""
    x = maps.flatten(2)  # [B, K, N] float64
    slope = 2 / (temperature * spans)  # [B, K, 1]
    first, second = (soft_masks(x, slope, fraction) for fraction in fractions or (0.3, 0.3))
    a, b = first[:, [i for i, _ in pairs]], second[:, [j for _, j in pairs]]
    both = (a * b).sum(-1)
    if fractions:
        return (both / a.sum(-1)).mean(1)  # [B]
    return (both / (a.sum(-1) + b.sum(-1) - both)).mean(1)  # [B]


CASES = [(1, "cond"), (2, "cond"), (2, "uncond"), (3, "cond")]


@pytest.mark.parametrize(("chunks", "branch"), CASES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("accumulate", "containment"), [(False, None), (True, None), (False, (0.1, 0.25))]
)
def test_injected_delta_is_the_energy_gradient(
    make_sd, reference_of, chunks, branch, prediction, accumulate, containment
):
    """The hook's change of the prediction against central differences of an independent energy."""
    pipe = as_double(make_sd(prediction_type=prediction))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 16, 16, generator=generator, dtype=torch.float64)
    states = torch.randn(2 * chunks, 5, 32, generator=generator, dtype=torch.float64)
    timestep, scale, pairs = 601, 30.0, [(0, 1), (1, 2)]

    @torch.no_grad()
    def unet(latents, timestep=timestep):
        return pipe.unet(latents.repeat(chunks, 1, 1, 1), timestep, states).sample

    plain = unet(z)
    named = [(THREE.concepts[i], THREE.concepts[j]) for i, j in pairs]
    settings = bm.Energy(
        pairs=named, scale=scale, temperature=0.2, clip=None, accumulate=accumulate,
        containment=containment,
    )  # fmt: skip
    with bm.guide(pipe, THREE, settings, branch=branch, chunks=chunks) as guidance:
        if accumulate:  # a first call, whose maps then count as constants
            unet(z.roll(1, 0), 801)
        guided = unet(z)
    rows = [row for row in guidance.ledger if row.timestep == timestep]

    alpha_bar = float(pipe.scheduler.alphas_cumprod[timestep])
    strength = scale * math.sqrt(1 - alpha_bar)
    if prediction == "v_prediction":
        strength /= math.sqrt(alpha_bar)
    deltas = (guided - plain).reshape(chunks, *z.shape) / strength
    for delta in deltas[1:]:  # the same in every chunk
        torch.testing.assert_close(delta, deltas[0], rtol=1e-6, atol=1e-12)
    gradient = deltas[0]
    norms = torch.tensor([row.gradient_norm for row in rows], dtype=torch.float64)
    torch.testing.assert_close(gradient.flatten(1).norm(dim=1), norms, rtol=1e-5, atol=0)

    reference = reference_of(pipe)
    first = 2 if branch == "cond" and chunks > 1 else 0

    def maps(latents, timestep=timestep):
        reference.seen.clear()
        unet(latents, timestep)
        return reference.maps(THREE, (16, 16), slice(first, first + 2))

    earlier = maps(z.roll(1, 0), 801) if accumulate else 0.0
    base = (maps(z) + earlier).flatten(2)
    spans = base.amax(-1, keepdim=True) - base.amin(-1, keepdim=True)
    found = torch.tensor([row.energy for row in rows], dtype=torch.float64)
    expected = energy(maps(z) + earlier, pairs, spans, containment)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for seed in range(2):
        direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).double()
        ahead, behind = (
            energy(maps(z + step * direction) + earlier, pairs, spans, containment)
            for step in (1e-5, -1e-5)
        )
        expected = (ahead - behind) / 2e-5
        along = (gradient * direction).flatten(1).sum(1)
        size = norms * direction.flatten(1).norm(dim=1)
        assert bool(((along - expected).abs() < 1e-4 * size).all()), (along, expected, size)


SCHEDULERS = {
    "DDIMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "LMSDiscreteScheduler": {},
    "UniPCMultistepScheduler": {},
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_small_step_lowers_the_energy_with_every_scheduler(make_sd, kind, prediction):
    """One sampling step, plain and guided: the guided latents, seen at the same time, overlap less.

    The latents' energy is taken where the gradient was: at the first timestep, in the network's
    own (variance-preserving) frame. A scheduler whose frame were mistaken, or whose sign, fails.
    """
    pipe = as_double(make_sd(kind=kind, prediction_type=prediction, **SCHEDULERS[kind]))
    options = {"temperature": 0.2, "clip": None, "accumulate": False}
    states, start = {}, {}

    def run(scale):
        def remember(pipe, step, timestep, kwargs):
            if step == 0:
                states[scale] = kwargs["latents"].clone()
                start["t"] = timestep
            return kwargs

        with bm.guide(pipe, THREE, bm.Energy(scale=scale, stop=0.01, **options)) as guidance:
            draw(pipe, num_inference_steps=8, callback_on_step_end=remember)
        return guidance.ledger

    rows = run(0.05)
    assert [row.call for row in rows] == [0, 0]
    assert all(row.applied for row in rows)
    run(0.0)
    moved = states[0.05] - states[0.0]
    assert 0 < float(moved.abs().max()) < 0.5

    # the direction in which guidance moved the latents, tried at the start of the run
    embeds = pipe.encode_prompt("a photo of a doctor", "cpu", 2, True)
    text = torch.cat([embeds[1], embeds[0]])
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    noise = torch.cat(
        [torch.randn(1, 4, 16, 16, generator=g, dtype=torch.float64) for g in generators]
    )

    def energies(z):
        with (
            bm.guide(pipe, THREE, bm.Energy(scale=0.0, **options), chunks=2) as guidance,
            torch.no_grad(),
        ):
            pipe.unet(z.repeat(2, 1, 1, 1), start["t"], text)
        return torch.tensor([row.energy for row in guidance.ledger])

    # the network's input at the first step: unit variance whatever the scheduler's own frame
    step = 0.05 * moved / moved.flatten(1).norm(dim=1)[:, None, None, None]
    assert bool((energies(noise + step) < energies(noise - step)).all())


def test_inner_steps_descend_where_the_parts_lead(make_sd):
    """Two inner steps: the second gradient is taken at the latents that the first amounts to."""
    pipe = as_double(make_sd())
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 4, 16, 16, generator=generator, dtype=torch.float64)
    states = torch.randn(1, 5, 32, generator=generator, dtype=torch.float64)
    options = {"clip": None, "temperature": 0.2}

    @torch.no_grad()
    def delta(latents, scale, inner_steps=1):
        plain = pipe.unet(latents, 601, states).sample
        settings = bm.Energy(scale=scale, inner_steps=inner_steps, **options)
        with bm.guide(pipe, THREE, settings, chunks=1) as guidance:
            guided = pipe.unet(latents, 601, states).sample
        return guided - plain, guidance.ledger

    sigma = math.sqrt(1 - float(pipe.scheduler.alphas_cumprod[601]))
    first, rows = delta(z, 20.0)
    second, _ = delta(z - sigma * first, 20.0)
    both, together = delta(z, 40.0, inner_steps=2)
    torch.testing.assert_close(both, first + second, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(both, 2 * first, rtol=1e-3)
    assert together[0].energy == rows[0].energy

    def energies(inner_steps):  # of two calls, the second with the maps of the first
        settings = bm.Energy(scale=1e-9, inner_steps=inner_steps, accumulate=True, **options)
        with bm.guide(pipe, THREE, settings, chunks=1) as guidance:
            for timestep in (801, 601):
                pipe.unet(z, timestep, states)
        return [row.energy for row in guidance.ledger]

    assert energies(3) == pytest.approx(energies(1), rel=1e-6)
