"""Draws pictures with a model and keeps what every candidate measure is computed from.

Not the package's recorder: this is written from the formulas, keeps layers, thirds of the run and
both branches apart, and has raw scores too. A test compares its sum with the recorder's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from biasmap_fast.concepts import AttributionPrompt, encode, tokenize_all
from biasmap_fast.files import write_text, writing
from biasmap_fast.testbed import PLAUSIBLE, World, pipeline
from biasmap_fast.testbed.classify import Classifier
from biasmap_fast.unet import cross_attention_layers
from training.evaluate import pixel_auc
from training.population import face_prompt, world_of

from .candidates import BRANCHES, NORMS, SIDE, layer_maps

STEPS, GUIDANCE_SCALE, PARTS = 25, 3.0, 3
EVERY_LAYER = ("down_blocks", "mid_block", "up_blocks")


@dataclass(frozen=True)
class Concept:
    """A word in an attribution prompt, under the name that candidates know it by."""

    key: str
    text: str
    word: str


def concepts_of(world: World, noun: str) -> list[Concept]:
    """The words and prompts whose maps are kept for one profession."""
    opening = face_prompt(noun)
    found = [
        Concept("noun", opening, noun),
        Concept("control", opening, "photo"),
        Concept("neutral", "a photo of the face of a person", "person"),
    ]
    for word in world.words:
        joint = f"{opening} and {word}"
        found += [
            Concept(f"noun with {word}", joint, noun),
            Concept(f"{word} with noun", joint, word),
            Concept(word, f"a photo of the face of a {word}", word),
        ]
    return found


class Capture:
    """Sums of concept maps, per layer, third of the run, branch and normalisation."""

    def __init__(self, pipe: Any, concepts: Sequence[Concept], images: int) -> None:
        self.layers = cross_attention_layers(pipe, EVERY_LAYER)
        self.images, self.step = images, 0
        self.prompts = []  # (columns in the result, token weights [K, T'], keys by layer)
        texts = list(dict.fromkeys(concept.text for concept in concepts))
        for text in texts:
            rows = [i for i, concept in enumerate(concepts) if concept.text == text]
            words = tuple(concepts[i].word for i in rows)
            tokenized = tokenize_all(AttributionPrompt(text, words), pipe)
            states = encode(tokenized, pipe, torch.device("cpu"))  # [1, T', D]
            with torch.no_grad():
                keys = {layer.name: layer.keys(states)[0] for layer in self.layers}
            self.prompts.append((rows, tokenized[0].weights, keys))
        self.count = len(concepts)
        self.sums: dict[str, torch.Tensor] = {}  # layer -> [B, K, norm, part, branch, n]
        self.handles: list[Any] = []
        self.pipe = pipe

    def __enter__(self) -> Capture:
        for layer in self.layers:
            hook = layer.module.to_q.register_forward_hook(self._hook(layer))
            self.handles.append(hook)
        self.handles.append(self.pipe.unet.register_forward_hook(self._count_step))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _count_step(self, *_: Any) -> None:
        self.step += 1

    def _hook(self, layer: Any) -> Any:
        def see(_module: Any, _inputs: Any, query: torch.Tensor) -> None:
            q = layer.split_heads(query).float()  # [2 B, heads, n, d]: uncond, then cond
            part = min(PARTS - 1, self.step * PARTS // STEPS)
            if layer.name not in self.sums:
                shape = (self.images, self.count, len(NORMS), PARTS, len(BRANCHES), q.shape[2])
                self.sums[layer.name] = torch.zeros(shape)
            into = self.sums[layer.name]
            keys = torch.cat([k[layer.name] for _, _, k in self.prompts], 1)  # [heads, T, d]
            every = q @ keys.transpose(1, 2)  # [2 B, heads, n, T], T of all prompts together
            lengths = [weights.shape[1] for _, weights, _ in self.prompts]
            for (rows, weights, _), scores in zip(
                self.prompts, every.split(lengths, -1), strict=True
            ):
                soft = (scores.softmax(-1) @ weights.T).sum(1)  # [2 B, n, K]
                raw = scores @ weights.T  # [2 B, heads, n, K]
                # every head and call counts alike, whatever the size of its scores
                raw = (raw - raw.mean(2, keepdim=True)) / raw.std(2, keepdim=True).clamp(min=1e-6)
                for norm, maps in enumerate((soft, raw.sum(1))):
                    both = maps.unflatten(0, (2, self.images))  # [2, B, n, K]
                    into[:, rows, norm, part] += both.permute(1, 3, 0, 2)  # [B, K, 2, n]

        return see


@torch.no_grad()
def collect(model: Path, out: Path, seeds: Sequence[int]) -> None:
    """Writes ``out/maps.safetensors`` and ``out/pictures.json`` for one model.

    Every profession is drawn once a seed; the same seed starts from the same noise everywhere.
    Maps are ``[professions, seeds, concepts, norm, part, branch, n]``, one tensor a layer.
    """
    record = json.loads((model / "training.json").read_text())
    world = world_of(record)
    pipe, classifier = pipeline(model), Classifier(world)
    sums: dict[str, list[torch.Tensor]] = {}
    pictures: list[dict[str, Any]] = []
    for noun in world.markers:
        concepts = concepts_of(world, noun)
        with Capture(pipe, concepts, len(seeds)) as capture:
            images = pipe(
                [face_prompt(noun)] * len(seeds),
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="np",
            ).images
        for name, value in capture.sums.items():
            sums.setdefault(name, []).append(value)
        for seed, reading in zip(seeds, classifier(images), strict=True):
            good = reading.plausibility >= PLAUSIBLE and reading.profession == noun
            pictures.append(
                {
                    "profession": noun,
                    "seed": seed,
                    "right": bool(good),
                    "demographic": reading.demographic,
                    "plausibility": reading.plausibility,
                    "overlap": reading.overlap if good else None,
                    "auc": _word_aucs(capture, concepts, reading, len(pictures) % len(seeds))
                    if good
                    else None,
                }
            )
    out.mkdir(parents=True, exist_ok=True)
    with writing(out / "maps.safetensors") as partial:
        save_file({name: torch.stack(parts) for name, parts in sums.items()}, partial)
    summary = {
        "settings": record["settings"],
        "seconds": record["seconds"],
        "concepts": [concept.key for concept in concepts],
        "layers": list(sums),
        "sizes": {noun: world.markers[noun].size for noun in world.markers},
        "region_fraction": world.truth.rows[0].region_fraction,
        "truth": {
            row.profession: {"level": row.level, "gap": row.gap, "share": row.shares["woman"]}
            for row in world.truth
        },
        "pictures": pictures,
    }
    write_text(out / "pictures.json", json.dumps(summary) + "\n")


def _word_aucs(
    capture: Capture, concepts: Sequence[Concept], reading: Any, image: int
) -> dict[str, float]:
    """Whether a word's map, all layers but the mid block, lies where the word decides."""
    found = {}
    total = default_maps(capture.sums)  # [B, K, 16, 16]
    large = torch.nn.functional.interpolate(total, size=64, mode="bilinear")[image]
    for index, concept in enumerate(concepts):
        if concept.key in ("control", "neutral"):
            continue
        region = "marker" if concept.key.startswith("noun") else "demographic"
        found[concept.key] = pixel_auc(large[index].numpy(), reading.regions[region])
    return found


def default_maps(sums: dict[str, torch.Tensor]) -> torch.Tensor:
    """The package's default map from a capture: softmax, whole run, conditional, no mid block."""
    sides = {name: value for name, value in sums.items() if not name.startswith("mid_block")}
    parts = [value[:, :, 0, :, 1].sum(2) for value in layer_maps(sides).values()]  # [B, K, 256]
    total = torch.stack(parts).sum(0)
    return total.reshape(*total.shape[:-1], SIDE, SIDE)


def load(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `collect` wrote."""
    return load_file(out / "maps.safetensors"), json.loads((out / "pictures.json").read_text())
