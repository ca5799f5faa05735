"""One guided UNet call at the shapes of SD 1.5: this package against the published way.

    python benchmarks/guidance.py [--out DIR] [--threads N] [--rounds N] [--width 320]

The published way takes the gradient through the whole guidance batch (two chunks here), with the
weights' own gradients on, from row-wise soft masks of 20 unrolled iterations of the unconditional
chunk's maps. Ours differentiates the attributed chunk alone, of the same branch. Both run once a
round, in turn, in this process; peak memory is taken in a process each. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import biasmap_fast as bm
from biasmap_fast import presets
from biasmap_fast.attribution import attribution_keys
from biasmap_fast.concepts import tokenize_all
from biasmap_fast.maps import resize
from biasmap_fast.reference import concept_map
from biasmap_fast.unet import cross_attention_layers
from harness import Variant, measure, save, show

PROMPT = bm.AttributionPrompt("a photo of the face of a doctor and woman", ("doctor", "woman"))


def build(width: int) -> Any:
    """SD 1.5's UNet (for 320 channels) with random weights, behind a pipeline's other parts."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    channels = tuple(width * factor for factor in (1, 2, 4, 4))
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, block_out_channels=channels
        )
    unet = unet.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.fill_(1.0)  # norms
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    testbed = bm.testbed.pipeline()
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(testbed.tokenizer), hidden_size=768, num_hidden_layers=2,
        num_attention_heads=12, max_position_embeddings=77,
        bos_token_id=testbed.tokenizer.bos_token_id, eos_token_id=testbed.tokenizer.eos_token_id,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=testbed.vae,
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=testbed.tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.scheduler.set_timesteps(50)
    return pipe


def arguments(pipe: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 64, 64, generator=generator).repeat(2, 1, 1, 1)
    return latents, pipe.scheduler.timesteps[10], torch.randn(2, 77, 768, generator=generator)


def plain(pipe: Any) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.no_grad():
            sample: torch.Tensor = pipe.unet(*arguments(pipe)).sample
        return sample

    return run


def published(pipe: Any) -> Callable[[], torch.Tensor]:
    """Written from the description of the published code; none of it is copied."""
    layers = cross_attention_layers(pipe, None)
    keys = attribution_keys(pipe, layers, tokenize_all(PROMPT, pipe))

    def run() -> torch.Tensor:
        latents, timestep, text = arguments(pipe)
        latents.requires_grad_()
        queries: dict[str, torch.Tensor] = {}
        handles = [
            layer.module.to_q.register_forward_hook(
                lambda module, args, query, name=layer.name: queries.__setitem__(name, query)
            )
            for layer in layers
        ]
        try:
            prediction = pipe.unet(latents, timestep, text).sample
        finally:
            for handle in handles:
                handle.remove()
        total = torch.zeros(1, 2, 64, 64)
        for layer in layers:
            rows = layer.split_heads(queries[layer.name])[:1]  # batch index 0: unconditional
            side = int(rows.shape[2] ** 0.5)
            maps = concept_map(rows, keys.by_layer[layer.name], keys.weights)
            total = total + resize(maps.view(1, 2, side, side), (64, 64))
        energy = presets.paper_soft_iou(total[:, 0], total[:, 1])
        (gradient,) = torch.autograd.grad(energy.sum(), latents)
        alpha_bar = pipe.scheduler.alphas_cumprod[int(timestep)]
        added: torch.Tensor = prediction.detach() + 100 * (1 - alpha_bar).sqrt() * gradient[:1]
        return added

    return run


def guided(pipe: Any) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with bm.guide(pipe, PROMPT, branch="uncond", chunks=2, clip=None), torch.no_grad():
            sample: torch.Tensor = pipe.unet(*arguments(pipe)).sample
        return sample

    return run


WAYS = {"plain": plain, "published": published, "guide": guided}


def peak_mib(way: str, options: argparse.Namespace) -> float:
    """Growth of the high-water mark over one call, in a process of its own."""
    command = [sys.executable, __file__, "--peak", way]
    command += ["--width", str(options.width), "--threads", str(options.threads)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(answer.stdout)["mib"])


def report_peak(way: str, options: argparse.Namespace) -> None:
    run = WAYS[way](build(options.width))
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark of building
    before = high_water_kib()
    run()
    print(json.dumps({"mib": (high_water_kib() - before) / 1024}))


def high_water_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=320, help="channels; SD 1.5 has 320")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        report_peak(options.peak, options)
        return

    pipe = build(options.width)
    group = "guided UNet call"
    workload = f"{options.width} channels, latents of 64 x 64, 2 chunks, float32"
    variants = [
        Variant(name, WAYS[name](pipe), lambda values: None, note)
        for name, note in (("published", ""), ("guide", ""), ("plain", "no guidance"))
    ]
    rows = measure(group, workload, variants, options.rounds)
    for row in rows:
        row.peak_mib = peak_mib(row.name, options)
    show(rows)
    print(f"\n{save(rows, options.out, options.threads, 'guidance')}")


if __name__ == "__main__":
    main()
