"""Readers of pictures: the testbed's own, CLIP zero-shot, or anybody's function.

A reader says which profession and which demographic words a picture shows. Its errors are not in
any interval of the report; the labels of a zero-shot classifier carry biases of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import presets
from ..pipelines import TESTBED, ModelError
from .conditions import find

if TYPE_CHECKING:
    from PIL.Image import Image

    from .plan import AuditPlan


@dataclass(frozen=True)
class Reading:
    """What a classifier reads in one picture.

    Attributes:
        profession: The profession, or ``None`` if it cannot be told.
        demographic: The demographic word, or ``None``.
        score: How much the picture looks like what was read, 0 to 1.
        by_axis: Axis -> its word or ``None``, and the score of that; takes the place of
            ``demographic`` and ``score`` on the axes that it names.
    """

    profession: str | None
    demographic: str | None
    score: float
    by_axis: Mapping[str, tuple[str | None, float]] = field(default_factory=dict)


Reader = Callable[[Sequence["Image"]], Sequence[Reading]]

CLIP_TEMPLATE = "a photo of {}"
"""Text whose similarity with the picture decides, with the word and its article."""


def reader_for(plan: AuditPlan, folder: str = ".") -> Reader | None:
    """Returns the reader that a plan's ``classifier`` asks for, or ``None``.

    Args:
        plan: The plan. ``"module:function"`` (or ``"file.py:function"``) names a function of a list
            of PIL pictures that returns one `Reading` per picture.
        folder: Where the function's module is looked for beside ``sys.path``.
    """
    if plan.classifier == "none":
        return None
    if plan.classifier == TESTBED:
        return reader_for_testbed()
    kind, _, rest = plan.classifier.partition(":")
    if kind == "clip":
        return ClipReader(plan, *_load_clip(rest, plan.device))
    return _function(plan.classifier, folder)


def reader_for_testbed(classifier: Callable[[Any], list[Any]] | None = None) -> Reader:
    """Returns the testbed's own reader, or that of another of its worlds (`testbed.classify`)."""
    from .. import testbed

    classify = classifier or testbed.classify

    def read(pictures: Sequence[Image]) -> list[Reading]:
        return [
            Reading(
                label.profession,
                # Of noise the classifier still says which word is nearer: that is no reading.
                label.demographic if label.plausibility >= testbed.PLAUSIBLE else None,
                float(label.plausibility),
            )
            for label in classify(list(pictures))
        ]

    return read


class ClipReader:
    """Reads pictures with CLIP, zero-shot (Radford et al., ICML 2021).

    Of the professions, and of the words of each axis, the one whose text ``"a photo of a ..."`` is
    nearest to the picture counts; its softmax probability among them is the score. The temperature
    is the model's own.

    Args:
        plan: Its professions and axes are the labels.
        model: A transformers ``CLIPModel``.
        tokenizer: Its tokenizer.

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
        self._profession_texts = self._texts(self._professions)
        self._word_texts = {axis: self._texts(words) for axis, words in self._axes.items()}

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image]) -> list[Reading]:
        """Returns one `Reading` per picture; its ``score`` is the profession's probability."""
        images = self._unit(self._model.get_image_features(pixel_values=self._pixels(pictures)))
        scale = self._model.logit_scale.exp()

        def probabilities(texts: torch.Tensor) -> torch.Tensor:
            values: torch.Tensor = (scale * images @ texts.T).softmax(dim=-1)
            return values.float().cpu()  # [B, words]

        professions = probabilities(self._profession_texts)
        words = {axis: probabilities(texts) for axis, texts in self._word_texts.items()}
        readings = []
        for index in range(len(pictures)):
            by_axis = {
                axis: (self._axes[axis][int(p[index].argmax())], float(p[index].max()))
                for axis, p in words.items()
            }
            best = int(professions[index].argmax())
            score = float(professions[index, best])
            readings.append(Reading(self._professions[best], None, score, by_axis))
        return readings

    @torch.no_grad()
    def scores(self, pictures: Sequence[Image], texts: Sequence[str]) -> list[float]:
        """Returns the CLIP score of each picture with its text (Hessel et al., EMNLP 2021).

        ``max(100 cos, 0)``, as in torchmetrics, whose own takes transformers' preprocessing and so
        torchvision. Texts are cut to what the text encoder takes.
        """
        images = self._unit(self._model.get_image_features(pixel_values=self._pixels(pictures)))
        wanted = {text: self._embedded([text])[0] for text in dict.fromkeys(texts)}
        cosine = (images * torch.stack([wanted[text] for text in texts])).sum(-1)  # [B]
        scores: list[float] = (100 * cosine.double()).clamp(min=0).tolist()
        return scores

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
        return self._unit(self._model.get_text_features(input_ids=ids, attention_mask=mask))

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
    function = find(target, folder)

    def read(pictures: Sequence[Image]) -> list[Reading]:
        readings = list(function(list(pictures)))
        if len(readings) != len(pictures) or not all(isinstance(r, Reading) for r in readings):
            raise TypeError(
                f"the classifier {target} must return one Reading per picture, got "
                f"{len(readings)} of {sorted({type(r).__name__ for r in readings})} for "
                f"{len(pictures)} pictures"
            )
        return readings

    return read
