from __future__ import annotations

import copy

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import AttributionPrompt
from biasmap_fast.concepts import encode, text_encoders, tokenize, tokenize_all


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


@pytest.fixture
def inverted_pipe(sd_pipe):
    """With the textual inversion "<cat>" of three vectors; the shared tokenizer stays as it is."""
    sd_pipe.tokenizer = copy.deepcopy(sd_pipe.tokenizer)
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    sd_pipe.load_textual_inversion({"cat": vectors}, token="<cat>")
    return sd_pipe


def test_textual_inversion_of_several_vectors_is_expanded_as_the_pipeline_does(inverted_pipe):
    prompt = AttributionPrompt("a photo of <cat> doctor", ("<cat>", "doctor", "a photo"))
    (tokens,) = tokenize_all(prompt, inverted_pipe)
    assert tokens.pieces[4:8] == ("<cat>", "<cat>_1", "<cat>_2", "doctor</w>")
    assert [row.nonzero().flatten().tolist() for row in tokens.weights] == [[4, 5, 6], [7], [1, 2]]
    padded, _ = inverted_pipe.encode_prompt(prompt.text, "cpu", 1, False)
    states = encode([tokens], inverted_pipe, torch.device("cpu"))
    torch.testing.assert_close(states, padded[:, : states.shape[1]])
    with bm.attribute(inverted_pipe, prompt) as recorder:
        inverted_pipe("a <cat>", num_inference_steps=1, height=32, width=32, output_type="latent")
    assert recorder.maps().values.shape == (1, 3, 16, 16)


def test_added_tokens_are_words_of_their_own(inverted_pipe):
    """Alone in a prompt, in front of a word, and right behind one."""
    for text, concept, columns in (
        ("<cat>", "<cat>", [1, 2, 3]), ("<cat> man", "man", [4]), ("man<cat>", "<cat>", [2, 3, 4]),
    ):  # fmt: skip
        (tokens,) = tokenize_all(AttributionPrompt(text, (concept,)), inverted_pipe)
        assert tokens.weights[0].nonzero().flatten().tolist() == columns
