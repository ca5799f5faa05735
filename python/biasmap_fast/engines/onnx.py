"""Writing an engine folder: trace, translate to ONNX, compare with torch, name the folder.

The folder gets its name last, when everything in it has been compared: an export that fails or is
killed leaves none that loads. What a killed one leaves is called ``.NAME.*.partial``.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from .decompositions import table
from .errors import EngineError, ExportError, MissingExtraError, ParityError
from .graph import (
    AttributionGraph,
    Convolutions,
    EnergyGraph,
    Maps,
    attributed_layers,
    prepared,
)
from .manifest import (
    GradientFile,
    GraphFile,
    Manifest,
    config_hash,
    file_hash,
    plain_config,
    sample_hash,
    tensor_bytes,
    weights_hash,
)
from .shapes import PRESETS, Shapes, Tensor, preset_of
from .winograd import winograd

logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16", "bfloat16")
OPSETS = (18, 20, 23, 24)
# Greatest difference over the output's scale; that of a half type is its rounding, accumulated.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Gradient:
    """The sizes and the energy of one gradient graph; shapes are fixed in it.

    Attributes:
        height: of the latents.
        width: of the latents.
        batch: images a run of the graph; more images take several runs.
        tokens: of the text that draws.
        prompts: most attribution prompts of one image.
        attribution_tokens: most tokens of an attribution prompt; shorter ones are padded.
        concepts: most concepts of an attribution prompt.
        fraction: of the soft masks, as in `guide`.
        temperature: of the soft masks, as in `guide`.
    """

    height: int
    width: int
    batch: int = 1
    tokens: int = 77
    prompts: int = 1
    attribution_tokens: int = 16
    concepts: int = 4
    fraction: float = 0.3
    temperature: float = 0.01

    @property
    def sizes(self) -> dict[str, int]:
        """Dimension name -> size."""
        return {name: getattr(self, name) for name in Shapes.__dataclass_fields__}


def export_unet(
    model: Any,
    out: str | Path,
    *,
    format: Literal["onnx", "tensorrt"] = "onnx",  # noqa: A002
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
        format: ``"onnx"``; ``"tensorrt"`` builds a plan from the ONNX file as well, see
            `engines.tensorrt`.
        dtype: type of the weights in the file, ``"float32"``, ``"float16"`` or ``"bfloat16"``,
            with float32 around every softmax and norm; default the UNet's.
        maps: ``"reduced"`` for maps of concepts a block; ``"probabilities"`` for every layer's
            attention probabilities (2000 times the bytes); ``"none"`` for no attribution.
        opset: ONNX operator set; 20 for portability, 23 or 24 for attention and group norm as one
            operator each, where the runtime has them.
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
        MissingExtraError: the extra ``onnx`` is not installed.
        UnsupportedUNetError: the UNet has a part that the graph does not have.
        ExportError: ``out`` exists, or a step failed.
        ParityError: the graph does not compute what torch computes.
        ValueError: an unknown option, or Winograd's convolutions for what they are not for.

    Example:
        >>> import biasmap_fast as bm
        >>> pipe = bm.testbed.pipeline()
        >>> bm.export_unet(pipe, "engines/testbed")  # doctest: +SKIP
        >>> pipe.unet = bm.load_engine("engines/testbed")  # doctest: +SKIP
    """
    unet = getattr(model, "unet", model)
    unet = getattr(unet, "_orig_mod", unet)
    kind = dtype or str(unet.dtype).removeprefix("torch.")
    check_options(format, kind, maps, opset, convolutions, gradients)
    if shapes is None:
        attributed_layers(unet, layers)  # refuses what has no size to choose a preset by
        shapes = preset_of(unet)
    bounds = _bounds(shapes)
    _require_onnx()
    if format == "tensorrt":
        from . import tensorrt

        tensorrt.require()
    target = Path(out)
    say = progress or (lambda step: None)
    chosen = attributed_layers(unet, layers)  # refuses before anything is written
    names = [layer.name for layer in chosen]
    with _new_folder(target) as folder, prepared(unet, getattr(torch, kind)) as made:
        graph = AttributionGraph(made, attributed_layers(made, names), maps).eval()
        bounds = bounds.on_grid(graph.multiple)
        for gradient in gradients:
            if gradient.height % graph.multiple or gradient.width % graph.multiple:
                raise ValueError(
                    f"a gradient's height and width must be multiples of {graph.multiple}, got "
                    f"{gradient.height} x {gradient.width}"
                )
        writer = _Writer(folder, kind, opset, verify, say)
        forward = writer.forward(graph, bounds, convolutions)
        backward = tuple(writer.gradient(graph, each) for each in gradients)
        say("manifest")
        manifest = Manifest(
            dtype=kind,
            maps=maps,
            convolutions=convolutions,
            layers=graph.layers,
            blocks=graph.blocks,
            shapes=bounds,
            config=plain_config(unet),
            config_sha256=config_hash(unet),
            weights_sha256=weights_hash(unet, getattr(torch, kind)),
            graph=forward,
            gradients=backward,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        manifest.write(folder)
        say("name the folder")
    if format == "tensorrt":
        say("build the TensorRT plan")
        tensorrt.build(target)
    return manifest


def sizes(model: Any, *, dtype: str, shapes: Shapes | str, concepts: int = 2) -> dict[str, float]:
    """What an export would write and a run would return, in bytes: nothing is written.

    Args:
        model: a diffusers pipeline, or its UNet.
        dtype: type of the weights in the file.
        shapes: as in `export_unet`.
        concepts: of one attribution prompt.

    Returns:
        ``"weights"``, and per image ``"maps"`` (reduced) and ``"probabilities"`` (of 77 tokens) at
        the best size.
    """
    unet = getattr(model, "unet", model)
    bounds = _bounds(shapes)
    graph = AttributionGraph(unet, attributed_layers(unet, None), "reduced")
    height, width = bounds.height.best, bounds.width.best
    width_of = getattr(torch, dtype).itemsize
    queries = sum(
        layer.heads * -(-height // 2**layer.level) * -(-width // 2**layer.level)
        for layer in graph.layers
    )
    return {
        "weights": sum(p.numel() for p in unet.parameters()) * width_of,
        "maps": len(graph.blocks) * concepts * height * width * 4,
        "probabilities": queries * 77 * 4,
    }


def check_options(
    kind: str, dtype: str, maps: str, opset: int, convolutions: str, gradients: Sequence[Any]
) -> None:
    """Refuses what no export has, before anything is written.

    Raises:
        ValueError: an unknown option, or two that do not go together.
    """
    for name, value, known in (
        ("format", kind, ("onnx", "tensorrt")),
        ("dtype", dtype, DTYPES),
        ("maps", maps, ("reduced", "probabilities", "none")),
        ("opset", opset, OPSETS),
        ("convolutions", convolutions, get_args(Convolutions)),
    ):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {list(known)}, got {value!r}")
    if gradients and maps != "reduced":
        raise ValueError(f"gradient graphs need maps='reduced', got {maps!r}")
    if convolutions == "winograd" and (kind, dtype) != ("onnx", "float32"):
        raise ValueError(
            "convolutions='winograd' is for format='onnx' and dtype='float32', got "
            f"format={kind!r} and dtype={dtype!r}"
        )


def _bounds(shapes: Shapes | str) -> Shapes:
    if isinstance(shapes, Shapes):
        return shapes
    if shapes not in PRESETS:
        raise ValueError(f"`shapes` must be a Shapes or one of {sorted(PRESETS)}, got {shapes!r}")
    return PRESETS[shapes]


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"exporting needs the extra `onnx` ({error}): pip install 'biasmap-fast[onnx]'"
        ) from error


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` if all goes well, and is removed if not."""
    if target.exists():
        raise ExportError(f"{target} exists: give a new folder, or remove it first")
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


class _Writer:
    """Writes and verifies the graphs of one folder."""

    def __init__(
        self, folder: Path, dtype: str, opset: int, verify: bool, say: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._dtype = dtype
        self._opset = opset
        self._verify = verify
        self._say = say

    def forward(
        self, graph: AttributionGraph, bounds: Shapes, convolutions: Convolutions
    ) -> GraphFile:
        """The graph with dynamic shapes."""
        self._say("trace")
        example = example_inputs(graph.inputs, _example_sizes(bounds), self._dtype)
        pixels = bounds.height.best * bounds.width.best
        replaced = winograd(graph.unet, pixels) if convolutions == "winograd" else nullcontext()
        with _step("torch.export of the UNet"), torch.no_grad(), _quiet(), replaced:
            program = torch.export.export(
                graph, example, dynamic_shapes={"given": _dynamic(graph.inputs, bounds)}
            )
        calls = [_example_sizes(bounds), {**_smallest(bounds), "batch": bounds.batch.low}]
        return self._write("unet", program, graph, calls, {})

    def gradient(self, graph: AttributionGraph, sizes: Gradient) -> GradientFile:
        """A graph with the energy's gradient, for fixed shapes."""
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.nn.attention import SDPBackend, sdpa_kernel

        from ..reference import unrolled

        name = f"gradient-{sizes.height}x{sizes.width}"
        self._say(f"trace {name}")
        energy = EnergyGraph(graph, sizes.fraction, sizes.temperature).eval()
        example = example_inputs(energy.inputs, sizes.sizes, self._dtype)
        # The exporter cannot differentiate: the backward pass is traced here, operator by
        # operator, with fake tensors, so that no activation is held. Of the fused attentions' own
        # backward operators ONNX has none.
        with _step("tracing the gradient"), sdpa_kernel([SDPBackend.MATH]), unrolled(), _quiet():
            traced = make_fx(
                lambda *given: energy(*given),
                decomposition_table=table(),
                tracing_mode="fake",
                _allow_non_fake_inputs=True,
            )(*example)
        traced.eval()
        own = {id(p): name for name, p in graph.unet.named_parameters()}
        sources = {name: own[id(p)] for name, p in traced.named_parameters() if id(p) in own}
        with _step("torch.export of the gradient"), torch.no_grad(), _quiet():
            program = torch.export.export(traced, example)
        file = self._write(name, program, energy, [sizes.sizes], sources)
        return GradientFile(file, sizes.sizes, sizes.fraction, sizes.temperature)

    def _write(
        self,
        name: str,
        program: Any,
        graph: AttributionGraph | EnergyGraph,
        calls: Sequence[Mapping[str, int]],
        sources: Mapping[str, str],
    ) -> GraphFile:
        self._say(f"translate {name}")
        with _step(f"translating {name} to ONNX"), _quiet():
            translated = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=self._opset,
                input_names=[each.name for each in graph.inputs],
                output_names=[each.name for each in graph.outputs],
                verbose=False,
            )
        if translated is None:
            raise ExportError(f"translating {name} to ONNX gave nothing")
        _name_dimensions(translated, graph.inputs)
        unet = graph.graph.unet if isinstance(graph, EnergyGraph) else graph.unet
        known = _initializers(translated.model.graph.initializers, unet, sources)
        self._say(f"write {name}")
        path = self._folder / f"{name}.onnx"
        translated.save(path, external_data=True)
        del translated, program
        gc.collect()  # gigabytes, held by cycles
        parity, why = self._compared(path, graph, calls)
        data = path.with_name(path.name + ".data")
        return GraphFile(
            file=path.name,
            sha256=file_hash(path),
            data=data.name if data.exists() else "",
            data_bytes=data.stat().st_size if data.exists() else 0,
            data_sample=sample_hash(data) if data.exists() else "",
            opset=self._opset,
            inputs=graph.inputs,
            outputs=graph.outputs,
            initializers=known,
            parity=parity,
            unverified=why,
        )

    def _compared(
        self, path: Path, graph: AttributionGraph | EnergyGraph, calls: Sequence[Mapping[str, int]]
    ) -> tuple[dict[str, Any], str]:
        if not self._verify:
            return {}, "verification was turned off"
        from .session import Session

        self._say(f"compare {path.stem} with torch")
        session = Session(path, torch.device("cpu"), graph.outputs)
        worst: dict[str, Any] = {}
        for sizes in calls:
            given = example_inputs(graph.inputs, sizes, self._dtype)
            with torch.no_grad():
                expected = graph(*given)
            names = [each.name for each in graph.inputs]
            found = session.run(dict(zip(names, given, strict=True)), sizes)
            for each, right in zip(graph.outputs, expected, strict=True):
                difference = relative(found[each.name], right)
                worst[each.name] = max(difference, worst.get(each.name, 0.0))
        limit = TOLERANCE[self._dtype]
        if wrong := {name: value for name, value in worst.items() if not value <= limit}:
            raise ParityError(
                f"{path.name} differs from torch by {wrong} of the outputs' scale; at most {limit} "
                f"is allowed for {self._dtype}"
            )
        return {**worst, "shapes": [dict(sizes) for sizes in calls]}, ""


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Greatest difference over the greatest magnitude expected."""
    scale = expected.double().abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float((found.double() - expected.double()).abs().max() / scale)


def example_inputs(
    inputs: Sequence[Tensor], sizes: Mapping[str, int], dtype: str, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Random inputs of a graph; the last token of the second prompt, if there is one, is padding.

    Args:
        inputs: the graph's inputs.
        sizes: dimension name -> size.
        dtype: of the engine.
        seed: of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for each in inputs:
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in each.shape]
        if each.name == "timestep":
            value = torch.randint(1, 999, shape, generator=generator).float()
        elif each.name == "attribution_mask":
            value = torch.ones(shape)
            if shape[0] > 1 and shape[1] > 1:
                value[1, -1] = 0.0
        elif each.name == "concept_weights":
            # A token each: of many tokens' sum the map is flat, and its mask's edge is rounding.
            value = torch.zeros(shape)
            for concept in range(shape[1]):
                value[:, concept, (1 + 2 * concept) % shape[2]] = 1.0
        elif each.name == "pair_weights":
            rows = shape[1] * shape[2]
            value = torch.ones(rows, rows).triu(1).reshape(shape)
        else:
            value = torch.randn(shape, generator=generator)
        made.append(value.to(getattr(torch, each.dtype)))
    return tuple(made)


def _dynamic(inputs: Sequence[Tensor], bounds: Shapes) -> tuple[dict[int, Any], ...]:
    dims: dict[str, Any] = {}
    for name, size in bounds.ranges.items():
        if size.low == size.high:
            continue  # a fixed size
        step = size.multiple
        unit = torch.export.Dim(f"_{name}", min=size.low // step, max=size.high // step)
        dims[name] = step * unit if step > 1 else unit
    return tuple(
        {
            place: dims[dim]
            for place, dim in enumerate(each.shape)
            if isinstance(dim, str) and dim in dims
        }
        for each in inputs
    )


def _example_sizes(bounds: Shapes) -> dict[str, int]:
    """Sizes to trace with: at least 2 where they vary, as 0 and 1 are special to the tracer."""
    wanted = {"batch": 3, "tokens": 9, "prompts": 2, "attribution_tokens": 7, "concepts": 2}
    wanted["height"] = 4 * bounds.height.multiple
    wanted["width"] = 6 * bounds.width.multiple
    return {
        name: min(max(wanted[name], size.low), size.high) for name, size in bounds.ranges.items()
    }


def _smallest(bounds: Shapes) -> dict[str, int]:
    return {name: size.low for name, size in bounds.ranges.items()}


def _name_dimensions(translated: Any, inputs: Sequence[Tensor]) -> None:
    names: dict[str, str] = {}
    for value, each in zip(translated.model.graph.inputs, inputs, strict=True):
        for found, dim in zip(value.shape, each.shape, strict=True):
            if isinstance(dim, str) and not isinstance(found, int):
                names[str(found)] = dim
    translated.rename_axes(names)


def _initializers(
    initializers: Mapping[str, Any], unet: torch.nn.Module, sources: Mapping[str, str]
) -> dict[str, tuple[str, bool]]:
    """Initializer -> (name in the UNet's state dict, transposed): by name, else by content."""
    state = unet.state_dict()
    known: dict[str, tuple[str, bool]] = {}
    others: list[str] = []
    for name, value in initializers.items():
        source = sources.get(name, name.removeprefix("unet."))
        if source in state and list(value.shape) == list(state[source].shape):
            known[name] = (source, False)
        else:
            others.append(name)
    by_content: dict[str, tuple[str, bool] | None] = {}
    for name, weight in state.items():
        for turned in (False, True) if weight.ndim == 2 else (False,):
            key = _content(tensor_bytes(weight.T if turned else weight))
            by_content[key] = None if key in by_content else (name, turned)  # not twice alike
    for name in others:
        found = by_content.get(_content(initializers[name].const_value.tobytes()))
        if found is not None:
            known[name] = found
    return known


def _content(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


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
