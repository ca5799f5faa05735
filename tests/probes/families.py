"""Tiny random pipelines of many families: the real classes, and text encoders built here.

A family also says, independently of the package, where the conditional predictions of a step are
and how its packed latents lie on their grid.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import Any

import torch

PROMPTS = ["a photo of a doctor", "a photo of a man"]


@dataclass
class Family:
    pipe: Any
    guided: dict = field(default_factory=lambda: {"guidance_scale": 3.0})
    plain: dict = field(default_factory=lambda: {"guidance_scale": 1.0})
    options: dict = field(default_factory=dict)
    size: tuple = (48, 32)  # height, width
    chunk: int = -1  # which guidance chunk is conditional
    separate: bool = False  # whether guidance branches have calls of their own, conditional first
    packed: bool = False
    channels: int = 4  # of the prediction without learned variance

    def draw(self, prompts=PROMPTS, seeds=(1, 2), guided=True, steps=3, **options):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = {
            "num_inference_steps": steps, "height": self.size[0], "width": self.size[1],
            "output_type": "latent", "generator": generators,
        }  # fmt: skip
        settings |= self.options | (self.guided if guided else self.plain) | options
        return self.pipe(prompt=list(prompts), **settings).images

    def conditional(self, outputs, images, guided):
        """Of all denoiser outputs of a run, the conditional ones on their grid, step by step."""
        found = []
        for output in outputs[:: 2 if self.separate and guided else 1]:
            value = torch.stack(output) if isinstance(output, list) else output
            value = value.split(images)[self.chunk if guided and not self.separate else 0]
            if self.packed:
                scale = self.pipe.vae_scale_factor
                value = self.pipe._unpack_latents(value, *self.size, scale)
            if value.ndim == 5:
                value = value[:, :, 0]
            found.append(value[:, : self.channels].double())
        return found


def lively(module, seed=0, scale=1.0):
    """Random weights in which words matter: layers that start at zero are drawn too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1 and not weight.any():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return module.eval()


def t5_tokenizer(length=32):
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = ["▁a", "▁photo", "▁of", "▁doctor", "▁man", "▁woman", "▁and", "▁person"]
    pieces += [(word, -1.0) for word in words]
    pieces += [(letter, -5.0) for letter in string.ascii_lowercase]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def t5(tokenizer, width=32, seed=5, kind="T5EncoderModel"):
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, kind.removesuffix("EncoderModel") + "Config")(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=width, num_layers=2, num_heads=2
    )
    return getattr(transformers, kind)(config).eval()


def qwen_tokenizer(chat=False):
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    vocabulary = {"<|endoftext|>": 0}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=600)
    if chat:
        tokenizer.chat_template = "{% for m in messages %}user: {{ m['content'] }}{% endfor %}"
    return tokenizer


def gemma_tokenizer():
    from transformers import GemmaTokenizer

    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "▁": 5}
    for letter in string.printable:
        vocabulary.setdefault(letter, len(vocabulary))
    return GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=64)


def decoder(seed, config, kind, **options):
    """A causal text model of transformers."""
    import transformers

    settings = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "initializer_range": 0.3, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = getattr(transformers, config)(**(settings | options))
    return getattr(transformers, kind)(config).eval()


def vae(channels=4, seed=1, levels=2):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * levels, block_out_channels=(8,) * levels,
        latent_channels=channels,
    ).eval()  # fmt: skip


def flow(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def diffusion(kind="DDIMScheduler", **options):
    import diffusers

    return getattr(diffusers, kind)(beta_start=0.0001, beta_end=0.02, **options)


def sd3(clip):
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, t5s = clip.tokenizer, t5_tokenizer()
    torch.manual_seed(3)
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16,
        pooled_projection_dim=32, out_channels=8, pos_embed_max_size=32,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=lively(transformer), scheduler=flow(), vae=vae(8),
        text_encoder=clip.encoder(16, 2, True), tokenizer=tokenizer,
        text_encoder_2=clip.encoder(16, 4, True), tokenizer_2=tokenizer,
        text_encoder_3=t5(t5s), tokenizer_3=t5s,
    )  # fmt: skip
    return Family(pipe, channels=8, options={"max_sequence_length": 16})


def flux(clip, guidance_embeds=True):
    from diffusers import FluxPipeline, FluxTransformer2DModel

    t5s = t5_tokenizer()
    torch.manual_seed(3)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    pipe = FluxPipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=vae(4),
        text_encoder=clip.encoder(32, 2), tokenizer=clip.tokenizer,
        text_encoder_2=t5(t5s), tokenizer_2=t5s, transformer=lively(transformer),
    )  # fmt: skip
    return Family(
        pipe, packed=True, separate=True, options={"max_sequence_length": 16},
        guided={"true_cfg_scale": 2.0, "negative_prompt": ["a", "a photo"]},
        plain={"guidance_scale": 3.5},
    )  # fmt: skip


