"""What maps cost a whole run: plain, this package's recorder, full probabilities, and OVAM.

    python benchmarks/recorder.py [--ovam CHECKOUT] [--part testbed|sd15] [--out DIR] [--rounds N]

Each variant draws with classifier-free guidance and ends with the maps of two concepts. "full
probabilities" keeps what naive hooks keep: every layer's attention over the attribution prompt,
every step, summed at the end. OVAM (github.com/vpulab/ovam, MIT) is used unmodified from a checkout
that the user gives; it measures one image, of the unconditional branch, so ours does the same where
the two are compared, and the error column holds the greatest difference of the maps over their
greatest value. ``sd15`` has SD 1.5's UNet in its real size with random weights, two steps.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import biasmap_fast as bm
from biasmap_fast.attribution import attribution_keys
from biasmap_fast.concepts import tokenize_all
from biasmap_fast.maps import resize
from biasmap_fast.unet import cross_attention_layers, resolutions
from guidance import build
from harness import Row, Variant, measure, save, show

PROMPT = bm.AttributionPrompt("a photo of the face of a doctor and woman", ("doctor", "woman"))
OTHER = bm.AttributionPrompt("a photo of the face of a doctor and man", ("doctor", "man"))
ROOT = Path(__file__).resolve().parents[1]


def one_of(found: Any) -> torch.Tensor:
    """The maps of `PROMPT` among those of several prompts."""
    maps: torch.Tensor = found[PROMPT.name].values
    return maps


class Runs:
    """Ways to draw ``images`` pictures in ``steps`` steps and to have maps of them afterwards."""

    def __init__(self, pipe: Any, images: int, steps: int, size: int) -> None:
        self.pipe, self.images, self.steps, self.size = pipe, images, steps, size
        self.held: dict[str, int] = {}

    def draw(self) -> None:
        self.pipe(
            ["a photo of the face of a doctor"] * self.images,
            num_inference_steps=self.steps,
            guidance_scale=3.0,
            height=self.size * self.pipe.vae_scale_factor,
            width=self.size * self.pipe.vae_scale_factor,
            generator=[torch.Generator().manual_seed(seed) for seed in range(self.images)],
            output_type="latent",
        )

    def plain(self) -> None:
        self.draw()

    def recorder(self, *prompts: bm.AttributionPrompt) -> torch.Tensor:
        with bm.attribute(self.pipe, prompts, branch="uncond") as recorder:
            self.draw()
            self.held[f"recorder {len(prompts)}"] = recorder.nbytes["maps"]
        found = recorder.maps()
        return one_of(found)

    def probabilities(self) -> torch.Tensor:
        """Hooks that keep every call's attention, ``[images, heads, n, T']``."""
        layers = cross_attention_layers(self.pipe, None)
        tokenized = tokenize_all(PROMPT, self.pipe)
        keys = attribution_keys(self.pipe, layers, tokenized)
        kept: list[torch.Tensor] = []

        def see(layer: Any) -> Callable[..., None]:
            def hook(_module: Any, _inputs: Any, query: torch.Tensor) -> None:
                q = layer.split_heads(query[: self.images])  # [B, heads, n, d]
                kept.append((q @ keys.by_layer[layer.name].transpose(1, 2)).softmax(-1))

            return hook

        with ExitStack() as stack:
            for layer in layers:
                handle = layer.module.to_q.register_forward_hook(see(layer))
                stack.callback(handle.remove)
            self.draw()
        self.held["full probabilities"] = sum(one.nbytes for one in kept)
        sizes = resolutions(self.size, self.size)
        total = torch.zeros(self.images, 2, self.size, self.size)
        for one in kept:
            columns = (one @ keys.weights.T).sum(1).transpose(1, 2)  # [B, K, n]
            side = sizes[columns.shape[2]]
            total += resize(columns.reshape(*columns.shape[:2], *side), (self.size, self.size))
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
        (tokenized,) = tokenize_all(PROMPT, self.pipe)
        found: torch.Tensor = torch.einsum("kt,bthw->bkhw", tokenized.weights, maps)
        return found


def compare(runs: Runs, group: str, hooker_class: Any, rounds: int) -> list[Row]:
    expected = runs.probabilities()

    def error(maps: torch.Tensor) -> float:
        return float((maps - expected).abs().max() / expected.abs().max())

    variants = [
        Variant("plain", runs.plain, lambda _: None, "no maps"),
        Variant("recorder", lambda: runs.recorder(PROMPT), error, "2 concepts, 1 prompt"),
        Variant("recorder, 2 prompts", lambda: runs.recorder(PROMPT, OTHER), error, "4 concepts"),
        Variant("full probabilities", runs.probabilities, error, "2 concepts, 1 prompt"),
    ]
    if hooker_class is not None and runs.images == 1:
        variants.append(Variant("OVAM", lambda: runs.ovam(hooker_class), error, "1 prompt"))
    size = f"latents of {runs.size} x {runs.size}"
    workload = f"{runs.images} image(s), {runs.steps} steps, two chunks, {size}"
    rows = measure(group, workload, variants, rounds)
    held = {
        "recorder": "recorder 1", "recorder, 2 prompts": "recorder 2",
        "full probabilities": "full probabilities", "OVAM": "OVAM",
    }  # fmt: skip
    for row in rows:
        if row.name in held:
            row.note += f"; holds {runs.held[held[row.name]] / 2**10:.0f} KiB after the run"
    return rows


def load_ovam(folder: Path | None) -> Any:
    """The hooker of an OVAM checkout, or None."""
    if folder is None:
        return None
    if not (folder / "ovam/stable_diffusion").is_dir():
        raise SystemExit(f"--ovam must be a checkout with ovam/stable_diffusion, got {folder}")
    sys.path.insert(0, str(folder))
    return importlib.import_module("ovam.stable_diffusion").StableDiffusionHooker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ovam", type=Path, help="a checkout of github.com/vpulab/ovam")
    parser.add_argument("--part", choices=("testbed", "sd15"), default="testbed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    hooker_class = load_ovam(options.ovam)
    rows: list[Row] = []
    if options.part == "testbed":
        pipe = bm.testbed.pipeline()
        for images, steps in ((1, 10), (1, 25), (1, 50), (8, 25)):
            runs = Runs(pipe, images, steps, 16)
            group = f"testbed, {images} image(s), {steps} steps"
            rows += compare(runs, group, hooker_class, options.rounds or 7)
    else:
        pipe = build(320)
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.requires_grad_(False)
        rows += compare(Runs(pipe, 1, 2, 64), "SD 1.5 shapes", hooker_class, options.rounds or 3)
    show(rows)
    print(save(rows, options.out, options.threads, f"recorder-{options.part}"))


if __name__ == "__main__":
    main()
