"""The models of a FLUX pipeline as files have them: their sizes, and how they are recognised."""

from __future__ import annotations

from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ..files.single_file import SingleFileModel

EXPECTED_FLUX = "FLUX.1 in one file (.safetensors in bf16, fp16 or plain fp8, or .gguf), or a diffusers folder"
EXPECTED_VAE = "FLUX's VAE (ae.safetensors)"

CLIP_L = SingleFileModel(
    name="CLIP-L's text encoder",
    model=CLIPTextModel,
    config=CLIPTextConfig,
    released={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "vocab_size": 49408,
        "hidden_act": "quick_gelu",
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
    prefix="text_model.",
    prefixes=("embeddings.", "encoder.", "final_layer_norm."),
    width_key=("embeddings.token_embedding.weight", 1, "hidden_size"),
)
T5_XXL = SingleFileModel(
    name="T5-XXL's encoder",
    model=T5EncoderModel,
    config=T5Config,
    released={
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
    prefix="",
    prefixes=("shared.", "encoder."),
    width_key=("shared.weight", 1, "d_model"),
)
VAE = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
