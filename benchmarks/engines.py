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
from biasmap_fast.engines import EngineUNet
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
# Of each an export of many minutes and 3.4 GB.
AT_SD15 = ("onnx 23, no maps", "onnx 23, reduced maps")


def engine(pipe: Any, folder: Path, name: str, shapes: str) -> EngineUNet:
    maps, opset = ENGINES[name]
    target = folder / f"{shapes}-{maps}-{opset}"
    if not target.exists():
        begun = time.perf_counter()
        bm.export_unet(pipe, target, maps=maps, opset=opset, shapes=shapes)  # type: ignore[arg-type]
        print(f"exported {target} in {time.perf_counter() - begun:.0f} s", flush=True)
    return bm.load_engine(target)


def calls(
    pipe: Any, folder: Path, names: tuple[str, ...], shapes: str, given: tuple[torch.Tensor, ...],
    *, compiled: bool,
) -> list[Variant]:  # fmt: skip
    """The variants of one UNet call; the engines' prompts are asked for once and stay."""
    unet = pipe.unet

    def plain(model: Any) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.no_grad():
                sample: torch.Tensor = model(*given).sample
            return sample

        return run

    def recorded() -> torch.Tensor:
        with bm.attribute(pipe, PROMPT, chunks=1):
            return plain(unet)()

    expected = plain(unet)()

    def error(sample: torch.Tensor) -> float:
        return relative(sample, expected)

    variants = [
        Variant("torch", plain(unet), error, "no maps"),
        Variant("torch, recorder", recorded, error, "2 concepts, 1 prompt"),
    ]
    if compiled:
        variants.append(Variant("torch.compile", plain(torch.compile(unet)), error, "no maps"))
    states = attribution_states(pipe, tokenize_all(PROMPT, pipe))
    for name in names:
        loaded = engine(pipe, folder, name, shapes)
        if ENGINES[name][0] != "none":
            loaded.register_attribution_hook([states], lambda maps: None)
        opset = loaded.manifest.graph.opset
        variants.append(Variant(name, plain(loaded), error, f"opset {opset}"))
    return variants


def testbed(options: argparse.Namespace) -> list[Row]:
    pipe = bm.testbed.pipeline()
    generator = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    for batch in (1, 8):
        given = (
            torch.randn(batch, 4, 16, 16, generator=generator),
            torch.tensor(500),
            torch.randn(batch, 20, 64, generator=generator),
        )
        variants = calls(
            pipe, options.engines, tuple(ENGINES), "testbed", given, compiled=options.compile
        )
        workload = f"testbed, batch {batch}, latents of 16 x 16"
        rows += measure(f"testbed, batch {batch}", workload, variants, options.rounds)
    return rows


def sd15(options: argparse.Namespace) -> list[Row]:
    pipe = build(320)
    pipe.unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    given = (
        torch.randn(1, 4, 64, 64, generator=generator),
        torch.tensor(500),
        torch.randn(1, 77, 768, generator=generator),
    )
    variants = calls(pipe, options.engines, AT_SD15, "sd15", given, compiled=False)
    workload = "SD 1.5, random weights, batch 1, latents of 64 x 64"
    return measure("SD 1.5", workload, variants, options.rounds)


def audit(options: argparse.Namespace) -> None:
    """Writes the IoU table of one audit through torch and through an engine."""
    pipe = bm.testbed.pipeline()
    folder = engine(pipe, options.engines, "onnx, reduced maps", "testbed").folder
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
