"""What each tool can do, tried: two images a call, latents not square, a word beyond the prompt.

A tiny UNet of SD 1.5's kind at 64 x 64. A tool can do a thing if it ends with the maps that were
asked for; whatever else comes of it stands in its row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .harness import Entry, Group
from .recorder import PROMPT, Runs, real_size
from .settings import Settings


def tried(
    runs: Runs,
    make: Callable[[], torch.Tensor],
    expected: Callable[[], torch.Tensor],
    exact: bool = True,
) -> Callable[[], Any]:
    """Raises unless the maps are one an image, of the latents' shape, and the right ones."""

    def run() -> None:
        maps = make()
        wanted = (runs.images, 2, *runs.size)
        if exact and tuple(maps.shape) != wanted:
            raise ValueError(f"maps of {tuple(maps.shape)} where {wanted} are asked for")
        right = expected()
        if exact and (worst := float((maps - right).abs().max() / right.max())) > 1e-4:
            raise ValueError(f"maps differ by {worst:.0e}")

    return run


_PIPES: dict[torch.device, Any] = {}  # one for all groups


def pipeline(settings: Settings) -> Any:
    if settings.device not in _PIPES:
        _PIPES[settings.device] = real_size(settings, 32)
    return _PIPES[settings.device]


def tools(settings: Settings, images: int, size: tuple[int, int]) -> list[Entry]:
    pipe = pipeline(settings)
    runs = Runs(pipe, images, 1, *size)
    right = functools.cache(runs.probabilities)
    ovam, daam = settings.ovam, settings.daam
    return [
        Entry("biasmap_fast", tried(runs, lambda: runs.recorder(PROMPT), right), ours=True),
        Entry("OVAM", tried(runs, lambda: runs.ovam(ovam.load), right), status=ovam.status),
        Entry("DAAM", tried(runs, lambda: runs.daam(daam.load), right, False), status=daam.status),
    ]


def beyond(settings: Settings) -> list[Entry]:
    """Maps of a word that is not in the drawing prompt ("woman")."""
    runs = Runs(pipeline(settings), 1, 1, 64)

    def daam() -> torch.Tensor:
        with settings.daam.load(runs.pipe) as traced:
            runs.draw()
            heat: torch.Tensor = (
                traced.compute_global_heat_map().compute_word_heat_map("woman").heatmap
            )
        return heat

    entries = tools(settings, 1, (64, 64))
    entries[-1].run = tried(runs, daam, runs.probabilities, False)
    return entries


def groups(settings: Settings) -> list[Group]:
    asked = {
        "one image": lambda: tools(settings, 1, (64, 64)),
        "two images a call": lambda: tools(settings, 2, (64, 64)),
        "latents of 64 x 48": lambda: tools(settings, 1, (64, 48)),
        "a word that the drawing prompt lacks": lambda: beyond(settings),
    }
    workload = "32 channels, random weights, 1 step, two chunks, float32"
    return [
        Group(
            "peers", name, workload, setup, rounds=1, seconds=15, threads=2, warm_up="biasmap_fast"
        )
        for name, setup in asked.items()
    ]
