from __future__ import annotations

import pytest
import torch

from biasmap_fast import AttributionPrompt
from biasmap_fast.concepts import encode, text_encoders, tokenize


def columns(prompt, tokenizer, concept):
    row = prompt.concepts.index(concept)
    found = tokenize(prompt, tokenizer)
    return [found.pieces[i] for i in found.weights[row].nonzero().flatten().tolist()]


def test_word_of_one_piece(tokenizer):
    prompt = AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))
    assert columns(prompt, tokenizer, "man") == ["man</w>"]


def test_word_of_several_pieces_takes_them_all(tokenizer):
    prompt = AttributionPrompt("a judge and man", ("judge",))
    pieces = columns(prompt, tokenizer, "judge")
    assert len(pieces) > 1
    assert "".join(pieces) == "judge</w>"


def test_repeated_word_takes_every_occurrence(tokenizer):
    prompt = AttributionPrompt("a doctor, a Doctor and a DOCTOR", ("doctor",))
    assert columns(prompt, tokenizer, "doctor") == ["doctor</w>"] * 3


def test_phrase_and_word_may_share_tokens(tokenizer):
    prompt = AttributionPrompt("a photo of a doctor", ("a doctor", "doctor"))
    assert columns(prompt, tokenizer, "a doctor") == ["a</w>", "doctor</w>"]
    assert tokenize(prompt, tokenizer).weights.sum(1).tolist() == [2, 1]


def test_word_inside_another_is_not_matched(tokenizer):
    # this tokenizer splits "woman" into "w" "o" "man"
    assert "man</w>" in tokenizer.tokenize("woman")[1:]
    prompt = AttributionPrompt("a woman and man", ("man",))
    assert tokenize(prompt, tokenizer).weights.sum() == 1
    with pytest.raises(ValueError, match=r"'man' is not in the attribution prompt .*w \| o \| man"):
        tokenize(AttributionPrompt("a woman", ("man",)), tokenizer)


def test_no_padding_and_special_tokens_have_no_weight(tokenizer):
    found = tokenize(AttributionPrompt("a doctor", ("doctor",)), tokenizer)
    assert found.pieces == ("<|startoftext|>", "a</w>", "doctor</w>", "<|endoftext|>")
    assert found.weights.tolist() == [[0, 0, 1, 0]]


def test_special_tokens_are_never_matched(tokenizer):
    with pytest.raises(ValueError, match="does not know"):
        tokenize(AttributionPrompt("a doctor", ("<|endoftext|>",)), tokenizer)
    with pytest.raises(ValueError, match="does not know"):
        tokenize(AttributionPrompt("a doctor 医", ("医",)), tokenizer)


def test_missing_concept_lists_the_tokens(tokenizer):
    with pytest.raises(ValueError, match=r"'gender' is not in .*startoftext\|> \| a \| doctor"):
        tokenize(AttributionPrompt("a doctor", ("gender",)), tokenizer)


def test_too_long_prompt_lists_the_tokens(tokenizer):
    text = " ".join(["doctor"] * 40)
    with pytest.raises(ValueError, match=r"has 42 tokens.* at most 24: .*doctor \| doctor"):
        tokenize(AttributionPrompt(text, ("doctor",)), tokenizer)


@pytest.mark.parametrize(
    ("text", "concepts", "error", "message"),
    [
        ("", ("a",), ValueError, "`text` of an attribution prompt must not be empty"),
        (3, ("a",), TypeError, "`text` must be a string, got int"),
        ("a doctor", "doctor", TypeError, r"write \('doctor',\)"),
        ("a doctor", (), ValueError, "at least one word"),
        ("a doctor", ("",), ValueError, "word or phrase, got ''"),
        ("a doctor", ("doctor", " "), ValueError, "word or phrase, got ' '"),
        ("a doctor", ("doctor", "doctor"), ValueError, "may be named once"),
    ],
)
def test_bad_prompts(text, concepts, error, message):
    with pytest.raises(error, match=message):
        AttributionPrompt(text, concepts)


def test_tokenizer_without_word_ends_is_refused(tokenizer):
    class Other:
        all_special_ids = ()
        model_max_length = 20

        def __call__(self, text, **kwargs):
            return type("E", (), {"input_ids": [0, 1]})()

        def convert_ids_to_tokens(self, ids):
            return ["▁a", "▁doctor"]

    with pytest.raises(TypeError, match="expected a CLIP tokenizer"):
        tokenize(AttributionPrompt("a doctor", ("doctor",)), Other())


def test_encoding_is_the_pipelines_own(sd_pipe, sdxl_pipe):
    prompt = AttributionPrompt("a doctor", ("doctor",))
    for pipe, states in ((sd_pipe, 1), (sdxl_pipe, 2)):
        tokens = [tokenize(prompt, tokenizer) for tokenizer, _ in text_encoders(pipe)]
        found = encode(tokens, pipe, torch.device("cpu"))
        padded = (
            pipe.encode_prompt("a doctor", "cpu", 1, False)
            if states == 1
            else (pipe.encode_prompt("a doctor", device="cpu", do_classifier_free_guidance=False))
        )
        # causal text encoder: the padding that the pipeline adds does not reach earlier tokens
        torch.testing.assert_close(found, padded[0][:, : found.shape[1]])
        assert len(tokens) == states


def test_pipeline_without_text_encoder():
    with pytest.raises(TypeError, match="tokenizer and a text encoder, got object"):
        text_encoders(object())
