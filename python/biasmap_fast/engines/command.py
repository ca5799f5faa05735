"""What ``biasmap export`` does once its flags are read."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .onnx import Gradient, check_options, export_unet, sizes
from .shapes import preset_of


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
    """Exports a pipeline's UNet, or says what that would write.

    Args:
        pipe: the pipeline.
        out: folder to write.
        shapes: name of a preset; None for the one of the UNet's own size.
        dtype: of the weights; None for the UNet's.
        maps: as in `export_unet`.
        opset: as in `export_unet`.
        layers: as in `export_unet`.
        gradients: ``"64x64"``, sizes of latents.
        gradient_prompts: most attribution prompts of one image in their graphs.
        convolutions: as in `export_unet`.
        kind: ``"onnx"`` or ``"tensorrt"``.
        verify: as in `export_unet`.
        dry_run: write nothing.
        say: called with a line for every step.

    Returns:
        What was written, as plain values.

    Raises:
        ValueError: a size of latents cannot be read, or an option is unknown.
    """
    preset = shapes or preset_of(pipe.unet)
    chosen = dtype or str(pipe.unet.dtype).removeprefix("torch.")
    graphs = [_gradient(text, pipe, gradient_prompts) for text in gradients]
    if dry_run:
        check_options(kind, chosen, maps, opset, convolutions, graphs)
        found = sizes(pipe, dtype=chosen, shapes=preset)
        files = found["weights"] * (1 + len(graphs))
        return {
            "folder": str(out),
            "shapes": preset,
            "dtype": chosen,
            "files_mib": round(files / 2**20, 1),
            "maps_kib_per_image_and_call": round(found["maps"] / 2**10, 1),
            "probabilities_kib_per_image_and_call": round(found["probabilities"] / 2**10, 1),
        }
    begun = time.perf_counter()

    def step(name: str) -> None:
        if say is not None:
            say(f"{time.perf_counter() - begun:6.1f} s  {name}")

    manifest = export_unet(
        pipe,
        out,
        format=kind,  # type: ignore[arg-type]
        dtype=dtype,
        maps=maps,  # type: ignore[arg-type]
        opset=opset,
        shapes=preset,
        layers=layers,
        gradients=graphs,
        convolutions=convolutions,  # type: ignore[arg-type]
        verify=verify,
        progress=step,
    )
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {
        "folder": str(out),
        "shapes": preset,
        "dtype": manifest.dtype,
        "opset": manifest.graph.opset,
        "files_mib": round(written / 2**20, 1),
        "seconds": round(time.perf_counter() - begun, 1),
        "difference_from_torch": {
            graph.file: {k: v for k, v in graph.parity.items() if k != "shapes"}
            for graph in manifest.files
        },
    }


def _gradient(text: str, pipe: Any, prompts: int) -> Gradient:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(f"--gradient must be HEIGHTxWIDTH of the latents ('64x64'), got {text!r}")
    tokens = pipe.tokenizer.model_max_length
    return Gradient(int(match[1]), int(match[2]), tokens=tokens, prompts=prompts)
