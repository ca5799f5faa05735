"""What an engine folder says of itself: ``manifest.json``, and the checks before it is used."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ..files import sha256, sha256_file, write_file
from .errors import EngineError, ManifestError, WrongModelError
from .graph import Convolutions, Layer, Maps
from .shapes import Dtype, Shapes, Tensor

FORMAT = 2
NAME = "manifest.json"
_PACKAGES = ("biasmap-fast", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime")

Library = Literal["tensorrt", "tensorrt-rtx"]
# Names of files in the folder itself: a manifest must not lead out of it.
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class GraphFile:
    """One ONNX file; its weights lie beside it, in ``FILE.data``."""

    __pydantic_config__ = _STRICT
    file: FileName
    sha256: str
    data_sha256: str
    opset: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    # output -> greatest difference from torch over its scale, and "shapes"; {} if not compared
    parity: Mapping[str, Any]

    @property
    def data(self) -> str:
        """Name of the file with the weights."""
        return f"{self.file}.data"


@dataclass(frozen=True)
class GradientFile:
    """A graph with the gradient of the energy, for one set of sizes and soft masks."""

    graph: GraphFile
    sizes: Mapping[str, int]
    fraction: float
    temperature: float


@dataclass(frozen=True)
class PlanFile:
    """A plan that one of the TensorRT libraries has built; no other library or version loads it."""

    __pydantic_config__ = _STRICT
    file: FileName
    sha256: str
    graph: FileName  # it was built from
    library: Library
    version: str
    target: str  # GPU


@dataclass(frozen=True)
class Manifest:
    """Everything known of an engine folder."""

    __pydantic_config__ = _STRICT
    dtype: Dtype
    maps: Maps
    layers: tuple[Layer, ...]
    blocks: tuple[str, ...]  # in the order of the maps
    shapes: Shapes
    config: Mapping[str, Any]  # of the UNet
    config_sha256: str
    weights_sha256: str  # of the UNet's weights in `dtype`
    graph: GraphFile
    created: str  # UTC
    gradients: tuple[GradientFile, ...] = ()
    plans: tuple[PlanFile, ...] = ()
    convolutions: Convolutions = "direct"
    versions: Mapping[str, str | None] = field(
        default_factory=lambda: {name: installed(name) for name in _PACKAGES}
    )
    format: int = FORMAT

    @property
    def graphs(self) -> tuple[GraphFile, ...]:
        """Every graph of the folder."""
        return (self.graph, *(gradient.graph for gradient in self.gradients))

    def gradient(
        self, height: int, width: int, fraction: float, temperature: float
    ) -> GradientFile:
        """The gradient graph for latents of this size and these soft masks."""
        wanted = (height, width, fraction, temperature)
        files = {
            (file.sizes["height"], file.sizes["width"], file.fraction, file.temperature): file
            for file in self.gradients
        }
        if wanted in files:
            return files[wanted]
        text = "{} x {} with fraction {:g} and temperature {:g}"
        raise EngineError(
            f"the engine has no gradient graph for latents of {text.format(*wanted)}; there are: "
            f"{'; '.join(text.format(*key) for key in files) or 'none'}. Export with "
            f"gradients=[Gradient({height}, {width})]"
        )

    def write(self, folder: Path) -> None:
        """Writes ``manifest.json``, the last file of a folder."""
        write_file(folder / NAME, TypeAdapter(Manifest).dump_json(self, indent=1) + b"\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads the manifest of ``folder`` and hashes every file of its graphs.

        Raises:
            ManifestError: no engine, of another format, or a file is missing or was changed.
        """
        path = folder / NAME
        if not path.is_file():
            what = "has no" if folder.is_dir() else "does not exist: no"
            raise ManifestError(f"{folder} {what} {NAME}; write an engine with `biasmap export`")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ManifestError(f"{path} is not valid JSON: {error}") from error
        version = values.get("format") if isinstance(values, dict) else None
        if version != FORMAT:
            raise ManifestError(
                f"{folder} holds an engine of format {version!r}, this version reads {FORMAT}: "
                "export it again"
            )
        try:
            manifest = TypeAdapter(Manifest).validate_python(values)
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            where = ".".join(map(str, wrong["loc"]))
            raise ManifestError(
                f"{path} is damaged at {where or 'the top'} ({wrong['msg']}): export it again"
            ) from error
        if json_hash(manifest.config) != manifest.config_sha256:
            raise ManifestError(f"{path} is damaged: its `config` was changed; export it again")
        for graph in manifest.graphs:
            check_file(folder, graph.file, graph.sha256)
            check_file(folder, graph.data, graph.data_sha256)
        return manifest

    def check_model(self, unet: Any) -> None:
        """Checks that the engine was exported from this very UNet.

        Raises:
            WrongModelError: configuration or weights differ.
        """
        config = plain_config(unet)
        if json_hash(config) != self.config_sha256:
            names = [name for name in sorted(config) if self.config.get(name) != config[name]]
            raise WrongModelError(
                "the engine was exported from a UNet of another configuration; different: "
                f"{', '.join(names)}"
            )
        if weights_hash(unet, getattr(torch, self.dtype)) != self.weights_sha256:
            raise WrongModelError(
                "the engine was exported from a UNet with other weights: export it again, with "
                "the LoRA or checkpoint that is loaded now"
            )


def check_file(folder: Path, name: str, sha256: str) -> None:
    """Raises `ManifestError` if a file is missing or differs in any byte from what was exported."""
    path = folder / name
    if not path.is_file():
        raise ManifestError(f"{folder} lacks {name}, which its manifest names: copy it whole")
    if sha256_file(path) != sha256:
        raise ManifestError(
            f"{path} is not the file that was exported: its SHA-256 differs; copy or export it "
            "again"
        )


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def plain_config(unet: Any) -> dict[str, Any]:
    """The UNet's configuration without what diffusers notes about its origin."""
    items = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(items, default=str))
    return plain


def json_hash(values: Mapping[str, Any]) -> str:
    """SHA-256 of plain values."""
    return sha256(json.dumps(values, sort_keys=True).encode())


def weights_hash(unet: Any, dtype: torch.dtype) -> str:
    """SHA-256 over names, shapes and bytes of the UNet's weights in ``dtype``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(getattr(unet, "_orig_mod", unet).state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
