"""What maps cost a whole run: plain, this package's recorder, full probabilities, OVAM and DAAM.

Each entry draws with classifier-free guidance and ends with the maps of two concepts. "full
probabilities" keeps what naive hooks keep: every layer's attention over the attribution prompt,
every step, summed at the end. OVAM (github.com/vpulab/ovam, MIT) and DAAM (PyPI, MIT) run
unmodified where the user gives them. OVAM measures one image, of the unconditional branch, so
ours does the same where the two are compared; the error is the greatest difference of the maps
from those of full probabilities over their greatest value. DAAM knows the words of the drawing
prompt only, in the softmax over all 77 tokens: another quantity, without an error. The embedded
model runs on one thread; SD 1.5 is its UNet in real size with random weights, one step, two
threads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

import biasmap_fast as bm
from biasmap_fast.accumulate import add_maps, prompt_keys
from biasmap_fast.attribution import AttributionCache
from biasmap_fast.maps import resize
from biasmap_fast.reference import concept_map
from biasmap_fast.unet import cross_attention_layers, resolutions

from .guidance import build
from .harness import Entry, Group
from .settings import Settings

PROMPT = bm.AttributionPrompt("a photo of the face of a doctor and woman", ("doctor", "woman"))
OTHER = bm.AttributionPrompt("a photo of the face of a doctor and man", ("doctor", "man"))
SAME = 1e-4  # two tools' maps of one prompt, relative


def one_of(found: Any) -> torch.Tensor:
    """The maps of `PROMPT` among those of several prompts."""
    maps: torch.Tensor = found[PROMPT.name].values
    return maps


class Runs:
    """Ways to draw ``images`` pictures in ``steps`` steps and to have maps of them afterwards."""

    def __init__(
        self, pipe: Any, images: int, steps: int, height: int, width: int | None = None
    ) -> None:
        self.pipe, self.images, self.steps = pipe, images, steps
        self.size = (height, width or height)  # of the latents
        self.held: dict[str, int] = {}
        self.expected: torch.Tensor | None = None  # once it has been drawn

    def draw(self) -> None:
        self.pipe(
            ["a photo of the face of a doctor"] * self.images,
            num_inference_steps=self.steps,
            guidance_scale=3.0,
            height=self.size[0] * self.pipe.vae_scale_factor,
            width=self.size[1] * self.pipe.vae_scale_factor,
            generator=[torch.Generator().manual_seed(seed) for seed in range(self.images)],
            output_type="latent",
        )

    def recorder(self, *prompts: bm.AttributionPrompt) -> torch.Tensor:
        with bm.attribute(self.pipe, prompts, branch="uncond") as recorder:
            self.draw()
            self.held[f"recorder {len(prompts)}"] = recorder.nbytes["maps"]
        return one_of(recorder.maps_by_prompt())

    def probabilities(self) -> torch.Tensor:
        """Hooks that keep every call's attention, ``[images, heads, n, T']``."""
        layers = cross_attention_layers(self.pipe, None)
        keys = AttributionCache().keys(self.pipe, (PROMPT,), layers, apart=True)
        kept: list[torch.Tensor] = []

        def see(layer: Any) -> Callable[..., None]:
            def hook(_module: Any, _inputs: Any, query: torch.Tensor) -> None:
                q = layer.split_heads(query[: self.images]).float()  # [B, heads, n, d]
                kept.append((q @ keys.by_layer[layer.name][0].float().transpose(1, 2)).softmax(-1))

            return hook

        with ExitStack() as stack:
            for layer in layers:
                handle = layer.module.to_q.register_forward_hook(see(layer))
                stack.callback(handle.remove)
            self.draw()
        self.held["probabilities"] = sum(one.nbytes for one in kept)
        sizes = resolutions(*self.size)
        total = torch.zeros(self.images, 2, *self.size, device=kept[0].device)
        for one in kept:
            columns = (one @ keys.weights[0].to(one).T).sum(1).transpose(1, 2)  # [B, K, n]
            total += resize(
                columns.reshape(*columns.shape[:2], *sizes[columns.shape[2]]), self.size
            )
        self.expected = total
        return total

    def ovam(self, hooker_class: Any) -> torch.Tensor:
        with hooker_class(self.pipe) as hooker:
            self.draw()
        self.held["OVAM"] = sum(
            states.nbytes
            for block in hooker.cross_attention_hookers
            for states in block.hidden_states
        )
        with torch.no_grad():
            maps = hooker.get_ovam_callable()(PROMPT.text)  # [1, T', h, w]
        (tokenized,) = AttributionCache().tokens(self.pipe, PROMPT)
        found: torch.Tensor = torch.einsum("kt,bthw->bkhw", tokenized.weights.to(maps), maps)
        return found

    def daam(self, trace: Any, **settings: Any) -> torch.Tensor:
        with trace(self.pipe, **settings) as traced:
            self.draw()
            self.held["DAAM"] = sum(maps.nbytes for _, maps in traced.all_heat_maps)
            found: torch.Tensor = traced.compute_global_heat_map().heat_maps  # [T, h, w]
        return found


def entries(
    runs: Runs, settings: Settings, no_daam: str = "", both_prompts: bool = True
) -> list[Entry]:
    """Ways to have maps; ``no_daam`` says why DAAM cannot, if so."""

    def error(maps: torch.Tensor) -> float:
        expected = runs.expected if runs.expected is not None else runs.probabilities()
        if maps.shape != expected.shape:
            raise ValueError(f"maps of {tuple(maps.shape)}, expected {tuple(expected.shape)}")
        return float((maps.to(expected) - expected).abs().max() / expected.abs().max())

    def held(name: str) -> Callable[[], int]:
        return lambda: runs.held[name]

    ovam, daam = settings.ovam, settings.daam
    one = "cannot: one image a call" if runs.images > 1 else ""
    tolerance = SAME if not settings.gpu else 1e-2  # sums of float16 queries
    found = [
        Entry("plain", runs.draw, note="no maps"),
        Entry(
            "recorder", lambda: runs.recorder(PROMPT), error, "2 concepts, 1 prompt", ours=True,
            held=held("recorder 1"), tolerance=tolerance,
        ),
        Entry(
            "recorder, 2 prompts", lambda: runs.recorder(PROMPT, OTHER), error, "4 concepts",
            ours=True, held=held("recorder 2"), tolerance=tolerance,
        ),
        Entry(
            "full probabilities", runs.probabilities, error, "2 concepts, 1 prompt",
            held=held("probabilities"),
        ),
        Entry(
            "OVAM", lambda: runs.ovam(ovam.load), error, "all tokens of 1 prompt",
            held=held("OVAM"), tolerance=tolerance, status=one or ovam.status,
        ),
        Entry(
            "DAAM", lambda: runs.daam(daam.load), None, "words of the drawing prompt",
            held=held("DAAM"), status=no_daam or one or daam.status,
        ),
    ]  # fmt: skip
    return found if both_prompts else [each for each in found if each.name != "recorder, 2 prompts"]


def real_size(settings: Settings, width: int, **kwargs: Any) -> Any:
    """A pipeline with SD 1.5's shapes, whose prompts have 77 tokens."""
    pipe = build(width, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.requires_grad_(False)
    pipe.tokenizer.model_max_length = 77
    pipe.vae_scale_factor = 8  # DAAM takes the size of its maps from it
    return pipe.to(settings.device, settings.dtype)


def layers_entries(settings: Settings, shapes: tuple[tuple[int, int, int], ...]) -> list[Entry]:
    """What the recorder computes in one UNet call of one image, with the work there is."""
    from .kernels import MAPS, TOKENS, attention_inputs

    inputs = [attention_inputs(1, shape, settings.device)[0] for shape in shapes for _ in range(5)]
    sums = {shape[0]: torch.zeros(1, 1, MAPS, shape[0]) for shape in shapes}
    states = torch.eye(TOKENS)  # no two tokens are alike

    def own_keys(keys: torch.Tensor) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
        return lambda _: {"layer": keys[None]}

    given = [prompt_keys(w[None], states[None], own_keys(k)) for _, k, w in inputs]

    def kept() -> list[torch.Tensor]:
        return [(q @ k.transpose(1, 2)).softmax(-1) for q, k, _ in inputs]

    def in_torch() -> None:
        for query, keys, weights in inputs:
            sums[query.shape[2]][0] += concept_map(query, keys, weights)

    def recorded() -> None:
        for (query, *_), group in zip(inputs, given, strict=True):
            rows = query.transpose(1, 2).flatten(2)  # as `to_q` leaves them: a view
            add_maps([sums[query.shape[2]]], rows, group, "layer")

    tokens = sum(query.shape[1] * query.shape[2] * TOKENS for query, *_ in inputs)
    depths = sum(query.numel() * TOKENS for query, *_ in inputs)
    found = [
        Entry("probabilities kept", kept),
        Entry("concept maps in torch", in_torch),
        Entry("concept maps", recorded, ours=True),
    ]
    for entry in found:
        entry.bytes = float(sum(query.nbytes for query, *_ in inputs))
        entry.flops, entry.exponentials = 2.0 * depths, float(tokens)
    return found


def groups(settings: Settings) -> list[Group]:
    found: list[Group] = []

    def add(name: str, workload: str, setup: Callable[[], list[Entry]], **kwargs: Any) -> None:
        found.append(Group("recorder", name, workload, setup, **kwargs))

    def testbed(images: int, steps: int) -> list[Entry]:
        pipe = bm.testbed.pipeline(device=settings.device)
        why = "cannot: it wants prompts of 77 tokens, this model has 20"
        return entries(Runs(pipe, images, steps, 16), settings, why)

    workload = "{} image(s), {} steps, two chunks, latents of 16 x 16, float32"
    sizes = [(1, 10), (1, 25), (1, 50), (8, 25)]
    if settings.quick or settings.gpu:  # where time is short
        sizes = [(1, 10)] if settings.quick else [(1, 25), (8, 25)]
    for images, steps in sizes:
        rounds = settings.rounds(7 if images * steps <= 25 else 3)
        drawing = (rounds + 1) * 5 * steps * 0.009 * (1 + images)
        add(
            f"testbed, {images} image(s), {steps} steps",
            workload.format(images, steps),
            lambda images=images, steps=steps: testbed(images, steps),  # type: ignore[misc]
            rounds=rounds,
            seconds=15.0 if settings.gpu else drawing + 20 * (steps == 50),
            peaks=steps == 50,
        )
    width, steps = (32, 1) if settings.quick else (320, 25 if settings.gpu else 1)
    add(
        "SD 1.5 shapes",
        f"{width} channels, random weights, 1 image, {steps} step(s), two chunks, latents of "
        f"64 x 64, {str(settings.dtype).removeprefix('torch.')}",
        lambda: entries(Runs(real_size(settings, width), 1, steps, 64), settings, "", settings.gpu),
        rounds=settings.rounds(5 if settings.gpu else 2),
        warm_up="" if settings.gpu else "plain",
        seconds=100 if settings.gpu else 125,
        threads=2,
        peaks=settings.gpu,
    )
    if not settings.gpu:
        shapes = ((4096, 8, 40), (1024, 8, 80), (256, 8, 160))
        add(
            "the recorder's share of a UNet call",
            "15 layers of SD 1.5, one image, 12 tokens, float32",
            lambda: layers_entries(settings, shapes),
            rounds=settings.rounds(9),
            seconds=3,
        )
    return found
