"""What any diffusers pipeline passes its denoiser, and the denoiser called with other prompts.

A pipeline makes a denoiser's arguments from a prompt in its own way: pooled states, masks, chat
templates, text ids. So the pipeline itself makes them: a *rehearsal* runs its own ``__call__`` on a
shallow copy with another prompt and stops at the first call of the denoiser. Arguments that depend
on the text come from the rehearsal, by name; latents, time, guidance, image ids and a ControlNet's
residuals come from the live call. Two rehearsals check the list of names: nothing else may differ.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

probing: ContextVar[bool] = ContextVar("biasmap_fast.probing", default=False)
"""Whether the denoiser runs for a probe: hooks that watch or change a drawing then do nothing."""

Arguments = dict[str, Any]
_Path = tuple[str, ...]

# Arguments of denoisers that depend on the text; also inside dicts such as added_cond_kwargs.
_TEXT = frozenset(
    {
        "attention_mask",  # Chroma, PRX: of the text's tokens (and the picture's, all true)
        "cap_feats",
        "encoder_attention_mask",
        "encoder_attention_mask_2",
        "encoder_hidden_states",
        "encoder_hidden_states_2",
        "encoder_hidden_states_llama3",
        "encoder_hidden_states_mask",
        "encoder_hidden_states_t5",
        "encoder_mask",
        "pooled_embeds",
        "pooled_projections",
        "text_bth",
        "text_embeds",
        "text_embedding_mask",
        "text_embedding_mask_t5",
        "text_encoder_layers",
        "text_lens",
        "txt_ids",
        "txt_seq_lens",
    }
)
# Arguments without a dimension of rows, whatever their size.
_ROWLESS = frozenset({"txt_ids", "img_ids", "image_rotary_emb"})
# Lists with one entry per row; other lists hold tensors that have rows.
_LISTED = frozenset({"cap_feats", "img_shapes", "text_lens", "txt_seq_lens", "x"})
_SAMPLE = ("sample", "hidden_states", "x")
_TIME = ("timestep", "timesteps", "t")
# The prompt's other forms among a pipeline's own arguments: a rehearsal's prompt replaces them all.
_PROMPT = ("prompt_", "pooled_prompt_", "callback")


class _Reached(Exception):  # noqa: N818 - no error: how a rehearsal ends
    def __init__(self, args: tuple[Any, ...], kwargs: Arguments) -> None:
        super().__init__("a rehearsal reached the denoiser")
        self.call = (args, kwargs)


@dataclass(frozen=True)
class Conditioning:
    """What one prompt gives the denoiser, for the B images of a batch.

    Attributes:
        text: Path of an argument -> its value: B rows, or a value without rows.
    """

    text: Mapping[_Path, Any]

    def row(self, image: int) -> tuple[Any, ...]:
        """One image's values, in the order of ``text``."""
        return tuple(take(path, value, [image]) for path, value in self.text.items())

    def same(self, other: Conditioning, image: int) -> bool:
        """Whether another prompt gives an image exactly the same."""
        return self.text.keys() == other.text.keys() and _equal(self.row(image), other.row(image))


