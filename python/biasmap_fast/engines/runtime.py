"""An engine in a pipeline: it replaces ``pipe.unet`` and hands maps to recorders.

Attribution prompts of every recorder go into the one UNet call as a dimension of their own, each
padded to the longest, so a call costs one pass however many recorders there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from .errors import EngineError, ShapeError, WrongModelError
from .manifest import GraphFile, Manifest
from .session import Session, open_session
from .shapes import Range, check_sizes

if TYPE_CHECKING:
    from ..concepts import TokenizedPrompt

# The arguments of a UNet's call that engines have inputs for.
_ARGUMENTS = ("sample", "timestep", "encoder_hidden_states", "added_cond_kwargs", "return_dict")


@dataclass(frozen=True)
class EnginePart:
    """What an engine keeps apart: a block, or with probabilities a layer."""

    name: str
    block: str  # it is or lies in
    layers: tuple[str, ...]  # whose sum it is


@dataclass(frozen=True)
class EngineEnergy:
    """What a gradient graph computes of B images; maps of one prompt's concepts after another's."""

    prediction: torch.Tensor  # [B, C, H, W]
    maps: torch.Tensor  # [B, K, h, w]
    energy: torch.Tensor  # [B]
    gradient: torch.Tensor  # of the energy by the latents, [B, C, H, W]


# part -> for every prompt its maps [rows, K, h, w]
PartMaps = Mapping[EnginePart, Sequence[torch.Tensor]]
# hidden states [T', D] and concept weights [K, T']
Prompt = tuple[torch.Tensor, torch.Tensor]


def load_engine(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    backend: str = "onnxruntime",
    unet: Any = None,
) -> EngineUNet:
    """Loads an engine folder as a UNet for any diffusers pipeline.

    Every file that is used is hashed once, and refused if a byte of it was changed.

    Args:
        folder: what `export_unet` wrote.
        device: ``"cpu"``, or ``"cuda"``, ``"cuda:1"``: never another than the one asked for.
        backend: ``"onnxruntime"``, or ``"tensorrt"`` or ``"tensorrt-rtx"`` for a plan in the
            folder that this library and version built.
        unet: the UNet it replaces, to check that the engine was exported from it.

    Raises:
        ManifestError: the folder holds no engine, of another version, or a file was changed.
        WrongModelError: the engine was exported from another UNet than ``unet``.
        MissingExtraError: the runtime is not installed.
        DeviceError: the runtime cannot use ``device``.

    Example:
        >>> import biasmap_fast as bm
        >>> pipe = bm.testbed.pipeline()
        >>> pipe.unet = bm.load_engine("engines/testbed", unet=pipe.unet)  # doctest: +SKIP
    """
    manifest = Manifest.read(Path(folder))
    if unet is not None:
        manifest.check_model(unet)
    chosen = torch.device("cuda:0" if str(device) == "cuda" else device)
    return EngineUNet(Path(folder), manifest, chosen, backend)


class EngineUNet(torch.nn.Module):
    """An engine with the interface of diffusers' `UNet2DConditionModel`; made by `load_engine`.

    It holds no parameters. Its `state_dict` is empty; `weights_sha256` identifies the weights.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, device: torch.device, backend: str
    ) -> None:
        from diffusers.configuration_utils import FrozenDict

        super().__init__()
        self.config = FrozenDict(dict(manifest.config))
        self.folder = folder
        self.manifest = manifest
        self.dtype: torch.dtype = getattr(torch, manifest.dtype)
        self.device = device
        self._backend = backend
        self._session = self._open(manifest.graph)
        self._gradients: dict[str, Session] = {}
        self._listeners: list[_Listener] = []
        self._prompts: tuple[list[_Listener], dict[str, torch.Tensor]] = ([], {})
        if manifest.config.get("addition_embed_type") == "text_time":
            # SDXL's pipelines ask the first layer how long the added embedding is.
            width = manifest.config["projection_class_embeddings_input_dim"]
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    @property
    def weights_sha256(self) -> str:
        """Identifies the weights that the engine was exported from."""
        return self.manifest.weights_sha256

    def attribution_parts(
        self, selection: Sequence[str] | None, by: Sequence[str]
    ) -> list[EnginePart]:
        """The parts whose maps a recorder of these layers wants, in the order of the UNet."""
        maps = self.manifest.maps
        if maps == "none":
            raise EngineError(
                f"the engine in {self.folder} gives no maps: export it with maps='reduced'"
            )
        allowed = ["total", "block", "step"] + (["layer"] if maps == "probabilities" else [])
        if not set(by) <= set(allowed):
            raise ValueError(
                f"`by` must be of {allowed} for an engine with maps={maps!r}, got {list(by)}"
            )
        parts = _parts(self.manifest)
        return parts if selection is None else _selected(parts, selection)

    def register_attribution_hook(
        self, prompts: Sequence[Prompt], hook: Callable[[PartMaps], None]
    ) -> _Listener:
        """Hands the maps of these prompts to ``hook`` in every call, until ``remove()``."""
        width = self.config["cross_attention_dim"]
        for states, _ in prompts:
            if states.shape[-1] != width:
                raise WrongModelError(
                    f"the engine takes text states of width {width}, the pipeline's text encoder "
                    f"gives {states.shape[-1]}: it was exported from another model"
                )
        listener = _Listener(tuple(prompts), hook, self._listeners)
        self._listeners.append(listener)
        return listener

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """As `UNet2DConditionModel.forward`; arguments without an input are refused."""
        _refuse(others)
        outputs = self._run(
            self._image_inputs(sample, timestep, encoder_hidden_states, added_cond_kwargs)
        )
        prediction = outputs["noise_pred"]
        return self.output(prediction) if return_dict else (prediction,)

    def output(self, prediction: torch.Tensor) -> Any:
        """The prediction as a UNet returns it."""
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=prediction)

    def energy_gradient(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        prompts: Sequence[Prompt],
        pairs: Sequence[tuple[int, int]],
        weights: Sequence[float],
        *,
        fraction: float,
        temperature: float,
    ) -> EngineEnergy:
        """One UNet call and the gradient of its energy, for the images of one guidance chunk.

        ``pairs`` are indices of two concepts among those of all prompts, one prompt after another,
        and ``weights`` what the SoftIoU of each counts.
        """
        named = {**dict(zip(_ARGUMENTS[:3], args, strict=False)), **kwargs}
        _refuse({name: value for name, value in named.items() if name not in _ARGUMENTS})
        sample, timestep, states = (named[name] for name in _ARGUMENTS[:3])
        images = self._image_inputs(sample, timestep, states, named.get("added_cond_kwargs"))
        height, width = sample.shape[-2:]
        gradient = self.manifest.gradient(height, width, fraction, temperature)
        sizes, graph = gradient.sizes, gradient.graph
        if graph.file not in self._gradients:
            self._gradients[graph.file] = self._open(graph)
        padded = _padded(prompts, sizes, self.config["cross_attention_dim"])
        concepts = [(p, k) for p, (_, columns) in enumerate(prompts) for k in range(len(columns))]
        count, most = padded["concept_weights"].shape[:2]
        padded["pair_weights"] = torch.zeros(1, count, most, count, most)
        for (first, second), weight in zip(pairs, weights, strict=True):
            padded["pair_weights"][(0, *concepts[first], *concepts[second])] += weight
        padded = self._placed(padded, graph)
        fixed = {name: Range(size, size, size) for name, size in sizes.items()}
        runs = []
        for row in range(len(sample)):
            inputs = {**{name: value[row : row + 1] for name, value in images.items()}, **padded}
            check_sizes(fixed, graph.inputs, inputs)
            runs.append(self._gradients[graph.file].run(inputs, sizes))
        joined = {name: torch.cat([run[name] for run in runs]) for name in runs[0]}
        if self._listeners:  # their prompts are not those of the energy
            self._run(images)
        maps = joined["maps"].sum(dim=2)  # [B, P, K, h, w]
        return EngineEnergy(
            prediction=joined["noise_pred"],
            maps=torch.stack([maps[:, p, k] for p, k in concepts], dim=1),
            energy=joined["energy"],
            gradient=joined["gradient"],
        )

    def check_gradient(
        self,
        size: tuple[int, int],
        prompts: Sequence[TokenizedPrompt],
        *,
        fraction: float,
        temperature: float,
    ) -> None:
        """Refuses before a run what `energy_gradient` would refuse in every call."""
        sizes = self.manifest.gradient(*size, fraction, temperature).sizes
        needed = {
            "prompts": len(prompts),
            "attribution_tokens": max(prompt.weights.shape[1] for prompt in prompts),
            "concepts": max(prompt.weights.shape[0] for prompt in prompts),
        }
        if missing := {dim: n for dim, n in needed.items() if n > sizes[dim]}:
            most = {dim: sizes[dim] for dim in missing}
            raise ShapeError(
                f"the gradient graph of {self.folder} takes at most {most}, and {missing} are "
                "needed: export one with these (`biasmap export --gradient-prompts`, or "
                "Gradient(...) in Python)"
            )

    def _open(self, graph: GraphFile) -> Session:
        return open_session(self._backend, self.folder, self.manifest, graph, self.device)

    def _placed(
        self, values: Mapping[str, torch.Tensor], graph: GraphFile
    ) -> dict[str, torch.Tensor]:
        """The inputs of a graph among these tensors, in its types and on its device."""
        return {
            tensor.name: values[tensor.name].to(self.device, getattr(torch, tensor.dtype))
            for tensor in graph.inputs
            if tensor.name in values
        }

    def _image_inputs(
        self,
        sample: torch.Tensor,
        timestep: Any,
        states: torch.Tensor,
        added: Mapping[str, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        """The inputs of a call that have the batch as first dimension, in the graph's types."""
        if sample.device != self.device:
            raise EngineError(
                f"the engine runs on {self.device}, got latents on {sample.device}: move the "
                "pipeline, or load the engine with device="
            )
        times = torch.as_tensor(timestep, device=sample.device).to(torch.float32).reshape(-1)
        inputs = {
            "sample": sample.detach(),
            "timestep": times.expand(len(sample)) if times.shape[0] == 1 else times,
            "encoder_hidden_states": states,
            **(added or {}),
        }
        for tensor in self.manifest.graph.inputs:
            if tensor.name in ("text_embeds", "time_ids") and tensor.name not in inputs:
                raise WrongModelError(
                    f"the engine needs added_cond_kwargs[{tensor.name!r}]: it was exported from "
                    "an SDXL model"
                )
        return self._placed(inputs, self.manifest.graph)

    def _run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One run of the forward graph; listeners get their maps."""
        manifest, listeners = self.manifest, list(self._listeners)
        prompts = self._prompt_inputs(listeners)
        inputs = {**inputs, **self._placed(prompts, manifest.graph)}
        sizes = check_sizes(manifest.shapes.ranges, manifest.graph.inputs, inputs)
        outputs = self._session.run(inputs, sizes)
        if not listeners:
            return outputs
        maps = {}  # part -> [rows, P, K, h, w]
        for index, part in enumerate(_parts(manifest)):
            if manifest.maps == "reduced":
                maps[part] = outputs["maps"][:, :, index]
                continue
            level = manifest.layers[index].level
            probabilities = outputs[f"probabilities.{part.name}"]  # [rows, P, heads, T', n]
            reduced = prompts["concept_weights"] @ probabilities.sum(dim=2)  # [rows, P, K, n]
            size = (sizes["height"] >> level, sizes["width"] >> level)
            maps[part] = reduced.view(*reduced.shape[:3], *size)
        first = 0
        for listener in listeners:
            counts = [len(columns) for _, columns in listener.prompts]
            listener.hook(
                {
                    part: [values[:, first + i, :k] for i, k in enumerate(counts)]
                    for part, values in maps.items()
                }
            )
            first += len(counts)
        return outputs

    def _prompt_inputs(self, listeners: list[_Listener]) -> dict[str, torch.Tensor]:
        """The prompts of all listeners as inputs; made again when a listener comes or goes."""
        known, inputs = self._prompts
        if inputs and known == listeners:
            return inputs
        prompts = [prompt for listener in listeners for prompt in listener.prompts]
        if not prompts:  # nobody listens: the smallest prompts there are
            low = {name: size.low for name, size in self.manifest.shapes.ranges.items()}
            states = torch.zeros(low["attribution_tokens"], self.config["cross_attention_dim"])
            prompts = [(states, torch.zeros(low["concepts"], len(states)))] * low["prompts"]
        inputs = _padded(prompts, {}, self.config["cross_attention_dim"])
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        self._prompts = (listeners, inputs)
        return inputs


@dataclass(frozen=True, eq=False)
class _Listener:
    """A recorder's prompts and the hook that takes their maps."""

    prompts: Sequence[Prompt]
    hook: Callable[[PartMaps], None]
    _all: list[_Listener]

    def remove(self) -> None:
        if self in self._all:
            self._all.remove(self)


def _parts(manifest: Manifest) -> list[EnginePart]:
    layers = manifest.layers
    if manifest.maps == "probabilities":
        return [EnginePart(layer.name, layer.block, (layer.name,)) for layer in layers]
    return [
        EnginePart(block, block, tuple(layer.name for layer in layers if layer.block == block))
        for block in manifest.blocks
    ]


def _selected(parts: list[EnginePart], selection: Sequence[str]) -> list[EnginePart]:
    if isinstance(selection, str) or not selection:
        raise ValueError(f"`layers` must be names or prefixes of layers, got {selection!r}")
    names = [name for part in parts for name in part.layers]
    wanted = {
        name: {item for item in selection if name == item or name.startswith(f"{item}.")}
        for name in names
    }
    if unmatched := set(selection).difference(*wanted.values()):
        raise ValueError(
            f"the engine attributes no layer that matches {sorted(unmatched)}; there are: "
            f"{', '.join(names)}"
        )
    chosen = [part for part in parts if any(wanted[name] for name in part.layers)]
    for part in chosen:
        if not all(wanted[name] for name in part.layers):
            raise ValueError(
                f"the engine sums over the layers of {part.name} ({', '.join(part.layers)}); "
                f"`layers` must name all or none of them, got {list(selection)}. Export with "
                "layers= or maps='probabilities'"
            )
    return chosen


def _padded(
    prompts: Sequence[Prompt], least: Mapping[str, int], width: int
) -> dict[str, torch.Tensor]:
    """Prompts of different lengths as inputs of a graph, of at least these sizes."""
    count = max(len(prompts), least.get("prompts", 1))
    tokens = max(least.get("attribution_tokens", 1), *(len(states) for states, _ in prompts), 1)
    concepts = max(least.get("concepts", 1), *(len(columns) for _, columns in prompts), 1)
    hidden = torch.zeros(count, tokens, width, dtype=prompts[0][0].dtype)
    mask = torch.zeros(count, tokens)
    weights = torch.zeros(count, concepts, tokens)
    for index, (states, columns) in enumerate(prompts):
        hidden[index, : len(states)] = states
        mask[index, : len(states)] = 1.0
        weights[index, : len(columns), : len(states)] = columns
    return {
        "attribution_hidden_states": hidden,
        "attribution_mask": mask,
        "concept_weights": weights,
    }


def _refuse(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if value is not None and value != {}:
            raise EngineError(
                f"engines have no input for `{name}`; use the torch UNet for this pipeline"
            )
