"""TensorRT plans of an engine folder: build, cache, run on torch's stream, refit.

Written against the documented API of TensorRT 10 and 11; every name it uses is listed in `API` and
compared with the real bindings of both (tests/data). **Nothing here has been run**: the library
cannot be installed on the machines at hand. What needs no library is tested: profiles, keys,
files, errors.

Precision lives in the ONNX file: networks are strongly typed, by a flag in 10, always in 11.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import DeviceError, EngineError, ExportError, ManifestError, MissingExtraError
from .manifest import GraphFile, Manifest
from .shapes import Shapes, output_shape

# Everything that is used of the library: its classes, their members, and their enums' values.
API = (
    "Builder.build_serialized_network",
    "Builder.create_builder_config",
    "Builder.create_network",
    "Builder.create_optimization_profile",
    "BuilderFlag.REFIT",
    "DataType.BF16",
    "DataType.FLOAT",
    "DataType.HALF",
    "IBuilderConfig.add_optimization_profile",
    "IBuilderConfig.builder_optimization_level",
    "IBuilderConfig.create_timing_cache",
    "IBuilderConfig.get_timing_cache",
    "IBuilderConfig.set_flag",
    "IBuilderConfig.set_memory_pool_limit",
    "IBuilderConfig.set_timing_cache",
    "ICudaEngine.create_execution_context",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.set_input_shape",
    "IExecutionContext.set_tensor_address",
    "IOptimizationProfile.set_shape",
    "ITimingCache.serialize",
    "Logger.WARNING",
    "MemoryPoolType.WORKSPACE",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "OnnxParser.get_error",
    "OnnxParser.num_errors",
    "OnnxParser.parse_from_file",
    "ParserError.desc",
    "Refitter.get_all_weights",
    "Refitter.get_weights_prototype",
    "Refitter.refit_cuda_engine",
    "Refitter.set_named_weights",
    "Runtime.deserialize_cuda_engine",
    "Weights.dtype",
)

# CUDA graphs, and with each its buffers and its share of the plan's memory, kept at a time.
_MOST_GRAPHS = 4


@dataclass(frozen=True)
class Options:
    """What a plan is built with.

    Attributes:
        level: builder optimisation level, 0 to 5.
        refit: let weights be replaced later, at some cost in speed.
        workspace: most bytes of scratch memory; None for the library's own limit.
    """

    level: int = 3
    refit: bool = False
    workspace: int | None = None


def require() -> Any:
    """The module `tensorrt`, with every name that is used here.

    Raises:
        MissingExtraError: it is not installed, or without its libraries.
        EngineError: it is of a version that lacks a name.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:  # the bindings alone fail on their libraries
        raise MissingExtraError(
            f"TensorRT cannot be imported ({' '.join(str(error).split())}): pip install "
            "'biasmap-fast[tensorrt]'; the bindings alone do not suffice"
        ) from error
    missing = [name for name in API if not _has(tensorrt, name)]
    if missing:
        version = getattr(tensorrt, "__version__", "of unknown version")
        raise EngineError(
            f"TensorRT {version} lacks {', '.join(missing)}; expected version 10.8 to 11"
        )
    return tensorrt


