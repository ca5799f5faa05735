"""An engine in a pipeline: what stands in for ``pipe.unet``, and hands maps to the recorder.

Attribution prompts of every recorder go into the one UNet call as a dimension of their own, each
padded to the longest, so a call costs one pass whoever listens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch

from .errors import EngineError, ShapeError, WrongModelError
from .manifest import GradientFile, Manifest
from .shapes import check_sizes

if TYPE_CHECKING:
    from ..concepts import TokenizedPrompt

Backend = Literal["onnxruntime", "tensorrt"]

# The arguments of a UNet's call that engines have inputs for.
_TAKEN = ("sample", "timestep", "encoder_hidden_states", "added_cond_kwargs", "return_dict")


@dataclass(frozen=True)
class EnginePart:
    """What an engine keeps apart: a block, or with probabilities a layer.

    Attributes:
        name: of the block or layer.
        block: the UNet block it is or lies in.
        layers: the layers whose sum it is.
    """

    name: str
    block: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class EngineEnergy:
    """What a gradient graph computes of B images.

    Attributes:
        prediction: the noise prediction ``[B, C, H, W]``.
        maps: of all prompts' concepts, one prompt after another, ``[B, K, h, w]`` float32.
        energy: ``[B]`` float32.
        gradient: of the energy by the latents, ``[B, C, H, W]`` float32.
    """

    prediction: torch.Tensor
    maps: torch.Tensor
    energy: torch.Tensor
    gradient: torch.Tensor


# part -> for every prompt its maps [rows, K, h, w]
Found = Mapping[EnginePart, Sequence[torch.Tensor]]


@dataclass(frozen=True, eq=False)
class _Listener:
    """A recorder's prompts, and what takes their maps."""

    states: Sequence[torch.Tensor]  # [T', D] a prompt
    weights: Sequence[torch.Tensor]  # [K, T'] a prompt
    hook: Callable[[Found], None]


class _Handle:
    def __init__(self, listeners: list[_Listener], listener: _Listener) -> None:
        self._listeners, self._listener = listeners, listener

    def remove(self) -> None:
        if self._listener in self._listeners:
            self._listeners.remove(self._listener)


def load_engine(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    backend: Backend = "onnxruntime",
    unet: Any = None,
) -> EngineUNet:
    """Loads an engine folder as a UNet for any diffusers pipeline.

    Args:
        folder: what `export_unet` wrote.
        device: ``"cpu"``, or ``"cuda"``, ``"cuda:1"``: never another than the one asked for.
        backend: ``"onnxruntime"``, or ``"tensorrt"`` for a plan that was built on this machine.
        unet: the UNet whose place it takes, to check that the engine was exported from it.

    Raises:
        ManifestError: the folder holds no engine, of another version, or not whole.
        WrongModelError: the engine was exported from another UNet than ``unet``.
        MissingExtraError: the runtime is not installed.
        DeviceError: the runtime cannot use ``device``.

    Example:
        >>> import biasmap_fast as bm
        >>> pipe = bm.testbed.pipeline()
        >>> pipe.unet = bm.load_engine("engines/testbed", unet=pipe.unet)  # doctest: +SKIP
    """
    path = Path(folder)
    manifest = Manifest.read(path)
    if unet is not None:
        manifest.check_model(unet)
    if backend not in ("onnxruntime", "tensorrt"):
        raise ValueError(f"`backend` must be 'onnxruntime' or 'tensorrt', got {backend!r}")
    place = torch.device(device)
    if str(place) == "cuda":
        place = torch.device("cuda", 0)
    return EngineUNet(path, manifest, place, backend)


