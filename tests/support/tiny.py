"""A pipeline as small as can be, with random weights from a seed: for tests and for trying benchmarks."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from instantcharacter.character.encoders import CharacterEncoder
from instantcharacter.flux.pipeline import InstantCharacterPipeline
from instantcharacter.model.adapter import AdapterConfig, CharacterAdapter

TEXT_WIDTH, POOLED_WIDTH = 64, 32

SIGLIP = SiglipVisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=27,
    num_attention_heads=4,
    image_size=384,
    patch_size=14,
    hidden_act="gelu_pytorch_tanh",
)
DINOV2 = Dinov2Config(
    hidden_size=48,
    num_hidden_layers=30,
    num_attention_heads=4,
    mlp_ratio=2,
    use_swiglu_ffn=True,
    image_size=518,
    patch_size=14,
)
ADAPTER = AdapterConfig(
    feature_dim=80,
    fusion_layers=1,
    fusion_heads=4,
    resampler_dim=64,
    resampler_layers=1,
    resampler_heads=2,
    num_tokens=16,
    token_dim=TEXT_WIDTH,
    attention_dim=128,
    attention_heads=4,
    num_attention_blocks=4,
)


def tiny_pipeline(seed: int = 0) -> InstantCharacterPipeline:
    """A pipeline as complete as the real one, adapter and encoder set, with random weights: about 3 M parameters."""
    pipeline = InstantCharacterPipeline(**tiny_components(seed))
    pipeline.set_character_adapter(tiny_adapter(seed))
    pipeline.set_character_encoder(tiny_encoder(seed))
    return pipeline


def tiny_components(seed: int = 0) -> dict[str, object]:
    """What a FluxPipeline is made of, by its names."""
    torch.manual_seed(seed)
    clip = CLIPTextConfig(
        vocab_size=258,
        hidden_size=POOLED_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=POOLED_WIDTH,
        bos_token_id=0,
        eos_token_id=1,
    )
    t5 = T5Config(vocab_size=258, d_model=TEXT_WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            norm_num_groups=4,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).eval(),
        "text_encoder": CLIPTextModel(clip).eval(),
        "tokenizer": byte_tokenizer(77),
        "text_encoder_2": T5EncoderModel(t5).eval(),
        "tokenizer_2": byte_tokenizer(512),
        "transformer": _tiny_flux(),
    }


def tiny_adapter(seed: int = 0) -> CharacterAdapter:
    """An adapter that fits :func:`tiny_components`' transformer and :func:`tiny_encoder`'s features."""
    torch.manual_seed(seed)
    adapter = CharacterAdapter(ADAPTER)
    for attention in adapter.attention:
        nn.init.normal_(
            attention.get_parameter("to_v_ip.weight"), std=1.0
        )  # untrained, the character would hardly be seen
    return adapter.eval()


def tiny_encoder(seed: int = 0) -> CharacterEncoder:
    """Encoders with as many layers as the features need, and little in them."""
    torch.manual_seed(seed)
    return CharacterEncoder(SiglipVisionModel(SIGLIP), Dinov2Model(DINOV2))


def _tiny_flux() -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    nn.init.normal_(transformer.proj_out.weight, std=0.2)  # untrained, it would hardly change the noise
    return transformer.eval()


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token a byte: any text, no vocabulary file."""
    vocabulary = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", model_max_length=max_length
    )
