"""The pack's toy FLUX as a MODEL, a CLIP and a VAE, for ComfyUI's own nodes.

ComfyUI recognises models by the sizes that were released. The toy's are read from its configs instead, and given to
the same classes; only its VAE is diffusers', since ComfyUI's cannot have its sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.text_encoders.flux
import torch
from comfy.sd1_clip import SDClipModel, SDTokenizer
from comfy.supported_models_base import ClipTarget
from comfy.taesd.taesd import TAESD
from comfy.text_encoders.t5 import T5
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ..files.catalog import toy
from ..files.reading import read_json, read_safetensors
from .latent_format import ToyLatents
from .patchers import HostedPatcher

SHIFT = 0.5
"""Of the timesteps, for 256 image tokens, as FLUX.1's scheduler has it; ComfyUI's own is 1.15, for 4096."""


class ToyFlux(comfy.supported_models.Flux):
    """The toy among ComfyUI's supported models, its config in diffusers' terms."""

    latent_format = ToyLatents

    def __init__(self, config: dict[str, Any]) -> None:
        patch_size, heads = 2, config["num_attention_heads"]
        channels = config["in_channels"] // patch_size**2
        super().__init__(
            {
                "image_model": "flux",
                "in_channels": channels,
                "out_channels": channels,
                "vec_in_dim": config["pooled_projection_dim"],
                "context_in_dim": config["joint_attention_dim"],
                "hidden_size": heads * config["attention_head_dim"],
                "mlp_ratio": 4.0,
                "num_heads": heads,
                "depth": config["num_layers"],
                "depth_single_blocks": config["num_single_layers"],
                "axes_dim": config["axes_dims_rope"],
                "theta": 10000,
                "patch_size": patch_size,
                "qkv_bias": True,
                "guidance_embed": config["guidance_embeds"],
                "txt_ids_dims": [],
            }
        )
        self.sampling_settings["shift"] = SHIFT


class ToyTokenizer(comfy.text_encoders.flux.FluxTokenizer):
    """The toy's vocabularies."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        shared = {
            "embedding_directory": embedding_directory,
            "pad_with_end": False,
            "tokenizer_class": PreTrainedTokenizerFast,
            "tokenizer_data": tokenizer_data or {},
        }
        folder = toy("flux")
        clip_l, t5 = read_json(folder / "text_encoder/config.json"), read_json(folder / "text_encoder_2/config.json")
        self.clip_l = SDTokenizer(
            folder / "tokenizer",
            max_length=clip_l["max_position_embeddings"],
            embedding_size=clip_l["hidden_size"],
            **shared,
        )
        self.t5xxl = SDTokenizer(
            folder / "tokenizer_2",
            max_length=10**8,
            min_length=read_json(folder / "tokenizer_2/tokenizer_config.json")["model_max_length"],
            pad_to_max_length=False,
            has_start_token=False,
            embedding_size=t5["d_model"],
            embedding_key="t5xxl",
            **shared,
        )


class ToyTextEncoders(comfy.text_encoders.flux.FluxClipModel):
    """The toy's text encoders."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        nn.Module.__init__(self)
        self.dtypes = {dtype}
        common = {"device": device, "dtype": dtype, "model_options": model_options or {}}
        config = read_json(toy("flux") / "text_encoder/config.json")
        self.clip_l = SDClipModel(
            max_length=config["max_position_embeddings"],
            textmodel_json_config=config,
            special_tokens=_special_tokens(config),
            return_projected_pooled=False,
            **common,
        )
        words = comfy.ops.manual_cast.Embedding(config["vocab_size"], config["hidden_size"], device=device, dtype=dtype)
        self.clip_l.transformer.set_input_embeddings(words)  # ComfyUI's always has CLIP's 49408 words
        config = read_json(toy("flux") / "text_encoder_2/config.json")
        self.t5xxl = SDClipModel(
            textmodel_json_config={**config, "dense_act_fn": "gelu_pytorch_tanh"},  # ComfyUI's name of gelu_new
            model_class=T5,
            special_tokens=_special_tokens(config),
            **common,
        )


class Autoencoder(nn.Module):
    """diffusers' VAE with the calls of ComfyUI's: latents are the VAE's own, not FLUX's scaled ones."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents, [B, channels, h, w], of pictures in [-1, 1], [B, 3, 8h, 8w]."""
        return self.vae.encode(pixels).latent_dist.mode()

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, [B, 3, 8h, 8w], of latents, [B, channels, h, w]."""
        return self.vae.decode(latents).sample


class ToyVAE(comfy.sd.VAE):
    """ComfyUI's VAE around the toy's.

    ComfyUI sets it up for its tiny autoencoder of as many channels, whose place the toy's takes.
    """

    def __init__(self) -> None:
        super().__init__(TAESD(latent_channels=ToyLatents().latent_channels).state_dict())
        vae = AutoencoderKL.from_pretrained(toy("flux") / "vae", torch_dtype=self.vae_dtype)
        self.first_stage_model = Autoencoder(vae)
        self.patcher = HostedPatcher(self.first_stage_model)
        self.device = self.patcher.load_device
        self.size = None


def load_toy(lora_strength: float = 0.0) -> tuple[Any, Any, Any]:
    """The toy's MODEL, CLIP and VAE.

    Args:
        lora_strength: of the toy's LoRA, which is not loaded for 0.

    Raises:
        FileNotFoundError: the pack was installed without the toy.
    """
    model = _load_flux(toy("flux") / "transformer")
    if lora_strength:
        model, _ = comfy.sd.load_lora_for_models(model, None, _read(toy("lora")), lora_strength, 0.0)
    return model, _load_text_encoders(toy("flux")), ToyVAE()


def _load_flux(folder: Path) -> Any:
    state = comfy.model_detection.convert_diffusers_mmdit(_read(folder / "diffusion_pytorch_model.safetensors"))
    config = ToyFlux(read_json(folder / "config.json"))
    dtype = management.unet_dtype(supported_dtypes=config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, None)
    model = config.get_model(state)
    model.load_model_weights(state)
    devices = {"load_device": management.get_torch_device(), "offload_device": management.unet_offload_device()}
    return comfy.model_patcher.ModelPatcher(model, **devices)


def _load_text_encoders(folder: Path) -> Any:
    clip_l, t5 = (_read(folder / name / "model.safetensors") for name in ("text_encoder", "text_encoder_2"))
    clip_l = {f"text_model.{key}": tensor for key, tensor in clip_l.items()}
    width = clip_l["text_model.final_layer_norm.weight"].numel()
    clip_l["text_projection.weight"] = torch.eye(width)  # without effect, but ComfyUI warns if it is missing
    parameters = sum(tensor.numel() for tensor in (*clip_l.values(), *t5.values()))
    return comfy.sd.CLIP(ClipTarget(ToyTokenizer, ToyTextEncoders), parameters=parameters, state_dict=[clip_l, t5])


def _read(path: Path) -> dict[str, Tensor]:
    return read_safetensors(path, "a model of the pack's toy FLUX")[0]


def _special_tokens(config: dict[str, Any]) -> dict[str, int]:
    return {"end": config["eos_token_id"], "pad": config["pad_token_id"]}
