"""One guided UNet call at the shapes of SD 1.5: this package against the published way.

The published way takes the gradient through the whole guidance batch, two chunks or (with semantic
guidance, as its scripts run) four, with the weights' own gradients on, from row-wise soft masks of
20 unrolled iterations of the unconditional chunk's maps. Ours differentiates the attributed chunk
alone, of the same branch. Weights are random. On a CPU four
chunks are measured at 64 channels, or they would take half of the whole run.
"""

from __future__ import annotations

from typing import Any

import torch

import biasmap_fast as bm
from biasmap_fast import presets
from biasmap_fast.attribution import AttributionCache
from biasmap_fast.maps import resize
from biasmap_fast.reference import concept_map
from biasmap_fast.unet import cross_attention_layers

from .harness import Entry, Group
from .settings import Settings

PROMPT = bm.AttributionPrompt("a photo of the face of a doctor and woman", ("doctor", "woman"))


def bare_unet(width: int) -> Any:
    """SD 1.5's UNet (for 320 channels) without values."""
    from diffusers import UNet2DConditionModel

    channels = tuple(width * factor for factor in (1, 2, 4, 4))
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, block_out_channels=channels
        )


def build(width: int) -> Any:
    """SD 1.5's UNet (for 320 channels) with random weights, behind a pipeline's other parts."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = bare_unet(width).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    # One block over and over, half the time of drawing all; of a prime length: rows are not alike.
    block = torch.empty(4_194_301).normal_(0.0, 0.02, generator=generator)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.fill_(1.0)  # norms
                continue
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(block)):
                part = flat[start : start + len(block)]
                part.copy_(block[: len(part)])
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


def flops(width: int, chunks: int) -> float:
    """Of one forward pass, counted on tensors without values."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        bare_unet(width)(
            torch.empty(chunks, 4, 64, 64), torch.tensor(0), torch.empty(chunks, 77, 768)
        )
    return float(counted.get_total_flops())


class Calls:
    """Ways of one UNet call with ``chunks`` copies of the latents in its batch."""

    def __init__(self, pipe: Any, chunks: int, side: int = 64) -> None:
        self.pipe, self.chunks, self.side = pipe, chunks, side

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(1, 4, self.side, self.side, generator=generator)
        latents = latents.repeat(self.chunks, 1, 1, 1)
        text = torch.randn(self.chunks, 77, 768, generator=generator)
        unet = self.pipe.unet
        return (
            latents.to(unet.device, unet.dtype),
            self.pipe.scheduler.timesteps[10],
            text.to(unet.device, unet.dtype),
        )

    def plain(self) -> torch.Tensor:
        with torch.no_grad():
            sample: torch.Tensor = self.pipe.unet(*self.arguments()).sample
        return sample

    def published(self) -> torch.Tensor:
        """Written from the description of the published code; none of it is copied."""
        latents, timestep, text = self.arguments()
        latents.requires_grad_()
        with RowwiseEnergy(self.pipe, PROMPT) as energy:
            prediction = self.pipe.unet(latents, timestep, text).sample
        (gradient,) = torch.autograd.grad(energy(), latents)
        alpha_bar = self.pipe.scheduler.alphas_cumprod[int(timestep)]
        added: torch.Tensor = prediction.detach() + 100 * (1 - alpha_bar).sqrt() * gradient[:1]
        return added

    def guided(self) -> torch.Tensor:
        energy = bm.Energy(clip=None)
        guide = bm.guide(self.pipe, PROMPT, energy, branch="uncond", chunks=self.chunks)
        with guide, torch.no_grad():
            sample: torch.Tensor = self.pipe.unet(*self.arguments()).sample
        return sample


class RowwiseEnergy:
    """The published energy of one UNet call of one image: maps of batch index 0, unrolled masks."""

    def __init__(self, pipe: Any, prompt: bm.AttributionPrompt) -> None:
        self.layers = cross_attention_layers(pipe, None)
        self.keys = AttributionCache().keys(pipe, (prompt,), self.layers, apart=True)
        self.queries: dict[str, torch.Tensor] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> RowwiseEnergy:
        for layer in self.layers:

            def keep(
                _module: Any, _inputs: Any, query: torch.Tensor, name: str = layer.name
            ) -> None:
                self.queries[name] = query

            self.handles.append(layer.module.to_q.register_forward_hook(keep))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def maps(self) -> torch.Tensor:
        """``[1, K, h, w]``, summed over heads and layers."""
        queries = [layer.split_heads(self.queries[layer.name])[:1] for layer in self.layers]
        side = int(max(q.shape[2] for q in queries) ** 0.5)
        total = torch.zeros(1, self.keys.weights.shape[1], side, side, device=queries[0].device)
        for layer, rows in zip(self.layers, queries, strict=True):
            here = int(rows.shape[2] ** 0.5)
            maps = concept_map(rows, self.keys.by_layer[layer.name][0], self.keys.weights[0])
            total = total + resize(maps.view(1, -1, here, here), (side, side))
        return total

    def __call__(self) -> torch.Tensor:
        """The first concept against the mean of the others' masks' overlaps, differentiable."""
        maps = self.maps()
        first, others = maps[:, :1], maps[:, 1:]
        return presets.paper_soft_iou(first.expand_as(others), others).mean()


def entries(width: int, chunks: int, settings: Settings) -> list[Entry]:
    pipe = build(width).to(settings.device, settings.dtype)
    calls = Calls(pipe, chunks)
    forward = flops(width, chunks)
    own = "another energy: the exact soft top-k of a whole map"
    return [
        Entry("published", calls.published, note="20 unrolled iterations, row by row"),
        Entry("guide", calls.guided, note=own, ours=True),
        Entry("plain", calls.plain, note="no guidance", flops=forward),
    ]


def groups(settings: Settings) -> list[Group]:
    """Two chunks at full width, then four (on a CPU, at less of it)."""
    widths = {2: 32, 4: 32} if settings.quick else {2: 320, 4: 320 if settings.gpu else 64}
    seconds = {2: 225.0, 4: 75.0}
    dtype = str(settings.dtype).removeprefix("torch.")
    return [
        Group(
            "guidance",
            f"guided UNet call, {chunks} chunks",
            f"{width} channels, latents of 64 x 64, {chunks} chunks, {dtype}",
            lambda width=width, chunks=chunks: entries(width, chunks, settings),  # type: ignore[misc]
            rounds=settings.rounds(9 if settings.gpu else 2),
            seconds=60.0 if settings.gpu else seconds[chunks],
            threads=2,
            warm_up="" if settings.gpu else "plain",
            peaks=True,
        )
        for chunks, width in widths.items()
    ]
