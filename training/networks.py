"""The untrained parts of the embedded pipeline: tokenizer, text encoder, autoencoder, UNet."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from biasmap_fast.testbed import quiet_diffusers

MAX_TOKENS = 20
TEXT_WIDTH = 64

_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def build_tokenizer(words: Iterable[str]) -> Any:
    """A `CLIPTokenizer` in which every given lower-case word is one token.

    Byte-level pairs are merged, the most frequent first, until each word is whole; every other
    text falls into several pieces over the byte alphabet. Text is lower-cased.
    """
    vocabulary, merges = byte_pairs(sorted(set(words)))
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(Path(folder), vocabulary, merges)
        with quiet_diffusers():
            return CLIPTokenizer(
                vocab=str(Path(folder) / "vocab.json"),
                merges=str(Path(folder) / "merges.txt"),
                model_max_length=MAX_TOKENS,
            )


def write_vocabulary(folder: Path, vocabulary: list[str], merges: list[tuple[str, str]]) -> None:
    """Writes `vocab.json` and `merges.txt`, the form that every transformers version reads."""
    text = json.dumps({piece: index for index, piece in enumerate(vocabulary)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def byte_pairs(words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Vocabulary in order of its ids and merges in order of their rank, until words are whole."""
    # the printable stand-ins of the 256 bytes that GPT-2 and CLIP use
    bytes_ = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = [chr(b) for b in bytes_] + [chr(256 + n) for n in range(256 - len(bytes_))]
    vocabulary = stand_ins + [piece + "</w>" for piece in stand_ins]
    known = set(vocabulary)
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(pieces) > 1 for pieces in spelled):
        counts: Counter[tuple[str, str]] = Counter()
        for pieces in spelled:
            counts.update(itertools.pairwise(pieces))
        pair = max(sorted(counts), key=lambda p: counts[p])
        merges.append(pair)
        if pair[0] + pair[1] not in known:
            vocabulary.append(pair[0] + pair[1])
            known.add(pair[0] + pair[1])
        spelled = [_merge(pieces, pair) for pieces in spelled]
    return vocabulary + list(_SPECIAL), merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def build_text_encoder(tokenizer: Any) -> Any:
    """The random text encoder, which is never trained.

    Trained together with the UNet, the trial's encoder moved the profession's information to
    other tokens and the word maps no longer lay on the marker (AUC 0.27-0.45 against 0.96).
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_WIDTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config)
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, torch.nn.Embedding):
                # words far apart, positions a small addition to them
                module.weight.normal_(0.0, 0.2 if len(module.weight) == MAX_TOKENS else 1.0)
    encoder.eval()
    return encoder.requires_grad_(False)


def build_autoencoder() -> Any:
    """The autoencoder: 64 x 64 x 3 to 16 x 16 x 4.

    Of the same size, `AutoencoderKL` trained at a third of the pictures per second.
    """
    return AutoencoderTiny(
        encoder_block_out_channels=(24,) * 3,
        decoder_block_out_channels=(24,) * 3,
        num_encoder_blocks=(0, 1, 3),
        num_decoder_blocks=(3, 1, 0),
        latent_channels=4,
        scaling_factor=1.0,
    )


def build_unet() -> Any:
    """The UNet: cross-attention at 16 x 16, at 8 x 8 and, in the middle, at 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=16,
    )


def build_scheduler() -> Any:
    """DPM-Solver++ of second order, v-prediction.

    Stable Diffusion's noise schedule, but for its end: sqrt(abar) is 0.016 at the last time, not
    0.068, and sampling begins there, with what the model was trained on. The signal that Stable
    Diffusion leaves in its last step makes it draw grey averages (Lin et al., arXiv 2305.08891),
    and here it shifted the demographic shares.
    """
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def build_pipeline(autoencoder: Any, text_encoder: Any, tokenizer: Any, unet: Any) -> Any:
    with quiet_diffusers():
        return StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
