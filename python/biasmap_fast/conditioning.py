"""The arguments of a denoiser call: which hold text, which have rows, and rows taken and joined.

diffusers has no common form for them, so they are told apart by name. Whoever adds a family adds
its names here; `Conditionings.of` refuses a pipeline whose prompts change an argument that is not
listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Arguments = dict[str, Any]
_Path = tuple[str, ...]  # of an argument, and of what is in it: ("added_cond_kwargs", "time_ids")

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
        "text_embedding_mask",
        "text_embedding_mask_t5",
        "text_embeds",
        "text_encoder_layers",
        "text_lens",
        "txt_ids",
        "txt_seq_lens",
    }
)
_ROWLESS = frozenset({"txt_ids", "img_ids", "image_rotary_emb"})  # whatever their size
# lists with one entry per row; other lists hold tensors that have rows
_LISTED = frozenset({"cap_feats", "img_shapes", "text_lens", "txt_seq_lens", "x"})
_LATENTS = ("sample", "hidden_states", "x")
_TIMES = ("timestep", "timesteps", "t")


@dataclass(frozen=True)
class Conditioning:
    """What one prompt gives the denoiser for the B images of a batch.

    Attributes:
        text: Path of an argument -> its value: B rows, or something without rows.
        images: B.
    """

    text: Mapping[_Path, Any]
    images: int

    def row(self, image: int) -> list[Any]:
        """One image's values, in the order of ``text``."""
        return [take(path, value, [image], self.images) for path, value in self.text.items()]

    def same(self, other: Conditioning, image: int) -> bool:
        """Whether another prompt gives an image exactly the same."""
        return self.text.keys() == other.text.keys() and equal(self.row(image), other.row(image))


@dataclass(frozen=True)
class Batch:
    """Rows that go through the denoiser together.

    Attributes:
        numbers: Of the predictions, among those that were asked for.
        images: Image of each row.
        text: Path of an argument -> its value for all rows.
    """

    numbers: list[int]
    images: list[int]
    text: Mapping[_Path, Any]


@dataclass
class Conditionings:
    """What several prompts give the denoiser in one call of a pipeline.

    Attributes:
        first: First of the rows that the prompt decides, in the rehearsed calls.
        images: Their number, B.
        prompts: One conditioning for each prompt.
    """

    first: int
    images: int
    prompts: list[Conditioning]
    _batches: dict[Any, list[Batch]] = field(default_factory=dict)
    _located: tuple[list[Any], int] = ((), 0)  # type: ignore[assignment]

    @classmethod
    def of(cls, calls: Sequence[Arguments]) -> Conditionings:
        """Finds them in the arguments of calls that differ in the prompt alone.

        Raises:
            ValueError: The prompts do not change the text, something changes that is not known to
                hold text, or the rows that change are not one block.
        """
        leaves = [dict(_leaves(call)) for call in calls]
        rows = len(latents_of(calls[0]))
        changed = [False] * rows
        for path, value in leaves[0].items():
            for other in (those.get(path) for those in leaves[1:]):
                if path[-1] in _TEXT:
                    if _has_rows(path, value, rows) and _has_rows(path, other, rows):
                        for row in range(rows):
                            pair = (take(path, each, [row], rows) for each in (value, other))
                            changed[row] |= not equal(*_common(*pair))
                elif not _may_differ(path) and not equal(value, other):
                    raise ValueError(
                        f"the denoiser's argument {'.'.join(path)} depends on the prompt and is "
                        "not known to hold text: this pipeline cannot be probed yet"
                    )
        if not any(changed):
            raise ValueError(
                "the words do not change what the pipeline gives its denoiser: expected prompts "
                "that its text encoder tells apart"
            )
        first, images = changed.index(True), sum(changed)
        if not all(changed[first : first + images]) or rows % images or first % images:
            raise ValueError(f"expected one block of rows that the prompt decides, got {changed}")
        return cls(first, images, [text_of(call, first, images) for call in calls])

    def locate(self, call: Arguments, index: int) -> int | None:
        """The first row of the block of rows that holds a prompt's text; None if none does.

        Args:
            call: Arguments of a live call.
            index: The prompt.
        """
        leaves = [value for path, value in _leaves(call) if path[-1] in _TEXT]
        known, start = self._located
        if len(known) == len(leaves) and all(a is b for a, b in zip(known, leaves, strict=True)):
            return start  # most pipelines pass the same tensors at every call
        wanted = self.prompts[index].text
        for start in range(0, len(latents_of(call)), self.images):
            text = text_of(call, start, self.images).text
            if text.keys() == wanted.keys() and all(equal(text[p], wanted[p]) for p in wanted):
                self._located = (leaves, start)
                return start
        return None

    def batches(self, wanted: Sequence[tuple[int, int]], rows: int) -> list[Batch]:
        """Batches of at most ``rows`` rows, each of prompts that give values of the same shapes.

        Args:
            wanted: Of each prediction, the number of its prompt and its image.
            rows: Rows at most.
        """
        key = (tuple(wanted), rows)
        if key not in self._batches:
            texts = [self.prompts[index].row(image) for index, image in wanted]
            paths = [list(self.prompts[index].text) for index, _ in wanted]
            alike: dict[Any, list[int]] = {}
            for number, (text, names) in enumerate(zip(texts, paths, strict=True)):
                shapes = tuple(map(_shape, names, text))
                alike.setdefault((tuple(names), shapes), []).append(number)
            self._batches[key] = [
                Batch(
                    chunk,
                    [wanted[number][1] for number in chunk],
                    {
                        path: _join(path, [texts[number][i] for number in chunk])
                        for i, path in enumerate(paths[chunk[0]])
                    },
                )
                for numbers in alike.values()
                for chunk in (numbers[i : i + rows] for i in range(0, len(numbers), rows))
            ]
        return self._batches[key]


