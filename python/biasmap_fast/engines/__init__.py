"""Engines: a UNet with its attribution maps, and with their energy's gradient, outside torch.

`export_unet` writes a folder; `load_engine` makes of it what a pipeline takes for its UNet.
"""

from __future__ import annotations

from .errors import EngineError
from .manifest import Manifest
from .onnx import Gradient, export_unet
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
