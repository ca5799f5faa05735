"""The UNet of Stable Diffusion 1.5 in its real size, with random weights."""

from __future__ import annotations

import pytest
import torch

import biasmap_fast as bm


@pytest.mark.slow
def test_recorder_at_sd15_shapes(make_sd):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        # the defaults of the class are SD 1.x but for the width of the text states
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    unet = unet.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if name.endswith("weight") and parameter.ndim == 1:
            parameter.fill_(1.0)  # group and layer norms
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964

    pipe = make_sd(text_width=768)
    pipe.unet = unet
    prompt = bm.AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))
    torch.set_num_threads(2)
    try:
        with bm.attribute(pipe, prompt, by="total") as recorder:
            pipe(
                "a photo of a doctor",
                num_inference_steps=1,
                guidance_scale=1.0,
                height=128,  # this pipeline's autoencoder halves once: latents of 64 x 64
                width=128,
                generator=generator,
                output_type="latent",
            )
            held = recorder.nbytes
    finally:
        torch.set_num_threads(1)
    maps = recorder.maps()
    assert maps.values.shape == (1, 2, 64, 64)
    assert len(recorder.layers) == 15
    assert held["maps"] == 2 * (64 * 64 + 32 * 32 + 16 * 16) * 4  # 43 KB, whatever the steps
    assert held["maps"] < 100_000
    assert bool(torch.isfinite(maps.values).all())
    # 8 heads in 15 layers, one call: each probability lies between 0 and 1
    assert float(maps.values.min()) > 0
    assert float(maps.values.max()) < 8 * 15
    assert bool((maps.values.std((-2, -1)) > 0).all())
