"""ComfyUI's model folders, filled with tiny models under the names that real ones have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from support import recorded, tiny
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from instantcharacter import InstantCharacterPipeline
from instantcharacter.flux.load import VAE


def fill(folder: Path) -> None:
    """Put every file that a workflow names into ``folder/models`` and ``folder/input``."""
    models = folder / "models"
    torch.manual_seed(0)
    transformer = recorded.transformer()
    _save(transformer.state_dict(), models / "unet/flux1-dev.safetensors")
    _save_text_encoders(models / "text_encoders")
    _save_vae(models / "vae/ae.safetensors")
    for name, saved_as in (
        ("siglip", "clipvision/tiny-siglip/sigclip_vision_patch14_384.safetensors"),
        ("dinov2", "clipvision/dinov2-giant/model.safetensors"),
    ):
        _copy(recorded.FOLDER / name / "model.safetensors", models / saved_as)
        _copy(recorded.FOLDER / name / "config.json", (models / saved_as).parent / "config.json")
    for name, folder_name in (("siglip", "siglip-so400m-patch14-384"), ("dinov2", "dinov2-giant")):
        shutil.copytree(recorded.FOLDER / name, models / "clip_vision" / folder_name)
    (models / "ipadapter").mkdir()
    recorded.adapter().save(models / "ipadapter/instantcharacter_ip-adapter.bin")
    sizes = json.dumps(asdict(recorded.ADAPTER_CONFIG))
    (models / "ipadapter/instantcharacter_ip-adapter.json").write_text(sizes)
    InstantCharacterPipeline(**{**tiny.tiny_components(), "transformer": transformer}).save_pretrained(
        models / "diffusers/FLUX.1-dev"
    )
    for name in ("ghibli_style", "FLUX.1-Turbo-Alpha"):
        _copy(recorded.LORA, models / f"loras/{name}.safetensors")
    for picture in ("character.png", "owl.png", "monster.png"):
        _copy(Path(__file__).parents[2] / "assets" / picture, folder / "input" / picture)


def save_gguf(path: Path) -> None:
    """The recorded FLUX with its linear layers in 8 bits, in the layout of the released file."""
    write_gguf(path, released_layout(recorded.transformer().state_dict()), {})


def write_gguf(path: Path, state: Mapping[str, Tensor], fields: Mapping[str, str | list]) -> None:
    """A GGUF file of FLUX with its matrices in 8 bits.

    Args:
        path: the file.
        state: its weights.
        fields: texts and lists beside them.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "flux")
    for name, value in fields.items():
        (writer.add_string if isinstance(value, str) else writer.add_array)(name, value)
    for key, weight in state.items():
        if weight.ndim == 2 and weight.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(key, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def released_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A FLUX transformer of diffusers under the released file's keys."""
    renamed = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "proj_out": "final_layer.linear",
    }
    double = {
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    }
    out: dict[str, Tensor] = {}
    for key, weight in state.items():
        stem, kind = key.rsplit(".", 1)
        if stem in renamed:
            out[f"{renamed[stem]}.{kind}"] = weight
        elif stem == "norm_out.linear":
            scale, shift = weight.chunk(2)
            out[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        elif key.startswith("transformer_blocks"):
            _, i, part = stem.split(".", 2)
            if part in double:
                out[f"double_blocks.{i}.{double[part]}.{kind}"] = weight
    for i in sorted({key.split(".")[1] for key in state if key.startswith("transformer_blocks")}):
        block, theirs = f"transformer_blocks.{i}.attn", f"double_blocks.{i}"
        for stream, projections, norms in (
            ("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")),
        ):
            for kind in ("weight", "bias"):
                parts = [state[f"{block}.{name}.{kind}"] for name in projections]
                out[f"{theirs}.{stream}_attn.qkv.{kind}"] = torch.cat(parts)
            for name, norm in zip(("query_norm", "key_norm"), norms):
                out[f"{theirs}.{stream}_attn.norm.{name}.scale"] = state[f"{block}.{norm}.weight"]
    for i in sorted({key.split(".")[1] for key in state if key.startswith("single_transformer_blocks")}):
        block, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        for kind in ("weight", "bias"):
            parts = [state[f"{block}.{name}.{kind}"] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
            out[f"{theirs}.linear1.{kind}"] = torch.cat(parts)
            out[f"{theirs}.linear2.{kind}"] = state[f"{block}.proj_out.{kind}"]
            out[f"{theirs}.modulation.lin.{kind}"] = state[f"{block}.norm.linear.{kind}"]
        for name, norm in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
            out[f"{theirs}.norm.{name}.scale"] = state[f"{block}.attn.{norm}.weight"]
    return out


def _save_text_encoders(folder: Path) -> None:
    """Tiny ones with the whole vocabularies, since ComfyUI's tokenizers are the real ones."""
    clip = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=32,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    t5 = T5Config(vocab_size=32128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    for model, name in ((CLIPTextModel(clip), "clip_l"), (T5EncoderModel(t5), "t5xxl_fp16")):
        model.save_pretrained(folder / f"tiny-{name}")
        (folder / f"tiny-{name}/model.safetensors").rename(folder / f"tiny-{name}/{name}.safetensors")


def _save_vae(path: Path) -> None:
    """At its real size: ComfyUI knows no smaller one."""
    vae = AutoencoderKL(**{key: value for key, value in VAE.items() if not key.startswith("_")})
    _save({key: weight.half() for key, weight in vae.state_dict().items()}, path)


def _save(state: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
