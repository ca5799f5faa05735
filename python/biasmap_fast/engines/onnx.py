"""Writing an engine folder: trace, translate to ONNX, compare with torch, name the folder.

The folder gets its name last, when everything in it has been compared and built: an export that
fails or is killed leaves none that loads. What a killed one leaves is called ``.NAME.*.partial``.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..files import sha256_file
from .errors import EngineError, ExportError, ParityError
from .gradient import EnergyGraph, Gradient, fold, traced
from .graph import (
    AttributionGraph,
    Convolutions,
    Maps,
    attributed_layers,
    check_plain,
    prepared,
)
from .manifest import (
    GradientFile,
    GraphFile,
    Manifest,
    json_hash,
    plain_config,
    weights_hash,
)
from .session import OnnxSession, require_exporter
from .shapes import PRESETS, Dtype, Shapes, Tensor, preset_of
from .tensorrt import build, require, target_of
from .winograd import use_winograd

Format = Literal["onnx", "tensorrt", "tensorrt-rtx"]

OPSETS = (18, 20, 23, 24)
# Greatest difference over the output's scale; of a half type its rounding, accumulated.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def export_unet(
    model: Any,
    out: str | Path,
    *,
    format: Format = "onnx",  # noqa: A002
    dtype: str | None = None,
    maps: Maps = "reduced",
    opset: int = 20,
    shapes: Shapes | str | None = None,
    layers: Sequence[str] | None = None,
    gradients: Sequence[Gradient] = (),
    convolutions: Convolutions = "direct",
    verify: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Writes a UNet with its attribution maps as an engine folder for `load_engine`.

    Args:
        model: a diffusers pipeline, or its UNet.
        out: the folder to write; must not exist.
        format: ``"onnx"``; ``"tensorrt"`` and ``"tensorrt-rtx"`` build plans of the ONNX files as
            well, the first for the GPU of this machine, the second without a GPU.
        dtype: type of the weights in the file, ``"float32"``, ``"float16"`` or ``"bfloat16"``,
            with float32 around every softmax and norm; default the UNet's.
        maps: ``"reduced"`` for maps of concepts per block; ``"probabilities"`` for the attention
            probabilities of every layer (300 times the bytes); ``"none"`` for no attribution.
        opset: ONNX operator set; 20 for portability, 23 or 24 for attention and group norm as one
            operator each, if the runtime has them.
        shapes: bounds of every dimension, or the name of one of the `PRESETS`; default the preset
            for the UNet's own size.
        layers: as in `attribute`.
        gradients: shapes of gradient graphs, which `guide` needs; each holds the weights again.
        convolutions: ``"winograd"`` for 3 x 3 convolutions in fewer products, see
            `engines.winograd`: for ONNX Runtime on a CPU, float32. Gradient graphs keep
            ``"direct"`` ones.
        verify: compare every graph with torch on ONNX Runtime before the folder gets its name.
        progress: called with the name of each step before it begins.

    Returns:
        The folder's manifest.

    Raises:
        MissingExtraError: an extra that the export needs is not installed.
        UnsupportedUNetError: the UNet has a part that the graph does not have.
        ExportError: ``out`` exists, or a step failed.
        ParityError: the graph does not compute what torch computes.
        ValueError: an unknown option, or two that do not go together.

    Example:
        >>> import biasmap_fast as bm
        >>> pipe = bm.testbed.pipeline()
        >>> bm.export_unet(pipe, "engines/testbed")  # doctest: +SKIP
        >>> pipe.unet = bm.load_engine("engines/testbed")  # doctest: +SKIP
    """
    export = Export(
        model, Path(out), format, dtype, maps, opset, shapes, layers, gradients, convolutions
    )
    return export.write(verify, progress or (lambda step: None))


