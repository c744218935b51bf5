"""The pictures that image-to-image and inpainting start from, checked: diffusers takes most of what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from ..files.pictures import open_picture
from ..model.tensors import FLOATS, check_range, check_tensor, is_dense
from ..values import check_count, shown

OVERSHOOT = 0.5
"""How far outside of its range a resized picture may lie."""
MASK_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
Size = tuple[int, int, int]


def check_init_pictures(settings: Mapping[str, Any], latents: Size, pictures: int) -> None:
    """Check the picture of a call, and in inpainting the mask and what belongs to it.

    Args:
        settings: arguments of the call.
        latents: channels, height and width of a picture's latents.
        pictures: number of pictures that are generated at once.

    Raises:
        ValueError: not pictures in RGB, or masks, of numbers in their range; or a number of them that does not divide
            the pictures.
    """
    _check("image", settings["image"], latents, pictures)
    if "mask_image" not in settings:
        return
    _check("mask_image", settings["mask_image"], latents, pictures)
    masked = settings["masked_image_latents"]
    if masked is not None:
        check_tensor("masked_image_latents", masked, (None, *latents))
        _check_number_of("masked_image_latents", len(masked), pictures)
    if settings["padding_mask_crop"] is not None:
        check_count("padding_mask_crop", settings["padding_mask_crop"], 0, 16384)
        _check_crop(settings["image"], settings["mask_image"])


def _check(name: str, value: Any, latents: Size, pictures: int) -> None:
    """Check the values and the number of pictures or masks."""
    items = value if isinstance(value, list) else [value]
    if not items or len({_kind(item) for item in items}) != 1:
        raise ValueError(f"{name} is {shown(value)}; expected a picture, or a list of them")
    is_mask = name == "mask_image"
    for item in items:
        if isinstance(item, Image.Image):
            _check_image(name, item, MASK_MODES if is_mask else ("RGB",))
        elif len(items) > 1 and item.shape != items[0].shape:
            raise ValueError(f"{name} has arrays {shown(items[0])} and {shown(item)}; expected all of one shape")
    counts = [1 if isinstance(item, Image.Image) else _check_array(name, item, latents, is_mask) for item in items]
    _check_number_of(name, sum(counts), pictures)


def _kind(item: Any) -> str:
    """Whether an item is a PIL image, an array or a tensor; others, and arrays of integers, get a name of their own."""
    if isinstance(item, Image.Image):
        return "image"
    if isinstance(item, np.ndarray) and item.size and item.dtype in (np.float16, np.float32, np.float64):
        return "array"
    if is_dense(item) and item.numel() and item.dtype in FLOATS:
        return "tensor"
    raise ValueError(
        f"a picture of image or mask_image is {shown(item)}; expected a PIL image, or an array or tensor of floats in "
        "0 to 1: convert it"
    )


def _check_image(name: str, image: Image.Image, modes: tuple[str, ...]) -> None:
    open_picture(image)
    if image.mode not in modes:
        raise ValueError(f"{name} is a PIL image of mode {image.mode}; expected {' or '.join(modes)}: convert it")


def _check_array(name: str, item: Any, latents: Size, is_mask: bool) -> int:
    """Check the shape and values of an array or a tensor, and return the number of pictures in it."""
    channels_last = isinstance(item, np.ndarray)
    shape = [*item.shape] if not channels_last else [*item.shape[:-3], *item.shape[-1:], *item.shape[-3:-1]]
    if is_mask:
        count = _masks_in(item.shape, channels_last)
    elif shape[-3:] == [*latents] and not channels_last and len(shape) == 4:
        check_tensor(name, item, (None, *latents))
        return len(item)
    else:
        count = (1 if len(shape) == 3 else shape[0]) if len(shape) in (3, 4) and shape[-3] == 3 else 0
    if not count:
        layout = "[H, W] or [N, H, W]" if is_mask else "[H, W, 3]" if channels_last else "[3, H, W]"
        raise ValueError(f"{name} is {shown(item)}; expected {layout}, or a batch of such")
    check_range(name, item, -OVERSHOOT if is_mask else -1 - OVERSHOOT, 1 + OVERSHOOT)
    return count


def _masks_in(shape: tuple[int, ...], channels_last: bool) -> int:
    """Number of masks in an array of this shape; 0 if it is none of masks."""
    if len(shape) == 2:
        return 1
    if len(shape) == 3:
        return 1 if channels_last and shape[-1] == 1 else shape[0]
    return shape[0] if len(shape) == 4 and shape[-1 if channels_last else 1] == 1 else 0


def _check_number_of(name: str, number: int, pictures: int) -> None:
    if number > pictures or pictures % number:
        raise ValueError(f"{name} has {number} pictures for {pictures}; expected one for all, or one for each")


def _check_crop(image: Any, mask: Any) -> None:
    """Check what ``padding_mask_crop`` crops: diffusers crops the picture where the mask is white."""
    for name, value in (("image", image), ("mask_image", mask)):
        if not isinstance(value, Image.Image):
            raise ValueError(f"{name} is {shown(value)}; expected one PIL image with padding_mask_crop")
    if image.size != mask.size or mask.convert("L").getbbox() is None:
        raise ValueError(
            f"image is {image.size} and mask_image {mask.size} pixels; expected one size, and white in the mask, with "
            "padding_mask_crop"
        )
