"""Nodes for the tests alone. ComfyUI knows no T5 smaller than XXL, so a text encoder of another kind stands in. Its
Load Image reads pictures with ``av``, which not every machine has."""

from __future__ import annotations

import gc
import hashlib

import numpy as np
import torch
from PIL import Image, ImageOps


class TestTextEncode:
    """A prompt as embeddings of the tiny FLUX's widths, from its hash."""

    CATEGORY = "tests"
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"text": ("STRING", {"multiline": True})}}

    def encode(self, text: str) -> tuple:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        random = torch.Generator().manual_seed(seed)
        embeddings, pooled = (torch.randn(1, *shape, generator=random) for shape in ((10, 64), (32,)))
        return ([[embeddings, {"pooled_output": pooled}]],)


class TestOtherModel:
    """A MODEL that is not FLUX."""

    CATEGORY = "tests"
    FUNCTION = "make"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def make(self) -> tuple:
        from comfy.model_patcher import ModelPatcher

        other = torch.nn.Module()
        other.diffusion_model = torch.nn.Linear(1, 1)
        return (ModelPatcher(other, torch.device("cpu"), torch.device("cpu")),)


class TestLoadImage:
    """A picture and its mask as Load Image gives them: 1 where transparent, 64×64 zeros without alpha."""

    CATEGORY = "tests"
    FUNCTION = "load"
    RETURN_TYPES = ("IMAGE", "MASK")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"image": ("STRING", {})}}

    def load(self, image: str) -> tuple:
        import folder_paths

        picture = ImageOps.exif_transpose(Image.open(folder_paths.get_annotated_filepath(image)))
        values = torch.from_numpy(np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255)[None]
        mask = 1 - values[..., 3] if "A" in picture.getbands() else torch.zeros(1, 64, 64)
        return (values[..., :3], mask)


class TestAlive:
    """How many of a class's objects there are in this process."""

    CATEGORY = "tests"
    FUNCTION = "count"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"name": ("STRING", {})}}

    @classmethod
    def IS_CHANGED(cls, name: str) -> float:
        return float("nan")

    def count(self, name: str) -> dict:
        return {"ui": {"alive": [sum(type(thing).__name__ == name for thing in gc.get_objects())]}}


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (TestTextEncode, TestOtherModel, TestLoadImage, TestAlive)}
