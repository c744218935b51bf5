"""Nodes for the tests alone. ComfyUI knows no T5 smaller than XXL, so a text encoder of another kind stands in. Its
Load Image reads pictures with ``av``, which not every machine has."""

from __future__ import annotations

import gc
import hashlib
from json import loads

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


class Any(str):
    """A type that every link fits."""

    def __ne__(self, other: object) -> bool:
        return False


class TestValue:
    """A value that no node should pass on: numbers, texts and tensors of any kind, as links."""

    CATEGORY = "tests"
    FUNCTION = "make"
    RETURN_TYPES = (Any("*"),)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"json": ("STRING", {})}}

    def make(self, json: str) -> tuple:
        return (_value(loads(json)),)


def _value(spec: object) -> object:
    """``{"tensor": shape, "dtype": name, "fill": number}`` as a tensor, wherever it is in a value."""
    if isinstance(spec, dict) and "tensor" in spec:
        return torch.full(spec["tensor"], spec["fill"]).to(getattr(torch, spec["dtype"]))
    if isinstance(spec, dict):
        return {key: _value(value) for key, value in spec.items()}
    return [_value(value) for value in spec] if isinstance(spec, list) else spec


class TestSink:
    """An output node for any value: of a tensor, whether it is finite, its shape, its mean and its deviation."""

    CATEGORY = "tests"
    FUNCTION = "show"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"value": (Any("*"), {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: dict) -> bool:
        return True

    def show(self, value: object) -> dict:
        if not isinstance(value, torch.Tensor):
            return {"ui": {"shown": [type(value).__name__]}}
        value = value.float()
        hashed = hashlib.sha256(value.numpy().tobytes()).hexdigest()
        return {"ui": {"shown": [bool(value.isfinite().all()), list(value.shape), value.std().item(), hashed]}}


NODES = (TestTextEncode, TestOtherModel, TestLoadImage, TestAlive, TestValue, TestSink)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
