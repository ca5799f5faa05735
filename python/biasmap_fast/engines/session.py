"""ONNX Runtime behind torch tensors: one ONNX file, one device, no copies."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import DeviceError, EngineError, MissingExtraError
from .shapes import Tensor, output_shape

# Every one of them installs the same folder `onnxruntime`, and pip lets them overwrite each other.
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


class Session:
    """An ONNX file on ONNX Runtime.

    Args:
        path: the ONNX file.
        device: where it runs, and where its inputs and outputs are.
        outputs: the graph's outputs.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        DeviceError: it cannot use ``device``.
        EngineError: two ONNX Runtime packages are installed, or it cannot run the file.
    """

    def __init__(self, path: Path, device: torch.device, outputs: Sequence[Tensor]) -> None:
        runtime = require_runtime()
        self.device = device
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
        if device.type == "cuda":
            runtime.preload_dlls()  # those that pip installed
            providers: list[Any] = [(provider, {"device_id": device.index or 0})]
        else:
            providers = [provider]
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
        """One call.

        Args:
            inputs: name -> tensor on the session's device, in the graph's type.
            sizes: dimension name -> size of this call, for the outputs.

        Returns:
            Output name -> tensor.
        """
        binding = self._session.io_binding()
        held = {name: tensor.contiguous() for name, tensor in inputs.items()}
        for name, tensor in held.items():
            binding.bind_input(*self._described(name, tensor))
        found: dict[str, torch.Tensor] = {}
        for each in self._outputs:
            made = torch.empty(
                output_shape(each, sizes), dtype=getattr(torch, each.dtype), device=self.device
            )
            found[each.name] = made
            binding.bind_output(*self._described(each.name, made))
        if self.device.type == "cuda":
            # Its own stream does not wait for torch's; and it waits for itself at the end.
            torch.cuda.current_stream(self.device).synchronize()
        self._session.run_with_iobinding(binding)
        return found

    def _described(self, name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
        index = self.device.index or 0
        shape = list(tensor.shape)
        return name, self.device.type, index, _KINDS[tensor.dtype], shape, tensor.data_ptr()


def require_runtime() -> Any:
    """The module `onnxruntime`.

    Raises:
        MissingExtraError: it is not installed.
        EngineError: several of its packages are.
    """
    installed = [name for name in _DISTRIBUTIONS if _is_installed(name)]
    if len(installed) > 1:
        raise EngineError(
            f"{' and '.join(installed)} are both installed and overwrite each other's files: "
            f"pip uninstall {' '.join(installed)}, then install one of the extras `onnx` and "
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


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