class EngineUNet(torch.nn.Module):
    """An engine with the face of diffusers' `UNet2DConditionModel`; made by `load_engine`.

    It holds no parameters. Its `state_dict` is empty; `weights_sha256` says whose it is.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, device: torch.device, backend: Backend
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
        self._gradients: dict[str, Any] = {}
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
        """The parts whose maps a recorder wants, in the UNet's order.

        Args:
            selection: names or dotted prefixes of layers; None for all that were exported.
            by: what the recorder keeps apart.

        Raises:
            EngineError: the engine has no maps.
            ValueError: the selection is no union of the engine's parts, or ``by`` is finer.
        """
        manifest = self.manifest
        if manifest.maps == "none":
            raise EngineError(
                f"the engine in {self.folder} gives no maps: export it with maps='reduced'"
            )
        finest = "block" if manifest.maps == "reduced" else "layer"
        allowed = ("total", "block", "step") + (("layer",) if finest == "layer" else ())
        if not set(by) <= set(allowed):
            raise ValueError(
                f"`by` must be of {list(allowed)} for an engine with maps={manifest.maps!r}, got "
                f"{list(by)}"
            )
        parts = self._parts()
        if selection is None:
            return parts
        if isinstance(selection, str) or not selection:
            raise ValueError(f"`layers` must be names or prefixes of layers, got {selection!r}")
        chosen = []
        left = set(selection)
        for part in parts:
            wanted = [
                {item for item in selection if name == item or name.startswith(item + ".")}
                for name in part.layers
            ]
            if any(wanted) and not all(wanted):
                raise ValueError(
                    f"the engine sums over the layers of {part.name} ({', '.join(part.layers)}); "
                    f"`layers` must name all or none of them, got {list(selection)}. Export with "
                    "layers= or maps='probabilities'"
                )
            if all(wanted):
                chosen.append(part)
                left -= set().union(*wanted)
        if left:
            raise ValueError(
                f"the engine attributes no layer that matches {sorted(left)}; there are: "
                f"{', '.join(layer.name for layer in manifest.layers)}"
            )
        return chosen

    def register_attribution_hook(
        self,
        prompts: Sequence[tuple[torch.Tensor, torch.Tensor]],
        hook: Callable[[Found], None],
    ) -> Any:
        """Has the maps of these prompts computed in every call and handed to ``hook``.

        Args:
            prompts: hidden states ``[T', D]`` and concept weights ``[K, T']`` of each.
            hook: called with part -> for every prompt its maps ``[rows, K, h, w]``.

        Returns:
            A handle whose ``remove()`` ends it.
        """
        states, weights = zip(*prompts, strict=True)
        listener = _Listener(states, weights, hook)
        self._check_prompts(states)
        self._listeners.append(listener)
        return _Handle(self._listeners, listener)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        class_labels: Any = None,
        timestep_cond: Any = None,
        attention_mask: Any = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        down_block_additional_residuals: Any = None,
        mid_block_additional_residual: Any = None,
        down_intrablock_additional_residuals: Any = None,
        encoder_attention_mask: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """As `UNet2DConditionModel.forward`; arguments that no engine has an input for are refused.

        Raises:
            EngineError: such an argument was given, or a tensor is on another device.
            ShapeError: a shape is outside the engine's bounds.
            WrongModelError: the text states have another width than the engine's.
        """
        _refuse(
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            cross_attention_kwargs=cross_attention_kwargs,
            down_block_additional_residuals=down_block_additional_residuals,
            mid_block_additional_residual=mid_block_additional_residual,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
            encoder_attention_mask=encoder_attention_mask,
        )
        inputs = self._image_inputs(sample, timestep, encoder_hidden_states, added_cond_kwargs)
        found = self._run(inputs)
        prediction = found["noise_pred"]
        if not return_dict:
            return (prediction,)
        return self.output(prediction)

    def output(self, prediction: torch.Tensor) -> Any:
        """The prediction as a UNet returns it."""
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=prediction)

    def energy_gradient(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        prompts: Sequence[tuple[torch.Tensor, torch.Tensor]],
        pairs: Sequence[tuple[int, int]],
        weights: Sequence[float],
        *,
        fraction: float,
        temperature: float,
    ) -> EngineEnergy:
        """One UNet call with its energy's gradient, for the images of one guidance chunk.

        Args:
            args: the call's positional arguments.
            kwargs: the call's keyword arguments.
            prompts: hidden states ``[T', D]`` and concept weights ``[K, T']`` of each.
            pairs: indices of two concepts among those of all prompts, one prompt after another.
            weights: what the SoftIoU of each pair counts.
            fraction: of the soft masks.
            temperature: of the soft masks.

        Raises:
            EngineError: the folder has no gradient graph of this shape and these masks.
        """
        named = dict(zip(_TAKEN[:3], args, strict=False))
        named.update(kwargs)
        _refuse(**{name: value for name, value in named.items() if name not in _TAKEN})
        given = self._image_inputs(
            named["sample"],
            named["timestep"],
            named["encoder_hidden_states"],
            named.get("added_cond_kwargs"),
        )
        height, width = given["sample"].shape[-2:]
        chosen = self._gradient_file(height, width, fraction, temperature)
        sizes = chosen.sizes
        if chosen.graph.file not in self._gradients:
            self._gradients[chosen.graph.file] = self._open(chosen.graph)
        session = self._gradients[chosen.graph.file]
        images, step = given["sample"].shape[0], sizes["batch"]
        padded = self._padded(prompts, sizes)
        count, most = padded["concept_weights"].shape[:2]
        # (prompt, concept) of every concept of the prompts in a row
        places = [(p, k) for p, (_, columns) in enumerate(prompts) for k in range(len(columns))]
        table = torch.zeros(1, count, most, count, most)
        for (first, second), weight in zip(pairs, weights, strict=True):
            table[0][(*places[first], *places[second])] += weight
        padded["pair_weights"] = table.to(self.device)
        results = []
        for start in range(0, images, step):
            rows = [min(row, images - 1) for row in range(start, start + step)]
            inputs = {**{name: value[rows] for name, value in given.items()}, **padded}
            self._check(chosen.graph.inputs, inputs, fixed=sizes)
            found = session.run(inputs, sizes)
            results.append({name: value[: images - start] for name, value in found.items()})
        joined = {name: torch.cat([r[name] for r in results]) for name in results[0]}
        if self._listeners:  # their prompts are not the energy's
            self._run(given)
        maps = joined["maps"].sum(dim=2)  # [B, P, K, h, w]
        return EngineEnergy(
            prediction=joined["noise_pred"],
            maps=torch.stack([maps[:, p, k] for p, k in places], dim=1),
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
        """Refuses before a run what `energy_gradient` would refuse in every call.

        Args:
            size: height and width of the latents.
            prompts: the attribution prompts of one image.
            fraction: of the soft masks.
            temperature: of the soft masks.

        Raises:
            EngineError: the folder has no gradient graph of this size and these masks.
            ShapeError: that graph takes fewer prompts, or shorter ones.
        """
        sizes = self._gradient_file(*size, fraction, temperature).sizes
        needed = {
            "prompts": len(prompts),
            "attribution_tokens": max(each.weights.shape[1] for each in prompts),
            "concepts": max(each.weights.shape[0] for each in prompts),
        }
        if missing := {dim: n for dim, n in needed.items() if n > sizes[dim]}:
            most = {dim: sizes[dim] for dim in missing}
            raise ShapeError(
                f"the gradient graph of {self.folder} takes at most {most}, and {missing} are "
                "needed: export one with these (`biasmap export --gradient-prompts`, or "
                "Gradient(...) in Python)"
            )

    def _open(self, graph: Any) -> Any:
        if self._backend == "tensorrt":
            from .tensorrt import PlanSession

            return PlanSession(self.folder, self.manifest, graph, self.device)
        from .session import Session

        return Session(self.folder / graph.file, self.device, graph.outputs)

    def _parts(self) -> list[EnginePart]:
        layers = self.manifest.layers
        if self.manifest.maps == "probabilities":
            return [EnginePart(layer.name, layer.block, (layer.name,)) for layer in layers]
        return [
            EnginePart(block, block, tuple(one.name for one in layers if one.block == block))
            for block in self.manifest.blocks
        ]

    def _image_inputs(
        self,
        sample: torch.Tensor,
        timestep: Any,
        states: torch.Tensor,
        added: Mapping[str, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        """The inputs of a call that belong to the batch's rows, in the graph's types."""
        batch = sample.shape[0]
        if sample.device != self.device:
            raise EngineError(
                f"the engine runs on {self.device}, got latents on {sample.device}: move the "
                "pipeline, or load the engine with device="
            )
        width = self.config["cross_attention_dim"]
        if states.shape[-1] != width or sample.shape[1] != self.config["in_channels"]:
            raise WrongModelError(
                f"the engine takes text states of width {width} and latents of "
                f"{self.config['in_channels']} channels, got {states.shape[-1]} and "
                f"{sample.shape[1]}: it was exported from another model than this pipeline's"
            )
        times = torch.as_tensor(timestep, device=sample.device).to(torch.float32).reshape(-1)
        inputs = {
            "sample": sample.detach().to(self.dtype),
            "timestep": times.expand(batch) if times.shape[0] == 1 else times,
            "encoder_hidden_states": states.to(self.dtype),
        }
        for each in self.manifest.graph.inputs:
            if each.name in ("text_embeds", "time_ids"):
                if not added or each.name not in added:
                    raise WrongModelError(
                        f"the engine needs added_cond_kwargs[{each.name!r}]: it was exported from "
                        "an SDXL model"
                    )
                inputs[each.name] = added[each.name].to(getattr(torch, each.dtype))
        return inputs

    def _run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One run of the forward graph; listeners get their maps."""
        listeners = list(self._listeners)
        if self.manifest.maps != "none":
            inputs = {**inputs, **self._listened(listeners)}
        graph = self.manifest.graph
        if self.manifest.maps == "probabilities":
            weights = inputs.pop("concept_weights")
        sizes = self._check(graph.inputs, inputs)
        found: dict[str, torch.Tensor] = self._session.run(inputs, sizes)
        if listeners:
            if self.manifest.maps == "probabilities":
                maps = self._reduced(found, weights, sizes)
            else:
                maps = {
                    part: found["maps"][:, :, place] for place, part in enumerate(self._parts())
                }  # [rows, P, K, H, W]
            first = 0
            for listener in listeners:
                counts = [weights.shape[0] for weights in listener.weights]
                listener.hook(
                    {
                        part: [values[:, first + i, :k] for i, k in enumerate(counts)]
                        for part, values in maps.items()
                    }
                )
                first += len(counts)
        return found

    def _listened(self, listeners: list[_Listener]) -> dict[str, torch.Tensor]:
        """The prompts of all listeners as inputs, made when somebody comes or goes."""
        known, inputs = self._prompts
        if inputs and known == listeners:
            return inputs
        prompts = [
            pair
            for listener in listeners
            for pair in zip(listener.states, listener.weights, strict=True)
        ]
        if not prompts:  # nobody listens: the smallest prompt there is
            low = self.manifest.shapes
            tokens, concepts = low.attribution_tokens.low, low.concepts.low
            states = torch.zeros(tokens, self.config["cross_attention_dim"])
            prompts = [(states, torch.zeros(concepts, tokens))] * low.prompts.low
        inputs = self._padded(prompts, {})
        self._prompts = (listeners, inputs)
        return inputs

    def _reduced(
        self,
        found: Mapping[str, torch.Tensor],
        weights: torch.Tensor,
        sizes: Mapping[str, int],
    ) -> dict[EnginePart, torch.Tensor]:
        """Each layer's maps ``[rows, P, K, h, w]`` from its probabilities."""
        maps = {}
        for part, layer in zip(self._parts(), self.manifest.layers, strict=True):
            probabilities = found[f"probabilities.{layer.name}"]  # [rows, P, heads, T', n]
            size = (sizes["height"] >> layer.level, sizes["width"] >> layer.level)
            reduced = weights @ probabilities.sum(dim=2)  # [rows, P, K, n]
            maps[part] = reduced.view(*reduced.shape[:3], *size)
        return maps

    def _padded(
        self, prompts: Sequence[tuple[torch.Tensor, torch.Tensor]], sizes: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        """Prompts of different lengths as the graph's inputs; ``sizes`` are least sizes."""
        count = max(len(prompts), sizes.get("prompts", 1))
        tokens = max(sizes.get("attribution_tokens", 1), *(len(s) for s, _ in prompts), 1)
        concepts = max(sizes.get("concepts", 1), *(len(w) for _, w in prompts), 1)
        width = self.config["cross_attention_dim"]
        device = self.device
        states = torch.zeros(count, tokens, width, dtype=self.dtype, device=device)
        mask = torch.zeros(count, tokens, device=device)
        weights = torch.zeros(count, concepts, tokens, device=device)
        for place, (own, columns) in enumerate(prompts):
            states[place, : len(own)] = own.to(self.dtype)
            mask[place, : len(own)] = 1.0
            weights[place, : len(columns), : len(own)] = columns
        return {
            "attribution_hidden_states": states,
            "attribution_mask": mask,
            "concept_weights": weights,
        }

    def _check_prompts(self, states: Sequence[torch.Tensor]) -> None:
        width = self.config["cross_attention_dim"]
        for each in states:
            if each.shape[-1] != width:
                raise WrongModelError(
                    f"the engine takes text states of width {width}, the pipeline's text encoder "
                    f"gives {each.shape[-1]}: it was exported from another model"
                )

    def _check(
        self, inputs: Any, given: Mapping[str, torch.Tensor], fixed: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """Checks a call's shapes; returns dimension name -> size."""
        sizes = {
            dim: int(size)
            for each in inputs
            for dim, size in zip(each.shape, given[each.name].shape, strict=False)
            if isinstance(dim, str)
        }
        if fixed is None:
            check_sizes(self.manifest.shapes, inputs, given)
        elif wrong := {d: s for d, s in sizes.items() if s != fixed[d]}:
            raise ShapeError(
                f"the gradient graph has fixed sizes {dict(fixed)}, got {wrong}: export one with "
                "these"
            )
        return sizes

    def _gradient_file(
        self, height: int, width: int, fraction: float, temperature: float
    ) -> GradientFile:
        gradients = self.manifest.gradients
        for each in gradients:
            same = (each.fraction, each.temperature) == (fraction, temperature)
            if same and (each.sizes["height"], each.sizes["width"]) == (height, width):
                return each
        known = [
            f"{each.sizes['height']} x {each.sizes['width']} with fraction {each.fraction:g} and "
            f"temperature {each.temperature:g}"
            for each in gradients
        ]
        raise EngineError(
            f"{self.folder} has no gradient graph for latents of {height} x {width} with fraction "
            f"{fraction:g} and temperature {temperature:g}; there are: "
            f"{'; '.join(known) or 'none'}. Export with gradients=[Gradient({height}, {width})]"
        )


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and value != {}:
            raise EngineError(
                f"engines have no input for `{name}`; use the torch UNet for this pipeline"
            )