def profile(graph: GraphFile, shapes: Shapes) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Least, best and greatest shape of every input with a dimension that varies."""
    found = {}
    for each in graph.inputs:
        if any(isinstance(dim, str) for dim in each.shape):
            found[each.name] = tuple(
                tuple(
                    dim if isinstance(dim, int) else getattr(getattr(shapes, dim), bound)
                    for dim in each.shape
                )
                for bound in ("low", "best", "high")
            )
    return found


def key(
    manifest: Manifest, graph: GraphFile, version: str, gpu: Mapping[str, Any], options: Options
) -> str:
    """SHA-256 over everything that changes a plan.

    Args:
        manifest: the engine folder's.
        graph: the graph that was built.
        version: of TensorRT.
        gpu: name and compute capability, see `device`.
        options: of the build.
    """
    everything = {
        "onnx": graph.sha256,
        "weights": manifest.weights_sha256,
        "profile": profile(graph, manifest.shapes),
        "tensorrt": version,
        "gpu": dict(gpu),
        "options": asdict(options),
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def device(index: int) -> dict[str, Any]:
    """Name and compute capability of a GPU: a plan of another is never loaded.

    Raises:
        DeviceError: there is no such GPU.
    """
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise DeviceError(f"TensorRT needs a CUDA device, got none with the index {index}")
    major, minor = torch.cuda.get_device_capability(index)
    return {"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}"}


def build(folder: str | Path, *, options: Options = Options(), index: int = 0) -> list[Path]:
    """Builds the plans of all of a folder's graphs, unless they are there.

    Plans lie in ``plans/`` of the folder, named by their `key`, beside the timing cache.

    Args:
        folder: what `export_unet` wrote.
        options: of the build.
        index: of the CUDA device.

    Raises:
        MissingExtraError: TensorRT is not installed.
        DeviceError: there is no such GPU.
        ExportError: TensorRT does not take the file.
    """
    trt, path = require(), Path(folder)
    manifest = Manifest.read(path)
    gpu = device(index)
    plans = path / "plans"
    plans.mkdir(exist_ok=True)
    found = []
    for graph in manifest.files:
        target = plans / f"{key(manifest, graph, trt.__version__, gpu, options)}.plan"
        found.append(target)
        if not target.exists():
            timing = plans / f"timing-{trt.__version__}-{gpu['capability']}.cache"
            with torch.cuda.device(index):
                plan = _built(trt, path / graph.file, graph, manifest.shapes, options, timing)
            _write(target, plan)
    return found


def _built(
    trt: Any, path: Path, graph: GraphFile, shapes: Shapes, options: Options, timing: Path
) -> Any:
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)  # 11 ignores it
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        reasons = [parser.get_error(place).desc() for place in range(parser.num_errors)]
        raise ExportError(f"TensorRT {trt.__version__} does not take {path}: {'; '.join(reasons)}")
    config = builder.create_builder_config()
    config.builder_optimization_level = options.level
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    bounds = profile(graph, shapes)
    if bounds:
        limits = builder.create_optimization_profile()
        for name, (low, best, high) in bounds.items():
            limits.set_shape(name, low, best, high)
        config.add_optimization_profile(limits)
    # the name keeps the cache alive until the plan is built
    cache = config.create_timing_cache(timing.read_bytes() if timing.exists() else b"")
    config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT {trt.__version__} could not build {path}; its log says why")
    _write(timing, config.get_timing_cache().serialize())
    return plan


class PlanSession:
    """A plan in the place of `session.Session`, on the caller's CUDA stream.

    The first call of a shape captures a CUDA graph, later ones replay it. Graphs have buffers of
    their own: inputs are copied in and outputs out, on the device.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        graph: GraphFile,
        on: torch.device,
        options: Options = Options(),
    ) -> None:
        if on.type != "cuda":
            raise DeviceError(f"TensorRT engines run on cuda, got {on}")
        self._trt = require()
        self._graph = graph
        self.device = on
        index = on.index or 0
        name = key(manifest, graph, self._trt.__version__, device(index), options)
        path = folder / "plans" / f"{name}.plan"
        if not path.exists():
            raise ManifestError(
                f"{folder} has no plan for this GPU, this TensorRT {self._trt.__version__} and "
                f"{options}: build it with biasmap_fast.engines.tensorrt.build({str(folder)!r})"
            )
        self._logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._runtime = self._trt.Runtime(self._logger)
        with torch.cuda.device(on):
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EngineError(f"TensorRT {self._trt.__version__} cannot load {path}")
        self._captured: dict[tuple[int, ...], _Captured] = {}

    def run(
        self, inputs: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        """One call; as `session.Session.run`."""
        place = tuple(sizes[name] for name in sorted(sizes))
        with torch.cuda.device(self.device):
            captured = self._captured.pop(place, None) or self._capture(inputs, sizes)
            self._captured[place] = captured  # the latest last
            if len(self._captured) > _MOST_GRAPHS:
                del self._captured[next(iter(self._captured))]
            for name, buffer in captured.inputs.items():
                buffer.copy_(inputs[name])
            captured.graph.replay()
            return {name: buffer.clone() for name, buffer in captured.outputs.items()}

    def refit(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replaces the plan's weights, for example after a LoRA was fused.

        Args:
            state: the UNet's ``state_dict()``.

        Raises:
            EngineError: a weight has no place of its own in the plan, or the plan was not built
                with ``refit=True``.
        """
        trt = self._trt
        kinds = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
        }
        known = self._graph.initializers
        if lost := sorted(set(state) - {source for source, _ in known.values()}):
            raise EngineError(
                f"the plan holds these weights in a form that cannot be told from others: {lost}; "
                "export and build it again"
            )
        torch.cuda.synchronize(self.device)  # nothing may run meanwhile
        refitter = trt.Refitter(self._engine, self._logger)
        held = []  # the library reads them in refit_cuda_engine
        for name in refitter.get_all_weights():
            if name not in known:
                continue  # a constant of the graph
            source, turned = known[name]
            prototype = refitter.get_weights_prototype(name)
            weight = state[source].T if turned else state[source]
            value = weight.detach().to("cpu", kinds[prototype.dtype]).contiguous()
            held.append(value)
            given = trt.Weights(prototype.dtype, value.data_ptr(), value.numel())
            if not refitter.set_named_weights(name, given):
                raise EngineError(f"TensorRT does not take new weights for {name}")
        if not refitter.refit_cuda_engine():
            raise EngineError("TensorRT could not refit the plan; its log says why")
        self._captured.clear()

    def _capture(self, inputs: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> _Captured:
        # A context of its own: a graph stays bound to the memory of the context it was captured on.
        context = self._engine.create_execution_context()
        buffers = {
            each.name: inputs[each.name].clone(memory_format=torch.contiguous_format)
            for each in self._graph.inputs
        }
        outputs = {
            each.name: torch.empty(
                output_shape(each, sizes), dtype=getattr(torch, each.dtype), device=self.device
            )
            for each in self._graph.outputs
        }
        for name, buffer in buffers.items():
            if not context.set_input_shape(name, tuple(buffer.shape)):
                raise EngineError(f"the plan does not take `{name}` of {list(buffer.shape)}")
        for name, buffer in (buffers | outputs).items():
            context.set_tensor_address(name, buffer.data_ptr())
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # what the first run sets up must not be captured
            self._enqueue(context)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._enqueue(context)
        return _Captured(context, graph, buffers, outputs)

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise EngineError("TensorRT could not run the plan; its log says why")


@dataclass(frozen=True)
class _Captured:
    """A CUDA graph of one shape, and what it reads and writes."""

    context: Any
    graph: Any
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


def _has(module: Any, name: str) -> bool:
    owner, _, member = name.partition(".")
    return hasattr(getattr(module, owner, None), member)


def _write(path: Path, data: Any) -> None:
    """Writes a file, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(memoryview(data))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
