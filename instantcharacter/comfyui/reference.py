"""The node Prepare: a reference cut out by its mask, by its transparency, or by ComfyUI's background removal."""

from __future__ import annotations

from typing import Literal

from PIL import Image
from torch import Tensor

from ..character.image import Keep, cut_out, prepare_reference
from ..files.errors import first_line
from ..files.pictures import open_picture, to_square
from ..files.reading import file_states
from .folders import BACKGROUND_REMOVAL, BIREFNET, background_removal_file
from .images import to_image
from .inputs import masks
from .internals import load_background_removal
from .model_cache import ModelCache, shared_cache

ReferenceFit = Literal["auto", "pad", "stretch"]
KEEPS = 0.5
"""Least value of a mask that keeps a pixel."""
WHOLE = "kept the whole picture"
TO_CUT_OUT = (
    f"to cut the character out, connect a mask, or put {BIREFNET} from huggingface.co/Comfy-Org/BiRefNet into "
    f"models/{BACKGROUND_REMOVAL}"
)


def prepare(
    picture: Tensor, mask: Tensor | None, margin: float, fit: ReferenceFit, keep: Keep
) -> tuple[Image.Image, str]:
    """A reference picture with the character alone, on white, in a square.

    Args:
        picture: [H, W, C].
        mask: [h, w], or None. An empty one counts as none if ``fit`` is ``"auto"``.
        margin: see :func:`cut_out`.
        fit: ``"auto"`` cuts a picture without a mask out by its alpha, or by the background removal model in
            ComfyUI's folder, and pads it if there is neither. See :func:`prepare_reference` for the others.
        keep: the character's side of the mask, see :func:`prepare_reference`.

    Returns:
        The square, and a sentence on the part of the picture in it.

    Raises:
        ValueError: see :func:`prepare_reference`; or the background removal model cannot be read.
    """
    if fit != "auto":
        return prepare_reference(picture, mask, margin, fit, keep)
    if mask is not None and mask.max() >= KEEPS:
        return prepare_reference(picture, mask, margin, keep=keep)
    if picture.shape[-1] == 4 and picture[..., 3].min() < 1:
        return _cut_out(picture[..., :3], picture[..., 3], margin, "its transparency")
    return _remove_background(open_picture(picture), margin)


def background_removal_cache() -> ModelCache:
    """The cache of the background removal model, see :func:`shared_cache`."""
    return shared_cache(BACKGROUND_REMOVAL)


def _remove_background(image: Image.Image, margin: float) -> tuple[Image.Image, str]:
    file = background_removal_file()
    if file is None:
        return to_square(image), f"{WHOLE}: {TO_CUT_OUT}"
    try:
        find_foreground = background_removal_cache().get(file_states(file), lambda: load_background_removal(file))
    except Exception as error:  # of safetensors, torch or ComfyUI
        raise ValueError(
            f"{file} cannot be read: {first_line(error)}. Replace or delete it, or choose another fit"
        ) from error
    if find_foreground is None:
        return to_square(image), f"{WHOLE}: {file.name} is no background removal model for ComfyUI; {TO_CUT_OUT}"
    mask = masks(find_foreground(to_image(image)[None]))[0]
    if mask.max() < KEEPS:
        return to_square(image), f"{WHOLE}: {file.name} found no character in it; connect a mask"
    return _cut_out(image, mask, margin, file.name)


def _cut_out(picture: Tensor | Image.Image, mask: Tensor, margin: float, by: str) -> tuple[Image.Image, str]:
    fraction = (mask >= KEEPS).float().mean().item()
    return cut_out(picture, mask, margin), f"cut out by {by}: {fraction:.0%} of the picture"
