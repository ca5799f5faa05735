"""One UNet call: torch, torch.compile and ONNX Runtime, without and with attribution maps.

    python benchmarks/engines.py [--part testbed|sd15|audit] [--engines DIR] [--threads N]

``testbed`` is the embedded model, ``sd15`` the UNet of Stable Diffusion 1.5 in its real size with
random weights (12 GiB of memory; the first export takes many minutes), ``audit`` one audit through
torch and through an engine. Engines are kept in DIR and taken from there if they exist. Each part
writes its own file. The error is the noise prediction's greatest difference from plain torch, over
its greatest value.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import biasmap_fast as bm
from biasmap_fast.attribution import attribution_states
from biasmap_fast.concepts import tokenize_all
from biasmap_fast.engines.onnx import relative
from guidance import build
from harness import Row, Variant, measure, save, show

PROMPT = bm.AttributionPrompt("a photo of the face of a doctor and woman", ("doctor", "woman"))

# name -> maps, opset
ENGINES = {
    "onnx, no maps": ("none", 20),
    "onnx, reduced maps": ("reduced", 20),
    "onnx, probabilities": ("probabilities", 20),
    "onnx 23, no maps": ("none", 23),
    "onnx 23, reduced maps": ("reduced", 23),
}


def exported(pipe: Any, folder: Path, name: str, shapes: str) -> Path:
    maps, opset = ENGINES[name]
    target = folder / f"{shapes}-{maps}-{opset}"
    if not target.exists():
        begun = time.perf_counter()
        bm.export_unet(pipe, target, maps=maps, opset=opset, shapes=shapes)  # type: ignore[arg-type]
        print(f"exported {target} in {time.perf_counter() - begun:.0f} s", flush=True)
    return target


class Calls:
    """Variants of one UNet call on the same inputs."""

    def __init__(self, pipe: Any, given: tuple[torch.Tensor, ...]) -> None:
        self.pipe = pipe
        self.given = given
        self.unet = pipe.unet
        self.states = attribution_states(pipe, tokenize_all(PROMPT, pipe))
        self.expected = self.plain(pipe.unet)()

    def plain(self, model: Any) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.no_grad():
                sample: torch.Tensor = model(*self.given).sample
            return sample

        return run

    def recorded(self) -> torch.Tensor:
        with bm.attribute(self.pipe, PROMPT, chunks=1):
            return self.plain(self.pipe.unet)()

    def error(self, sample: torch.Tensor) -> float:
        return relative(sample, self.expected)

    def torch(self) -> list[Variant]:
        return [
            Variant("torch", self.plain(self.pipe.unet), self.error, "no maps"),
            Variant("torch, recorder", self.recorded, self.error, "2 concepts, 1 prompt"),
        ]

    def compiled(self) -> Variant:
        compiled = torch.compile(self.pipe.unet)
        return Variant("torch.compile", self.plain(compiled), self.error, "no maps")

    def engine(self, name: str, folder: Path) -> Variant:
        """The engine's prompt is asked for once and stays."""
        engine = bm.load_engine(folder, unet=self.unet)
        if ENGINES[name][0] != "none":
            engine.register_attribution_hook([self.states], lambda maps: None)
        return Variant(name, self.plain(engine), self.error, f"opset {ENGINES[name][1]}")


def testbed(options: argparse.Namespace) -> list[Row]:
    pipe = bm.testbed.pipeline()
    generator = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    folders = {name: exported(pipe, options.engines, name, "testbed") for name in ENGINES}
    for batch in (1, 8):
        latents = torch.randn(batch, 4, 16, 16, generator=generator)
        text = torch.randn(batch, 20, 64, generator=generator)
        calls = Calls(pipe, (latents, torch.tensor(500), text))
        variants = calls.torch()
        if options.compile:
            variants.append(calls.compiled())
        variants += [calls.engine(name, folder) for name, folder in folders.items()]
        workload = f"batch {batch}, latents of 16 x 16, float32"
        rows += measure(f"testbed, batch {batch}", workload, variants, options.rounds)
    return rows


def sd15(options: argparse.Namespace) -> list[Row]:
    """Two groups, as three models at once would not fit into 12 GiB."""
    pipe = build(320)
    pipe.unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 64, 64, generator=generator)
    text = torch.randn(1, 77, 768, generator=generator)
    names = ("onnx 23, no maps", "onnx 23, reduced maps")
    folders = {name: exported(pipe, options.engines, name, "sd15") for name in names}
    calls = Calls(pipe, (latents, torch.tensor(500), text))
    workload = "random weights, batch 1, latents of 64 x 64, float32"
    reduced = calls.engine(names[1], folders[names[1]])
    rows = measure("SD 1.5", workload, [*calls.torch(), reduced], options.rounds)
    plain = calls.engine(names[0], folders[names[0]])
    pipe.unet = calls.unet = None
    gc.collect()
    return rows + measure("SD 1.5, what maps cost", workload, [plain, reduced], options.rounds)


def audit(options: argparse.Namespace) -> None:
    """Writes the IoU table of one audit through torch and through an engine."""
    pipe = bm.testbed.pipeline()
    folder = exported(pipe, options.engines, "onnx, reduced maps", "testbed")
    table: dict[str, Any] = {}
    records = {}
    with tempfile.TemporaryDirectory() as runs:
        for name, used in (("torch", None), ("onnx", str(folder))):
            settings: dict[str, Any] = {"engine": used, "seeds": range(options.seeds)}
            plan = bm.AuditPlan(**settings, save_pictures="none", save_maps="none")
            begun = time.perf_counter()
            result = bm.run_audit(plan, Path(runs) / name)
            table[f"{name}_seconds"] = round(time.perf_counter() - begun, 1)
            records[name] = result.records.to_pylist()
    pairs = list(zip(records["torch"], records["onnx"], strict=True))
    table["images"] = len({(row["semantic"], row["seed"]) for row in records["torch"]})
    table["steps"] = records["torch"][0]["steps"]
    table["greatest_difference_of_a_record"] = max(abs(a["iou"] - b["iou"]) for a, b in pairs)
    means: dict[str, dict[str, float]] = {}
    for name, rows in records.items():
        for row in rows:
            key = f"{row['semantic']} / {row['demographic']}"
            means.setdefault(key, {}).setdefault(name, 0.0)
            means[key][name] += row["iou"] / options.seeds
    table["mean_iou"] = {
        key: {n: round(v, 5) for n, v in each.items()} for key, each in means.items()
    }
    table["greatest_difference_of_a_mean"] = max(
        abs(each["torch"] - each["onnx"]) for each in means.values()
    )
    path = save([], options.out, options.threads, "engines-audit")
    path.write_text(json.dumps({**json.loads(path.read_text()), **table}, indent=1) + "\n")
    print(json.dumps(table, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=("testbed", "sd15", "audit"), default="testbed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--engines", type=Path, help="default a temporary folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=8, help="of the audit")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        if options.engines is None:
            options.engines = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.part == "audit":
            audit(options)
            return
        rows = testbed(options) if options.part == "testbed" else sd15(options)
    show(rows)
    print(f"\n{save(rows, options.out, options.threads, f'engines-{options.part}')}")


if __name__ == "__main__":
    main()
