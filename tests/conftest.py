"""Tiny random pipelines of the real architectures, and what the tests share."""

from __future__ import annotations

import json

import pytest
import torch

# The models here are tiny: a second thread only costs time, above all on a busy machine.
torch.set_num_threads(1)

# Tests over about three seconds, without their parameters; `make test-fast` leaves them out.
SLOW = {
    "tests/benchmarks/test_run.py::test_peaks_come_from_processes_of_their_own",
    "tests/testbed/test_pipeline.py::test_model_draws_professions",
    "tests/training/test_calibration.py::test_a_word_that_loses_its_profession_is_put_halfway_back",
    "tests/training/test_calibration.py::test_calibration_finds_the_planted_share",
    "tests/training/test_calibration.py::test_interrupted_calibration_ends_with_the_same_words",
    "tests/training/test_calibration.py::test_words_in_pieces_and_unreadable_pictures_are_refused",
    "tests/training/test_training.py::test_interrupted_training_ends_with_the_same_weights",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.partition("[")[0] in SLOW:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A CLIP tokenizer of letters with a few merges: "doctor" is one piece, "woman" is three."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    merges = [
        "o r</w>",
        "d o",
        "do c",
        "doc t",
        "doct or</w>",
        "m a",
        "ma n</w>",
        "a n",
        "an d</w>",
    ]
    merges += ["p h", "ph o", "t o</w>", "pho to</w>", "o f</w>"]
    merged = [merge.replace(" ", "") for merge in merges]
    vocabulary = letters + [letter + "</w>" for letter in letters] + merged
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({v: i for i, v in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=24)


def text_encoder(tokenizer, width, seed, projection=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # random words must differ enough for maps to have structure
        initializer_factor=5.0,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def vae(seed):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


def scheduler(kind="DDIMScheduler", **config):
    import diffusers

    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    settings["steps_offset"] = 1
    if kind == "DDIMScheduler":
        settings["clip_sample"] = False
    return getattr(diffusers, kind)(**(settings | config))


def unet(width, seed, **config):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    settings = {
        "sample_size": 16,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": width,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    model = UNet2DConditionModel(**(settings | config)).eval()
    with torch.no_grad():  # sharper attention than random layers have: maps worth comparing
        for name, weight in model.named_parameters():
            if "attn2.to_q" in name or "attn2.to_k" in name:
                weight.mul_(4.0)
    return model


def build_sd(
    tokenizer, *, unet_config=None, text_width=32, kind="DDIMScheduler", **scheduler_config
):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae(1),
        text_encoder=text_encoder(tokenizer, text_width, 2),
        tokenizer=tokenizer,
        unet=unet(text_width, 3, **(unet_config or {})),
        scheduler=scheduler(kind, **scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def make_sd(tokenizer):
    """Builds a tiny Stable Diffusion pipeline: ``make_sd(unet_config=..., kind=...)``."""

    def make(**options):
        return build_sd(tokenizer, **options)

    return make


@pytest.fixture
def sd_pipe(make_sd):
    """Stable Diffusion 1.x in small."""
    return make_sd()


@pytest.fixture
def sdxl_pipe(tokenizer):
    """SDXL in small: two text encoders, additional embeddings, heads that differ by layer."""
    from diffusers import StableDiffusionXLPipeline

    config = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }
    pipe = StableDiffusionXLPipeline(
        vae=vae(1),
        text_encoder=text_encoder(tokenizer, 32, 2),
        text_encoder_2=text_encoder(tokenizer, 48, 4, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(80, 3, **config),
        scheduler=scheduler("EulerDiscreteScheduler"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Reference:
    """The maps written from the formulas: whole attention matrices, step by step, layer by layer.

    It keeps every call's hidden states (an attention processor sees them, no hook), and evaluates
    afterwards in float64, resizing each layer's map of each step on its own.
    """

    def __init__(self, pipe, mid_block=False):
        self.pipe = pipe
        self.seen = []  # (layer, hidden states)
        reference = self

        class Processor:
            def __init__(self, name, inner):
                self.name, self.inner = name, inner

            def __call__(
                self,
                attn,
                hidden_states,
                encoder_hidden_states=None,
                attention_mask=None,
                temb=None,
            ):
                if encoder_hidden_states is not None:
                    reference.seen.append((self.name, hidden_states.detach().clone()))
                return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

        names = pipe.unet.attn_processors
        pipe.unet.set_attn_processor(
            {name: Processor(name.removesuffix(".processor"), p) for name, p in names.items()}
        )
        self.mid_block = mid_block

    def states(self, prompt):
        pipe = self.pipe
        ids = pipe.tokenizer(prompt.text, return_tensors="pt").input_ids
        with torch.no_grad():
            if getattr(pipe, "text_encoder_2", None) is None:
                return ids[0], pipe.text_encoder(ids)[0]
            encoders = (pipe.text_encoder, pipe.text_encoder_2)
            hidden = [e(ids, output_hidden_states=True).hidden_states[-2] for e in encoders]
            return ids[0], torch.cat(hidden, -1)

    def columns(self, ids, concept):
        wanted = self.pipe.tokenizer(concept, add_special_tokens=False).input_ids
        starts = [i for i in range(len(ids)) if ids[i : i + len(wanted)].tolist() == wanted]
        return [i for start in starts for i in range(start, start + len(wanted))]

    @torch.no_grad()
    def maps(
        self, prompt, latents, rows, layers=None, keep=lambda name, head, call: True, size=None
    ):
        ids, states = self.states(prompt)
        calls, pieces = {}, []
        sizes = {}
        for name, hidden in self.seen:
            if layers is None and name.startswith("mid_block"):
                continue
            if layers is not None and not any(name.startswith(layer) for layer in layers):
                continue
            call = calls[name] = calls.get(name, -1) + 1
            attn = self.pipe.unet.get_submodule(name)
            h, w = latents
            while h * w != hidden.shape[1]:
                h, w = -(-h // 2), -(-w // 2)
            sizes[h * w] = (h, w)
            query = attn.to_q(hidden[rows]).double()
            key = attn.to_k(states.to(hidden.dtype))[0].double()
            dim = query.shape[-1] // attn.heads
            for head in range(attn.heads):
                channels = slice(head * dim, (head + 1) * dim)
                matrix = query[..., channels] @ key[:, channels].T / dim**0.5  # [B, n, T']
                matrix = matrix.softmax(-1)
                if not keep(name, head, call):
                    matrix = matrix * 0
                for k, concept in enumerate(prompt.concepts):
                    column = matrix[..., self.columns(ids, concept)].sum(-1)
                    pieces.append((k, column.reshape(-1, 1, h, w)))
        largest = sizes[max(sizes)]
        total = torch.zeros(len(pieces[0][1]), len(prompt.concepts), *largest, dtype=torch.float64)
        for k, piece in pieces:
            total[:, k] += torch.nn.functional.interpolate(
                piece, size=largest, mode="bilinear", align_corners=False
            )[:, 0]
        if size is not None:
            total = torch.nn.functional.interpolate(total, size=size, mode="bilinear")
        return total


@pytest.fixture
def reference_of():
    """``reference_of(pipe)``: the independent reference of a pipeline's maps."""
    return Reference
