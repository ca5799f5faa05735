from __future__ import annotations

import itertools

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast.shares import mixture, student

DOCTOR = "a photo of a doctor"
GENDER = {"woman": "a photo of a doctor and woman", "man": "a photo of a doctor and man"}


def predictions(groups, images=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups, images, 4, 6, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("groups", [2, 3, 5, 9])
def test_an_exact_mixture_is_found(groups):
    parts = predictions(groups)
    weights = torch.rand(3, groups, generator=torch.Generator().manual_seed(1)).double()
    weights[0, 0] = 0.0
    weights /= weights.sum(1, keepdim=True)
    mixed = torch.einsum("bg,gbchw->bchw", weights, parts)
    torch.testing.assert_close(mixture(mixed, parts), weights, rtol=0, atol=1e-9)
    # float32 and a far offset that all predictions share
    found = mixture((mixed + 10).float(), (parts + 10).float())
    torch.testing.assert_close(found, weights, rtol=0, atol=1e-5)


def test_no_other_weights_of_the_simplex_are_nearer():
    """Nearly alike groups and a mixture outside of them: the hard case for the solver."""
    parts = predictions(4)
    parts[1:] = parts[:1] + 0.05 * parts[1:]
    mixed = predictions(1, seed=5)[0]
    found = mixture(mixed, parts)
    assert float(found.min()) >= 0
    torch.testing.assert_close(found.sum(1), torch.ones(3, dtype=torch.float64))
    best = (torch.einsum("bg,gbchw->bchw", found, parts) - mixed).flatten(1).norm(dim=1)
    for steps in itertools.product(range(11), repeat=4):
        if sum(steps) == 10:
            weights = torch.tensor(steps).double() / 10
            error = (torch.einsum("g,gbchw->bchw", weights, parts) - mixed).flatten(1).norm(dim=1)
            assert bool((best <= error + 1e-9).all())


def test_two_groups_are_the_projection_and_only_posteriors_are_clipped():
    parts = predictions(2)
    mixed = parts[1] + 1.25 * (parts[0] - parts[1])
    torch.testing.assert_close(
        mixture(mixed, parts, clip=False)[:, 0], torch.full((3,), 1.25).double()
    )
    torch.testing.assert_close(mixture(mixed, parts)[:, 0], torch.ones(3).double())


def test_student():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 7, 31, 63, 1000):
        assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=3e-3)


def test_draws_do_not_depend_on_batches(sd_pipe):
    options = {"num_inference_steps": 4, "height": 32, "width": 24}
    many = bm.share(sd_pipe, DOCTOR, GENDER, draws=7, seed=2, **options)
    few = bm.share(sd_pipe, DOCTOR, GENDER, draws=5, seed=4, rows=4, **options)
    torch.testing.assert_close(many.draws[2:], few.draws, rtol=1e-3, atol=1e-3)
    assert many.rows == 21
    assert sum(many.values.values()) == pytest.approx(1.0)
    assert all(low < many[label] < high for label, (low, high) in many.intervals.items())


def test_nothing_of_the_pipeline_changes(sd_pipe):
    scheduler = sd_pipe.scheduler.timesteps.clone()
    attributes, state = dict(vars(sd_pipe)), torch.get_rng_state()
    bm.share(sd_pipe, DOCTOR, GENDER, draws=2, num_inference_steps=4)
    assert vars(sd_pipe) == attributes
    assert torch.equal(sd_pipe.scheduler.timesteps, scheduler)
    assert torch.equal(torch.get_rng_state(), state)


def test_guidance_is_said(sd_pipe, family):
    plain = bm.share(sd_pipe, DOCTOR, GENDER, draws=2, num_inference_steps=4)
    assert plain.guidance.startswith("without classifier-free guidance")
    flux = family("flux")
    size = {"height": flux.size[0], "width": flux.size[1]}
    distilled = bm.share(flux.pipe, DOCTOR, GENDER, draws=2, num_inference_steps=2, **size)
    assert "guidance scale as an input" in distilled.guidance


def test_refusals(sd_pipe):
    with pytest.raises(ValueError, match="at least two groups"):
        bm.share(sd_pipe, DOCTOR, {"woman": DOCTOR})
    with pytest.raises(ValueError, match="at least 2 for an interval"):
        bm.share(sd_pipe, DOCTOR, GENDER, draws=1)
    with pytest.raises(ValueError, match="draws its own noise"):
        bm.share(sd_pipe, DOCTOR, GENDER, generator=torch.Generator())


def test_the_planted_share_comes_back_and_is_decided_on_the_way():
    """The embedded model; few draws, so only what is far apart is compared."""
    pipe, truth = bm.testbed.pipeline(), bm.testbed.truth()
    estimates = {}
    for profession in ("baker", "nurse"):
        text = f"a photo of a {profession}"
        groups = {word: f"{text} and {word}" for word in truth.words}
        estimates[profession] = bm.share(pipe, text, groups, draws=8)["woman"]
        planted = truth[profession].shares["woman"]
        assert estimates[profession] == pytest.approx(planted, abs=0.15)
    assert estimates["nurse"] - estimates["baker"] > 0.3
    groups = {word: f"a photo of a doctor and {word}" for word in truth.words}
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    with bm.probe(pipe, [bm.Swap("gender", groups)], calls="all") as probes:
        pipe(
            "a photo of a doctor", num_images_per_prompt=4, generator=generators,
            num_inference_steps=12, guidance_scale=1.0, output_type="latent",
        )  # fmt: skip
    shares = probes.shares("gender")
    assert shares.shape == (12, 4, 2)
    entropy = torch.special.entr(shares).sum(-1).mean(-1)
    assert 0 < probes.decided("gender") < 12
    assert float(entropy[probes.decided("gender")]) <= float(entropy[0]) / 2
    assert float(entropy[probes.decided("gender") - 1]) > float(entropy[0]) / 2
