"""Loading a model by name: the embedded testbed, a directory, or an id of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TESTBED = "testbed"


class ModelError(RuntimeError):
    """A model cannot be loaded, or is of a kind that cannot be attributed."""


def load_pipeline(
    model: str, *, revision: str | None = None, dtype: str = "float32", device: str = "cpu"
) -> Any:
    """Loads a diffusers pipeline with a UNet.

    Args:
        model: ``"testbed"``, a directory in diffusers' layout, or a model id of the hub.
        revision: commit, tag or branch of a hub model.
        dtype: of the weights: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

    Raises:
        ModelError: there is no such model or device, or it has no UNet.

    Example:
        >>> pipe = load_pipeline("testbed")
        >>> type(pipe).__name__
        'StableDiffusionPipeline'
    """
    kind = getattr(torch, dtype)
    pipe = _testbed(kind) if model == TESTBED else _pretrained(model, revision, kind)
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"the model cannot be moved to {device!r}: {' '.join(str(error).split())}"
        ) from error


def _testbed(dtype: torch.dtype) -> Any:
    from . import testbed

    try:
        return testbed.pipeline(dtype=dtype)
    except OSError as error:
        raise ModelError(f"the embedded model cannot be loaded: {error}") from error


def _pretrained(model: str, revision: str | None, dtype: torch.dtype) -> Any:
    import diffusers

    directory = Path(model)
    if directory.is_dir() and not (directory / "model_index.json").is_file():
        raise ModelError(f"expected a diffusers model in {model}, but it has no model_index.json")
    try:
        # the older keyword still works in 0.42, with a deprecation warning
        release = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
        kind = "dtype" if release >= (0, 42) else "torch_dtype"
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            model, revision=revision, **{kind: dtype}
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the model {model!r} cannot be loaded: {' '.join(str(error).split())}"
        ) from error
    if getattr(pipe, "unet", None) is None:
        raise ModelError(
            f"expected a pipeline with a UNet, got {type(pipe).__name__} from {model!r}"
        )
    return pipe