@dataclass
class Denoiser:
    """The denoiser of a pipeline: ``pipe.unet`` or ``pipe.transformer``.

    Attributes:
        pipe: The pipeline that draws.
        call: The ``__call__`` of its class.
        rows: Rows in one forward pass at most; halved when memory runs out.
        forwarded: Rows that went through the denoiser for probes.
    """

    pipe: Any
    call: Callable[..., Any]
    rows: int = 32
    forwarded: int = 0
    _stacked: dict[Any, Arguments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"`rows` must be at least 1, got {self.rows}")
        self.name, self.module = _find(self.pipe)
        if "prompt" not in inspect.signature(self.call).parameters:
            raise TypeError(f"{type(self.pipe).__name__} takes no prompt, so nothing can be probed")

    def refuse(self) -> None:
        """Refuses pipelines whose denoiser cannot be called for a probe just now.

        Raises:
            ValueError: A step cache is on, or perturbed-attention guidance.
        """
        if getattr(self.module, "is_cache_enabled", False):
            raise ValueError(
                f"a step cache ({type(self.module._cache_config).__name__}) is enabled on "
                f"{type(self.module).__name__}, and it would mix the probes' calls with the "
                "picture's: call disable_cache() first"
            )
        if getattr(self.pipe, "do_perturbed_attention_guidance", False):
            raise ValueError(
                "perturbed-attention guidance changes the network for a part of its batch, which "
                "a probe's batch does not have: set pag_scale=0"
            )

    @cached_property
    def _parameters(self) -> list[str]:
        plain = getattr(self.module, "_orig_mod", self.module)  # torch.compile wraps the module
        return list(inspect.signature(type(plain).forward).parameters)[1:]

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """Arguments of a denoiser call by name.

        Raises:
            ValueError: The latents are those of a video.
        """
        call = dict(zip(self._parameters, args, strict=False)) | dict(kwargs)
        sample = latents_of(call)
        if isinstance(sample, torch.Tensor) and sample.ndim == 5:
            raise ValueError(
                f"expected the latents of pictures, got shape {tuple(sample.shape)}; pipelines "
                "that draw videos are not supported"
            )
        return call

    def rehearse(self, arguments: Mapping[str, Any], prompt: str) -> Arguments:
        """What the pipeline would pass its denoiser first for another prompt.

        Nothing of the pipeline changes: it runs as a shallow copy with copies of scheduler and
        generators, and torch's random state is put back.

        Args:
            arguments: Of the pipeline's call, by name.
            prompt: Takes the place of the call's prompt, once for each of its prompts.

        Raises:
            RuntimeError: The pipeline ended without a call of its denoiser.
        """
        pipe = copy.copy(self.pipe)
        changed = {
            "scheduler": copy.deepcopy(getattr(pipe, "scheduler", None)),
            self.name: self._stand_in(),
            "_progress_bar_config": {"disable": True},
        }
        pipe.__dict__.update(changed)  # setattr would write to the pipeline's config
        try:
            with isolated(self.module):
                self.call(pipe, **_with_prompt(arguments, prompt))
        except _Reached as reached:
            return self.named(*reached.call)
        except Exception as error:
            error.add_note(f"raised in a rehearsal of the pipeline with the prompt {prompt!r}")
            raise
        raise RuntimeError(
            f"{type(self.pipe).__name__} ended without calling its {self.name}: it cannot be probed"
        )

    def _stand_in(self) -> torch.nn.Module:
        """The denoiser without hooks, whose call ends the rehearsal."""

        def stop(*args: Any, **kwargs: Any) -> None:
            raise _Reached(args, kwargs)

        module = copy.copy(self.module)
        plain = {
            "forward": stop,
            "cache_context": lambda *args, **kwargs: nullcontext(),
            "_forward_hooks": {},
            "_forward_pre_hooks": {},
            "_compiled_call_impl": None,
        }
        module.__dict__.update(plain)
        return module

    def predict(
        self,
        live: Mapping[str, Any],
        conditionings: Sequence[Conditioning],
        wanted: Sequence[tuple[int, int]],
        first: int = 0,
    ) -> torch.Tensor:
        """Predictions at the latents and time of a live call, without gradient.

        Args:
            live: The live call's arguments, by name.
            conditionings: What prompts give the denoiser. The same at every call of a run.
            wanted: Of each prediction, its number in ``conditionings`` and its image.
            first: Row of the live call in which image 0 is drawn with its prompt.

        Returns:
            ``[len(wanted), C, h, w]``, at least float32.
        """
        alike: dict[Any, list[int]] = {}  # what can share a batch -> numbers in ``wanted``
        for number, (index, image) in enumerate(wanted):
            signature = _signature(conditionings[index], image)
            alike.setdefault(signature, []).append(number)
        done: list[torch.Tensor] = []
        order: list[int] = []
        with isolated(self.module):
            for numbers in alike.values():
                start = 0
                while start < len(numbers):
                    chunk = numbers[start : start + self.rows]
                    try:
                        done.append(self._forward(live, conditionings, wanted, chunk, first))
                    except torch.OutOfMemoryError:
                        if len(chunk) == 1:
                            raise
                        self.rows = len(chunk) // 2
                        continue
                    order += chunk
                    start += len(chunk)
        inverse = torch.tensor(order).argsort()
        return torch.cat(done)[inverse.to(done[0].device)]

    def _forward(
        self,
        live: Mapping[str, Any],
        conditionings: Sequence[Conditioning],
        wanted: Sequence[tuple[int, int]],
        chunk: Sequence[int],
        first: int,
    ) -> torch.Tensor:
        pairs = tuple(wanted[number] for number in chunk)
        text = self._stacked.get(pairs)
        if text is None:
            rows = [conditionings[index].row(image) for index, image in pairs]
            paths = conditionings[pairs[0][0]].text
            text = self._stacked[pairs] = {
                path: _join(path, [row[i] for row in rows]) for i, path in enumerate(paths)
            }
        call = take((), live, [first + image for _, image in pairs], len(latents_of(live)))
        for path, value in text.items():
            *outer, name = path
            holder = call
            for key in outer:
                holder = holder[key]
            holder[name] = value
        self.forwarded += len(pairs)
        return self.prediction(self.module(**call), live)

    @property
    def precision(self) -> float:
        """Differences of this size, relative to a prediction, may be rounding."""
        dtype = getattr(self.module, "dtype", torch.float32)
        return max(4 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps / 8)

    def forget(self) -> None:
        """Drops what was stacked for one list of conditionings."""
        self._stacked.clear()

    def prediction(self, output: Any, live: Mapping[str, Any]) -> torch.Tensor:
        """A denoiser's output as ``[rows, C, h, w]``, at least float32.

        Learned variance channels are dropped; packed latents are laid out on their grid.

        Args:
            output: What the denoiser returned.
            live: The arguments of the call.

        Raises:
            ValueError: The output has no grid of pixels that is known.
        """
        value = output[0] if isinstance(output, (tuple, Mapping)) else output
        value = getattr(value, "sample", value)
        if isinstance(value, (list, tuple)):  # one [C, 1, h, w] per row
            value = torch.stack(list(value))
            value = value.squeeze(2) if value.ndim == 5 else value
        value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
        if value.ndim == 3:
            value = _unpacked(value, live, type(self.pipe).__name__)
        if value.ndim != 4:
            raise ValueError(
                f"expected a prediction of pictures, got shape {tuple(value.shape)} from "
                f"{type(self.module).__name__}"
            )
        return value[:, : value.shape[1] // 2] if self._learns_variance(value, live) else value

    def _learns_variance(self, value: torch.Tensor, live: Mapping[str, Any]) -> bool:
        config = getattr(getattr(self.pipe, "vae", None), "config", {})
        channels = config.get("latent_channels") or len(latents_of(live)[0])
        kind = getattr(self.pipe, "scheduler", None)
        kind = getattr(kind, "config", {}).get("variance_type")
        return bool(value.shape[1] == 2 * channels or kind in ("learned", "learned_range"))


def latents_of(call: Mapping[str, Any]) -> Any:
    """The latents among a denoiser call's arguments: a tensor of rows, or a list of them.

    Raises:
        ValueError: There are none under a known name.
    """
    for name in _SAMPLE:
        if call.get(name) is not None:
            return call[name]
    raise ValueError(f"expected latents under one of the names {_SAMPLE}, got {sorted(call)}")


def time_of(call: Mapping[str, Any]) -> float:
    """The time among a denoiser call's arguments, as the pipeline scales it."""
    value = next(call[name] for name in _TIME if name in call)
    return float(value.flatten()[0] if isinstance(value, torch.Tensor) else value)


def conditionings_of(calls: Sequence[Arguments]) -> tuple[int, int, list[Conditioning]]:
    """What prompts give the denoiser, from rehearsals that differ in the prompt alone.

    Args:
        calls: Arguments of the first denoiser call, one for each prompt.

    Returns:
        The first row of those that the prompt decides, their number B, and the conditionings.

    Raises:
        ValueError: The prompts do not change the text, an argument that is not known to depend on
            the text does, or the rows are not laid out in blocks of B.
    """
    leaves = [dict(_leaves(call)) for call in calls]
    rows = len(latents_of(calls[0]))
    changed = [False] * rows
    for path, value in leaves[0].items():
        for other in (those.get(path) for those in leaves[1:]):
            if not _is_text(path):
                if not _is_pictures(path) and not _equal(value, other):
                    raise ValueError(
                        f"the denoiser's argument {'.'.join(path)} depends on the prompt, and is "
                        "not known to hold text: this model cannot be probed yet"
                    )
            elif _has_rows(path, value, rows) and _has_rows(path, other, rows):
                for row in range(rows):
                    first, second = take(path, value, [row], rows), take(path, other, [row], rows)
                    changed[row] |= not _equal(*_common(first, second))
    if not any(changed):
        raise ValueError(
            "the words do not change what the pipeline gives its denoiser: expected prompts that "
            "its text encoder tells apart"
        )
    images, start = sum(changed), changed.index(True)
    if not all(changed[start : start + images]) or rows % images or start % images:
        raise ValueError(f"the prompt decides rows {changed} of the batch: expected one block")
    own = list(range(start, start + images))
    found = [
        Conditioning({p: take(p, v, own, rows) for p, v in those.items() if _is_text(p)})
        for those in leaves
    ]
    return start, images, found


def text_rows(call: Mapping[str, Any], start: int, images: int) -> Conditioning:
    """The conditioning of a block of rows of a live call."""
    rows, block = len(latents_of(call)), list(range(start, start + images))
    return Conditioning(
        {path: take(path, v, block, rows) for path, v in _leaves(call) if _is_text(path)}
    )


def text_block(call: Mapping[str, Any], reference: Conditioning, images: int) -> int | None:
    """The first row of the block of rows that holds a conditioning's text; None if none does."""
    for start in range(0, len(latents_of(call)), images):
        block = text_rows(call, start, images)
        if block.text.keys() == reference.text.keys() and all(
            _equal(value, reference.text[path]) for path, value in block.text.items()
        ):
            return start
    return None


def take(path: _Path, value: Any, rows: Sequence[int], count: int | None = None) -> Any:
    """Rows of an argument's value, and of everything in it; what has no rows as it is.

    Args:
        path: Where the argument is.
        value: Its value.
        rows: Numbers of rows, possibly repeated.
        count: How many rows there are; not given: as many as a tensor has.
    """
    if isinstance(value, Mapping):
        return {name: take((*path, name), item, rows, count) for name, item in value.items()}
    if path and path[-1] in _ROWLESS:
        return value
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or count not in (None, len(value)):
            return value
        if len(rows) == len(value) and list(rows) == list(range(len(value))):
            return value
        return value[list(rows)]
    if isinstance(value, (list, tuple)):
        if path and path[-1] in _LISTED:
            return [value[row] for row in rows] if count in (None, len(value)) else value
        return type(value)(take(path, item, rows, count) for item in value)
    return value


@contextmanager
def isolated(module: torch.nn.Module) -> Iterator[None]:
    """No gradient, torch's random state put back, and our own hooks told to do nothing."""
    device = getattr(module, "device", None)
    devices = [device] if device is not None and device.type == "cuda" else []
    token = probing.set(True)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        probing.reset(token)


def _find(pipe: Any) -> tuple[str, torch.nn.Module]:
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, torch.nn.Module):
            if "decoder_pipe" in vars(pipe) or "prior_pipe" in vars(pipe):
                break  # combined pipelines draw in another pipeline, with its own scheduler
            return name, module
    raise TypeError(
        "expected a diffusers text-to-image pipeline with one denoiser under `unet` or "
        f"`transformer`, got {type(pipe).__name__}"
    )


