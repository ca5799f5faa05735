"""Readers of pictures: the testbed's own, CLIP zero-shot, or anybody's function.

A reader says which profession and which demographic words a picture shows. Its errors are not in
any interval of the report; the labels of a zero-shot classifier carry biases of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import presets
from ..pipelines import TESTBED, ModelError
from .conditions import find
from .measure import Reading, reader_for_testbed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from .measure import Reader
    from .plan import AuditPlan

CLIP_TEMPLATE = "a photo of {}"
"""Text whose similarity with the picture decides, with the word and its article."""


def reader_for(plan: AuditPlan, folder: str = ".") -> Reader | None:
    """The reader that a plan asks for; None for none.

    Args:
        plan: its ``classifier`` is ``"none"``, ``"testbed"``, ``"clip:DIR"`` (or a hub id), or
            ``"module:function"``: a function of a list of PIL pictures that returns one `Reading`
            a picture (also ``"file.py:function"``).
        folder: where the function's module is looked for beside ``sys.path``.

    Raises:
        ConditionError: the module or function cannot be found.
        ModelError: the CLIP model cannot be loaded.
    """
    if plan.classifier == "none":
        return None
    if plan.classifier == TESTBED:
        return reader_for_testbed()
    kind, _, rest = plan.classifier.partition(":")
    if kind == "clip":
        return ClipReader(plan, *_load_clip(rest, plan.device))
    return _function(plan.classifier, folder)


class ClipReader:
    """Reads pictures with CLIP, zero-shot (Radford et al., ICML 2021).

    Of the professions, and of the words of each axis, the one whose text ``"a photo of a ..."`` is
    nearest to the picture counts; its softmax probability among them is the score. The temperature
    is the model's own.

    Args:
        plan: whose professions and axes are the labels.
        model: a transformers ``CLIPModel``.
        tokenizer: its tokenizer.

    Example:
        >>> reader = ClipReader(plan, model, tokenizer)  # doctest: +SKIP
        >>> reader([picture])[0].by_axis["gender"]  # doctest: +SKIP
        ('woman', 0.83)
    """

    def __init__(self, plan: AuditPlan, model: Any, tokenizer: Any) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._professions = list(plan.professions)
        self._axes = {axis: list(words) for axis, words in plan.axes.items()}
        self._nouns = self._texts(self._professions)
        self._words = {axis: self._texts(words) for axis, words in self._axes.items()}

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image]) -> list[Reading]:
        """One `Reading` a picture; its ``score`` is the profession's probability."""
        images = self._unit(self._model.get_image_features(pixel_values=self._pixels(pictures)))
        scale = self._model.logit_scale.exp()

        def probabilities(texts: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = (scale * images @ texts.T).softmax(dim=-1)
            return found.float().cpu()  # [B, words]

        nouns = probabilities(self._nouns)
        words = {axis: probabilities(texts) for axis, texts in self._words.items()}
        readings = []
        for index in range(len(pictures)):
            by_axis = {
                axis: (self._axes[axis][int(p[index].argmax())], float(p[index].max()))
                for axis, p in words.items()
            }
            noun = int(nouns[index].argmax())
            score = float(nouns[index, noun])
            readings.append(Reading(self._professions[noun], None, score, by_axis))
        return readings

    @torch.no_grad()
    def scores(self, pictures: Sequence[Image], texts: Sequence[str]) -> list[float]:
        """CLIP score of each picture with its text (Hessel et al., EMNLP 2021).

        ``max(100 cos, 0)``, as in torchmetrics, whose own takes transformers' preprocessing and so
        torchvision.

        Args:
            pictures: B pictures.
            texts: what each should show; cut to what the text encoder takes.
        """
        images = self._unit(self._model.get_image_features(pixel_values=self._pixels(pictures)))
        wanted = {text: self._embedded([text])[0] for text in dict.fromkeys(texts)}
        cosine = (images * torch.stack([wanted[text] for text in texts])).sum(-1)  # [B]
        found: list[float] = (100 * cosine.double()).clamp(min=0).tolist()
        return found

    def _texts(self, words: Sequence[str]) -> torch.Tensor:
        return self._embedded([CLIP_TEMPLATE.format(presets.with_article(word)) for word in words])

    @torch.no_grad()
    def _embedded(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit text features ``[T, D]``."""
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        ids, mask = (
            tokens[name].to(self._model.device) for name in ("input_ids", "attention_mask")
        )
        found = self._model.get_text_features(input_ids=ids, attention_mask=mask)
        return self._unit(found)

    @staticmethod
    def _unit(features: Any) -> torch.Tensor:
        # transformers 5 wraps the features into an output
        values: torch.Tensor = getattr(features, "pooler_output", features)
        return torch.nn.functional.normalize(values, dim=-1)

    def _pixels(self, pictures: Sequence[Image]) -> torch.Tensor:
        """CLIP's preprocessing ``[B, 3, S, S]``; transformers' own wants torchvision."""
        from PIL import Image as PILImage
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        side = self._model.config.vision_config.image_size
        arrays = []
        for picture in pictures:
            scale = side / min(picture.size)
            size = (
                max(side, round(picture.width * scale)),
                max(side, round(picture.height * scale)),
            )
            sized = picture.convert("RGB").resize(size, PILImage.Resampling.BICUBIC)
            left, top = (sized.width - side) // 2, (sized.height - side) // 2
            cropped = sized.crop((left, top, left + side, top + side))
            values = np.asarray(cropped, dtype=np.float32) / 255
            arrays.append((values - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD)
        stacked = torch.from_numpy(np.stack(arrays)).movedim(-1, 1)
        return stacked.to(self._model.device, self._model.dtype)


def _load_clip(name: str, device: str) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPTokenizer

    try:
        model, tokenizer = CLIPModel.from_pretrained(name), CLIPTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the classifier {name!r} cannot be loaded as CLIP: {' '.join(str(error).split())}"
        ) from error
    return model.to(device), tokenizer


def _function(target: str, folder: str) -> Reader:
    found = find(target, folder)

    def read(pictures: Sequence[Image]) -> list[Reading]:
        readings = list(found(list(pictures)))
        if len(readings) != len(pictures) or not all(isinstance(r, Reading) for r in readings):
            raise TypeError(
                f"the classifier {target} must return one Reading a picture, got "
                f"{len(readings)} of {sorted({type(r).__name__ for r in readings})} for "
                f"{len(pictures)} pictures"
            )
        return readings

    return read