@dataclass
class Export:
    """A checked export of which nothing is written yet; arguments and errors of `export_unet`."""

    model: Any
    out: Path
    format: Format = "onnx"
    dtype: Any = None
    maps: Maps = "reduced"
    opset: int = 20
    shapes: Any = None
    layers: Sequence[str] | None = None
    gradients: Sequence[Gradient] = ()
    convolutions: Convolutions = "direct"

    def __post_init__(self) -> None:
        unet = getattr(self.model, "unet", self.model)
        self.unet = unet = getattr(unet, "_orig_mod", unet)
        self.dtype = self.dtype or str(unet.dtype).removeprefix("torch.")
        for name, known in (
            ("format", get_args(Format)),
            ("dtype", get_args(Dtype)),
            ("maps", get_args(Maps)),
            ("opset", OPSETS),
            ("convolutions", get_args(Convolutions)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` must be one of {list(known)}, got {getattr(self, name)!r}"
                )
        if self.gradients and self.maps != "reduced":
            raise ValueError(f"gradient graphs need maps='reduced', got {self.maps!r}")
        if self.convolutions == "winograd" and (self.format, self.dtype) != ("onnx", "float32"):
            raise ValueError(
                "convolutions='winograd' is for format='onnx' and dtype='float32', got "
                f"format={self.format!r} and dtype={self.dtype!r}"
            )
        if self.out.exists():
            raise ExportError(f"{self.out} exists: give a new folder, or remove it first")
        require_exporter()
        if self.format != "onnx":
            require(self.format)
            target_of(self.format, None)
        graph = AttributionGraph(unet, attributed_layers(unet, self.layers), self.maps)
        self.layers = [layer.name for layer in graph.layers]
        self.preset = self.shapes
        if self.shapes is None:
            self.preset = preset_of(unet)
        if isinstance(self.preset, str) and self.preset in PRESETS:
            self.shapes = PRESETS[self.preset]
        if not isinstance(self.shapes, Shapes):
            raise ValueError(
                f"`shapes` must be a Shapes or one of {sorted(PRESETS)}, got {self.shapes!r}"
            )
        self.shapes = self.shapes.on_grid(graph.multiple)
        for gradient in self.gradients:
            if gradient.height % graph.multiple or gradient.width % graph.multiple:
                raise ValueError(
                    f"a gradient's height and width must be multiples of {graph.multiple}, got "
                    f"{gradient.height} x {gradient.width}"
                )
        # TensorRT-RTX has no kernel for opset 23's Attention.
        self.plain = self.dtype != "float32" or self.format == "tensorrt-rtx"
        if self.plain or self.gradients:
            for module in unet.modules():
                if hasattr(module, "set_processor"):
                    check_plain(module)

    def sizes(self) -> dict[str, float]:
        """Bytes of the folder without plans, and per image and call of maps and probabilities."""
        graph = AttributionGraph(self.unet, attributed_layers(self.unet, self.layers), "reduced")
        pixels = self.shapes.height.best * self.shapes.width.best
        queries = sum(layer.heads * pixels // 4**layer.level for layer in graph.layers)
        weights = sum(p.numel() for p in self.unet.parameters())
        weights *= getattr(torch, self.dtype).itemsize
        # Operators take about so many bytes per module, measured on the embedded model.
        modules = sum(not list(module.children()) for module in self.unet.modules())
        count = len(self.gradients)
        return {
            "folder": weights * (1 + count) + modules * (1100 + 4900 * count),
            "maps": len(graph.blocks) * 2 * pixels * 4,
            "probabilities": queries * 77 * 4,
        }

    def write(self, verify: bool, say: Callable[[str], None]) -> Manifest:
        """Writes the folder, and calls ``say`` with the name of each step."""
        kind = getattr(torch, self.dtype)
        with _new_folder(self.out) as folder:
            unet = prepared(self.unet, kind, plain=self.plain)
            graph = self._graph(unet)
            say("trace")
            fast = graph
            if self.convolutions == "winograd":  # what is compared with keeps direct ones
                pixels = self.shapes.height.best * self.shapes.width.best
                fast = self._graph(use_winograd(prepared(unet, kind, plain=False), pixels))
            program = self._program(fast)
            best = _example_sizes(self.shapes)
            smallest = {name: size.low for name, size in self.shapes.ranges.items()}
            path = folder / "unet.onnx"
            forward = self._file(path, program, graph, [best, smallest], verify, say)
            del program, fast
            if self.gradients and not self.plain:
                graph = self._graph(prepared(unet, kind, plain=True))
            backward = tuple(
                self._gradient(gradient, graph, folder, verify, say) for gradient in self.gradients
            )
            say("manifest")
            manifest = Manifest(
                dtype=self.dtype,
                maps=self.maps,
                convolutions=self.convolutions,
                layers=graph.layers,
                blocks=graph.blocks,
                shapes=self.shapes,
                config=plain_config(self.unet),
                config_sha256=json_hash(plain_config(self.unet)),
                weights_sha256=weights_hash(self.unet, kind),
                graph=forward,
                gradients=backward,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            manifest.write(folder)
            if self.format != "onnx":
                say(f"build plans for {self.format}")
                manifest = build(folder, self.format)
            say("name the folder")
        return manifest

    def _graph(self, unet: Any) -> AttributionGraph:
        return AttributionGraph(unet, attributed_layers(unet, self.layers), self.maps).eval()

    def _program(self, graph: AttributionGraph) -> Any:
        example = example_inputs(graph.inputs, _example_sizes(self.shapes))
        dims: dict[str, Any] = {}
        for name, size in self.shapes.ranges.items():
            if size.low < size.high:
                step = size.multiple
                unit = torch.export.Dim(f"_{name}", min=size.low // step, max=size.high // step)
                dims[name] = step * unit if step > 1 else unit
        dynamic = tuple(
            {index: dims[dim] for index, dim in enumerate(tensor.shape) if dim in dims}
            for tensor in graph.inputs
        )
        with _step("torch.export of the UNet"), torch.no_grad(), _quiet():
            return torch.export.export(graph, example, dynamic_shapes={"given": dynamic})

    def _gradient(
        self,
        gradient: Gradient,
        graph: AttributionGraph,
        folder: Path,
        compare: bool,
        say: Callable[[str], None],
    ) -> GradientFile:
        name = f"gradient-{gradient.height}x{gradient.width}"
        say(f"trace {name}")
        energy = EnergyGraph(graph, gradient.fraction, gradient.temperature).eval()
        example = example_inputs(energy.inputs, gradient.sizes)
        with _step("tracing the gradient"), _quiet():
            module = traced(energy, example)
        with _step("torch.export of the gradient"), torch.no_grad(), _quiet():
            program = torch.export.export(module, example)
        path = folder / f"{name}.onnx"
        file = self._file(path, program, energy, [gradient.sizes], compare, say)
        return GradientFile(file, gradient.sizes, gradient.fraction, gradient.temperature)

    def _file(
        self,
        path: Path,
        program: Any,
        graph: AttributionGraph | EnergyGraph,
        calls: Sequence[Mapping[str, int]],
        compare: bool,
        say: Callable[[str], None],
    ) -> GraphFile:
        """Translates, writes and compares a graph."""
        name = path.stem
        say(f"translate {name}")
        with _step(f"translating {name} to ONNX"), _quiet():
            translated = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=self.opset,
                input_names=[tensor.name for tensor in graph.inputs],
                output_names=[tensor.name for tensor in graph.outputs],
                verbose=False,
                optimize=isinstance(graph, AttributionGraph),
            )
        if translated is None:
            raise ExportError(f"translating {name} to ONNX gave nothing")
        if isinstance(graph, EnergyGraph):
            fold(translated.model)
        _tidy(translated, graph.inputs)
        say(f"write {name}")
        translated.save(path, external_data=True)
        del translated, program
        gc.collect()  # gigabytes, held by cycles
        parity: dict[str, Any] = {}
        if compare:
            say(f"compare {name} with torch")
            parity = {**self._parity(path, graph, calls), "shapes": [dict(s) for s in calls]}
        return GraphFile(
            file=path.name,
            sha256=sha256_file(path),
            data_sha256=sha256_file(path.with_name(f"{path.name}.data")),
            opset=self.opset,
            inputs=graph.inputs,
            outputs=graph.outputs,
            parity=parity,
        )

    def _parity(
        self, path: Path, graph: AttributionGraph | EnergyGraph, calls: Sequence[Mapping[str, int]]
    ) -> dict[str, float]:
        session = OnnxSession(path, torch.device("cpu"), graph.outputs)
        names = [tensor.name for tensor in graph.inputs]
        worst = dict.fromkeys((tensor.name for tensor in graph.outputs), 0.0)
        for sizes in calls:
            inputs = example_inputs(graph.inputs, sizes)
            with torch.no_grad():
                expected = graph(*inputs)
            outputs = session.run(dict(zip(names, inputs, strict=True)), sizes)
            for name, right in zip(worst, expected, strict=True):
                difference = relative(outputs[name], right)
                worst[name] = float(torch.tensor([worst[name], difference]).max())  # keeps NaN
        limit = TOLERANCE[self.dtype]
        if wrong := {name: value for name, value in worst.items() if not value <= limit}:
            raise ParityError(
                f"{path.name} differs from torch by {wrong} of the outputs' scale; at most {limit} "
                f"is allowed for {self.dtype}"
            )
        return worst


def relative(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Greatest difference over the greatest magnitude expected."""
    scale = expected.double().abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float((values.double() - expected.double()).abs().max() / scale)


def example_inputs(
    inputs: Sequence[Tensor], sizes: Mapping[str, int], seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Random inputs of a graph; the last token of a second prompt is padding."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for tensor in inputs:
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in tensor.shape]
        if tensor.name == "timestep":
            value = torch.randint(1, 999, shape, generator=generator).float()
        elif tensor.name == "attribution_mask":
            value = torch.ones(shape)
            if shape[0] > 1 and shape[1] > 1:
                value[1, -1] = 0.0
        elif tensor.name == "concept_weights":
            # One token each: the map of many tokens is flat, and the edge of its mask rounding.
            value = torch.zeros(shape)
            for concept in range(shape[1]):
                value[:, concept, (1 + 2 * concept) % shape[2]] = 1.0
        elif tensor.name == "pair_weights":
            rows = shape[1] * shape[2]
            value = torch.ones(rows, rows).triu(1).reshape(shape)
        else:
            value = torch.randn(shape, generator=generator)
        values.append(value.to(getattr(torch, tensor.dtype)))
    return tuple(values)


def _example_sizes(bounds: Shapes) -> dict[str, int]:
    """Sizes to trace with: at least 2 if they vary, as 0 and 1 are special to the tracer."""
    wanted = {"batch": 3, "tokens": 9, "prompts": 2, "attribution_tokens": 7, "concepts": 2}
    wanted["height"] = 4 * bounds.height.multiple
    wanted["width"] = 6 * bounds.width.multiple
    return {
        name: min(max(wanted[name], size.low), size.high) for name, size in bounds.ranges.items()
    }


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` if all goes well, and is removed if not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        folder.chmod(0o755)
        yield folder
        for path in folder.iterdir():  # a power cut must not leave the name without the content
            with path.open("rb") as file:
                os.fsync(file.fileno())
        folder.rename(target)
    except EngineError:
        raise
    except OSError as error:
        raise ExportError(f"the engine cannot be written to {target.parent}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tidy(translated: Any, inputs: Sequence[Tensor]) -> None:
    """Names the dimensions, and removes the stack traces of this machine from every node."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    names: dict[str, str] = {}
    for value, tensor in zip(translated.model.graph.inputs, inputs, strict=True):
        for symbol, dim in zip(value.shape, tensor.shape, strict=True):
            if isinstance(dim, str) and not isinstance(symbol, int):
                names[str(symbol)] = dim
    translated.rename_axes(names)
    ClearMetadataAndDocStringPass()(translated.model)


@contextmanager
def _step(what: str) -> Iterator[None]:
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise ExportError(
            f"{what} failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch 2.13's exporter says of itself, and of torchvision, which is not used."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
            warnings.filterwarnings("ignore", ".*axis name.*will not be used", UserWarning)
            yield
    finally:
        registration.setLevel(before)