def _with_prompt(arguments: Mapping[str, Any], prompt: str) -> Arguments:
    given = arguments.get("prompt")
    if given is None:  # embeddings instead
        states = arguments.get("prompt_embeds")
        given = "" if states is None else [""] * len(states)
    changed = {
        name: _copied(value) for name, value in arguments.items() if not name.startswith(_PROMPT)
    }
    changed["prompt"] = prompt if isinstance(given, str) else [prompt] * len(given)
    return changed


def _copied(value: Any) -> Any:
    """A pipeline's argument that a rehearsal may change."""
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, list) and any(isinstance(item, torch.Generator) for item in value):
        return [_copied(item) for item in value]
    return value


def _leaves(call: Mapping[str, Any], path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    for name, value in call.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _is_text(path: _Path) -> bool:
    return path[-1] in _TEXT


def _is_pictures(path: _Path) -> bool:
    """Whether an argument may depend on the text and still is the live picture's."""
    return "controlnet" in path[-1] or "residual" in path[-1]


def _has_rows(path: _Path, value: Any, rows: int) -> bool:
    if path[-1] in _ROWLESS or not isinstance(value, (torch.Tensor, list, tuple)):
        return False
    if isinstance(value, torch.Tensor) or path[-1] in _LISTED:
        return len(value) == rows
    return all(_has_rows(path, item, rows) for item in value)


def _equal(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        tensors = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
        return tensors and torch.equal(first, second)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_equal, first, second))
    return bool(first == second)