def pixart(clip):
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    t5s = t5_tokenizer()
    torch.manual_seed(3)
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        caption_channels=32, in_channels=4, cross_attention_dim=16, out_channels=8,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    pipe = PixArtSigmaPipeline(
        tokenizer=t5s,
        text_encoder=t5(t5s),
        vae=vae(4),
        transformer=lively(transformer),
        scheduler=diffusion("DPMSolverMultistepScheduler"),
    )
    options = {
        "use_resolution_binning": False, "max_sequence_length": 16, "clean_caption": False,
    }  # fmt: skip
    return Family(pipe, options=options)


def sana(clip):
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel

    tokenizer = gemma_tokenizer()
    torch.manual_seed(3)
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
        cross_attention_dim=8, caption_channels=32, sample_size=32,
    )  # fmt: skip
    autoencoder = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1], downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    pipe = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=decoder(2, "Gemma2Config", "Gemma2Model", vocab_size=len(tokenizer)),
        vae=autoencoder, transformer=lively(transformer), scheduler=flow(shift=3.0),
    )  # fmt: skip
    options = {
        "use_resolution_binning": False, "complex_human_instruction": None,
        "max_sequence_length": 32, "clean_caption": False,
    }  # fmt: skip
    guided = {"guidance_scale": 3.0, "negative_prompt": ["a", "a photo"]}
    return Family(pipe, options=options, size=(96, 64), guided=guided)


def qwen(clip):
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    torch.manual_seed(3)
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    autoencoder = AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1,
        temperal_downsample=[False, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
            "rope_scaling": {"type": "default", "mrope_section": [1, 1, 2], "rope_type": "default"},
            "rope_theta": 1000000.0, "initializer_range": 0.3,
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 16,
        },
        vocab_size=len(tokenizer), hidden_size=16,
    )  # fmt: skip
    pipe = QwenImagePipeline(
        scheduler=flow(), vae=autoencoder,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(), tokenizer=tokenizer,
        transformer=lively(transformer),
    )  # fmt: skip
    return Family(
        pipe, packed=True, separate=True, size=(96, 64),
        guided={"true_cfg_scale": 2.0, "negative_prompt": ["a", "a photo"]},
        plain={"true_cfg_scale": 1.0},
    )  # fmt: skip


def z_image(clip):
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    tokenizer = qwen_tokenizer(chat=True)
    torch.manual_seed(3)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )  # fmt: skip
    for name, weight in transformer.named_parameters():
        if "pad_token" in name:
            torch.nn.init.normal_(weight)
    pipe = ZImagePipeline(
        scheduler=flow(), vae=vae(4), tokenizer=tokenizer, transformer=lively(transformer),
        text_encoder=decoder(2, "Qwen3Config", "Qwen3Model", vocab_size=len(tokenizer)),
    )  # fmt: skip
    return Family(pipe, chunk=0, options={"max_sequence_length": 64}, plain={"guidance_scale": 0.0})


