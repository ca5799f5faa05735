"""One interface for every runtime: a graph of an engine folder, run on tensors of one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from .errors import DeviceError, EngineError, MissingExtraError
from .manifest import GraphFile, Library, Manifest, installed
from .shapes import Tensor, output_shape

# All of them install the same folder `onnxruntime`, and pip lets them overwrite each other.
_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-rocm",
)
# onnx.TensorProto.DataType
_KINDS = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Session(Protocol):
    """A graph that is ready to run."""

    def run(
        self, inputs: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        """Output name -> tensor, of inputs on the session's device and in the graph's types."""


def open_session(
    backend: str, folder: Path, manifest: Manifest, graph: GraphFile, device: torch.device
) -> Session:
    """Makes a graph of an engine folder ready to run."""
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {list(BACKENDS)}, got {backend!r}")
    return BACKENDS[backend](folder, manifest, graph, device)


def empty_outputs(
    outputs: Sequence[Tensor], sizes: Mapping[str, int], device: torch.device
) -> dict[str, torch.Tensor]:
    """Output name -> memory for it, in a call whose dimensions have these sizes."""
    return {
        output.name: torch.empty(
            output_shape(output, sizes), dtype=getattr(torch, output.dtype), device=device
        )
        for output in outputs
    }


class OnnxSession:
    """An ONNX file on ONNX Runtime, without copies of inputs and outputs."""

    def __init__(self, path: Path, device: torch.device, outputs: Sequence[Tensor]) -> None:
        runtime = require_runtime()
        self._device = device
        self._outputs = tuple(outputs)
        provider = _PROVIDERS.get(device.type)
        if provider is None:
            raise DeviceError(f"ONNX Runtime engines run on cpu and cuda, got {device}")
        if provider not in runtime.get_available_providers():
            raise DeviceError(
                f"the installed ONNX Runtime has no {provider}: pip uninstall onnxruntime, then "
                "pip install 'biasmap-fast[onnx-gpu]'"
            )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        providers: list[Any] = [provider]
        if device.type == "cuda":
            runtime.preload_dlls()  # those that pip installed
            providers = [(provider, {"device_id": device.index or 0})]
        try:
            self._session = runtime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # its classes are many, and derive from RuntimeError or not
            raise EngineError(
                f"ONNX Runtime {runtime.__version__} cannot load {path}: "
                f"{' '.join(str(error).split())[:500]}"
            ) from error
        used = self._session.get_providers()
        if used[0] != provider:  # it falls back to the CPU in silence
            raise DeviceError(
                f"ONNX Runtime cannot use {device}: it offers {used[0]} instead of {provider}; its "
                "log says which library did not load"
            )

    def run(
        self, inputs: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        """As `Session.run`."""
        binding = self._session.io_binding()
        held = {name: tensor.contiguous() for name, tensor in inputs.items()}
        outputs = empty_outputs(self._outputs, sizes, self._device)
        for name, tensor in held.items():
            binding.bind_input(*self._described(name, tensor))
        for name, tensor in outputs.items():
            binding.bind_output(*self._described(name, tensor))
        if self._device.type == "cuda":
            # Its own stream does not wait for torch's; and it waits for itself at the end.
            torch.cuda.current_stream(self._device).synchronize()
        self._session.run_with_iobinding(binding)
        return outputs

    def _described(self, name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
        index = self._device.index or 0
        shape = list(tensor.shape)
        return name, self._device.type, index, _KINDS[tensor.dtype], shape, tensor.data_ptr()


def require_runtime() -> Any:
    """The module `onnxruntime`, of one package only."""
    packages = [name for name in _DISTRIBUTIONS if installed(name)]
    if len(packages) > 1:
        raise EngineError(
            f"{' and '.join(packages)} are both installed and overwrite each other's files: "
            f"pip uninstall {' '.join(packages)}, then install one of the extras `onnx` and "
            "`onnx-gpu`"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            f"engines need ONNX Runtime ({error}): pip install 'biasmap-fast[onnx]' for the CPU, "
            "'biasmap-fast[onnx-gpu]' for CUDA"
        ) from error
    return onnxruntime


def require_exporter() -> None:
    """Raises `MissingExtraError` if a package that exports is missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"exporting needs the extra `onnx` ({error}): pip install 'biasmap-fast[onnx]'"
        ) from error


def _onnxruntime(
    folder: Path, manifest: Manifest, graph: GraphFile, device: torch.device
) -> Session:
    return OnnxSession(folder / graph.file, device, graph.outputs)


def _plan(
    folder: Path, manifest: Manifest, graph: GraphFile, device: torch.device, *, library: Library
) -> Session:
    from .tensorrt import PlanSession

    return PlanSession(folder, manifest, graph, device, library)


# name -> what makes a graph of a folder ready on a device
BACKENDS: dict[str, Callable[[Path, Manifest, GraphFile, torch.device], Session]] = {
    "onnxruntime": _onnxruntime,
    "tensorrt": partial(_plan, library="tensorrt"),
    "tensorrt-rtx": partial(_plan, library="tensorrt-rtx"),
}
