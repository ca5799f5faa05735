"""Attribution maps of concepts, recorded while a diffusers pipeline draws.

Per UNet call and cross-attention layer l with query q_l and the attribution prompt's keys k'_l,
``A = softmax(q_l k'_l^T / sqrt(d))`` over the T' tokens; a concept's column is the sum over its
pieces; columns are summed over heads, calls and layers (BiasMap, arXiv 2509.13496, after OVAM).

The query is seen by a forward hook on each layer's ``to_q``, whatever attention processor runs.
The hook changes nothing, so pictures stay bit-identical. If the UNet is an engine, its own outputs
are the maps.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch

from .accumulate import ALL, Rows, Sums, grouped
from .accumulate import By as By
from .concepts import AttributionPrompt
from .denoiser import probing
from .maps import AttributionMaps
from .sources import AttributionCache as AttributionCache
from .sources import source_of
from .unet import as_slice, batch_layout, branch_rows, check_text, guider_of, resolutions, rows_here

Branch = Literal["cond", "uncond"]
Prompts = AttributionPrompt | Sequence[AttributionPrompt] | Sequence[Sequence[AttributionPrompt]]


def attribute(
    pipe: Any,
    prompts: Prompts,
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
        pipe: The diffusers pipeline that draws, with a UNet and CLIP text encoders (Stable
            Diffusion 1.x, 2.x, SDXL, and their img2img, inpainting, ControlNet and InstructPix2Pix
            forms).
        prompts: One attribution prompt, or several; several share the UNet's queries, so another
            one costs little. They need not be the prompts that draw the pictures. Or a sequence of
            prompts per image of the batch, in batch order: they are measured on that image alone.
        branch: The part of the classifier-free-guidance batch whose queries count: ``"cond"``, or
            ``"uncond"`` as in the published code.
        layers: Names or name prefixes of cross-attention layers (``"up_blocks"``,
            ``"down_blocks.1.attentions.0"``). All of the down and up blocks if not given, without
            the mid block.
        by: What to keep apart beside the total: nothing (``"total"``), UNet blocks, layers, heads
            of each layer, or UNet calls (``"step"``: the one choice whose memory grows with steps).
            Several of them, but not ``"head"``, cost little more than one.
        size: Height and width of the maps (an int for a square); the largest layer's if not given.
        chunks: Number of guidance chunks in the UNet's batch. Looked up if not given; needed if the
            pipeline does not say (semantic guidance), or if the UNet is called by hand.
        detailed: Names of the prompts for which everything in ``by`` is kept; for the others only
            the first of it is. All if not given.
        cache: Keeps what prompts become, for further recorders of the same, unchanged model.

    Returns:
        A context manager; `Recorder.maps` gives the result, also after the block has ended.

    Raises:
        TypeError: ``pipe`` has no UNet or no CLIP text encoder.
        ValueError: An unknown ``branch``, ``by`` or layer, a layer that cannot be attributed, two
            prompts with one name, a concept that is not in its prompt, a name in ``detailed`` that
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


@dataclass(frozen=True)
class _Located:
    """A group's images in the pass now running."""

    group: int
    rows: Rows  # of the pass
    images: Rows  # rows of the group's sums


