"""The denoiser of any diffusers pipeline, called with other prompts than the pipeline draws.

A pipeline makes a denoiser's arguments from a prompt in its own way: pooled states, masks, chat
templates, text ids. So the pipeline itself makes them: a *rehearsal* runs its own ``__call__`` on a
shallow copy with another prompt and stops at the first call of the denoiser. Arguments that depend
on the text come from the rehearsal; latents, time, guidance, image ids and a ControlNet's residuals
come from the live call (`conditioning`).
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .conditioning import Arguments, Batch, Conditionings, latents_of, with_text

probing: ContextVar[bool] = ContextVar("biasmap_fast.probing", default=False)
"""Whether the denoiser runs for a probe: hooks that watch or change a drawing then do nothing."""

# A pipeline's other arguments that are made of the prompt: a rehearsal's prompt replaces them.
_PROMPT = re.compile(r"(pooled_)?prompt_(\d|.*(embeds|mask)).*|callback.*")


class _Reached(Exception):  # noqa: N818 - no error: how a rehearsal ends
    def __init__(self, args: tuple[Any, ...], kwargs: Arguments) -> None:
        super().__init__("a rehearsal reached the denoiser")
        self.call = (args, kwargs)


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
        live: Arguments,
        conditionings: Conditionings,
        wanted: Sequence[tuple[int, int]],
        first: int,
    ) -> torch.Tensor:
        """Predictions at the latents and time of a live call, without gradient.

        Args:
            live: The live call's arguments, by name.
            conditionings: What prompts give the denoiser.
            wanted: Of each prediction, the number of its prompt and its image.
            first: Row of the live call in which image 0 is drawn with its prompt.

        Returns:
            ``[len(wanted), C, h, w]``, at least float32.
        """
        with isolated(self.module):
            while True:
                batches = conditionings.batches(wanted, self.rows)
                try:
                    parts = [self._forward(live, batch, first) for batch in batches]
                    break
                except torch.OutOfMemoryError:
                    if self.rows == 1:
                        raise
                    self.rows = max(1, min(self.rows, len(wanted)) // 2)
        order = torch.tensor([number for batch in batches for number in batch.numbers]).argsort()
        predictions: torch.Tensor = torch.cat(parts)[order.to(parts[0].device)]
        return predictions

    def _forward(self, live: Arguments, batch: Batch, first: int) -> torch.Tensor:
        rows = [first + image for image in batch.images]
        self.forwarded += len(rows)
        return self.prediction(self.module(**with_text(live, rows, batch.text)), live)

    @property
    def precision(self) -> float:
        """Differences of this size, relative to a prediction, may be rounding."""
        dtype = getattr(self.module, "dtype", torch.float32)
        return max(4 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps / 8)

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
        kept = value.shape[1] // 2 if self._learns_variance(value, live) else value.shape[1]
        prediction: torch.Tensor = value[:, :kept]
        return prediction

    def _learns_variance(self, value: torch.Tensor, live: Mapping[str, Any]) -> bool:
        config = getattr(getattr(self.pipe, "vae", None), "config", {})
        channels = config.get("latent_channels") or len(latents_of(live)[0])
        kind = getattr(self.pipe, "scheduler", None)
        kind = getattr(kind, "config", {}).get("variance_type")
        return bool(value.shape[1] == 2 * channels or kind in ("learned", "learned_range"))


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
        name: _copied(value) for name, value in arguments.items() if not _PROMPT.fullmatch(name)
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
    patches = value[:, : height * width].reshape(len(value), height, width, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(value), -1, 2 * height, 2 * width)
