"""The files that users have, of random numbers: names, layouts and sizes of the released ones, and pictures.

    python benchmarks/released_files.py --comfyui ~/comfy/ComfyUI /tmp/base models           # 46 GB: 75 s on an H100
    python benchmarks/released_files.py --comfyui ~/comfy/ComfyUI /tmp/base diffusers gguf   # 24 and 13 GB more
    python benchmarks/released_files.py --comfyui ~/comfy/ComfyUI /tmp/base models --tiny    # the tests' models

``benchmarks/rehearsal.py`` calls this with ComfyUI's Python. The files go into ``models`` and ``input`` of a base
folder of ComfyUI; one that is there is left as it is. They wait in host memory to be written: 64 GiB of it are needed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.comfyui import released_flux

PACK = Path(__file__).parent.parent
State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIGLIP_FILE = "clipvision/sigclip_vision_patch14_384"
STD = 0.02
"""Of the weights: activations stay finite through all layers, in half precision too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="ComfyUI's base folder, made if need be")
    parser.add_argument("kind", nargs="+", choices=("models", "diffusers", "gguf"))
    parser.add_argument("--comfyui", type=Path, required=True, help="its folder")
    parser.add_argument("--tiny", action="store_true", help="the tests' models, which have the same layouts")
    options = parser.parse_args()
    sys.argv = ["comfyui", *(["--cpu"] if DEVICE == "cpu" else [])]
    sys.path.insert(0, str(options.comfyui))
    import comfy.options

    comfy.options.enable_args_parsing()
    begin = time.perf_counter()
    makers = TINY if options.tiny else RELEASED
    with Writer() as writer:
        for kind in options.kind:
            makers[kind](options.base / "models", writer)
        pictures(options.base / "input")
    print(f"files: {' '.join(options.kind)} in {time.perf_counter() - begin:.0f} s", flush=True)


class Writer:
    """Writes files in threads of its own; each appears under its name when it is whole."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(6)
        self._jobs: list[Future] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        for job in self._jobs:
            job.result()

    def put(self, path: Path, make: Callable[[], Any], save: Callable[[Any, Path], Any] = save_file) -> None:
        """Make what a file or folder holds, unless it is there, and save it in the background."""
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        content = make()

        def write() -> None:
            partial = path.with_name(f"{path.name}.part")
            save(content, partial)
            partial.rename(path)

        self._jobs.append(self._pool.submit(write))


# Random weights


def random_state(shapes: Callable[[], Shapes], dtype: torch.dtype) -> State:
    """Random numbers of these shapes; biases are zero, and norms' weights and other scales one."""

    def fill(key: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) < 2:
            return torch.full(shape, float(not key.endswith("bias")), dtype=dtype)
        return (torch.randn(shape, device=DEVICE) * STD).to(dtype).cpu()

    return {key: fill(key, shape) for key, shape in shapes().items()}


def shapes_of(module: Any, prefix: str = "") -> Shapes:
    """A module's, under a prefix that all its keys have in the released file and maybe not here."""
    state = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items() if "position_ids" not in key}
    return {f"{prefix}{key.removeprefix(prefix)}": shape for key, shape in state.items()}


# The released models


def released_models(models: Path, writer: Writer) -> None:
    """All that the shipped workflows name, except what :func:`diffusers_folders` and :func:`gguf_file` make."""
    for path, make in (
        ("unet/flux1-dev", partial(random_state, flux_shapes, torch.bfloat16)),
        ("text_encoders/t5xxl_fp16", t5),
        ("text_encoders/clip_l", partial(random_state, clip_l_shapes, torch.float16)),
        ("clipvision/dinov2-giant/model", partial(random_state, dinov2_shapes, torch.float32)),
        (SIGLIP_FILE, partial(random_state, siglip_shapes, torch.float16)),
        ("vae/ae", partial(random_state, vae_shapes, torch.float32)),
        ("loras/style_lora", partial(random_state, lora_shapes, torch.bfloat16)),
    ):
        writer.put(models / f"{path}.safetensors", make)
    writer.put(models / "ipadapter/instantcharacter_ip-adapter.bin", adapter, torch.save)
    birefnet(models / "background_removal/birefnet.safetensors")


