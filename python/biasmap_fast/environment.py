"""What a measurement ran on: versions, hardware, the compiled part, and a model's identity."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "biasmap-fast",
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "safetensors",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt_rtx_cu13_libs",
)
_EXTRAS = {
    "audit": ("filelock", "jinja2", "matplotlib", "pyarrow", "yaml", "scipy"),
    "cluster": ("ray",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx_bindings",),
}


def describe() -> dict[str, Any]:
    """Versions and hardware as plain values for JSON.

    Returns:
        A dict with the keys ``versions``, ``python``, ``platform``, ``cpu``, ``devices``,
        ``threads``, ``native`` (what the compiled extension says of itself, or why there is none),
        ``backend`` and ``extras``.

    Example:
        >>> sorted(describe())[:3]
        ['backend', 'cpu', 'devices']
    """
    native = _native()
    return {
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "devices": _devices(),
        "threads": torch.get_num_threads(),
        "native": native,
        "backend": _backend(native),
        "extras": {name: _missing(modules) for name, modules in _EXTRAS.items()},
    }


def describe_pipeline(pipe: Any) -> dict[str, Any]:
    """A pipeline's classes, scheduler settings and weights as plain values for JSON.

    Args:
        pipe: a diffusers pipeline.
    """
    scheduler = pipe.scheduler
    return {
        "pipeline": type(pipe).__name__,
        "scheduler": type(scheduler).__name__,
        "scheduler_config": json.loads(json.dumps(dict(scheduler.config), default=str)),
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "device": str(pipe.unet.device),
        "weights_sha256": weights_hash(pipe),
        "engine": _engine(pipe.unet),
    }


def _engine(unet: Any) -> dict[str, Any] | None:
    """What made the engine in a UNet's place, or ``None``."""
    manifest = getattr(unet, "manifest", None)
    if manifest is None:
        return None
    return {
        "folder": str(unet.folder),
        "dtype": manifest.dtype,
        "opset": manifest.graph.opset,
        "created": manifest.created,
        "versions": dict(manifest.versions),
    }


def weights_hash(pipe: Any) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors of a pipeline's networks.

    It identifies the weights as used: after loading, conversion of the type and LoRA. An engine
    holds none, and stands here with the hash of those that it was exported from.

    Args:
        pipe: a diffusers pipeline.
    """
    digest = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        if not isinstance(module, torch.nn.Module):
            continue
        if engine := getattr(module, "weights_sha256", None):
            digest.update(f"{part} engine {engine}\n".encode())
        weights = getattr(module, "_orig_mod", module).state_dict()  # under a compiled one's name
        for name, tensor in sorted(weights.items()):
            digest.update(f"{part}.{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(memoryview(data.numpy()))
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _devices() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _native() -> dict[str, Any]:
    try:
        from . import _C
        from .ops import native_status
    except ImportError as error:
        return {"available": False, "reason": str(error)}
    return {"available": True, **dict(_C.build_info()), "kernels": native_status()}


def _backend(native: dict[str, Any]) -> str:
    forced = os.environ.get("BIASMAP_BACKEND")
    if forced:
        return f"{forced} (BIASMAP_BACKEND)"
    return "native" if native["available"] else "reference"


def _missing(modules: tuple[str, ...]) -> str:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return "installed" if not missing else f"missing {', '.join(missing)}"
