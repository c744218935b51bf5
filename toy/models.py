"""The toy models: the classes of the real ones, with sizes that fit 25 MB together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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

from instantcharacter.model.adapter import AdapterConfig

PAD, END, START = "<pad>", "</s>", "<s>"
GAPS = [f"<gap_{i}>" for i in range(8)]
"""Placeholders of words that T5 learns to fill in."""
VOCABULARY = 512
LATENT_CHANNELS = 8
"""FLUX.1 has 16; small models learn fewer sooner (arXiv 2403.03206, section 5.2.1)."""
CLIP_LENGTH, T5_LENGTH = 64, 32
"""Tokens of a prompt."""

CLIP = CLIPTextConfig(
    vocab_size=VOCABULARY,
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=CLIP_LENGTH,
    projection_dim=96,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)
T5 = T5Config(
    vocab_size=VOCABULARY,
    d_model=96,
    d_kv=32,
    d_ff=192,
    num_layers=3,
    num_heads=3,
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=0,
)
SIGLIP = SiglipVisionConfig(
    hidden_size=48,
    intermediate_size=192,
    num_hidden_layers=27,
    num_attention_heads=3,
    image_size=384,
    patch_size=24,
    hidden_act="gelu_pytorch_tanh",
)
DINOV2 = Dinov2Config(
    hidden_size=48,
    num_hidden_layers=30,
    num_attention_heads=3,
    mlp_ratio=4,
    use_swiglu_ffn=True,
    image_size=384,
    patch_size=24,
)
ADAPTER = AdapterConfig(
    feature_dim=96,
    fusion_layers=1,
    fusion_heads=6,
    resampler_dim=128,
    resampler_layers=2,
    resampler_heads=4,
    num_tokens=32,
    token_dim=128,
    attention_dim=192,
    attention_heads=6,
    num_attention_blocks=8,
)


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 64),
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=256,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def new_flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=T5.d_model,
        pooled_projection_dim=CLIP.hidden_size,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def new_clip() -> CLIPTextModel:
    return CLIPTextModel(CLIP)


def new_t5() -> T5EncoderModel:
    return T5EncoderModel(T5)


def new_siglip() -> SiglipVisionModel:
    return SiglipVisionModel(SIGLIP)


def new_dinov2() -> Dinov2Model:
    return Dinov2Model(DINOV2)


def train_tokenizers(texts: Iterable[str]) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """CLIP's and T5's, with one byte-level vocabulary, which covers any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, START, *GAPS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finished(tokenizer, f"{START} $A {END}", CLIP_LENGTH), _finished(tokenizer, f"$A {END}", T5_LENGTH)


def save_half(model, folder: Path) -> None:
    """Write a model as its library does, in float16."""
    model.half().save_pretrained(folder)


def _finished(tokenizer: Tokenizer, template: str, length: int) -> PreTrainedTokenizerFast:
    copy = Tokenizer.from_str(tokenizer.to_str())
    specials = [(token, copy.token_to_id(token)) for token in (START, END)]
    copy.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=copy, pad_token=PAD, eos_token=END, bos_token=START, model_max_length=length
    )