def latents_of(call: Mapping[str, Any]) -> Any:
    """The latents among a denoiser call's arguments: a tensor of rows, or a list of them.

    Raises:
        ValueError: There are none under a known name.
    """
    for name in _LATENTS:
        if call.get(name) is not None:
            return call[name]
    raise ValueError(f"expected latents under one of the names {_LATENTS}, got {sorted(call)}")


def time_of(call: Mapping[str, Any]) -> float:
    """The time among a denoiser call's arguments, as the pipeline scales it."""
    value = next(call[name] for name in _TIMES if name in call)
    return float(value.flatten()[0] if isinstance(value, torch.Tensor) else value)


def text_of(call: Mapping[str, Any], first: int, images: int) -> Conditioning:
    """The text of a block of rows of a call."""
    rows, block = len(latents_of(call)), range(first, first + images)
    leaves = ((path, value) for path, value in _leaves(call) if path[-1] in _TEXT)
    return Conditioning({p: take(p, v, block, rows) for p, v in leaves}, images)


def with_text(call: Mapping[str, Any], rows: Sequence[int], text: Mapping[_Path, Any]) -> Arguments:
    """Rows of a live call, possibly repeated, with other text."""
    changed: Arguments = take((), call, rows, len(latents_of(call)))
    for (*outer, name), value in text.items():
        holder = changed
        for key in outer:
            holder = holder[key]
        holder[name] = value
    return changed


def take(path: _Path, value: Any, rows: Sequence[int], count: int) -> Any:
    """Rows of an argument's value and of everything in it; what has no rows as it is.

    Args:
        path: Where the argument is.
        value: Its value.
        rows: Numbers of rows, possibly repeated.
        count: How many rows there are.
    """
    if isinstance(value, Mapping):
        return {name: take((*path, name), item, rows, count) for name, item in value.items()}
    if path and path[-1] in _ROWLESS:
        return value
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or len(value) != count or list(rows) == list(range(count)):
            return value
        return value[rows.start : rows.stop] if isinstance(rows, range) else value[list(rows)]
    if isinstance(value, (list, tuple)):
        if path and path[-1] in _LISTED:
            return [value[row] for row in rows] if len(value) == count else value
        return type(value)(take(path, item, rows, count) for item in value)
    return value


def equal(first: Any, second: Any) -> bool:
    """Whether two arguments are equal to the bit, lists and tuples by their items."""
    if first is second:
        return True
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        both = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
        return both and torch.equal(first, second)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


def _leaves(call: Mapping[str, Any], path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    for name, value in call.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _may_differ(path: _Path) -> bool:
    # a ControlNet sees the text too; its residuals stay the live picture's
    return "controlnet" in path[-1] or "residual" in path[-1]


def _has_rows(path: _Path, value: Any, rows: int) -> bool:
    if path[-1] in _ROWLESS or not isinstance(value, (torch.Tensor, list, tuple)):
        return False
    if isinstance(value, torch.Tensor) or path[-1] in _LISTED:
        return len(value) == rows
    return all(_has_rows(path, item, rows) for item in value)


def _common(first: Any, second: Any) -> tuple[Any, Any]:
    """Two rows up to the shorter sequence, for prompts padded to lengths of their own."""
    tensors = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
    if tensors and first.ndim > 1 and second.ndim > 1:
        length = min(first.shape[1], second.shape[1])
        return first[:, :length], second[:, :length]
    return first, second


def _shape(path: _Path, value: Any) -> Any:
    """What must be equal for rows to share a batch."""
    if isinstance(value, torch.Tensor):
        ids = tuple(value.flatten().tolist()) if path[-1] in _ROWLESS else ()
        return (value.dtype, *value.shape, ids)
    if path[-1] in _LISTED:
        return None  # entries may have any length
    if isinstance(value, (list, tuple)):
        return tuple(_shape(path, item) for item in value)
    return value


def _join(path: _Path, rows: Sequence[Any]) -> Any:
    first = rows[0]
    if path[-1] in _ROWLESS:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(list(rows)) if first.ndim else first
    if path[-1] in _LISTED:
        return [item for row in rows for item in row]
    if isinstance(first, (list, tuple)):
        return type(first)(_join(path, items) for items in zip(*rows, strict=True))
    return first
