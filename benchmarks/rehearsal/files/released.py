"""The released models' files, random numbers in them."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from support.server import PACK

from benchmarks.comfyui import released_flux

from . import weights
from .writer import Writer

SIGLIP_FILE = "clipvision/sigclip_vision_patch14_384"


def write_models(models: Path, writer: Writer) -> None:
    """All that the shipped workflows name, except what ``diffusers_folders`` and ``gguf_file`` make."""
    for path, make in (
        ("unet/flux1-dev", partial(weights.random_state, flux_shapes, torch.bfloat16)),
        ("text_encoders/t5xxl_fp16", t5),
        ("text_encoders/clip_l", partial(weights.random_state, clip_l_shapes, torch.float16)),
        ("clipvision/dinov2-giant/model", partial(weights.random_state, dinov2_shapes, torch.float32)),
        (SIGLIP_FILE, partial(weights.random_state, siglip_shapes, torch.float16)),
        ("vae/ae", partial(weights.random_state, vae_shapes, torch.float32)),
        ("loras/ghibli_style", partial(weights.random_state, lora_shapes, torch.bfloat16)),
    ):
        writer.put(models / f"{path}.safetensors", make)
    writer.put(models / "ipadapter/instantcharacter_ip-adapter.bin", adapter, torch.save)
    birefnet(models / "background_removal/birefnet.safetensors")


def flux_shapes() -> weights.Shapes:
    """As released; what the file calls a norm's scale is a weight in ComfyUI's own model."""
    shapes = weights.shapes_of(released_flux())
    return {key.replace("_norm.weight", "_norm.scale"): shape for key, shape in shapes.items()}


def clip_l_shapes() -> weights.Shapes:
    from transformers import CLIPTextConfig, CLIPTextModel

    from instantcharacter.flux.load import CLIP_L

    with torch.device("meta"):
        return weights.shapes_of(CLIPTextModel(CLIPTextConfig(**CLIP_L.released)), CLIP_L.prefix)


def t5() -> weights.State:
    """With the embeddings twice, under both of their names, as the released file has them."""
    from transformers import T5Config, T5EncoderModel

    from instantcharacter.flux.load import T5_XXL

    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**T5_XXL.released))
    state = weights.random_state(partial(weights.shapes_of, model), torch.float16)
    return state | {"encoder.embed_tokens.weight": state["shared.weight"].clone()}


def siglip_shapes() -> weights.Shapes:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from instantcharacter.character.encoders import SIGLIP

    with torch.device("meta"):
        return weights.shapes_of(SiglipVisionModel(SiglipVisionConfig(**SIGLIP.released)), SIGLIP.prefix)


def dinov2_shapes() -> weights.Shapes:
    from transformers import Dinov2Config, Dinov2Model

    from instantcharacter.character.encoders import DINOV2

    with torch.device("meta"):
        return weights.shapes_of(Dinov2Model(Dinov2Config(**DINOV2.released)))


def vae_shapes() -> weights.Shapes:
    from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder

    sizes = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 16, "resolution": 256}
    sizes |= {"in_channels": 3, "out_ch": 3, "attn_resolutions": [], "dropout": 0.0, "double_z": True}
    with torch.device("meta"):
        halves = {"encoder": Encoder(**sizes), "decoder": Decoder(**sizes)}
    return {f"{name}.{key}": shape for name, half in halves.items() for key, shape in weights.shapes_of(half).items()}


def adapter() -> dict[str, weights.State]:
    from instantcharacter import CharacterAdapter

    with torch.device("meta"):
        whole = CharacterAdapter()
    parts = {"image_proj": whole.projector, "ip_adapter": whole.attention}
    shapes = {name: partial(weights.shapes_of, part) for name, part in parts.items()}
    return {name: weights.random_state(of_part, torch.bfloat16) for name, of_part in shapes.items()}


def lora_shapes(rank: int = 16) -> weights.Shapes:
    """A style LoRA as kohya writes it, on projections that both kinds of blocks have."""
    layers = {f"single_blocks_{i}_linear2": (3072, 15360) for i in range(38)}
    layers |= {f"double_blocks_{i}_{stream}_attn_proj": (3072, 3072) for i in range(19) for stream in ("img", "txt")}
    shapes = {}
    for layer, (rows, columns) in layers.items():
        shapes[f"lora_unet_{layer}.lora_down.weight"] = (rank, columns)
        shapes[f"lora_unet_{layer}.lora_up.weight"] = (rows, rank)
        shapes[f"lora_unet_{layer}.alpha"] = ()
    return shapes


def birefnet(path: Path) -> None:
    """The background removal model, by the tests' maker, where ComfyUI has the nodes for it."""
    if not path.exists() and (comfy_folder() / "background_removal/birefnet.json").is_file():
        maker = PACK / "tests/comfyui/inside/make_birefnet.py"
        subprocess.run([sys.executable, maker, comfy_folder().parent, path], check=True)


def comfy_folder() -> Path:
    import comfy

    return Path(next(iter(comfy.__path__)))