def lcm(clip):
    from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel

    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=2,
        time_cond_proj_dim=16,
    )  # fmt: skip
    pipe = LatentConsistencyModelPipeline(
        vae=vae(4), text_encoder=clip.encoder(32, 2), tokenizer=clip.tokenizer, unet=lively(unet),
        scheduler=diffusion("LCMScheduler"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    # guidance is an input of the network: one chunk with and without
    return Family(pipe, chunk=0, guided={"guidance_scale": 8.0})


def deepfloyd(clip):
    from diffusers import IFPipeline, UNet2DConditionModel

    t5s = t5_tokenizer(77)
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=6, block_out_channels=(8, 16),
        layers_per_block=1, cross_attention_dim=16, attention_head_dim=4, norm_num_groups=2,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        addition_embed_type="text", addition_embed_type_num_heads=2, encoder_hid_dim=32,
        encoder_hid_dim_type="text_proj", act_fn="gelu",
        resnet_time_scale_shift="scale_shift", time_embedding_type="positional",
    )  # fmt: skip
    pipe = IFPipeline(
        tokenizer=t5s, text_encoder=t5(t5s), unet=lively(unet), safety_checker=None,
        scheduler=diffusion("DDPMScheduler", variance_type="learned_range"),
        feature_extractor=None, watermarker=None, requires_safety_checker=False,
    )  # fmt: skip
    options = {"clean_caption": False, "output_type": "pt"}
    return Family(pipe, size=(24, 16), channels=3, options=options)


def kandinsky3(clip):
    from diffusers import Kandinsky3Pipeline, Kandinsky3UNet, VQModel

    t5s = t5_tokenizer(128)
    torch.manual_seed(3)
    unet = Kandinsky3UNet(
        in_channels=4, time_embedding_dim=4, groups=4, attention_head_dim=4, layers_per_block=3,
        block_out_channels=(32, 64), cross_attention_dim=4, encoder_hid_dim=32,
    )  # fmt: skip
    movq = VQModel(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        vq_embed_dim=4,
        num_vq_embeddings=12, layers_per_block=1, norm_type="spatial",
    )  # fmt: skip
    pipe = Kandinsky3Pipeline(
        tokenizer=t5s,
        text_encoder=t5(t5s),
        unet=lively(unet),
        movq=movq.eval(),
        scheduler=diffusion("DDPMScheduler"),
    )
    return Family(pipe, size=(128, 64))


def hunyuan(clip):
    from diffusers import HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel, BertTokenizer

    t5s = t5_tokenizer(256)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "doctor", "man"]
    words += ["woman", "and", "person"]
    bert = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=77)
    torch.manual_seed(3)
    transformer = HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, cross_attention_dim=32, cross_attention_dim_t5=32, hidden_size=16,
        pooled_projection_dim=16, activation_fn="gelu-approximate",
    )  # fmt: skip
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, initializer_range=0.3, max_position_embeddings=80,
    )  # fmt: skip
    pipe = HunyuanDiTPipeline(
        vae=vae(4, levels=4), text_encoder=BertModel(config).eval(), tokenizer=bert,
        transformer=lively(transformer), scheduler=diffusion("DDPMScheduler"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        text_encoder_2=t5(t5s), tokenizer_2=t5s,
    )  # fmt: skip
    return Family(pipe, options={"use_resolution_binning": False}, size=(192, 128))


def lumina2(clip):
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer = gemma_tokenizer()
    torch.manual_seed(3)
    transformer = Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=32, num_layers=1,
        num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
        axes_dim_rope=(4, 4, 8), axes_lens=(64, 32, 32), cap_feat_dim=32,
    )  # fmt: skip
    pipe = Lumina2Pipeline(
        transformer=lively(transformer),
        scheduler=flow(),
        vae=vae(4),
        tokenizer=tokenizer,
        text_encoder=decoder(2, "Gemma2Config", "Gemma2Model", vocab_size=len(tokenizer)),
    )
    options = {"max_sequence_length": 48, "system_prompt": "draw"}
    return Family(pipe, separate=True, options=options, size=(192, 128))


def cogview4(clip):
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel

    tokenizer = qwen_tokenizer()
    tokenizer.padding_side = "left"
    torch.manual_seed(3)
    transformer = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, text_embed_dim=32, time_embed_dim=8, condition_dim=4,
        pos_embed_max_size=32, sample_size=16, rope_axes_dim=(32, 32),
    )  # fmt: skip
    pipe = CogView4Pipeline(
        tokenizer=tokenizer,
        vae=vae(4),
        transformer=lively(transformer),
        scheduler=flow(),
        text_encoder=decoder(2, "GlmConfig", "GlmModel", vocab_size=len(tokenizer)),
    )
    guided = {"guidance_scale": 3.0, "negative_prompt": ["a", "a photo"]}
    return Family(pipe, separate=True, options={"max_sequence_length": 48}, guided=guided)


def aura_flow(clip):
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    t5s = t5_tokenizer()
    torch.manual_seed(3)
    transformer = AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=16, pos_embed_max_size=256,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.register_tokens)
    pipe = AuraFlowPipeline(
        tokenizer=t5s,
        text_encoder=t5(t5s, kind="UMT5EncoderModel"),
        vae=vae(4),
        transformer=lively(transformer),
        scheduler=flow(),
    )
    return Family(pipe, options={"max_sequence_length": 16})


def chroma(clip):
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    t5s = t5_tokenizer()
    torch.manual_seed(3)
    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    pipe = ChromaPipeline(
        scheduler=flow(),
        vae=vae(4),
        text_encoder=t5(t5s),
        tokenizer=t5s,
        transformer=lively(transformer),
    )
    return Family(pipe, packed=True, separate=True, options={"max_sequence_length": 16})


FAMILIES = {
    builder.__name__: builder
    for builder in (
        sd3, flux, pixart, sana, qwen, z_image,
        lcm, deepfloyd, kandinsky3, hunyuan, lumina2, cogview4, aura_flow, chroma,
    )
}  # fmt: skip
