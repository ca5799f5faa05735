"""Attribution maps of concepts, recorded while a diffusers pipeline draws.

Per UNet call and cross-attention layer l with query q_l and the attribution prompt's keys k'_l,
``A = softmax(q_l k'_l^T / sqrt(d))`` over the T' tokens; a concept's column is the sum over its
pieces; columns are summed over heads, calls and layers (BiasMap, arXiv 2509.13496, after OVAM).
Sums and bilinear resizing are linear, so the recorder adds per resolution, in place, and resizes
once at the end: what it holds does not grow with steps or layers.

The query is seen by a forward hook on each layer's ``to_q``, whatever attention processor runs.
The hook changes nothing, so pictures stay bit-identical. Where the UNet is an engine, its own
outputs are the maps, and the recorder only adds them up.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, get_args

import torch

from .concepts import AttributionPrompt, TokenizedPrompt, encode, tokenize_all
from .denoiser import probing
from .groups import ConceptMaps, Group, GroupKeys, group_keys, grouped
from .maps import AttributionMaps, resize
from .reference import concept_map
from .unet import (
    CrossAttention,
    as_slice,
    batch_layout,
    branch_rows,
    check_text,
    cross_attention_layers,
    engine_of,
    guider_of,
    resolutions,
    rows_here,
)

Branch = Literal["cond", "uncond"]
By = Literal["total", "block", "layer", "step", "head"]
_BY = get_args(By)
_Place = tuple[int, By, str]
_ALL = slice(None)
_T = TypeVar("_T")


def attribute(
    pipe: Any,
    prompts: AttributionPrompt
    | Sequence[AttributionPrompt]
    | Sequence[Sequence[AttributionPrompt]],
    *,
    branch: Branch = "cond",
    layers: Sequence[str] | None = None,
    by: By | Sequence[By] = "total",
    size: int | tuple[int, int] | None = None,
    chunks: int | None = None,
    detailed: Collection[str] | None = None,
    cache: AttributionCache | None = None,
) -> Recorder:
    """Records attribution maps of every picture drawn inside a ``with`` block.

    Args:
        pipe: any diffusers pipeline for pictures with a UNet and CLIP text encoders (Stable
            Diffusion 1.x, 2.x, SDXL, and their img2img, inpainting, ControlNet and
            InstructPix2Pix forms): the one that draws, for it says how its UNet's batch is laid
            out.
        prompts: one attribution prompt, or several; several share the UNet's queries, so each
            more costs little. They need not be the prompts that draw the pictures. Or a sequence
            of prompts for each image of the batch, in batch order, which then are measured on
            that image alone.
        branch: the part of the classifier-free-guidance batch whose queries count: ``"cond"``, or
            ``"uncond"`` as in the published code.
        layers: names or name prefixes of cross-attention layers (``"up_blocks"``,
            ``"down_blocks.1.attentions.0"``); default every one of the down and up blocks, without
            the mid block.
        by: what to keep apart beside the total: nothing (``"total"``), UNet blocks, layers, heads
            of each layer, or UNet calls (``"step"``: the one choice whose memory grows with steps).
            Several of them but ``"head"`` cost little more than one; `Recorder.maps` then takes
            which.
        size: height and width of the maps (an int for a square); default the largest layer's.
        chunks: how many guidance chunks the UNet's batch has; default asks the pipeline. Needed
            where the pipeline does not say (semantic guidance), or where the UNet is called by
            hand.
        detailed: names of the prompts of which everything in ``by`` is kept; of the others only
            the first of it is. Default all.
        cache: keeps what prompts become, for further recorders of the same, unchanged model.

    Returns:
        A context manager; `Recorder.maps` gives the result, also after the block has ended.

    Raises:
        TypeError: ``pipe`` has no UNet or no CLIP text encoder.
        ValueError: an unknown ``branch``, ``by`` or layer, a layer that cannot be handled, two
            prompts of one name, a concept that is not in its prompt, a name in ``detailed`` that
            no prompt has; at the first UNet call, prompts for another number of images than are
            drawn, ``clip_skip``, a LoRA scaled by ``cross_attention_kwargs``, a video's latents.

    Example:
        >>> import torch, biasmap_fast as bm
        >>> pipe = bm.testbed.pipeline()
        >>> prompt = bm.AttributionPrompt("a photo of a doctor and woman", ("doctor", "woman"))
        >>> with bm.attribute(pipe, prompt) as recorder:
        ...     images = pipe("a photo of a doctor", num_inference_steps=2).images
        >>> recorder.maps().values.shape
        torch.Size([1, 2, 16, 16])
    """
    return Recorder(
        pipe,
        prompts,
        branch=branch,
        layers=layers,
        by=by,
        size=size,
        chunks=chunks,
        detailed=detailed,
        cache=cache,
    )


@dataclass
class _Run:
    """The sums of one pipeline call."""

    images: int  # B
    calls: int = 0
    largest: tuple[int, int] = (0, 0)  # of the resolutions in ``sums``
    # (number of the group, by, part) -> (h, w) -> sum [P, b, K, h * w], float32; P' of what is
    # kept of detailed prompts alone
    sums: dict[_Place, dict[tuple[int, int], torch.Tensor]] = field(default_factory=dict)
    # (number of the group, layer, (h, w)) -> those it adds to; None for one of the call alone
    lasting: dict[tuple[int, str, tuple[int, int]], list[torch.Tensor | None]] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class _Located:
    """Where a group's images are in the pass now running."""

    group: int
    taken: slice | list[int]  # places in the pass
    rows: slice | list[int]  # of the group's sums


