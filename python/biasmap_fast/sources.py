"""Where attribution maps come from: the layers of a torch UNet, or the outputs of an engine.

Either source has ``parts``, attaches to the pipeline's UNet, hands over what a part shows in each
call, and adds the maps in it to sums. An engine is any UNet with ``attribution_parts`` and
``register_attribution_hook`` (`engines.runtime`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from .accumulate import ALL, By, PromptKeys, Rows, Size, add_heads, add_maps, prompt_keys
from .concepts import AttributionPrompt, TokenizedPrompt, encode, tokenize_all
from .unet import CrossAttention, cross_attention_layers

Receive = Callable[[Any, Any], None]  # a part, and what it shows in the UNet call now running
States = tuple[torch.Tensor, torch.Tensor]  # [T', D] hidden states, [K, T'] concept weights
_T = TypeVar("_T")


class AttributionCache:
    """What attribution prompts become in one pipeline, made once for recorders and guidances.

    For one pipeline, whose weights and adapters do not change or move meanwhile. What was used
    least recently goes when there are more than ``limit`` entries (two per prompt, one for prompts
    that are recorded together); at the shapes of SD 1.5 a prompt's keys take about 0.7 MB.

    Args:
        limit: Number of entries that are kept.

    Example:
        >>> import biasmap_fast as bm
        >>> pipe, cache = bm.testbed.pipeline(), AttributionCache()
        >>> prompt = bm.AttributionPrompt("a photo of a doctor and woman", ("doctor", "woman"))
        >>> for seed in (0, 1):
        ...     with bm.attribute(pipe, prompt, cache=cache) as recorder:
        ...         images = pipe("a photo of a doctor", num_inference_steps=1).images
        >>> len(cache)  # its tokens, its states, and the keys of all prompts together
        3
    """

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._entries: OrderedDict[Any, Any] = OrderedDict()
        self._pipe: dict[Any, Any] = {}  # what is known of the pipeline; not counted

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self._pipe.clear()

    def layers(self, pipe: Any, selection: Sequence[str] | None) -> list[CrossAttention]:
        """`cross_attention_layers` of the pipeline."""
        key = ("layers", None if selection is None else tuple(selection), type(selection))
        return self._of_pipe(key, lambda: cross_attention_layers(pipe, selection))

    def device(self, pipe: Any) -> torch.device:
        """Where the pipeline's networks run, wherever their weights wait."""
        # diffusers looks at every module to answer, so it is asked once
        device: torch.device = self._of_pipe(
            "device", lambda: getattr(pipe, "_execution_device", None) or pipe.unet.device
        )
        return device

    def tokens(self, pipe: Any, prompt: AttributionPrompt) -> list[TokenizedPrompt]:
        """`tokenize_all` of a prompt."""
        return self._entry(("tokens", prompt), lambda: tokenize_all(prompt, pipe))

    def states(self, pipe: Any, prompt: AttributionPrompt) -> States:
        """Hidden states ``[T', D]`` of a prompt, and its concept weights ``[K, T']``.

        Raises:
            ValueError: The pipeline's tokenizers split the prompt differently.
        """

        def make() -> States:
            tokenized = self.tokens(pipe, prompt)
            weights = tokenized[0].weights
            if any(not torch.equal(weights, other.weights) for other in tokenized[1:]):
                pieces = [list(tokens.pieces) for tokens in tokenized]
                raise ValueError(
                    f"the pipeline's tokenizers split the prompt differently: {pieces}"
                )
            dtype = self._of_pipe("dtype", lambda: pipe.unet.dtype)
            states = encode(tokenized, pipe, self.device(pipe)).to(dtype)[0]
            precision = torch.promote_types(states.dtype, torch.float32)
            return states, weights.to(self.device(pipe), precision)

        return self._entry(("states", prompt), make)

    def keys(
        self,
        pipe: Any,
        prompts: tuple[AttributionPrompt, ...],
        layers: Sequence[CrossAttention],
        *,
        apart: bool = False,
    ) -> PromptKeys:
        """`prompt_keys` of prompts with equal numbers of tokens and of concepts."""

        @torch.no_grad()
        def make() -> PromptKeys:
            made = [self.states(pipe, prompt) for prompt in prompts]
            states, weights = (torch.stack(tensors) for tensors in zip(*made, strict=True))
            return prompt_keys(
                weights,
                states,
                lambda states: {layer.name: layer.keys(states) for layer in layers},
                apart=apart,
            )

        return self._entry((prompts, tuple(layer.name for layer in layers), apart), make)

    def _entry(self, key: Any, make: Callable[[], _T]) -> _T:
        if key not in self._entries:
            self._entries[key] = make()
            if len(self._entries) > self._limit:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        entry: _T = self._entries[key]
        return entry

    def _of_pipe(self, key: Any, make: Callable[[], _T]) -> _T:
        if key not in self._pipe:
            self._pipe[key] = make()
        known: _T = self._pipe[key]
        return known


