"""The catalogue of model files: what InstantCharacter needs, and where it comes from.

Folders have ComfyUI's names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FLUX = "black-forest-labs/FLUX.1-dev"
SIGLIP = "google/siglip-so400m-patch14-384"
DINOV2 = "facebook/dinov2-giant"
ADAPTER = "tencent/InstantCharacter"
ADAPTER_FILE = "instantcharacter_ip-adapter.bin"

TOY = "toy"
"""The choice, in place of a model file, of the small model of its kind that comes with the pack."""
TOY_FOLDER = Path(__file__).parents[2] / "assets/toy"
TOY_FILES = {
    "flux": "flux",
    "siglip": "siglip",
    "dinov2": "dinov2",
    "adapter": "adapter.safetensors",
    "lora": "pixel_art.safetensors",
}
"""Paths in :data:`TOY_FOLDER`, by the names of :data:`FILES`, and a LoRA."""

EXAMPLES = ("character.png", "owl.png", "monster.png")
"""Pictures of characters that come with the pack, in the folder above :data:`TOY_FOLDER`."""


@dataclass(frozen=True)
class ModelFile:
    """A file that InstantCharacter needs.

    Attributes:
        title: for lists and errors.
        repo: its repository on the hub.
        path: its path in the repository, and in the folder that it is saved to.
        folder: that folder, under ComfyUI's ``models``.
        gigabytes: its approximate size.
        searched: ComfyUI's folders that are searched for it.
        subfolder: of ``folder``, that it is saved to.
        names: other paths that it may have in the searched folders.
        gated: whether its licence must be accepted on the hub first.
    """

    title: str
    repo: str
    path: str
    folder: str
    gigabytes: float
    searched: tuple[str, ...]
    subfolder: str = ""
    names: tuple[str, ...] = ()
    gated: bool = False

    @property
    def saved_as(self) -> Path:
        """Its path in :attr:`folder`."""
        return Path(self.subfolder, self.path)

    @property
    def page(self) -> str:
        """Its repository's page."""
        return f"https://huggingface.co/{self.repo}"


FILES = {
    "flux": ModelFile(
        "FLUX.1-dev",
        FLUX,
        "flux1-dev.safetensors",
        "unet",
        23.8,
        ("diffusion_models",),
        names=("flux1-dev.sft", "FLUX.1-dev"),
        gated=True,
    ),
    "clip_l": ModelFile(
        "CLIP-L", "comfyanonymous/flux_text_encoders", "clip_l.safetensors", "text_encoders", 0.25, ("text_encoders",)
    ),
    "t5": ModelFile(
        "T5-XXL",
        "comfyanonymous/flux_text_encoders",
        "t5xxl_fp16.safetensors",
        "text_encoders",
        9.8,
        ("text_encoders",),
        names=("t5xxl_fp8_e4m3fn_scaled.safetensors", "t5xxl_fp8_e4m3fn.safetensors"),
    ),
    "vae": ModelFile(
        "FLUX's VAE", FLUX, "ae.safetensors", "vae", 0.34, ("vae",), names=("flux_vae.safetensors",), gated=True
    ),
    "siglip": ModelFile(
        "SigLIP",
        "Comfy-Org/sigclip_vision_384",
        "sigclip_vision_patch14_384.safetensors",
        "clipvision",
        0.86,
        ("clipvision", "clip_vision"),
        names=("siglip-so400m-patch14-384/model.safetensors",),
    ),
    "dinov2": ModelFile(
        "DINOv2 giant",
        DINOV2,
        "model.safetensors",
        "clipvision",
        4.5,
        ("clipvision", "clip_vision"),
        subfolder="dinov2-giant",
        names=("dinov2-giant.safetensors", "dinov2_giant.safetensors"),
    ),
    "adapter": ModelFile(
        "the InstantCharacter adapter",
        ADAPTER,
        ADAPTER_FILE,
        "ipadapter",
        5.6,
        ("ipadapter",),
        names=("instantcharacter_ip-adapter.safetensors",),
    ),
}
"""By their names on the command line and in the nodes."""


def toy(name: str) -> Path:
    """The path of a toy model.

    Args:
        name: one of :data:`TOY_FILES`.

    Raises:
        FileNotFoundError: the pack was installed without it.
    """
    path = TOY_FOLDER / TOY_FILES[name]
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: the toy models come with the pack's repository; clone it")
    return path


def example(name: str) -> Path:
    """The path of a picture that comes with the pack.

    Args:
        name: one of :data:`EXAMPLES`.

    Raises:
        ValueError: another name.
    """
    if name not in EXAMPLES:
        raise ValueError(f"there is no example {name!r}; expected one of {', '.join(EXAMPLES)}")
    return TOY_FOLDER.parent / name
