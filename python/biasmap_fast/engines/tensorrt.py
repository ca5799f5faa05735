"""TensorRT 10 and 11, and TensorRT for RTX: plans of an engine folder, built and run.

Both libraries have the same names; what differs between them is in `LIBRARIES`. Plans of
TensorRT-RTX are built without a GPU, and tests build one of every graph; plans of TensorRT need
the GPU they are for. **No plan has been run**: no GPU of either kind was at hand.

Precision lies in the ONNX file: networks are strongly typed, by a flag in version 10, always later.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..files import sha256_file, write_file, writing
from .errors import DeviceError, EngineError, ExportError, ManifestError, MissingExtraError
from .manifest import GraphFile, Library, Manifest, PlanFile, check_file
from .session import empty_outputs
from .shapes import Shapes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traits:
    """What differs between the libraries."""

    module: str
    versions: tuple[tuple[int, ...], tuple[int, ...]]  # from, up to but not
    # Built without a GPU, for every GPU the library takes; kernels are compiled at the first run,
    # into a cache. Plans of the other library belong to one model of GPU.
    portable: bool = False
    capabilities: tuple[str, str] = ("any", r".*")  # in words, and as a pattern


LIBRARIES: dict[Library, Traits] = {
    "tensorrt": Traits("tensorrt", ((10, 8), (12,))),
    # It imports its libraries itself; the meta package `tensorrt-rtx` has the same module.
    "tensorrt-rtx": Traits(
        "tensorrt_rtx_bindings",
        ((1, 7), (2,)),
        portable=True,
        capabilities=("8.0, 8.6, 8.9, 12.0 and later", r"8\.[069]|1[2-9]\.\d"),
    ),
}


def require(library: Library) -> Any:
    """The library's module.

    Raises:
        MissingExtraError: it is not installed, or without its libraries.
        EngineError: it is of another version than this code was written for.
    """
    traits = LIBRARIES[library]
    try:
        module = importlib.import_module(traits.module)
    except (ImportError, OSError) as error:  # the bindings alone fail on their libraries
        raise MissingExtraError(
            f"{traits.module} cannot be imported ({' '.join(str(error).split())}): pip install "
            f"'biasmap-fast[{library}]'; the bindings alone do not suffice"
        ) from error
    least, above = traits.versions
    if not least <= tuple(int(part) for part in module.__version__.split(".")[:2]) < above:
        raise EngineError(
            f"expected {library} from {'.'.join(map(str, least))} up to {above[0]}.0, got "
            f"{module.__version__}: pip install --upgrade 'biasmap-fast[{library}]'"
        )
    return module


def target_of(library: Library, index: int | None) -> str:
    """The GPU that plans are for, with the index that builds or runs; portable plans need none.

    Raises:
        DeviceError: there is no such GPU, or the library does not take it.
    """
    traits = LIBRARIES[library]
    words, pattern = traits.capabilities
    if index is None and traits.portable:
        return words
    index = index or 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise DeviceError(f"{library} needs a CUDA device, got none with the index {index}")
    capability = "{}.{}".format(*torch.cuda.get_device_capability(index))
    name = torch.cuda.get_device_name(index)
    if not re.fullmatch(pattern, capability):
        raise DeviceError(
            f"{library} runs on compute capability {words}, got {capability} ({name}): use "
            "backend='onnxruntime' or 'tensorrt'"
        )
    return words if traits.portable else f"{name}, {capability}"


def profile(graph: GraphFile, shapes: Shapes) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Least, best and greatest shape of every input with a dimension that varies."""
    return {
        tensor.name: tuple(
            tuple(
                dim if isinstance(dim, int) else getattr(shapes.ranges[dim], bound)
                for dim in tensor.shape
            )
            for bound in ("low", "best", "high")
        )
        for tensor in graph.inputs
        if any(isinstance(dim, str) for dim in tensor.shape)
    }


def build(folder: str | Path, library: Library = "tensorrt", *, index: int = 0) -> Manifest:
    """Builds the plans of all graphs of an engine folder and names them in its manifest.

    Args:
        folder: what `export_unet` wrote.
        library: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        index: of the CUDA device that TensorRT builds for; TensorRT-RTX needs none.

    Raises:
        MissingExtraError: the library is not installed.
        DeviceError: there is no such GPU.
        ExportError: the library does not take a graph; the message has its node and reason.
    """
    trt, path = require(library), Path(folder)
    target = target_of(library, None if LIBRARIES[library].portable else index)
    manifest = Manifest.read(path)
    label = re.sub(r"\W+", "-", f"{library} {trt.__version__} {target}").strip("-")
    if LIBRARIES[library].portable:
        label = f"{library}-{trt.__version__}"
    plans = []
    fixed = {gradient.graph.file: gradient.sizes for gradient in manifest.gradients}
    for graph in manifest.graphs:
        file = f"{Path(graph.file).stem}.{label}.plan"
        bounds = None if graph.file in fixed else profile(graph, manifest.shapes)
        with writing(path / file) as partial:
            partial.write_bytes(memoryview(_built(trt, path / graph.file, bounds)))
        sha256 = sha256_file(path / file)
        plans.append(PlanFile(file, sha256, graph.file, library, trt.__version__, target))
    kept = [plan for plan in manifest.plans if plan.file not in {new.file for new in plans}]
    manifest = replace(manifest, plans=(*kept, *plans))
    manifest.write(path)
    return manifest