class LayerSource:
    """Maps of a torch UNet: its cross-attention layers show their queries ``[rows, n, C]``."""

    def __init__(
        self,
        pipe: Any,
        cache: AttributionCache,
        layers: Sequence[str] | None,
        by: tuple[By, ...] = ("total",),
    ) -> None:
        self.parts = cache.layers(pipe, layers)
        self._pipe, self._cache = pipe, cache
        self._per_head = by == ("head",)
        self.keys: list[PromptKeys] = []

    def attach(
        self,
        groups: Sequence[tuple[AttributionPrompt, ...]],
        receive: Receive,
        *,
        apart: bool = False,
    ) -> list[Any]:
        """Makes the keys of groups of prompts and has every layer's queries handed over."""
        apart = apart or self._per_head
        self.keys = [
            self._cache.keys(self._pipe, prompts, self.parts, apart=apart) for prompts in groups
        ]
        return [
            layer.module.to_q.register_forward_hook(_query_hook(receive, layer))
            for layer in self.parts
        ]

    def rows_and_size(
        self, part: CrossAttention, query: torch.Tensor, sizes: Mapping[int, Size]
    ) -> tuple[int, Size]:
        """Number of rows that a layer shows, and the height and width of its maps."""
        return query.shape[0], part.resolution(query, sizes)

    def add(
        self,
        part: CrossAttention,
        query: torch.Tensor,
        group: int,
        rows: Rows,
        sums: Sequence[torch.Tensor],
        images: Rows,
    ) -> None:
        """Adds a group's maps in some rows of a query to some images of sums."""
        if query.requires_grad:
            query = query.detach()
        query = query if rows is ALL else query[rows]
        add = add_heads if self._per_head else add_maps
        if isinstance(images, slice):
            targets = sums if images is ALL else [tensor[:, images] for tensor in sums]
            add(targets, query, self.keys[group], part.name)
            return
        # one sum of all prompts serves every target, except where each target is a head
        made = [
            torch.zeros_like(tensor[:, images]) for tensor in (sums if self._per_head else sums[:1])
        ]
        add(made, query, self.keys[group], part.name)
        for index, tensor in enumerate(sums):
            tensor[:, images] += made[index if self._per_head else 0][: len(tensor)]


class EngineSource:
    """Maps of an engine in the UNet's place: its outputs, ``[rows, K, h, w]`` of every prompt."""

    def __init__(
        self,
        pipe: Any,
        cache: AttributionCache,
        layers: Sequence[str] | None,
        by: tuple[By, ...] = ("total",),
    ) -> None:
        self.parts = pipe.unet.attribution_parts(layers, by)
        self._pipe, self._cache = pipe, cache
        self._starts: list[int] = []
        self.keys: list[PromptKeys] = []

    def attach(
        self, groups: Sequence[tuple[AttributionPrompt, ...]], receive: Receive
    ) -> list[Any]:
        """Has the maps of groups of prompts computed in every call and handed over."""
        prompts = [prompt for group in groups for prompt in group]
        self._starts = [sum(len(group) for group in groups[:index]) for index in range(len(groups))]

        def deliver(maps: Mapping[Any, Sequence[torch.Tensor]]) -> None:
            for part in self.parts:
                receive(part, maps[part])

        states = [self._cache.states(self._pipe, prompt) for prompt in prompts]
        return [self._pipe.unet.register_attribution_hook(states, deliver)]

    def rows_and_size(
        self, part: Any, maps: Sequence[torch.Tensor], sizes: Mapping[int, Size]
    ) -> tuple[int, Size]:
        """Number of rows that a part shows, and the height and width of its maps."""
        rows, _, height, width = maps[0].shape
        return rows, (height, width)

    @torch.no_grad()
    def add(
        self,
        part: Any,
        maps: Sequence[torch.Tensor],
        group: int,
        rows: Rows,
        sums: Sequence[torch.Tensor],
        images: Rows,
    ) -> None:
        """Adds a group's maps in some rows to some images of sums."""
        for tensor in sums:
            for index in range(len(tensor)):
                tensor[index, images] += maps[self._starts[group] + index][rows].flatten(-2)


def source_of(
    pipe: Any, cache: AttributionCache, layers: Sequence[str] | None, by: tuple[By, ...]
) -> LayerSource | EngineSource:
    """The source of a pipeline's maps.

    Raises:
        TypeError: The pipeline has no UNet, or one without cross-attention.
        ValueError: An unknown layer, or one whose maps cannot be had; an engine that does not keep
            apart what is asked for.
    """
    kind = LayerSource if engine_of(pipe) is None else EngineSource
    return kind(pipe, cache, layers, by)


def engine_of(pipe: Any) -> Any:
    """The pipeline's UNet if its own outputs are attribution maps (`engines`), else None."""
    unet = getattr(pipe, "unet", None)
    return unet if hasattr(unet, "register_attribution_hook") else None


def _query_hook(receive: Receive, layer: CrossAttention) -> Any:
    # Opaque to torch.compile: the sums are state that a compiled graph must not bake in.
    opaque = torch.compiler.disable(receive)  # type: ignore[no-untyped-call]

    def hook(module: torch.nn.Module, args: Any, query: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            opaque(layer, query)
        else:  # what makes it opaque takes as long as the rest of Python here
            receive(layer, query)

    return hook