def flux_shapes() -> Shapes:
    """As released; what the file calls a norm's scale is a weight in ComfyUI's own model."""
    shapes = shapes_of(released_flux())
    return {key.replace("_norm.weight", "_norm.scale"): shape for key, shape in shapes.items()}


def clip_l_shapes() -> Shapes:
    from transformers import CLIPTextConfig, CLIPTextModel

    from instantcharacter.flux.load import CLIP_L

    with torch.device("meta"):
        return shapes_of(CLIPTextModel(CLIPTextConfig(**CLIP_L.released)), CLIP_L.prefix)


def t5() -> State:
    """With the embeddings twice, under both of their names, as the released file has them."""
    from transformers import T5Config, T5EncoderModel

    from instantcharacter.flux.load import T5_XXL

    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**T5_XXL.released))
    state = random_state(partial(shapes_of, model), torch.float16)
    return state | {"encoder.embed_tokens.weight": state["shared.weight"].clone()}


def siglip_shapes() -> Shapes:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from instantcharacter.character.encoders import SIGLIP

    with torch.device("meta"):
        return shapes_of(SiglipVisionModel(SiglipVisionConfig(**SIGLIP.released)), SIGLIP.prefix)


def dinov2_shapes() -> Shapes:
    from transformers import Dinov2Config, Dinov2Model

    from instantcharacter.character.encoders import DINOV2

    with torch.device("meta"):
        return shapes_of(Dinov2Model(Dinov2Config(**DINOV2.released)))


def vae_shapes() -> Shapes:
    from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder

    sizes = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 16, "resolution": 256}
    sizes |= {"in_channels": 3, "out_ch": 3, "attn_resolutions": [], "dropout": 0.0, "double_z": True}
    with torch.device("meta"):
        halves = {"encoder": Encoder(**sizes), "decoder": Decoder(**sizes)}
    return {f"{name}.{key}": shape for name, half in halves.items() for key, shape in shapes_of(half).items()}


def adapter() -> dict[str, State]:
    from instantcharacter import CharacterAdapter

    with torch.device("meta"):
        whole = CharacterAdapter()
    parts = {"image_proj": whole.projector, "ip_adapter": whole.attention}
    return {name: random_state(partial(shapes_of, part), torch.bfloat16) for name, part in parts.items()}


def lora_shapes(rank: int = 16) -> Shapes:
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


# The same in other layouts


def diffusers_folders(models: Path, writer: Writer) -> None:
    """FLUX.1-dev, SigLIP and DINOv2 as folders of the hub, which the earlier pack takes. Files that are alike in the
    other layout are linked. ``models/diffusers/FLUX.1-dev`` may be a link itself, to a disk with 24 GB."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import AutoTokenizer, CLIPTextConfig, Dinov2Config, SiglipVisionConfig, T5Config

    from instantcharacter.character.encoders import DINOV2, SIGLIP
    from instantcharacter.flux.load import CLIP_L, CLIP_LENGTH, T5_LENGTH, T5_XXL, VAE

    released_models(models, writer)
    folder = models / "diffusers/FLUX.1-dev"
    for name, kind, settings in (
        ("transformer", FluxTransformer2DModel, {"guidance_embeds": True}),
        ("vae", AutoencoderKL, VAE),
    ):
        with torch.device("meta"):
            model = kind.from_config(settings)
        save = save_pieces(model, "diffusion_pytorch_model{suffix}.safetensors")
        writer.put(folder / name, partial(random_state, partial(shapes_of, model), torch.bfloat16), save)
    vision = models / "clip_vision"
    for config, file, where in (
        (CLIPTextConfig(**CLIP_L.released), "text_encoders/clip_l", folder / "text_encoder"),
        (T5Config(**T5_XXL.released), "text_encoders/t5xxl_fp16", folder / "text_encoder_2"),
        (SiglipVisionConfig(**SIGLIP.released), SIGLIP_FILE, vision / "siglip-so400m-patch14-384"),
        (Dinov2Config(**DINOV2.released), "clipvision/dinov2-giant/model", vision / "dinov2-giant"),
    ):
        config.save_pretrained(where)
        if not (where / "model.safetensors").is_symlink():
            (where / "model.safetensors").symlink_to(models.absolute() / f"{file}.safetensors")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_config(folder / "scheduler")
    for name, vocabulary, length in (
        ("tokenizer", "sd1_tokenizer", CLIP_LENGTH),
        ("tokenizer_2", "text_encoders/t5_tokenizer", T5_LENGTH),
    ):
        tokenizer = AutoTokenizer.from_pretrained(comfy_folder() / vocabulary, model_max_length=length)
        tokenizer.save_pretrained(folder / name)
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def save_pieces(model: Any, pattern: str) -> Callable[[State, Path], None]:
    """Saves a diffusers model's folder, its weights in files of 10 GB at the most."""

    def save(state: State, folder: Path) -> None:
        model.save_config(folder)
        save_torch_state_dict(state, folder, filename_pattern=pattern, max_shard_size="10GB")

    return save


