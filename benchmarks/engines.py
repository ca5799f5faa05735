"""One UNet call: torch, torch.compile and ONNX Runtime, without and with attribution maps.

The embedded model. Two parts are asked for by name: ``engines-testbed`` has everything that can
run its UNet side by side, torch.compile too, and an audit through torch and through an engine;
``engines-sd15`` has the UNet of Stable Diffusion 1.5 in its real size with random weights (20 GiB
of memory, 11 GiB of disk; the exports take minutes). Errors are the noise prediction's greatest
difference from plain torch over its greatest value, and the audit's greatest difference of a
record's IoU.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import biasmap_fast as bm
from biasmap_fast.attribution import AttributionCache
from biasmap_fast.engines.onnx import relative

from .guidance import build, flops
from .harness import Entry, Group
from .settings import Settings

logger = logging.getLogger(__name__)
PROMPT = bm.AttributionPrompt("a photo of the face of a doctor and woman", ("doctor", "woman"))

# name -> options of the export
ENGINES: dict[str, dict[str, Any]] = {
    "onnx, no maps": {"maps": "none", "opset": 20},
    "onnx, reduced maps": {"maps": "reduced", "opset": 20},
    "onnx 23, reduced maps": {"maps": "reduced", "opset": 23},
    "onnx, probabilities": {"maps": "probabilities", "opset": 20},
}
SHORT = tuple(ENGINES)[:2]
LARGE: dict[str, dict[str, Any]] = {
    "onnx 23, no maps": {"maps": "none", "opset": 23},
    "onnx 23, reduced maps": {"maps": "reduced", "opset": 23},
    "onnx 23, reduced maps, Winograd": {"opset": 23, "convolutions": "winograd"},
}


def exported(pipe: Any, folder: Path, name: str, shapes: str) -> Path:
    options = (ENGINES | LARGE)[name]
    target = folder / "-".join([shapes, *map(str, options.values())])
    if not target.exists():
        begun = time.perf_counter()
        bm.export_unet(pipe, target, shapes=shapes, **options)
        logger.info("exported %s in %.0f s", target.name, time.perf_counter() - begun)
    return target


class Calls:
    """Entries of one UNet call on the same inputs."""

    def __init__(self, pipe: Any, given: tuple[torch.Tensor, ...]) -> None:
        self.pipe = pipe
        self.given = given
        self.unet = pipe.unet
        self.cache = AttributionCache()  # keys are made once a run, as an engine's states are given
        self.states = self.cache.states(pipe, PROMPT)
        self.expected = self.plain(pipe.unet)()

    def plain(self, model: Any) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.no_grad():
                sample: torch.Tensor = model(*self.given).sample
            return sample

        return run

    def recorded(self) -> torch.Tensor:
        with bm.attribute(self.pipe, PROMPT, chunks=1, cache=self.cache):
            return self.plain(self.pipe.unet)()

    def error(self, sample: torch.Tensor) -> float:
        return relative(sample, self.expected)

    def torch(self) -> list[Entry]:
        unet = self.plain(self.pipe.unet)
        return [
            Entry("torch", unet, self.error, "no maps"),
            Entry("torch, recorder", self.recorded, self.error, "2 concepts, 1 prompt", ours=True),
        ]

    def compiled(self) -> Entry:
        compiled = torch.compile(self.pipe.unet)
        return Entry("torch.compile", self.plain(compiled), self.error, "no maps")

    def engine(self, name: str, folder: Path) -> Entry:
        """The engine's prompt is asked for once and stays."""
        engine = bm.load_engine(folder, unet=self.unet)
        options = (ENGINES | LARGE)[name]
        attributed = options.get("maps") != "none"
        if attributed:
            engine.register_attribution_hook([self.states], lambda maps: None)
        note = f"opset {options['opset']}"
        return Entry(name, self.plain(engine), self.error, note, ours=attributed)


def testbed(settings: Settings, batch: int, names: Sequence[str], compiled: bool) -> list[Entry]:
    """torch, engines, and torch.compile if asked for."""
    pipe = bm.testbed.pipeline()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, 16, 16, generator=generator)
    text = torch.randn(batch, 20, 64, generator=generator)
    calls = Calls(pipe, (latents, torch.tensor(500), text))
    folders = {name: exported(pipe, settings.scratch, name, "testbed") for name in names}
    found = calls.torch() + [calls.engine(name, folder) for name, folder in folders.items()]
    return [*found, calls.compiled()] if compiled else found


def audits(settings: Settings, seeds: int) -> list[Entry]:
    """One audit through torch and through an engine; a time is a picture's."""
    pipe = bm.testbed.pipeline()
    folder = exported(pipe, settings.scratch, "onnx, reduced maps", "testbed")
    records: dict[str, list[dict[str, Any]]] = {}

    def audit(name: str, engine: str | None) -> Callable[[], str]:
        given: dict[str, Any] = {"engine": engine, "seeds": range(seeds), "device": "cpu"}
        plan = bm.AuditPlan(**given, save_pictures="none", save_maps="none")

        def run() -> str:
            out = settings.scratch / f"{name}-{time.monotonic_ns()}"
            records[name] = bm.run_audit(plan, out, progress=False).records.to_pylist()
            return name

        return run

    def error(name: str) -> float:
        pairs = zip(records["torch"], records[name], strict=True)
        return float(max(abs(a["iou"] - b["iou"]) for a, b in pairs))

    pictures = 20 * seeds
    return [
        Entry("torch", audit("torch", None), error, calls=pictures),
        Entry("onnx", audit("onnx", str(folder)), error, calls=pictures, ours=True),
    ]


def sd15(settings: Settings) -> list[Entry]:
    pipe = build(320)
    pipe.unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 64, 64, generator=generator)
    text = torch.randn(1, 77, 768, generator=generator)
    folders = {name: exported(pipe, settings.scratch, name, "sd15") for name in LARGE}
    calls = Calls(pipe, (latents, torch.tensor(500), text))
    gc.collect()
    found = [*calls.torch(), *(calls.engine(name, folder) for name, folder in folders.items())]
    work = float(flops(320, 1))
    # Winograd's products are fewer: the bound of the others is none of its.
    return [entry if "Winograd" in entry.name else replace(entry, flops=work) for entry in found]


WORKLOAD = "batch {}, latents of 16 x 16, float32"


def groups(settings: Settings) -> list[Group]:
    return [
        Group(
            "engines", "testbed, batch 8", WORKLOAD.format(8),
            lambda: testbed(settings, 8, SHORT, False), settings.rounds(15), 60.0,
        )
    ]  # fmt: skip


def testbed_groups(settings: Settings) -> list[Group]:
    seeds = 1 if settings.quick else 2
    names = SHORT if settings.quick else tuple(ENGINES)
    return [
        *(
            Group(
                "engines-testbed", f"one call, batch {batch}", WORKLOAD.format(batch),
                lambda batch=batch: testbed(settings, batch, names, not settings.quick),  # type: ignore[misc]
                settings.rounds(31), 200.0,
            )
            for batch in (1, 8)
        ),
        Group(
            "engines-testbed", "an audit",
            f"{20 * seeds} pictures of the embedded model, 25 steps, batch 8; time of a picture",
            lambda: audits(settings, seeds), settings.rounds(5), 100.0, warm_up="torch",
        ),
    ]  # fmt: skip


def sd15_groups(settings: Settings) -> list[Group]:
    return [
        Group(
            "engines-sd15", "SD 1.5", "random weights, batch 1, latents of 64 x 64, float32",
            lambda: sd15(settings), settings.rounds(9), 2400.0, threads=2,
        )
    ]  # fmt: skip
