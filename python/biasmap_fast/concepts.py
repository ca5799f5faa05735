"""From words to the columns of cross-attention: attribution prompt -> token pieces -> weights.

An attribution prompt is the text whose tokens are looked for in a picture. It need not be the
prompt that drew the picture (open-vocabulary attribution: Marcos-Manchon et al., CVPR 2024; used
by BiasMap, arXiv 2509.13496). It is encoded *without padding*: start token, pieces, end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# CLIP's byte-pair encoding marks the last piece of every word with this suffix.
_WORD_END = "</w>"


@dataclass(frozen=True)
class AttributionPrompt:
    """A text and the concepts in it whose attribution maps are wanted.

    Args:
        text: The attribution prompt, for example ``"A photo of the face of a doctor and gender"``.
        concepts: Words or phrases of ``text``; each becomes one map. A word of several token
            pieces, or a word that occurs several times, is the sum over all its pieces.
        name: The key of this prompt's result if several prompts are recorded at once; the text
            itself if left empty.

    Raises:
        TypeError: ``text`` is no string, or ``concepts`` is one string instead of a sequence.
        ValueError: The text, the list of concepts or a concept is empty, or a concept is repeated.

    Example:
        >>> prompt = AttributionPrompt("A photo of a doctor and gender", ("doctor", "gender"))
        >>> prompt.name
        'A photo of a doctor and gender'
    """

    text: str
    concepts: tuple[str, ...]
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"`text` must be a string, got {type(self.text).__name__}")
        given: object = self.concepts
        if isinstance(given, str):
            raise TypeError(
                f"`concepts` must be a sequence of words or phrases, got the string "
                f"{given!r}; write ({given!r},)"
            )
        concepts = tuple(self.concepts)
        if not self.text.strip():
            raise ValueError("`text` of an attribution prompt must not be empty")
        if not concepts:
            raise ValueError(f"`concepts` must name at least one word of {self.text!r}, got none")
        for concept in concepts:
            if not isinstance(concept, str) or not concept.strip():
                raise ValueError(f"a concept must be a word or phrase, got {concept!r}")
        if len(set(concepts)) != len(concepts):
            raise ValueError(f"every concept may be named once, got {list(concepts)}")
        object.__setattr__(self, "concepts", concepts)
        object.__setattr__(self, "name", self.name or self.text)


@dataclass(frozen=True)
class TokenizedPrompt:
    """An attribution prompt as one tokenizer sees it.

    Attributes:
        prompt: The attribution prompt.
        ids: Token ids, T' of them, start and end token included.
        pieces: The same tokens as text.
        weights: ``[K, T']`` float32, 1 where a token is a piece of the concept, else 0.
    """

    prompt: AttributionPrompt
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    weights: torch.Tensor  # [K, T']


def tokenize(prompt: AttributionPrompt, tokenizer: Any, pipe: Any = None) -> TokenizedPrompt:
    """Finds the token pieces of every concept of ``prompt``.

    A concept matches if its pieces stand in order and begin at the start of a word, so "man" is not
    found inside "woman" even if the tokenizer splits that into "wo" and "man". Special tokens are
    never matched.

    Args:
        prompt: The text and its concepts.
        tokenizer: A CLIP tokenizer of transformers (``pipe.tokenizer``).
        pipe: The pipeline; its textual inversions of several vectors are expanded, as it does.

    Raises:
        TypeError: The tokenizer's pieces carry no CLIP word ends.
        ValueError: A concept is not in the text, or the text is too long for the encoder; the
            message lists the tokens.
    """
    expand = getattr(pipe, "maybe_convert_prompt", lambda text, _: text)
    ids = _encode(tokenizer, expand(prompt.text, tokenizer))
    pieces = tuple(tokenizer.convert_ids_to_tokens(list(ids)))
    special = set(tokenizer.all_special_ids)
    # A token that was added to the vocabulary is a word of its own, without the suffix of one.
    added = set(getattr(tokenizer, "added_tokens_encoder", {}).values())
    words = [token in special or token in added for token in ids]
    ends = [word or piece.endswith(_WORD_END) for word, piece in zip(words, pieces, strict=True)]
    if not all(words) and words == ends:
        raise TypeError(
            f"expected a CLIP tokenizer (pieces that end in {_WORD_END!r}), got "
            f"{type(tokenizer).__name__} with pieces {list(pieces)}"
        )
    limit = tokenizer.model_max_length
    if len(ids) > limit:
        raise ValueError(
            f"the attribution prompt {prompt.text!r} has {len(ids)} tokens, but the text encoder "
            f"takes at most {limit}: {_listed(pieces)}"
        )
    import torch

    weights = torch.zeros(len(prompt.concepts), len(ids))  # [K, T']
    for row, concept in enumerate(prompt.concepts):
        wanted = _encode(tokenizer, expand(concept, tokenizer), special_tokens=False)
        if not wanted or special.intersection(wanted):
            raise ValueError(
                f"the concept {concept!r} has characters that the tokenizer does not know; "
                f"its tokens: {_listed(tokenizer.convert_ids_to_tokens(list(wanted)))}"
            )
        columns = [
            column
            for start in range(len(ids) - len(wanted) + 1)
            if ids[start : start + len(wanted)] == wanted
            and (start == 0 or ends[start - 1] or ids[start] in added)
            for column in range(start, start + len(wanted))
        ]
        if not columns:
            raise ValueError(
                f"the concept {concept!r} is not in the attribution prompt {prompt.text!r}; "
                f"its tokens: {_listed(pieces)}"
            )
        weights[row, columns] = 1.0
    return TokenizedPrompt(prompt, ids, pieces, weights)


def tokenize_all(prompt: AttributionPrompt, pipe: Any) -> list[TokenizedPrompt]:
    """`tokenize` with each of the pipeline's tokenizers (one, or two for SDXL)."""
    return [tokenize(prompt, tokenizer, pipe) for tokenizer, _ in text_encoders(pipe)]


def encode(tokenized: Sequence[TokenizedPrompt], pipe: Any, device: torch.device) -> torch.Tensor:
    """Runs the pipeline's text encoders on one unpadded attribution prompt.

    Args:
        tokenized: The prompt as each of the pipeline's tokenizers sees it: one entry for Stable
            Diffusion 1.x and 2.x, two for SDXL.
        pipe: The pipeline that owns the encoders.
        device: Device that the encoders run on.

    Returns:
        ``[1, T', D]`` hidden states in the encoders' dtype: the last layer's for one encoder, the
        concatenated penultimate layers' for SDXL, as the pipelines themselves take them.
    """
    penultimate = getattr(pipe, "text_encoder_2", None) is not None
    states = []
    import torch

    with torch.no_grad():
        for (_, encoder), tokens in zip(text_encoders(pipe), tokenized, strict=True):
            ids = torch.tensor([tokens.ids], device=device)  # [1, T']
            if penultimate:
                states.append(encoder(ids, output_hidden_states=True).hidden_states[-2])
            else:
                states.append(encoder(ids)[0])
    return torch.cat(states, dim=-1)


def text_encoders(pipe: Any) -> list[tuple[Any, Any]]:
    """The pipeline's (tokenizer, text encoder) pairs, in the order of its text embedding.

    Raises:
        TypeError: The pipeline has no CLIP text encoder.
    """
    pairs = []
    for suffix in ("", "_2"):
        tokenizer = getattr(pipe, f"tokenizer{suffix}", None)
        encoder = getattr(pipe, f"text_encoder{suffix}", None)
        if tokenizer is not None and encoder is not None:
            pairs.append((tokenizer, encoder))
    if not pairs:
        raise TypeError(
            f"expected a pipeline with a tokenizer and a text encoder, got {type(pipe).__name__}"
        )
    return pairs


def _encode(tokenizer: Any, text: str, *, special_tokens: bool = True) -> tuple[int, ...]:
    # `verbose=False`: our own error names the tokens of a prompt that is too long.
    encoded = tokenizer(text, add_special_tokens=special_tokens, truncation=False, verbose=False)
    return tuple(encoded.input_ids)


def _listed(pieces: Any) -> str:
    return " | ".join(piece.removesuffix(_WORD_END) for piece in pieces)