class Recorder:
    """Records attribution maps between ``__enter__`` and ``__exit__``; made by `attribute`.

    Several pipeline calls inside one block are stacked along the batch in the order they drew.
    Entering again after the block starts afresh. Recorders may be nested on one pipeline.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Prompts,
        *,
        branch: Branch,
        layers: Sequence[str] | None,
        by: By | Sequence[By],
        size: int | tuple[int, int] | None,
        chunks: int | None,
        detailed: Collection[str] | None,
        cache: AttributionCache | None,
    ) -> None:
        if branch not in ("cond", "uncond"):
            raise ValueError(f"`branch` must be 'cond' or 'uncond', got {branch!r}")
        self._by = _checked_by(by)
        if chunks is not None and chunks < 1:
            raise ValueError(f"`chunks` must be at least 1, got {chunks}")
        self._prompts, images, self._expected = _prompts_and_images(prompts)
        self._pipe = pipe
        self._branch = branch
        self._chunks = chunks
        # A cache of its own is emptied after each block: the model may change until the next.
        self._private = cache is None
        self._cache = AttributionCache() if cache is None else cache
        self._source = source_of(pipe, self._cache, layers, self._by)
        names = [prompt.name for prompt in self._prompts]
        if unknown := sorted(set(detailed or ()).difference(names)):
            raise ValueError(f"no attribution prompt is called {unknown}; there are: {names}")
        weights = [self._cache.tokens(pipe, prompt)[0].weights for prompt in self._prompts]
        self._groups = grouped(
            [(len(rows), rows.shape[1]) for rows in weights],  # [K, T'] each
            images,
            [detailed is None or name in detailed for name in names],
        )
        self._size = _checked_size(size)
        self._sums = Sums(self._groups, self._by, self._size)
        self._handles: list[Any] = []
        self._interrupted: str | None = None
        self._timesteps: Any = None
        self._batch = 0
        self._rows = slice(0, 0)
        self._ignored = False  # a guider's call of the other branch
        # layer -> images of this call: recomputation under checkpointing must not count twice
        self._seen: dict[str, frozenset[int]] = {}
        # (rows of the pass and images, images of the run) -> those images, and the same by group
        self._located: dict[Any, tuple[frozenset[int], list[_Located]]] = {}
        self._resolutions: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("this recorder is already recording; make another to nest them")
        self._sums = Sums(self._groups, self._by, self._size)
        self._interrupted, self._timesteps = None, None
        prompts = [tuple(self._prompts[i] for i in group.prompts) for group in self._groups]
        self._handles = self._source.attach(prompts, self._receive)
        unet = self._pipe.unet
        self._handles.append(unet.register_forward_pre_hook(self._before_call, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._source.keys.clear()
        if self._private:
            self._cache.clear()
        self._timesteps = None
        if kind is not None:
            self._interrupted = kind.__name__

    def maps(self, by: By | None = None) -> AttributionMaps:
        """The maps of every picture drawn so far, of a recorder with one prompt.

        Args:
            by: What to keep apart, of what was recorded; the first of it if not given.

        Returns:
            Maps ``[B, K, H, W]``. If each image had its own prompts, `AttributionMaps.images` names
            the images that the prompt was measured on.

        Raises:
            RuntimeError: Nothing was drawn, or an exception ended the block, so that the maps
                would be those of unfinished pictures.
            ValueError: There are several prompts; calls of different map sizes, and no ``size`` to
                bring them to; or what was not recorded is asked for.
        """
        if len(self._prompts) > 1:
            raise ValueError(
                f"{len(self._prompts)} attribution prompts were recorded: use maps_by_prompt()"
                f"[name], with a name of {[prompt.name for prompt in self._prompts]}"
            )
        maps = self.maps_by_prompt(by)
        if not maps:
            raise ValueError(f"maps by {by!r} were not kept: `detailed` names no prompt")
        return maps[self._prompts[0].name]

    def maps_by_prompt(self, by: By | None = None) -> dict[str, AttributionMaps]:
        """As `maps`, for any number of prompts.

        Args:
            by: As in `maps`.

        Returns:
            Name of the prompt -> maps, for the prompts for which ``by`` was kept.

        Raises:
            RuntimeError: As `maps`.
            ValueError: As `maps`, but for several prompts.
        """
        wanted = self._by[0] if by is None else by
        if wanted not in self._by:
            raise ValueError(f"maps were recorded by {' and '.join(self._by)}, not by {by!r}")
        if self._interrupted is not None:
            raise RuntimeError(
                f"the block ended with {self._interrupted}: its maps are incomplete and not given"
            )
        if not self._sums.runs:
            raise RuntimeError("no UNet call was recorded: draw inside the `with` block first")
        self._check_complete()
        maps: dict[int, AttributionMaps] = {}
        for group, names, parts in self._sums.totals(wanted):  # [S, P, B, K, H, W]
            totals = parts.sum(0)
            for row, index in enumerate(group.prompts[: len(totals)]):
                maps[index] = AttributionMaps(
                    values=totals[row],  # [B, K, H, W]
                    concepts=self._prompts[index].concepts,
                    prompt=self._prompts[index].text,
                    branch=self._branch,
                    layers=self.layers,
                    by=wanted,
                    parts={} if wanted == "total" else dict(zip(names, parts[:, row], strict=True)),
                    images=self._sums.images(group),
                )
        return {self._prompts[index].name: maps[index] for index in sorted(maps)}

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the recorded layers."""
        return tuple(name for part in self._source.parts for name in part.layers)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held now: ``"maps"`` (per image, independent of steps unless by step), ``"keys"``.

        The keys depend on the prompts and the model alone and are freed at the end of the block.
        """
        keys = [tensor.nbytes for keys in self._source.keys for tensor in keys.by_layer.values()]
        return {"maps": self._sums.nbytes, "keys": sum(keys)}

    def _before_call(self, unet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Notes the latents' size and the guided batch's layout before each UNet call."""
        if probing.get():
            return
        guider = guider_of(self._pipe)
        self._ignored = guider is not None and guider.is_conditional != (self._branch == "cond")
        if self._ignored:
            return
        sample = args[0] if args else kwargs["sample"]  # [chunks * B, C, H, W]
        timesteps = getattr(getattr(self._pipe, "scheduler", None), "timesteps", None)
        # `set_timesteps` makes a new tensor in every pipeline call.
        begins = not self._sums.runs or timesteps is not self._timesteps
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
            self._sums.begin(images)
        run = self._sums.runs[-1]
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
        if not self._sums.runs:
            return
        run = self._sums.runs[-1]
        for part in self._source.parts:
            if len(self._seen.get(part.name, ())) < run.images:
                raise RuntimeError(
                    f"layer {part.name} was not seen in UNet call {run.calls - 1}: it was skipped, "
                    "or the UNet was compiled and run before recording began (then call "
                    "torch.compiler.reset() first)"
                )

    def _receive(self, part: Any, shown: Any) -> None:
        """Adds the maps in what one part shows to the sums."""
        if self._ignored or probing.get():
            return
        rows, size = self._source.rows_and_size(part, shown, self._resolutions)
        for located in self._fresh(part.name, rows):
            sums = self._sums.targets(located.group, part, size, _device(shown))
            self._source.add(part, shown, located.group, located.rows, sums, located.images)

    def _fresh(self, name: str, seen: int) -> list[_Located]:
        """Each group's images that were not yet counted for a layer."""
        fresh = rows_here(self._rows, self._batch, seen)
        counted = self._seen.get(name)
        if counted is not None:
            fresh = tuple(place for place in fresh if place[1] not in counted)
        images = self._sums.runs[-1].images
        if (fresh, images) not in self._located:
            self._located[fresh, images] = (
                frozenset(image for _, image in fresh),
                [
                    _Located(
                        index,
                        _indices([row for row, _ in selected], seen),
                        _indices([row for _, row in selected], group.rows(images)),
                    )
                    for index, group in enumerate(self._groups)
                    if (selected := group.select(fresh))
                ],
            )
        now, located = self._located[fresh, images]
        self._seen[name] = now if counted is None else counted | now
        return located


