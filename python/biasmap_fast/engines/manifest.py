"""What an engine folder says of itself: ``manifest.json``, and the checks before it is used."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import ManifestError, WrongModelError
from .graph import Convolutions, Layer, Maps
from .shapes import Shapes, Tensor

FORMAT = 1
NAME = "manifest.json"
_PACKAGES = ("biasmap-fast", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class GraphFile:
    """One ONNX file and its external data.

    Attributes:
        file: name in the engine's folder.
        sha256: of that file; the weights' bytes are not in it.
        data: name of the file with the weights; empty where all of them are in ``file``.
        data_bytes: its size.
        data_sample: SHA-256 over blocks spread evenly over it: that of another model differs, and
            gigabytes need not be read.
        opset: ONNX operator set.
        inputs: the graph's inputs, in order.
        outputs: the graph's outputs, in order.
        initializers: initializer -> (name in the UNet's state dict, whether transposed); weights
            that the exporter computed from several are missing.
        parity: output -> greatest difference from torch over the scale of the output, and
            ``"shapes"``; empty where it was not verified.
        unverified: why not.
    """

    file: str
    sha256: str
    data: str
    data_bytes: int
    data_sample: str
    opset: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    initializers: Mapping[str, tuple[str, bool]]
    parity: Mapping[str, Any]
    unverified: str = ""


@dataclass(frozen=True)
class GradientFile:
    """A gradient graph: one file a shape.

    Attributes:
        graph: its file.
        sizes: dimension name -> size.
        fraction: of the soft masks.
        temperature: of the soft masks.
    """

    graph: GraphFile
    sizes: Mapping[str, int]
    fraction: float
    temperature: float


@dataclass(frozen=True)
class Manifest:
    """Everything known of an engine folder.

    Attributes:
        dtype: type of weights and images inside, as torch names it.
        maps: what the graph gives beside the noise prediction.
        layers: the attributed layers.
        blocks: the order of the blocks in ``maps``.
        shapes: bounds of every dimension.
        config: the UNet's configuration.
        config_sha256: of the configuration.
        weights_sha256: of the weights in ``dtype``.
        graph: the forward graph.
        gradients: gradient graphs, one a shape.
        convolutions: how the forward graph computes those of 3 x 3.
        versions: of the libraries that exported.
        created: UTC time.
        format: of this file.
    """

    dtype: str
    maps: Maps
    layers: tuple[Layer, ...]
    blocks: tuple[str, ...]
    shapes: Shapes
    config: Mapping[str, Any]
    config_sha256: str
    weights_sha256: str
    graph: GraphFile
    created: str
    gradients: tuple[GradientFile, ...] = ()
    convolutions: Convolutions = "direct"
    versions: Mapping[str, str | None] = field(default_factory=lambda: library_versions())
    format: int = FORMAT

    @property
    def files(self) -> tuple[GraphFile, ...]:
        """Every graph of the folder."""
        return (self.graph, *(gradient.graph for gradient in self.gradients))

    def write(self, folder: Path) -> None:
        """Writes ``manifest.json``: the last file of a folder."""
        values = asdict(self)
        values["shapes"] = self.shapes.to_json()
        text = json.dumps(values, indent=1) + "\n"
        (folder / NAME).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads the manifest of ``folder`` and checks that its files are there and whole.

        Raises:
            ManifestError: no engine, of another format version, or a file is missing or changed.
        """
        values = _read_json(folder)
        if values.get("format") != FORMAT:
            raise ManifestError(
                f"{folder} holds an engine of format {values.get('format')!r}, this version reads "
                f"{FORMAT}: export it again"
            )
        try:
            manifest = _from_json(values)
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"{folder / NAME} is damaged: {error!r}") from error
        for graph in manifest.files:
            _check_file(folder, graph)
        return manifest

    def check_model(self, unet: Any) -> None:
        """Checks that the engine was exported from this very UNet.

        Raises:
            WrongModelError: configuration or weights differ.
        """
        if config_hash(unet) != self.config_sha256:
            names = [
                name
                for name, value in sorted(plain_config(unet).items())
                if self.config.get(name) != value
            ]
            raise WrongModelError(
                "the engine was exported from a UNet of another configuration; different: "
                f"{', '.join(names)}"
            )
        if weights_hash(unet, getattr(torch, self.dtype)) != self.weights_sha256:
            raise WrongModelError(
                "the engine was exported from a UNet with other weights: export it again, with "
                "the LoRA or checkpoint that is loaded now"
            )


def library_versions() -> dict[str, str | None]:
    """Versions of the libraries that take part in an export."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def plain_config(unet: Any) -> dict[str, Any]:
    """The UNet's configuration without what diffusers notes about its origin."""
    items = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(items, default=str))
    return plain


def config_hash(unet: Any) -> str:
    """SHA-256 of `plain_config`."""
    text = json.dumps(plain_config(unet), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def weights_hash(unet: Any, dtype: torch.dtype) -> str:
    """SHA-256 over names, shapes and bytes of the UNet's weights in ``dtype``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(getattr(unet, "_orig_mod", unet).state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor.to(dtype)))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor, row-major."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample_hash(path: Path, blocks: int = 64, size: int = 1 << 16) -> str:
    """SHA-256 over evenly spread blocks of a file, its end among them."""
    digest = hashlib.sha256()
    last = max(path.stat().st_size - size, 0)
    with path.open("rb") as file:
        for block in range(blocks):
            file.seek(last * block // (blocks - 1))
            digest.update(file.read(size))
    return digest.hexdigest()


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    if not path.is_file():
        what = "has no" if folder.is_dir() else "does not exist: no"
        raise ManifestError(f"{folder} {what} {NAME}; write an engine with `biasmap export`")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ManifestError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ManifestError(f"{path} must hold a mapping, got {type(values).__name__}")
    return values


def _from_json(values: dict[str, Any]) -> Manifest:
    given = dict(values)
    given["shapes"] = Shapes.from_json(given["shapes"])
    given["layers"] = tuple(Layer(**layer) for layer in given["layers"])
    given["blocks"] = tuple(given["blocks"])
    given["graph"] = _graph_from_json(given["graph"])
    given["gradients"] = tuple(
        GradientFile(**{**each, "graph": _graph_from_json(each["graph"])})
        for each in given["gradients"]
    )
    return Manifest(**given)


def _graph_from_json(values: dict[str, Any]) -> GraphFile:
    given = dict(values)
    given["inputs"] = tuple(Tensor.from_json(each) for each in given["inputs"])
    given["outputs"] = tuple(Tensor.from_json(each) for each in given["outputs"])
    given["initializers"] = {
        name: (source, bool(turned)) for name, (source, turned) in given["initializers"].items()
    }
    return GraphFile(**given)


def _check_file(folder: Path, graph: GraphFile) -> None:
    path = folder / graph.file
    if not path.is_file():
        raise ManifestError(f"{folder} lacks {graph.file}, which its manifest names")
    if file_hash(path) != graph.sha256:
        raise ManifestError(f"{path} is not the file that was exported: its SHA-256 differs")
    if not graph.data:
        return
    data = folder / graph.data
    if not data.is_file():
        raise ManifestError(f"{folder} lacks {graph.data}, the weights of {graph.file}")
    if data.stat().st_size != graph.data_bytes:
        raise ManifestError(
            f"{data} must have {graph.data_bytes} bytes, got {data.stat().st_size}: it was not "
            "copied whole"
        )
    if sample_hash(data) != graph.data_sample:
        raise ManifestError(f"{data} does not hold the weights that were exported")
