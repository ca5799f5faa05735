"""Engines: a UNet with its attribution maps, and with the gradient of their energy, outside torch.

`export_unet` writes a folder; `load_engine` loads it as the UNet of a pipeline.
"""

from __future__ import annotations

from .errors import EngineError
from .gradient import Gradient
from .manifest import Manifest
from .onnx import export_unet
from .runtime import EngineUNet, load_engine
from .shapes import PRESETS, Range, Shapes

__all__ = [
    "PRESETS",
    "EngineError",
    "EngineUNet",
    "Gradient",
    "Manifest",
    "Range",
    "Shapes",
    "export_unet",
    "load_engine",
]