def gguf_file(models: Path, writer: Writer, shapes_of_flux: Callable[[], Shapes] = flux_shapes) -> None:
    """FLUX with its linear layers in 8 bits (Q8_0). Nothing is quantised: each block is a scale and 32 random bytes."""
    import gguf

    scale = torch.tensor([STD / 74], dtype=torch.float16, device=DEVICE).view(torch.uint8)  # 74: the bytes' own

    def q8(rows: int, columns: int) -> np.ndarray:
        blocks = torch.randint(0, 256, (rows, columns // 32, 34), dtype=torch.uint8, device=DEVICE)
        blocks[..., :2] = scale
        return blocks.reshape(rows, -1).cpu().numpy()

    def make() -> dict[str, np.ndarray]:
        shapes = shapes_of_flux()
        large = {key for key, shape in shapes.items() if len(shape) == 2 and shape[1] % 32 == 0}
        small = random_state(lambda: {key: shapes[key] for key in shapes if key not in large}, torch.float32)
        return {key: q8(*shapes[key]) if key in large else small[key].numpy() for key in shapes}

    def save(state: dict[str, np.ndarray], path: Path) -> None:
        file = gguf.GGUFWriter(path, "flux")
        for key, array in state.items():
            file.add_tensor(key, array, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if array.dtype == np.uint8 else None)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()

    writer.put(models / "unet/flux1-dev-Q8_0.gguf", make, save)


# The tests' models, and pictures


def tiny_files(models: Path, _: Writer) -> None:
    if models.exists():
        return
    from support import tiny_models

    tiny_models.fill(models.parent)
    # ComfyUI knows no smaller VAE than the real one. The pack does, and takes this one, the first of the name.
    shutil.copytree(models / "diffusers/FLUX.1-dev/vae", models / "vae/0-tiny")
    (models / "vae/0-tiny/diffusion_pytorch_model.safetensors").rename(models / "vae/0-tiny/ae.safetensors")


def tiny_flux_shapes() -> Shapes:
    from support import recorded, tiny_models

    return {key: tuple(t.shape) for key, t in tiny_models.released_layout(recorded.transformer().state_dict()).items()}


def pictures(folder: Path) -> None:
    """The shipped workflows' own; a photograph without alpha; the same with a mask that was painted on it."""
    if (folder / "painted.png").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("character.png", "owl.png", "monster.png"):
        shutil.copy(PACK / "assets" / name, folder / name)
    figure = Image.open(PACK / "assets/character.png")
    figure = figure.resize((figure.width * 3 // 2, figure.height * 3 // 2))
    photograph = Image.radial_gradient("L").resize((1536, 2048)).convert("RGB")
    photograph.paste(figure, (288, 600), figure)
    photograph.save(folder / "photograph.jpg", quality=90)
    alpha = Image.new("L", photograph.size, 255)
    alpha.paste(0, (288, 600, 288 + figure.width, 600 + figure.height))  # ComfyUI's mask editor erases where one paints
    photograph.putalpha(alpha)
    photograph.save(folder / "painted.png", compress_level=1)


RELEASED = {"models": released_models, "diffusers": diffusers_folders, "gguf": gguf_file}
TINY = {"models": tiny_files, "diffusers": tiny_files, "gguf": partial(gguf_file, shapes_of_flux=tiny_flux_shapes)}

if __name__ == "__main__":
    main()