def _device(shown: Any) -> torch.device:
    tensor: torch.Tensor = shown if isinstance(shown, torch.Tensor) else shown[0]
    return tensor.device


def _prompts_and_images(
    given: Prompts,
) -> tuple[tuple[AttributionPrompt, ...], list[tuple[int, ...] | None], int | None]:
    """Each prompt once, the images that it is for, and their number; ``None`` for any."""
    if isinstance(given, AttributionPrompt):
        return (given,), [None], None
    if not given:
        raise ValueError("expected at least one attribution prompt, got an empty sequence")
    entries: list[Any] = list(given)
    nested = [entry for entry in entries if isinstance(entry, (list, tuple))]
    if len(nested) not in (0, len(entries)):
        raise TypeError(
            "expected attribution prompts, or a sequence of them for each image, got both mixed"
        )
    listed = list(itertools.chain.from_iterable(nested)) if nested else entries
    for prompt in listed:
        if not isinstance(prompt, AttributionPrompt):
            raise TypeError(
                f"expected an AttributionPrompt, got {type(prompt).__name__} {prompt!r}; write "
                'AttributionPrompt("text", concepts=("word", ...))'
            )
    images: dict[AttributionPrompt, list[int]] = {}
    for image, of_image in enumerate(nested):
        if not of_image:
            raise ValueError(
                f"expected at least one attribution prompt for image {image}, got none"
            )
        for prompt in of_image:
            images.setdefault(prompt, []).append(image)
    prompts = tuple(images) if nested else tuple(listed)
    names = [prompt.name for prompt in prompts]
    repeated = {name for name in names if names.count(name) > 1}
    repeated |= {prompt.name for prompt, rows in images.items() if len(set(rows)) < len(rows)}
    if repeated:
        raise ValueError(
            f"two attribution prompts have the same name {sorted(repeated)}; give each its own "
            "`name`"
        )
    if not nested:
        return prompts, [None] * len(prompts), None
    return prompts, [tuple(images[prompt]) for prompt in prompts], len(nested)


def _indices(rows: list[int], count: int) -> Rows:
    """Rows among ``count``, `ALL` if it is all of them in order."""
    indices = as_slice(rows)
    return ALL if indices == slice(0, count) else indices


def _checked_by(by: By | Sequence[By]) -> tuple[By, ...]:
    kinds: tuple[Any, ...] = (by,) if isinstance(by, str) else tuple(dict.fromkeys(by))
    if not kinds or not set(kinds) <= set(get_args(By)) or ("head" in kinds and len(kinds) > 1):
        raise ValueError(
            "`by` must be 'total', 'block', 'layer', 'step' or 'head', or several of them but "
            f"'head', got {by!r}"
        )
    return kinds


def _checked_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"`size` must be positive, got {size}")
    return height, width
