"""What ``biasmap export`` does once its options are read."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .gradient import Gradient
from .onnx import Export


def run_export(
    pipe: Any,
    out: Path,
    *,
    shapes: str | None,
    dtype: str | None,
    maps: str,
    opset: int,
    layers: Sequence[str] | None,
    gradients: Sequence[str],
    gradient_prompts: int,
    convolutions: str,
    kind: str,
    verify: bool,
    dry_run: bool,
    say: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Exports a pipeline's UNet, or checks everything and returns what that would write.

    Options as in `export_unet`; ``gradients`` are sizes of latents, ``"64x64"``, and
    ``gradient_prompts`` the most attribution prompts per image in their graphs. ``say`` is called
    with a line per step.
    """
    graphs = tuple(_gradient(text, pipe, gradient_prompts) for text in gradients)
    export = Export(pipe, out, kind, dtype, maps, opset, shapes, layers, graphs, convolutions)  # type: ignore[arg-type]
    written: dict[str, Any] = {"folder": str(out), "shapes": export.preset, "dtype": export.dtype}
    if dry_run:
        sizes = export.sizes()
        written["files_mib"] = round(sizes["folder"] / 2**20, 1)
        if kind != "onnx":
            written["plans_mib"] = "known when they are built"
        written["maps_kib_per_image_and_call"] = round(sizes["maps"] / 2**10, 1)
        written["probabilities_kib_per_image_and_call"] = round(sizes["probabilities"] / 2**10, 1)
        return written
    begun = time.perf_counter()

    def step(name: str) -> None:
        if say is not None:
            say(f"{time.perf_counter() - begun:6.1f} s  {name}")

    manifest = export.write(verify, step)
    files = sum(path.stat().st_size for path in out.iterdir())
    return written | {
        "opset": manifest.graph.opset,
        "files_mib": round(files / 2**20, 1),
        "plans": [plan.file for plan in manifest.plans],
        "seconds": round(time.perf_counter() - begun, 1),
        "difference_from_torch": {
            graph.file: {k: v for k, v in graph.parity.items() if k != "shapes"}
            for graph in manifest.graphs
        },
    }


def _gradient(text: str, pipe: Any, prompts: int) -> Gradient:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(f"--gradient must be HEIGHTxWIDTH of the latents ('64x64'), got {text!r}")
    tokens = pipe.tokenizer.model_max_length
    return Gradient(int(match[1]), int(match[2]), tokens=tokens, prompts=prompts)