def _built(trt: Any, path: Path, bounds: Mapping[str, Sequence[tuple[int, ...]]] | None) -> Any:
    name = f"{trt.__name__} {trt.__version__}"
    log = _log(trt)
    builder = trt.Builder(log)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)  # 11 ignores it
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = dict.fromkeys(
            f"node {error.node()}, {error.node_operator()} {error.node_name()!r}: {error.desc()}"
            for error in errors
        )
        raise ExportError(f"{name} does not take {path.name}: {'; '.join([*reasons][:3])}")
    config = builder.create_builder_config()
    if bounds:
        limits = builder.create_optimization_profile()
        for tensor, (low, best, high) in bounds.items():
            limits.set_shape(tensor, low, best, high)
        config.add_optimization_profile(limits)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"{name} could not build {path.name}: {log.reason()}")
    if hasattr(trt, "EngineValidity"):
        _check_header(trt, trt.Runtime(log), plan, path.name)
    return plan


def _check_header(trt: Any, runtime: Any, plan: Any, name: str, *, here: bool = False) -> None:
    validity, diagnostics = runtime.get_engine_validity(plan)
    kinds = trt.EngineInvalidityDiagnostics
    reasons = [kind for kind in kinds.__members__ if diagnostics & int(getattr(kinds, kind))]
    wrong = {"MALFORMED_ENGINE", "VERSION_MISMATCH"} & set(reasons)
    # Without a GPU every plan is INVALID; only what is wrong with the file itself counts then.
    if wrong or (here and validity == trt.EngineValidity.INVALID):
        raise EngineError(
            f"{trt.__name__} {trt.__version__} does not take the plan of {name}: "
            f"{', '.join(reasons) or 'invalid on this GPU'}; build it again"
        )


class PlanSession:
    """A plan as a `Session`, on the caller's CUDA stream."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        graph: GraphFile,
        device: torch.device,
        library: Library,
    ) -> None:
        if device.type != "cuda":
            raise DeviceError(f"{library} engines run on cuda, got {device}")
        trt = require(library)
        wanted = (library, trt.__version__, target_of(library, device.index or 0))
        plans = {
            (p.library, p.version, p.target): p for p in manifest.plans if p.graph == graph.file
        }
        if wanted not in plans:
            known = "; ".join(" ".join(key) for key in plans) or "none"
            raise ManifestError(
                f"{folder} has no plan of {graph.file} for {' '.join(wanted)}; there are: {known}. "
                f"Build it with biasmap_fast.engines.tensorrt.build({str(folder)!r}, {library!r})"
            )
        plan = plans[wanted]
        check_file(folder, plan.file, plan.sha256)
        data = (folder / plan.file).read_bytes()
        self._device, self._outputs = device, graph.outputs
        self._log = _log(trt)
        self._runtime = trt.Runtime(self._log)
        with torch.cuda.device(device):
            if LIBRARIES[library].portable:
                _check_header(trt, self._runtime, data, plan.file, here=True)
            engine = self._runtime.deserialize_cuda_engine(data)
            if engine is None:
                raise EngineError(f"{library} cannot load {plan.file}: {self._log.reason()}")
            self._engine = engine  # its context does not keep it alive
            self._cache: Any = None
            if not LIBRARIES[library].portable:
                self._context = engine.create_execution_context()
                return
            config = engine.create_runtime_config()
            self._cache = config.create_runtime_cache()
            major, minor = torch.cuda.get_device_capability(device)
            self._cache_file = folder / f".{plan.file}.{major}.{minor}.cache"
            if self._cache_file.is_file():
                self._cache.deserialize(self._cache_file.read_bytes())
            config.set_runtime_cache(self._cache)
            self._context = engine.create_execution_context(config)
            self._known: set[tuple[int, ...]] = set()

    def run(
        self, inputs: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        """As `Session.run`."""
        with torch.cuda.device(self._device):
            held = {name: tensor.contiguous() for name, tensor in inputs.items()}
            outputs = empty_outputs(self._outputs, sizes, self._device)
            for name, tensor in held.items():
                if not self._context.set_input_shape(name, tuple(tensor.shape)):
                    raise EngineError(f"the plan does not take `{name}` of {list(tensor.shape)}")
            for name, tensor in (held | outputs).items():
                self._context.set_tensor_address(name, tensor.data_ptr())
            if not self._context.execute_async_v3(
                torch.cuda.current_stream(self._device).cuda_stream
            ):
                raise EngineError(f"the plan could not be run: {self._log.reason()}")
            self._keep_kernels(tuple(sizes.values()))
        return outputs

    def _keep_kernels(self, sizes: tuple[int, ...]) -> None:
        if self._cache is None or sizes in self._known:
            return
        self._known.add(sizes)
        try:
            write_file(self._cache_file, bytes(self._cache.serialize()))
        except OSError as error:  # a folder that cannot be written is compiled for again
            logger.warning("the compiled kernels cannot be kept in %s: %s", self._cache_file, error)


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(message.split()))
            elif severity <= trt.ILogger.WARNING:
                logger.warning(message)

        def reason(self) -> str:
            return "; ".join(self.errors[-3:])[:1000] or "it gave no reason"

    return Log()
