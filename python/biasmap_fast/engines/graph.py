"""The graph that is exported: a UNet whose outputs are the noise prediction and attribution maps.

Attribution prompts come in as hidden states and concept weights, so one engine serves every
concept. Maps go out per UNet block: block IoU and the total both come from them, and six maps per
concept, as of SD 1.5, take 1/70 of the bytes of the attention probabilities they are made of.

Uses `reference`, never the custom ops: an operator that ONNX does not know cannot be exported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch.nn.functional import interpolate

from ..reference import attention
from ..unet import CrossAttention, cross_attention_layers
from .errors import UnsupportedUNetError
from .shapes import Dtype, Tensor, halved

Maps = Literal["reduced", "probabilities", "none"]
Convolutions = Literal["direct", "winograd"]

# Added to the scores of padding: exp(-1e4) is 0 in float32, and no infinity meets a subtraction.
_PADDING = 1e4


@dataclass(frozen=True)
class Layer:
    """A cross-attention layer of the graph."""

    name: str
    block: str
    level: int  # how often its resolution is the latents' halved
    heads: int


class AttributionGraph(torch.nn.Module):
    """UNet -> noise prediction and maps, with tensors as inputs and nothing else.

    Args:
        unet: a `UNet2DConditionModel` as `prepared` returns it.
        layers: the layers that are attributed.
        maps: ``"reduced"``: maps ``[B, P, blocks, K, H, W]`` float32 of P prompts, H and W those of
            the largest layer; ``"probabilities"``: ``[B, P, heads, T', n]`` float32 per layer;
            ``"none"``: the noise prediction alone.
    """

    unet: Any  # a submodule

    def __init__(self, unet: Any, layers: Sequence[CrossAttention], maps: Maps) -> None:
        super().__init__()
        self.unet = unet
        self.maps = maps
        self._layers = tuple(layers)
        levels = len(unet.config.down_block_types)
        self.layers = tuple(
            Layer(layer.name, layer.block, level_of(layer.block, levels), layer.heads)
            for layer in layers
        )
        self.blocks = tuple(dict.fromkeys(layer.block for layer in layers))
        self.multiple = 1 << (levels - 1)  # of heights and widths, so that levels halve evenly

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Inputs of `forward`, in order."""
        config, half = self.unet.config, self._dtype
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
        half = self._dtype
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
                    (
                        "batch",
                        "prompts",
                        layer.heads,
                        "attribution_tokens",
                        f"pixels >> {layer.level}",
                    ),
                )
                for layer in self.layers
            ),
        )

    @property
    def _dtype(self) -> Dtype:
        return str(self.unet.dtype).removeprefix("torch.")  # type: ignore[return-value]

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One UNet call; the arguments are `inputs`, the results `outputs`."""
        values = dict(zip((tensor.name for tensor in self.inputs), given, strict=True))
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
            maps = self._by_layer(seen, values)
        if self.maps == "probabilities":
            return (noise, *maps)
        return noise, self._by_block(maps)

    def _by_layer(
        self, seen: Mapping[str, Any], values: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:  # maps [B, P, K, h, w], or probabilities [B, P, heads, T', n]
        states, mask = values["attribution_hidden_states"], values["attribution_mask"]
        # Padding is replaced by a token of the prompt, so that no score is beyond the prompt's.
        states = torch.where(mask[..., None] > 0.0, states, states[:, :1])
        reduced = self.maps == "reduced"
        if reduced:
            weights = values["concept_weights"]
            sums = torch.cat([torch.ones_like(weights[:, :1]), weights], 1) * mask[:, None]
        else:
            bias = ((mask - 1.0) * _PADDING)[:, None, :, None]  # [P, 1, T', 1]
        by_layer = []
        for layer in self._layers:
            query, size = seen[layer.name]
            rows = layer.split_heads(query)[:, None]  # [B, 1, heads, n, d]
            keys = layer.keys(states)  # [P, heads, T', d]
            if reduced:
                maps = _concept_maps(rows, keys, sums)  # [B, P, K, n]
                by_layer.append(maps.unflatten(-1, size))  # type: ignore[no-untyped-call]
            else:
                by_layer.append(attention(rows, keys, bias))
        return by_layer

    def _by_block(self, by_layer: Sequence[torch.Tensor]) -> torch.Tensor:
        sums: dict[str, torch.Tensor] = {}
        levels: dict[str, int] = {}
        for layer, maps in zip(self.layers, by_layer, strict=True):
            levels[layer.block] = layer.level
            sums[layer.block] = sums[layer.block] + maps if layer.block in sums else maps
        finest = min(levels, key=lambda block: levels[block])
        height, width = sums[finest].shape[-2:]
        resized = [
            maps if levels[block] == levels[finest] else upsampled(maps, height, width)
            for block, maps in sums.items()
        ]
        return torch.stack(resized, dim=2)  # [B, P, blocks, K, H, W]


def attributed_layers(unet: Any, selection: Sequence[str] | None) -> list[CrossAttention]:
    """The layers that an engine of ``unet`` attributes; refuses what a graph cannot have.

    Raises:
        UnsupportedUNetError: the UNet is of another class, or has inputs that no engine has.
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
    return cross_attention_layers(SimpleNamespace(unet=unet), selection)


