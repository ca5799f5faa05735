"""The graph that is exported: a UNet whose outputs are the noise prediction and attribution maps.

Attribution prompts come in as hidden states and concept weights, so one engine serves every
concept. Maps go out a UNet block at a time: block IoU and the total both come from them, and the
largest, six maps a concept for SD 1.5, is 1/70 of the attention probabilities they are made of.

Uses `reference`, never the custom ops: an operator that ONNX does not know cannot be exported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.functional import interpolate

from ..reference import attention, soft_topk
from ..unet import CrossAttention, cross_attention_layers
from .errors import UnsupportedUNetError
from .shapes import Tensor, area, halved

Maps = Literal["reduced", "probabilities", "none"]
Convolutions = Literal["direct", "winograd"]

# Added to the scores of padding: exp(-1e4) is 0 in float32, and no infinity meets a subtraction.
_PADDING = 1e4


@dataclass(frozen=True)
class Layer:
    """A cross-attention layer of the graph.

    Attributes:
        name: dotted name in the UNet.
        block: the UNet block it lies in.
        level: how often its resolution is the latents' halved.
        heads: number of attention heads.
    """

    name: str
    block: str
    level: int
    heads: int


class AttributionGraph(torch.nn.Module):
    """UNet -> noise prediction and maps, with tensors as inputs and nothing else.

    Args:
        unet: a `UNet2DConditionModel` in the engine's type, see `prepared`.
        layers: the layers that are attributed.
        maps: ``"reduced"``: maps ``[B, P, blocks, K, H, W]`` float32, of P prompts, H and W being
            the largest layer's;
            ``"probabilities"``: each layer's ``[B, P, heads, T', n]`` float32 instead;
            ``"none"``: the noise prediction alone.
    """

    unet: Any  # a submodule

    def __init__(self, unet: Any, layers: Sequence[CrossAttention], maps: Maps) -> None:
        super().__init__()
        self.unet = unet
        self.maps = maps
        self._layers = tuple(layers)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The attributed layers, in the order of their maps."""
        count = len(self.unet.config.down_block_types)
        return tuple(
            Layer(layer.name, layer.block, level_of(layer.block, count), layer.heads)
            for layer in self._layers
        )

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks of ``maps``, in order."""
        return tuple(dict.fromkeys(layer.block for layer in self._layers))

    @property
    def multiple(self) -> int:
        """What heights and widths must be multiples of, so that levels halve evenly."""
        return 1 << (len(self.unet.config.down_block_types) - 1)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The inputs of `forward`, in order."""
        config, half = self.unet.config, str(self.unet.dtype).removeprefix("torch.")
        width = config.cross_attention_dim
        inputs = [
            Tensor("sample", half, ("batch", config.in_channels, "height", "width")),
            Tensor("timestep", "float32", ("batch",)),
            Tensor("encoder_hidden_states", half, ("batch", "tokens", width)),
        ]
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim
            pooled -= 6 * config.addition_time_embed_dim
            inputs.append(Tensor("text_embeds", half, ("batch", pooled)))
            inputs.append(Tensor("time_ids", "float32", ("batch", 6)))
        if self.maps == "none":
            return tuple(inputs)
        states = ("prompts", "attribution_tokens", width)
        inputs.append(Tensor("attribution_hidden_states", half, states))
        inputs.append(Tensor("attribution_mask", "float32", ("prompts", "attribution_tokens")))
        if self.maps == "reduced":
            weights = ("prompts", "concepts", "attribution_tokens")
            inputs.append(Tensor("concept_weights", "float32", weights))
        return tuple(inputs)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """What `forward` returns, in order."""
        half = str(self.unet.dtype).removeprefix("torch.")
        noise = Tensor(
            "noise_pred", half, ("batch", self.unet.config.out_channels, "height", "width")
        )
        if self.maps == "none":
            return (noise,)
        if self.maps == "reduced":
            finest = min(layer.level for layer in self.layers)
            size = (halved("height", finest), halved("width", finest))
            shape = ("batch", "prompts", len(self.blocks), "concepts", *size)
            return (noise, Tensor("maps", "float32", shape))
        return (
            noise,
            *(
                Tensor(
                    f"probabilities.{layer.name}",
                    "float32",
                    ("batch", "prompts", layer.heads, "attribution_tokens", area(layer.level)),
                )
                for layer in self.layers
            ),
        )

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One UNet call; the arguments are `inputs`, the results `outputs`."""
        values = dict(zip((each.name for each in self.inputs), given, strict=True))
        added = {name: values[name] for name in ("text_embeds", "time_ids") if name in values}
        with _queries(self.unet, () if self.maps == "none" else self._layers) as seen:
            (noise,) = self.unet(
                values["sample"],
                values["timestep"],
                values["encoder_hidden_states"],
                added_cond_kwargs=added or None,
                return_dict=False,
            )
            if self.maps == "none":
                return (noise,)
            found = self._attributed(seen, values)
        if self.maps == "probabilities":
            return (noise, *found)
        return noise, self._by_block(found)

    def _attributed(
        self, seen: Mapping[str, Any], values: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Each layer's maps ``[B, P, K, h, w]``, or probabilities ``[B, P, heads, T', n]``."""
        states, mask = values["attribution_hidden_states"], values["attribution_mask"]
        # In the place of padding a token of the prompt, so that no score lies beyond the prompt's.
        states = torch.where(mask[..., None] > 0.0, states, states[:, :1])
        reduced = self.maps == "reduced"
        if reduced:
            weights = values["concept_weights"]
            sums = torch.cat([torch.ones_like(weights[:, :1]), weights], 1) * mask[:, None]
        else:
            bias = ((mask - 1.0) * _PADDING)[:, None, :, None]  # [P, 1, T', 1]
        found = []
        for layer in self._layers:
            query, size = seen[layer.name]
            rows = layer.split_heads(query)[:, None]  # [B, 1, heads, n, d]
            keys = layer.keys(states)  # [P, heads, T', d]
            if reduced:
                maps = _concept_maps(rows, keys, sums)  # [B, P, K, n]
                found.append(maps.unflatten(-1, size))  # type: ignore[no-untyped-call]
            else:
                found.append(attention(rows, keys, bias))
        return found

    def _by_block(self, found: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps of the layers as ``[B, P, blocks, K, H, W]`` at the largest layer's resolution."""
        sums: dict[str, torch.Tensor] = {}
        levels: dict[str, int] = {}
        for layer, maps in zip(self.layers, found, strict=True):
            levels[layer.block] = layer.level
            sums[layer.block] = sums[layer.block] + maps if layer.block in sums else maps
        finest = min(levels, key=lambda block: levels[block])
        height, width = sums[finest].shape[-2:]
        resized = [
            maps if levels[block] == levels[finest] else upsampled(maps, height, width)
            for block, maps in sums.items()
        ]
        return torch.stack(resized, dim=2)


class EnergyGraph(torch.nn.Module):
    """UNet -> noise prediction, maps, energy, SoftIoU of every two concepts, dE / d latents.

    ``E = sum over pairs of weight * SoftIoU``, the weights of any two concepts of any two prompts
    being an input ``pair_weights [1, P, K, P, K]``; padding has zeros there.
    """

    def __init__(self, graph: AttributionGraph, fraction: float, temperature: float) -> None:
        super().__init__()
        if graph.maps != "reduced":
            raise ValueError(f"energy needs maps='reduced', got {graph.maps!r}")
        self.graph = graph
        self.fraction = fraction
        self.temperature = temperature

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The inputs of `forward`, in order."""
        pairs = (1, "prompts", "concepts", "prompts", "concepts")
        return (*self.graph.inputs, Tensor("pair_weights", "float32", pairs))

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """What `forward` returns, in order."""
        pairs = ("batch", "prompts", "concepts", "prompts", "concepts")
        sample = self.graph.inputs[0].shape
        return (
            *self.graph.outputs,
            Tensor("energy", "float32", ("batch",)),
            Tensor("soft_iou", "float32", pairs),
            Tensor("gradient", "float32", sample),
        )

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One UNet call and its energy's gradient."""
        *others, pair_weights = given
        latents = others[0].detach().requires_grad_()
        with torch.enable_grad():
            noise, maps = self.graph(latents, *others[1:])
            total = maps.sum(dim=2).flatten(-2).flatten(1, 2)  # [B, P * K, N]
            masks = soft_topk(total, self.fraction, self.temperature)
            both = masks @ masks.transpose(-1, -2)  # [B, P * K, P * K]
            area = masks.sum(dim=-1)
            soft_iou = both / (area[..., :, None] + area[..., None, :] - both)
            soft_iou = soft_iou.reshape(-1, *pair_weights.shape[1:])  # [B, P, K, P, K]
            energy = (pair_weights * soft_iou).flatten(1).sum(dim=1)  # [B]
            # Images do not meet in the UNet: the gradient of the sum is each image's own.
            (gradient,) = torch.autograd.grad(energy.sum(), latents)
        found = (noise, maps, energy, soft_iou, gradient.float())
        return tuple(value.detach() for value in found)


def attributed_layers(unet: Any, selection: Sequence[str] | None) -> list[CrossAttention]:
    """The layers that an engine of ``unet`` attributes; refuses what a graph cannot have.

    Raises:
        UnsupportedUNetError: the UNet is of another class, or has inputs that the engine has not.
        ValueError: a layer is unknown or cannot be attributed.
    """
    from diffusers import UNet2DConditionModel

    if not isinstance(unet, UNet2DConditionModel):
        raise UnsupportedUNetError(f"expected a UNet2DConditionModel, got {type(unet).__name__}")
    config = unet.config
    known = {
        "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "time_cond_proj_dim": (None,),
        "encoder_hid_dim_type": (None,),
    }
    for name, expected in known.items():
        if getattr(config, name) not in expected:
            raise UnsupportedUNetError(
                f"engines have no input for {name}={getattr(config, name)!r}; expected "
                f"{' or '.join(map(repr, expected))}"
            )
    if not isinstance(config.cross_attention_dim, int):
        raise UnsupportedUNetError(
            f"expected one cross_attention_dim for all blocks, got {config.cross_attention_dim}"
        )
    return cross_attention_layers(_Holder(unet), selection)


@contextmanager
def prepared(unet: Any, dtype: torch.dtype) -> Iterator[Any]:
    """The UNet on the CPU in the engine's type: itself, frozen meanwhile, or a copy.

    Float32 islands lie around every norm and softmax of a half-precision copy.
    """
    unet = getattr(unet, "_orig_mod", unet)
    if dtype == torch.float32 and unet.dtype == torch.float32 and unet.device.type == "cpu":
        frozen = [p for p in unet.parameters() if p.requires_grad]
        training = unet.training
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            yield unet.eval()
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            unet.train(training)
        return
    made = copy.deepcopy(unet).to("cpu", dtype).eval().requires_grad_(False)
    if dtype != torch.float32:
        _add_islands(made)
    yield made


def _concept_maps(query: torch.Tensor, keys: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """`reference.concept_map` as a quotient of sums of exponentials.

    A runtime's softmax over tokens, which are no last dimension, turns the scores twice.

    Args:
        query: ``[B, 1, heads, n, d]``.
        keys: ``[P, heads, T', d]``, divided by sqrt(d).
        sums: ``[P, 1 + K, T']``, ones and then the concepts' weights, all 0 at padding.

    Returns:
        ``[B, P, K, n]`` in the keys' type.
    """
    scores = keys @ query.to(keys.dtype).transpose(-1, -2)  # [B, P, heads, T', n]
    highest = scores.detach().amax(-2, keepdim=True)  # divides out, and has no gradient
    found = sums[:, None] @ (scores - highest).exp()  # [B, P, heads, 1 + K, n]
    return (found[..., 1:, :] / found[..., :1, :]).sum(2)


def upsampled(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`maps.resize` of a graph: ``[..., h, w]`` to ``[..., height, width]``.

    Where a gradient is wanted, as two matrix products: ONNX has no operator for the other's.
    """
    if not maps.requires_grad:
        flat = maps.flatten(0, -4)  # [B, K, h, w]
        resized = interpolate(flat, size=(height, width), mode="bilinear", align_corners=False)
        return resized.view(*maps.shape[:-2], height, width)
    rows = _interpolation(height, maps.shape[-2], maps.device)  # [height, h]
    columns = _interpolation(width, maps.shape[-1], maps.device)  # [width, w]
    return rows @ maps @ columns.transpose(0, 1)


def _interpolation(size: int, source: int, device: torch.device) -> torch.Tensor:
    """Bilinear weights ``[size, source]`` for size >= source, pixel centres aligned."""
    at = torch.arange(size, dtype=torch.float32, device=device)
    at = (at + 0.5) * (source / size) - 0.5
    at = at.clamp(min=0.0).minimum(torch.full_like(at, 1.0) * (source - 1))
    places = torch.arange(source, dtype=torch.float32, device=device)
    return (1.0 - (at[:, None] - places).abs()).clamp(min=0.0)


@dataclass(frozen=True)
class _Holder:
    """What `cross_attention_layers` looks at of a pipeline."""

    unet: Any


def level_of(name: str, count: int) -> int:
    """How often the latents are halved where a block or module of a UNet of ``count`` levels is.

    Example:
        >>> level_of("up_blocks.1", 4), level_of("up_blocks.1.upsamplers.0.conv", 4)
        (2, 1)
    """
    kind, *rest = name.split(".")
    if kind == "mid_block":
        return count - 1
    if kind == "down_blocks":
        return int(rest[0])
    if kind == "up_blocks":
        return max(count - 1 - int(rest[0]) - ("upsamplers" in rest), 0)
    return 0


@contextmanager
def _queries(unet: Any, layers: Sequence[CrossAttention]) -> Iterator[dict[str, Any]]:
    """Layer -> (query, (h, w)) of the forward pass inside the block."""
    seen: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    handles = []

    def keep_size(name: str, module: Any, args: Any) -> None:
        sizes[name] = args[0].shape[-2:]

    def keep_query(name: str, around: str, module: Any, args: Any, query: torch.Tensor) -> None:
        seen[name] = (query, sizes[around])

    try:
        for layer in layers:
            around = layer.name.partition(".transformer_blocks.")[0]
            transformer = unet.get_submodule(around)
            handles.append(transformer.register_forward_pre_hook(partial(keep_size, around)))
            hook = partial(keep_query, layer.name, around)
            handles.append(layer.module.to_q.register_forward_hook(hook))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        seen.clear()  # a traced pass must not leave its fake tensors behind


def _add_islands(unet: Any) -> None:
    for module in unet.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.float()
            module.register_forward_pre_hook(lambda norm, args: (args[0].float(),))
            module.register_forward_hook(lambda norm, args, out, dtype=unet.dtype: out.to(dtype))
        elif hasattr(module, "set_processor"):
            module.set_processor(_SoftmaxIsland())


class _SoftmaxIsland:
    """Attention of diffusers' `Attention` module with its softmax in float32."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,  # [B, n, C]
        encoder_hidden_states: torch.Tensor | None = None,  # [B, T, D]
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        plain = (
            attention_mask is None
            and attn.spatial_norm is None
            and attn.group_norm is None
            and not attn.norm_cross
            and not attn.residual_connection
        )
        if not plain:
            raise UnsupportedUNetError(
                "half-precision engines know the attention of Stable Diffusion only, without mask "
                "and norms of its own; export float32"
            )
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        split = (
            projection.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B, heads, n or T, d]
            for projection in (
                attn.to_q(hidden_states) * attn.scale,
                attn.to_k(source),
                attn.to_v(source),
            )
        )
        query, key, value = split
        weights = (query @ key.transpose(-1, -2)).float().softmax(dim=-1).to(value.dtype)
        out = (weights @ value).transpose(1, 2).flatten(2)
        for module in attn.to_out:
            out = module(out)
        scaled: torch.Tensor = out / attn.rescale_output_factor
        return scaled