def _common(first: Any, second: Any) -> tuple[Any, Any]:
    """Two rows up to the shorter sequence: prompts may be padded to their own lengths."""
    tensors = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
    if tensors and first.ndim > 1 and second.ndim > 1:
        length = min(first.shape[1], second.shape[1])
        return first[:, :length], second[:, :length]
    return first, second


def _signature(conditioning: Conditioning, image: int) -> tuple[Any, ...]:
    """What must be equal for rows to share a batch."""

    def shape(path: _Path, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (value.dtype, *value.shape)
        if path[-1] in _LISTED:
            return None  # entries may have any length
        if isinstance(value, (list, tuple)):
            return tuple(shape(path, item) for item in value)
        return value

    row = conditioning.row(image)
    return tuple((p, shape(p, v)) for p, v in zip(conditioning.text, row, strict=True))


def _join(path: _Path, rows: Sequence[Any]) -> Any:
    first = rows[0]
    if path[-1] in _ROWLESS or first is None:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(list(rows)) if first.ndim else first
    if path[-1] in _LISTED:
        return [item for row in rows for item in row]
    if isinstance(first, (list, tuple)):
        return type(first)(_join(path, items) for items in zip(*rows, strict=True))
    return first


def _unpacked(value: torch.Tensor, live: Mapping[str, Any], pipeline: str) -> torch.Tensor:
    """Packed latents ``[rows, h * w, C * 4]`` as ``[rows, C, 2 * h, 2 * w]``."""
    if live.get("img_shapes") is not None:
        shape: Any = live["img_shapes"][0]
        height, width = (shape[0] if isinstance(shape, (list, tuple)) else shape)[-2:]
    elif live.get("img_ids") is not None:
        ids = live["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids  # [tokens, 3]; the first counts pictures
        ids = ids[ids[:, 0] == ids[0, 0]]
        height, width = (int(ids[:, axis].max() - ids[:, axis].min()) + 1 for axis in (1, 2))
    else:
        raise ValueError(
            f"{pipeline} packs its latents into a sequence of {value.shape[1]} and passes its "
            "denoiser no grid (img_ids or img_shapes): it cannot be probed"
        )
    if value.shape[1] < height * width or value.shape[2] % 4:
        raise ValueError(
            f"expected packed latents of {height} x {width} patches of 2 x 2, got shape "
            f"{tuple(value.shape)}"
        )
    # a picture to be edited may follow in the sequence
    patches = value[:, : height * width].unflatten(2, (-1, 2, 2)).unflatten(1, (height, width))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