def prepared(unet: Any, dtype: torch.dtype, *, plain: bool) -> Any:
    """A copy of the UNet for an export, frozen, on the CPU; weights are shared where they can be.

    Args:
        unet: the UNet.
        dtype: type of the copy; in half types every norm and softmax is computed in float32.
        plain: write attention as products and a softmax, which half types, gradients and
            TensorRT-RTX need, instead of one operator.

    Raises:
        UnsupportedUNetError: an attention layer cannot be written so.
    """
    tensors = [*unet.parameters(), *unet.buffers()]
    memo: dict[int, Any] = {
        id(t): t.detach().to("cpu", dtype if t.is_floating_point() else t.dtype) for t in tensors
    }
    for parameter in unet.parameters():
        memo[id(parameter)] = torch.nn.Parameter(memo[id(parameter)], requires_grad=False)
    made = copy.deepcopy(unet, memo).eval()
    for module in made.modules():
        if dtype != torch.float32 and isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.float()
            module.register_forward_pre_hook(lambda norm, args: (args[0].float(),))
            module.register_forward_hook(lambda norm, args, out: out.to(dtype))
        elif (plain or dtype != torch.float32) and hasattr(module, "set_processor"):
            check_plain(module)
            module.set_processor(PlainAttention())
    return made


def _concept_maps(query: torch.Tensor, keys: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """`reference.concept_map` ``[B, P, K, n]`` as a quotient of sums of exponentials.

    A runtime's softmax over tokens, which are not the last dimension, turns the scores twice.
    ``query [B, 1, heads, n, d]``; ``keys [P, heads, T', d]``, divided by sqrt(d);
    ``sums [P, 1 + K, T']``: ones and then the concepts' weights, all 0 at padding.
    """
    scores = keys @ query.to(keys.dtype).transpose(-1, -2)  # [B, P, heads, T', n]
    highest = scores.detach().amax(-2, keepdim=True)  # divides out, and has no gradient
    exponentials = sums[:, None] @ (scores - highest).exp()  # [B, P, heads, 1 + K, n]
    return (exponentials[..., 1:, :] / exponentials[..., :1, :]).sum(2)


def upsampled(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`maps.resize` of a graph: ``[..., h, w]`` to ``[..., height, width]``.

    Two matrix products if a gradient is wanted: ONNX has no gradient of its resizing operator.
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
    pixels = torch.arange(source, dtype=torch.float32, device=device)
    return (1.0 - (at[:, None] - pixels).abs()).clamp(min=0.0)


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


def check_plain(attn: Any) -> None:
    """Refuses diffusers' `Attention` modules that `PlainAttention` cannot stand for."""
    if (
        attn.spatial_norm is not None
        or attn.group_norm is not None
        or attn.norm_q is not None
        or attn.norm_cross
        or attn.residual_connection
    ):
        raise UnsupportedUNetError(
            "engines in half precision, with gradients or for TensorRT-RTX know the attention of "
            "Stable Diffusion only, without norms of its own; export float32 to ONNX"
        )


class PlainAttention:
    """Attention of diffusers' `Attention` module as two products and a softmax in float32."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,  # [B, n, C]
        encoder_hidden_states: torch.Tensor | None = None,  # [B, T, D]
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One call of the layer; engines have no input for masks."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projection.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B, heads, n or T, d]
            for projection in (
                attn.to_q(hidden_states) * attn.scale,
                attn.to_k(source),
                attn.to_v(source),
            )
        )
        weights = (query @ key.transpose(-1, -2)).float().softmax(dim=-1).to(value.dtype)
        out = (weights @ value).transpose(1, 2).flatten(2)
        for module in attn.to_out:
            out = module(out)
        scaled: torch.Tensor = out / attn.rescale_output_factor
        return scaled
