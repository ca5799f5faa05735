"""Effect maps and shares of every family against the pipeline drawing each prompt itself.

The reference knows nothing of text arguments: for each prompt the pipeline draws, and at every
call of its denoiser the latents are replaced by those of the drawing that is probed.
"""

from __future__ import annotations

import pytest
import torch

import biasmap_fast as bm

SWAPS = [
    bm.Swap("profession", {"doctor": "a photo of a doctor", "person": "a photo of a person"}),
    bm.Swap("gender", {"woman": "a photo of a woman", "man": "a photo of a man"}),
    bm.Swap("three", {name: f"a photo of a {name}" for name in ("man", "woman", "doctor")}),
]
NAMES = [
    "sd_pipe", "sdxl_pipe", "sd3", "flux", "pixart", "sana", "qwen", "z_image", "lcm", "deepfloyd",
    "kandinsky3", "hunyuan", "lumina2", "cogview4", "aura_flow", "chroma",
]  # fmt: skip
# diffusers' own use of what it deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")


def recorded(family, latents=None, **options):
    """Denoiser outputs and latents of a drawing, the latents replaced if given; and the picture."""
    module = getattr(family.pipe, "unet", None) or family.pipe.transformer
    outputs, seen = [], []

    def before(module, args, kwargs):
        name = next((n for n in ("sample", "hidden_states", "x") if n in kwargs), None)
        value = kwargs[name] if name else args[0]
        seen.append(value)
        if latents is None:
            return None
        forced = latents[len(seen) - 1]
        return (args, kwargs | {name: forced}) if name else ((forced, *args[1:]), kwargs)

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(lambda module, args, output: outputs.append(output[0])),
    ]
    picture = family.draw(**options)
    for handle in handles:
        handle.remove()
    return outputs, seen, picture


def by_hand(own, groups):
    """Effect map ``[B, h, w]`` and weights ``[B, G]`` of float64 predictions."""
    stacked = torch.stack(groups)
    distance = (stacked - stacked.mean(0)).pow(2).sum(2).mean(0).sqrt()
    effect = distance / distance.mean((1, 2), keepdim=True)
    weights = []
    for image in range(len(own)):
        best, error = None, float("inf")
        # every set of groups that may have a weight, solved with one equation for the sum
        for chosen in range(1, 2 ** len(groups)):
            kept = [g for g in range(len(groups)) if chosen >> g & 1]
            columns = torch.stack([groups[g][image].flatten() for g in kept], 1)
            gram, right = columns.T @ columns, columns.T @ own[image].flatten()
            system = torch.nn.functional.pad(gram, (0, 1, 0, 1), value=1.0)
            system[-1, -1] = 0.0
            found = torch.linalg.solve(system, torch.cat([right, torch.ones(1).double()]))[:-1]
            rest = float((columns @ found - own[image].flatten()).norm())
            if bool((found >= 0).all()) and rest < error:
                best, error = torch.zeros(len(groups)).double(), rest
                best[kept] = found
        weights.append(best)
    return effect, torch.stack(weights)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_probes_against_the_pipeline_itself(family, name, guided):
    family = family(name)
    outputs, latents, picture = recorded(family, guided=guided)
    state = torch.get_rng_state()
    with bm.probe(family.pipe, SWAPS, calls="all", rows=5) as probes:
        probed = family.draw(guided=guided)
    assert torch.equal(picture, probed)
    assert torch.equal(state, torch.get_rng_state())
    own = family.conditional(outputs, 2, guided)
    predictions = {}
    for prompt in {text for swap in SWAPS for text in swap.groups.values()}:
        forced, _, _ = recorded(family, latents, guided=guided, prompts=[prompt] * 2)
        predictions[prompt] = family.conditional(forced, 2, guided)
    effects = probes.effects()
    assert effects.values.shape[-2:] == own[0].shape[-2:]
    for swap in SWAPS:
        steps = [
            by_hand(f, [predictions[text][step] for text in swap.groups.values()])
            for step, f in enumerate(own)
        ]
        expected = torch.stack([effect for effect, _ in steps]).mean(0)
        torch.testing.assert_close(effects[swap.name].double(), expected, rtol=1e-5, atol=1e-5)
        shares = torch.stack([weights for _, weights in steps])
        torch.testing.assert_close(probes.shares(swap.name), shares, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_share_against_the_pipeline_itself(family, name):
    family = family(name)
    groups = SWAPS[0].groups
    options = family.options | family.plain
    size = {"height": family.size[0], "width": family.size[1], "num_inference_steps": 4}
    estimate = bm.share(
        family.pipe, "a photo of a man", groups, draws=5, seed=3, rows=7, **options, **size
    )
    assert estimate.rows == 15
    weights = []
    for seed in range(3, 8):
        first = {}
        for prompt in ("a photo of a man", *groups.values()):
            outputs, _, _ = recorded(family, guided=False, prompts=[prompt], seeds=[seed], **size)
            first[prompt] = family.conditional(outputs, 1, False)[0]
        doctor, person = (first[text] for text in groups.values())
        difference = doctor - person
        rest = first["a photo of a man"] - person
        weights.append(float((rest * difference).sum() / difference.pow(2).sum()))
    expected = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(estimate.draws[:, 0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(estimate.draws.sum(1), torch.ones(5, dtype=torch.float64))
    half = 2.776445 * float(expected.std()) / 5**0.5
    low, high = estimate.intervals["doctor"]
    assert estimate["doctor"] == pytest.approx(float(expected.mean()), rel=1e-6)
    assert (high - low) / 2 == pytest.approx(half, rel=3e-3)
