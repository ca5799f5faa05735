"""Loading a model by name: the embedded testbed, a directory, or an id of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    import torch

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

    # no pickled weights: they can run code
    options = {"dtype": dtype, "use_safetensors": True}
    directory = Path(model)
    if directory.is_dir() and not (directory / "model_index.json").is_file():
        raise ModelError(f"expected a diffusers model in {model}, but it has no model_index.json")
    try:
        if not directory.is_dir():
            directory = Path(
                diffusers.DiffusionPipeline.download(model, revision=revision, use_safetensors=True)
            )
        networks = _networks(directory, options)
        pipe = diffusers.DiffusionPipeline.from_pretrained(directory, **options, **networks)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the model {model!r} cannot be loaded: {' '.join(str(error).split())}"
        ) from error
    if getattr(pipe, "unet", None) is None:
        raise ModelError(
            f"expected a pipeline with a UNet, got {type(pipe).__name__} from {model!r}"
        )
    return pipe


def _networks(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The networks of a diffusers folder, each with all the tensors that its class expects.

    diffusers and transformers draw a tensor that they do not find at random and only print a note.
    Tensors that a class does not use are common (a T5 file has a decoder) and harmless.
    """
    import diffusers
    import torch
    import transformers

    index = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))
    networks = {}
    for name, entry in index.items():
        library, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if library not in ("diffusers", "transformers") or kind is None:
            continue
        network = getattr(diffusers if library == "diffusers" else transformers, kind, None)
        if not isinstance(network, type) or not issubclass(network, torch.nn.Module):
            continue
        networks[name], report = network.from_pretrained(  # type: ignore[attr-defined]
            directory / name, **options, output_loading_info=True
        )
        if wrong := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
            raise ModelError(
                f"the weights in {directory / name} are not those of {kind}: {len(wrong)} tensors "
                f"are missing or of another shape, the first {wrong[0]!r}. They would be drawn at "
                "random; check the file, and that these versions of transformers and diffusers "
                "read it"
            )
    return networks