@dataclass(frozen=True)
class AttributionKeys:
    """One prompt, ready to meet the queries of a UNet."""

    weights: torch.Tensor  # [K, T'], on the UNet's device
    by_layer: Mapping[str, torch.Tensor]  # [heads, T', d] >= float32, times 1 / sqrt(d)


@torch.no_grad()
def attribution_keys(
    pipe: Any,
    layers: Sequence[CrossAttention],
    tokenized: Sequence[TokenizedPrompt],
    placement: Placement | None = None,
) -> AttributionKeys:
    """Attribution keys of every layer, k' = to_k(X') / sqrt(d): needed once, whatever the steps.

    Args:
        pipe: the pipeline whose text encoders and UNet are used.
        layers: the layers wanted.
        tokenized: the prompt as each of the pipeline's tokenizers sees it.
        placement: of the pipeline; default asks it.

    Raises:
        ValueError: the tokenizers split the prompt differently.
    """
    states, weights = attribution_states(pipe, tokenized, placement)
    by_layer = {layer.name: layer.keys(states[None])[0] for layer in layers}
    return AttributionKeys(weights, by_layer)


@torch.no_grad()
def attribution_states(
    pipe: Any,
    tokenized: Sequence[TokenizedPrompt],
    placement: Placement | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``[T', D]`` of one prompt and its concept weights ``[K, T']``.

    Raises:
        ValueError: the tokenizers split the prompt differently.
    """
    weights = tokenized[0].weights
    if any(not torch.equal(weights, other.weights) for other in tokenized[1:]):
        pieces = [list(tokens.pieces) for tokens in tokenized]
        raise ValueError(f"the pipeline's tokenizers split the prompt differently: {pieces}")
    placement = placement or Placement(pipe)
    states = encode(tokenized, pipe, placement.device).to(placement.dtype)[0]
    precision = torch.promote_types(states.dtype, torch.float32)
    return states, weights.to(placement.device, precision)


class Placement:
    """Where a pipeline's networks run, and in what type.

    diffusers looks at every module to say either: it is asked once, if at all.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    @cached_property
    def device(self) -> torch.device:
        """Of the networks that run, wherever their weights wait."""
        found: torch.device = getattr(self._pipe, "_execution_device", None) or (
            self._pipe.unet.device
        )
        return found

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the UNet."""
        found: torch.dtype = self._pipe.unet.dtype
        return found


class AttributionCache:
    """Attribution keys and states of prompts, made once for many recorders and guidances.

    Of one pipeline, whose weights and adapters do not change or move meanwhile. What was used
    least recently goes when there are more than ``limit`` entries (two a prompt, one for prompts
    that are recorded together); at the shapes of SD 1.5 a prompt's keys take about 0.7 MB.

    Args:
        limit: how many entries are kept.

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
        self._kept: OrderedDict[Any, Any] = OrderedDict()
        self._of_pipe: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(
        self,
        prompt: AttributionPrompt | tuple[AttributionPrompt, ...],
        what: Any,
        make: Callable[[], _T],
    ) -> _T:
        """What was made of a prompt before, or ``make()``; ``what`` says what it is."""
        key = (prompt, what)
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        found: _T = self._kept[key]
        return found

    def of_pipe(self, what: Any, make: Callable[[], _T]) -> _T:
        """What was found of the pipeline before, or ``make()``; stays, and is not counted."""
        if what not in self._of_pipe:
            self._of_pipe[what] = make()
        found: _T = self._of_pipe[what]
        return found


def tokens_of(
    cache: AttributionCache | None, prompt: AttributionPrompt, pipe: Any
) -> list[TokenizedPrompt]:
    """`concepts.tokenize_all`, from the cache where there is one."""
    if cache is None:
        return tokenize_all(prompt, pipe)
    return cache.get(prompt, "tokens", lambda: tokenize_all(prompt, pipe))


def placement_of(cache: AttributionCache | None, pipe: Any) -> Placement:
    """Of the pipeline, from the cache where there is one."""
    return Placement(pipe) if cache is None else cache.of_pipe("placement", lambda: Placement(pipe))


def layers_of(
    cache: AttributionCache | None, pipe: Any, selection: Sequence[str] | None
) -> list[CrossAttention]:
    """`cross_attention_layers`, from the cache where there is one."""
    make = partial(cross_attention_layers, pipe, selection)
    if cache is None:
        return make()
    return cache.of_pipe(("layers", selection if selection is None else tuple(selection)), make)


def cached_keys(
    cache: AttributionCache | None,
    pipe: Any,
    layers: Sequence[CrossAttention],
    tokenized: Sequence[TokenizedPrompt],
    placement: Placement,
) -> AttributionKeys:
    """`attribution_keys`, from the cache where there is one."""
    make = partial(attribution_keys, pipe, layers, tokenized, placement)
    if cache is None:
        return make()
    return cache.get(tokenized[0].prompt, tuple(layer.name for layer in layers), make)


def cached_states(
    cache: AttributionCache | None,
    pipe: Any,
    tokenized: Sequence[TokenizedPrompt],
    placement: Placement,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attribution_states`, from the cache where there is one."""
    make = partial(attribution_states, pipe, tokenized, placement)
    return make() if cache is None else cache.get(tokenized[0].prompt, "states", make)


class Recorder:
    """Records attribution maps between ``__enter__`` and ``__exit__``; made by `attribute`.

    Several pipeline calls inside one block are stacked along the batch in the order they drew.
    Entering again after the block starts afresh. Recorders may be nested on one pipeline.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: AttributionPrompt
        | Sequence[AttributionPrompt]
        | Sequence[Sequence[AttributionPrompt]],
        *,
        branch: Branch = "cond",
        layers: Sequence[str] | None = None,
        by: By | Sequence[By] = "total",
        size: int | tuple[int, int] | None = None,
        chunks: int | None = None,
        detailed: Collection[str] | None = None,
        cache: AttributionCache | None = None,
    ) -> None:
        if branch not in ("cond", "uncond"):
            raise ValueError(f"`branch` must be 'cond' or 'uncond', got {branch!r}")
        self._by = _checked_by(by)
        if chunks is not None and chunks < 1:
            raise ValueError(f"`chunks` must be at least 1, got {chunks}")
        self._single = isinstance(prompts, AttributionPrompt)
        self._prompts, images, self._expected = _prompts_and_images(prompts)
        self._pipe = pipe
        self._engine = engine_of(pipe)
        # an engine's parts are named blocks or layers, and need no queries
        self._layers: list[Any] = (
            layers_of(cache, pipe, layers)
            if self._engine is None
            else self._engine.attribution_parts(layers, self._by)
        )
        self._branch = branch
        self._size = _checked_size(size)
        self._chunks = chunks
        self._cache = cache
        self._tokenized = [tokens_of(cache, prompt, pipe) for prompt in self._prompts]
        weights = [tokens[0].weights for tokens in self._tokenized]  # [K, T'] each
        known = [prompt.name for prompt in self._prompts]
        if unknown := sorted(set(detailed or ()).difference(known)):
            raise ValueError(f"no attribution prompt is called {unknown}; there are: {known}")
        self._groups = grouped(
            [(len(own), own.shape[1]) for own in weights],
            images,
            [detailed is None or name in detailed for name in known],
        )
        self._keys: list[GroupKeys] = []
        self._adding = ConceptMaps()
        self._handles: list[Any] = []
        self._runs: list[_Run] = []
        self._interrupted: str | None = None
        self._timesteps: Any = None
        self._batch = 0
        self._rows = slice(0, 0)
        self._other_branch = False  # a guider's call that is not of the attributed branch
        # layer -> images of this call: recomputation under checkpointing must not count twice
        self._seen: dict[str, frozenset[int]] = {}
        # (places in the pass and images, images of the run) -> those images, and the same by group
        self._located: dict[
            tuple[tuple[tuple[int, int], ...], int], tuple[frozenset[int], list[_Located]]
        ] = {}
        self._resolutions: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("this recorder is already recording; make another to nest them")
        self._runs, self._interrupted, self._timesteps = [], None, None
        unet, placement = self._pipe.unet, placement_of(self._cache, self._pipe)
        if self._engine is not None:
            prompts = [
                cached_states(self._cache, self._pipe, tokens, placement)
                for tokens in self._tokenized
            ]
            self._handles.append(self._engine.register_attribution_hook(prompts, self._add_parts))
        else:
            self._keys += [self._group_keys(group, placement) for group in self._groups]
            for layer in self._layers:
                hook = self._query_hook(layer)
                self._handles.append(layer.module.to_q.register_forward_hook(hook))
        self._handles.append(unet.register_forward_pre_hook(self._before_call, with_kwargs=True))
        return self

    @torch.no_grad()
    def _group_keys(self, group: Group, placement: Placement) -> GroupKeys:
        """A group's keys, from the cache where there is one."""

        def make() -> GroupKeys:
            found = [
                cached_states(self._cache, self._pipe, self._tokenized[index], placement)
                for index in group.prompts
            ]
            states, weights = (torch.stack(each) for each in zip(*found, strict=True))
            return group_keys(
                weights,
                states,
                lambda states: {layer.name: layer.keys(states) for layer in self._layers},
                apart=self._by == ("head",),
            )

        if self._cache is None:
            return make()
        prompts = tuple(self._prompts[index] for index in group.prompts)
        layers = tuple(layer.name for layer in self._layers)
        return self._cache.get(prompts, (layers, self._by == ("head",)), make)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._keys.clear()
        self._timesteps = None
        if kind is not None:
            self._interrupted = kind.__name__

    def maps(self, by: By | None = None) -> AttributionMaps | dict[str, AttributionMaps]:
        """The maps of every picture drawn so far.

        Args:
            by: what to keep apart, of what was recorded; default the first of it.

        Returns:
            One `AttributionMaps` where one prompt was given, else a dict keyed by prompt name, of
            the prompts of which ``by`` was kept.
            Where each image had prompts of its own, `AttributionMaps.images` says which images
            those of a prompt are.

        Raises:
            RuntimeError: nothing was drawn, or an exception ended the block, so that the maps
                would be those of unfinished pictures.
            ValueError: calls of different map sizes, and no ``size`` to bring them to; or what was
                not recorded is asked for.
        """
        wanted = self._by[0] if by is None else by
        if wanted not in self._by:
            raise ValueError(f"maps were recorded by {' and '.join(self._by)}, not by {by!r}")
        if self._interrupted is not None:
            raise RuntimeError(
                f"the block ended with {self._interrupted}: its maps are incomplete and not given"
            )
        if not self._runs:
            raise RuntimeError("no UNet call was recorded: draw inside the `with` block first")
        self._check_complete()
        found: dict[int, AttributionMaps] = {}
        for number in range(len(self._groups)):
            found.update(self._results(number, wanted))
        if self._single and not found:
            raise ValueError(f"maps by {wanted!r} were not kept: `detailed` names no prompt")
        if self._single:
            return found[0]
        return {self._prompts[index].name: found[index] for index in sorted(found)}

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the recorded layers."""
        return tuple(name for layer in self._layers for name in layer.layers)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held now: ``"maps"`` (per image, independent of steps unless by step), ``"keys"``.

        The keys depend on the prompts and the model alone and are freed at the end of the block.
        """
        sums = [t for run in self._runs for part in run.sums.values() for t in part.values()]
        keys = [key for own in self._keys for key in own.tensors()]
        return {"maps": sum(t.nbytes for t in sums), "keys": sum(t.nbytes for t in keys)}

    def _before_call(self, unet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Notes the latents' size and the guided batch's layout before each UNet call."""
        if probing.get():
            return
        guider = guider_of(self._pipe)
        self._other_branch = guider is not None and guider.is_conditional != (
            self._branch == "cond"
        )
        if self._other_branch:
            return
        sample = args[0] if args else kwargs["sample"]  # [chunks * B, C, H, W]
        timesteps = getattr(getattr(self._pipe, "scheduler", None), "timesteps", None)
        # `set_timesteps` makes a new tensor in every pipeline call.
        begins = not self._runs or timesteps is not self._timesteps
        self._check_complete()
        if begins or sample.shape[0] != self._batch:
            check_text(self._pipe, kwargs)
            layout = batch_layout(self._pipe, self._chunks)
            latents = sample[:, : unet.config.out_channels]
            self._rows = branch_rows(latents, layout, self._branch, separate=guider is not None)
            self._batch = sample.shape[0]
        images = self._rows.stop - self._rows.start
        if self._expected not in (None, images):
            raise ValueError(
                f"attribution prompts are given for {self._expected} images, and the UNet draws "
                f"{images}"
            )
        if begins:
            self._timesteps = timesteps
            self._runs.append(_Run(images))
        run = self._runs[-1]
        if images != run.images:
            raise RuntimeError(
                f"the number of images changed from {run.images} to {images} in the middle of a "
                "run; record UNet calls of different batches in separate `with` blocks"
            )
        self._resolutions = resolutions(sample.shape[-2], sample.shape[-1])
        self._seen.clear()
        run.calls += 1

    def _check_complete(self) -> None:
        """Refuses a UNet call in which a layer did not show its queries: its maps would lack it."""
        if not self._runs:
            return
        for layer in self._layers:
            if len(self._seen.get(layer.name, ())) < self._runs[-1].images:
                raise RuntimeError(
                    f"layer {layer.name} was not seen in UNet call {self._runs[-1].calls - 1}: it "
                    "was skipped, or the UNet was compiled and run before recording began (then "
                    "call torch.compiler.reset() first)"
                )

    def _query_hook(self, layer: CrossAttention) -> Any:
        # Opaque to torch.compile: the sums are state that a compiled graph must not bake in.
        opaque = torch.compiler.disable(self._add)  # type: ignore[no-untyped-call]

        def hook(module: torch.nn.Module, args: Any, query: torch.Tensor) -> None:
            if torch.compiler.is_compiling():
                opaque(layer, query)
            else:  # what makes it opaque takes as long as the rest of Python here
                self._add(layer, query)

        return hook

    def _add(self, layer: CrossAttention, query: torch.Tensor) -> None:
        """Adds one layer's concept maps of the attributed branch: query ``[rows, n, C]``."""
        if self._other_branch or probing.get():
            return
        if query.requires_grad:
            query = query.detach()
        size = layer.resolution(query, self._resolutions)
        for located in self._fresh(layer.name, query.shape[0]):
            own = query if located.taken is _ALL else query[located.taken]
            keys = self._keys[located.group]
            if self._by == ("head",):
                self._add_heads(located, layer, own, size)
                continue
            sums = self._sums(located.group, layer, size, keys.weights)
            place = located.rows
            if place is _ALL:
                self._adding.add(sums, own, keys, layer.name)
            elif isinstance(place, slice):
                self._adding.add([each[:, place] for each in sums], own, keys, layer.name)
            else:
                found = torch.zeros_like(sums[0][:, place])
                self._adding.add([found], own, keys, layer.name)
                for each in sums:
                    each[:, place] += found[: len(each)]

    def _add_heads(
        self, located: _Located, layer: CrossAttention, own: torch.Tensor, size: tuple[int, int]
    ) -> None:
        run, attributed = self._runs[-1], self._keys[located.group]
        rows = layer.split_heads(own)  # [b, heads, n, d]
        for index, weights in enumerate(attributed.weights):
            keys = attributed.by_layer[layer.name][index]
            found = concept_map(rows, keys, weights, per_head=True)  # [b, heads, K, n]
            for head in range(layer.heads):
                part: _Place = (located.group, "head", f"{layer.name}:{head}")
                self._sum(run, part, size, weights)[index, located.rows] += found[:, head]

    @torch.no_grad()
    def _add_parts(self, found: Mapping[Any, Sequence[torch.Tensor]]) -> None:
        """Adds an engine's maps: part -> for every prompt ``[rows, K, h, w]``."""
        if self._other_branch or probing.get():
            return
        for part in self._layers:
            for located in self._fresh(part.name, found[part][0].shape[0]):
                for index, prompt in enumerate(self._groups[located.group].prompts):
                    maps = found[part][prompt]
                    size = (maps.shape[-2], maps.shape[-1])
                    for sums in self._sums(located.group, part, size, maps):
                        if index < len(sums):
                            sums[index, located.rows] += maps[located.taken].flatten(-2)

    def _fresh(self, name: str, seen: int) -> list[_Located]:
        """Of every group, its images that were not yet counted for a layer."""
        fresh = rows_here(self._rows, self._batch, seen)
        counted = self._seen.get(name)
        if counted is not None:
            fresh = tuple(each for each in fresh if each[1] not in counted)
        images = self._runs[-1].images
        if (fresh, images) not in self._located:
            self._located[fresh, images] = (
                frozenset(image for _, image in fresh),
                [
                    _Located(
                        number,
                        _indices([place for place, _ in own], seen),
                        _indices([row for _, row in own], group.rows(images)),
                    )
                    for number, group in enumerate(self._groups)
                    if (own := group.mine(fresh))
                ],
            )
        now, located = self._located[fresh, images]
        self._seen[name] = now if counted is None else counted | now
        return located

    def _sums(
        self, group: int, layer: Any, size: tuple[int, int], like: torch.Tensor
    ) -> list[torch.Tensor]:
        """The sums that one layer's maps of a group belong to, of everything kept apart."""
        run = self._runs[-1]
        key = (group, layer.name, size)
        if key not in run.lasting:
            names: dict[By, str] = {"total": "", "block": layer.block, "layer": layer.name}
            run.lasting[key] = [
                None if by == "step" else self._sum(run, (group, by, names[by]), size, like)
                for by in (self._by if self._groups[group].detailed else self._by[:1])
            ]
        step: _Place = (group, "step", str(run.calls - 1))
        return [
            self._sum(run, step, size, like) if sums is None else sums for sums in run.lasting[key]
        ]

    def _sum(
        self, run: _Run, part: _Place, resolution: tuple[int, int], like: torch.Tensor
    ) -> torch.Tensor:
        """The sum of one group's part at one resolution, ``[P, b, K, n]``, where ``like`` is.

        P counts the prompts that it is kept of: all, or the detailed ones.
        """
        by_resolution = run.sums.setdefault(part, {})
        if resolution not in by_resolution:
            group = self._groups[part[0]]
            prompts = len(group.prompts) if part[1] == self._by[0] else group.detailed
            shape = (prompts, group.rows(run.images), group.concepts)
            pixels = resolution[0] * resolution[1]
            by_resolution[resolution] = torch.zeros((*shape, pixels), device=like.device)
            run.largest = max(run.largest, resolution)
        return by_resolution[resolution]

    def _results(self, number: int, by: By) -> dict[int, AttributionMaps]:
        """The maps of a group's prompts of which ``by`` was kept, by their places."""
        group = self._groups[number]
        kept = group.prompts if by == self._by[0] else group.prompts[: group.detailed]
        if not kept:
            return {}
        sizes = {run.largest for run in self._runs}
        if len(sizes) > 1 and self._size is None:
            raise ValueError(
                f"the recorded pipeline calls have maps of different sizes {sorted(sizes)}; "
                "give attribute(..., size=) one to bring them to"
            )
        names: dict[str, None] = {}
        for run in self._runs:
            names.update({part: None for *own, part in run.sums if own == [number, by]})
        places = [(number, by, name) for name in names]
        runs = [self._resized(run, places) for run in self._runs]
        whole = torch.cat(runs, dim=2) if len(runs) > 1 else runs[0]  # [S, P, B, K, H, W]
        totals = whole.sum(0)
        found = {}
        for row, index in enumerate(kept):
            prompt = self._prompts[index]
            found[index] = AttributionMaps(
                values=totals[row],  # [B, K, H, W]
                concepts=prompt.concepts,
                prompt=prompt.text,
                branch=self._branch,
                layers=self.layers,
                by=by,
                parts={} if by == "total" else dict(zip(names, whole[:, row], strict=True)),
                images=self._images(group),
            )
        return found

    def _images(self, group: Group) -> tuple[int, ...] | None:
        """The images of a group over all pipeline calls."""
        if group.images is None:
            return None
        ends = list(itertools.accumulate(run.images for run in self._runs))
        starts = [0, *ends[:-1]]
        return tuple(start + image for start in starts for image in group.images)

    def _resized(self, run: _Run, parts: Sequence[_Place]) -> torch.Tensor:
        """Parts of a group's prompts, ``[S, P, b, K, H, W]``.

        Sums are resized to the largest resolution, and what they add up to is brought to ``size``.
        """
        for part in parts:
            if part not in run.sums:
                raise ValueError(
                    f"pipeline calls with different numbers of steps have no common part "
                    f"{part[2]!r}; record them separately to keep steps apart"
                )
        alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for number, part in enumerate(parts):
            alike.setdefault(tuple(run.sums[part]), []).append(number)
        totals = []
        for sizes, numbers in alike.items():
            found = []
            for size in sizes:
                own = torch.stack([run.sums[parts[number]][size] for number in numbers])
                maps = own.view(-1, own.shape[3], *size)  # [s * P * b, K, h, w]
                found.append(resize(maps, run.largest))
            total = resize(torch.stack(found).sum(0), self._size or run.largest)
            totals.append(total.view(*own.shape[:4], *total.shape[-2:]))
        if len(totals) == 1:
            return totals[0]
        order = torch.tensor(list(itertools.chain.from_iterable(alike.values()))).argsort()
        return torch.cat(totals)[order]


def _prompts_and_images(
    given: AttributionPrompt | Sequence[AttributionPrompt] | Sequence[Sequence[AttributionPrompt]],
) -> tuple[tuple[AttributionPrompt, ...], list[tuple[int, ...] | None], int | None]:
    """Each prompt once, the images that it is for, and of how many; ``None`` for any.

    Raises:
        TypeError: something else than attribution prompts.
        ValueError: none, or different prompts of one name.
    """
    if isinstance(given, AttributionPrompt):
        return (given,), [None], None
    if not given:
        raise ValueError("expected at least one attribution prompt, got an empty sequence")
    each: list[Any] = list(given)
    nested = [own for own in each if isinstance(own, (list, tuple))]
    if len(nested) not in (0, len(each)):
        raise TypeError(
            "expected attribution prompts, or a sequence of them for each image, got both mixed"
        )
    listed = list(itertools.chain.from_iterable(nested)) if nested else each
    for prompt in listed:
        if not isinstance(prompt, AttributionPrompt):
            raise TypeError(
                f"expected an AttributionPrompt, got {type(prompt).__name__} {prompt!r}; write "
                'AttributionPrompt("text", concepts=("word", ...))'
            )
    images: dict[AttributionPrompt, list[int]] = {}
    for image, own in enumerate(nested):
        if not own:
            raise ValueError(
                f"expected at least one attribution prompt for image {image}, got none"
            )
        for prompt in own:
            images.setdefault(prompt, []).append(image)
    prompts = tuple(images) if nested else tuple(listed)
    names = [prompt.name for prompt in prompts]
    repeated = sorted({name for name in names if names.count(name) > 1})
    repeated += sorted({p.name for p, own in images.items() if len(set(own)) < len(own)})
    if repeated:
        raise ValueError(
            f"two attribution prompts have the same name {repeated}; give each its own `name`"
        )
    if not nested:
        return prompts, [None] * len(prompts), None
    return prompts, [tuple(images[prompt]) for prompt in prompts], len(nested)


def _indices(places: list[int], count: int) -> slice | list[int]:
    """Places among ``count``, `_ALL` where it is all of them in order."""
    found = as_slice(places)
    return _ALL if found == slice(0, count) else found


def _checked_by(by: By | Sequence[By]) -> tuple[By, ...]:
    """What is kept apart, each once."""
    found: tuple[Any, ...] = (by,) if isinstance(by, str) else tuple(dict.fromkeys(by))
    if not found or not set(found) <= set(_BY) or ("head" in found and len(found) > 1):
        raise ValueError(
            "`by` must be 'total', 'block', 'layer', 'step' or 'head', or several of them but "
            f"'head', got {by!r}"
        )
    return found


def _checked_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"`size` must be positive, got {size}")
    return height, width
