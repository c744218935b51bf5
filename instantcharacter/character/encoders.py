"""The vision encoders, SigLIP and DINOv2: a picture to features."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from ..files.errors import escaped
from ..files.pictures import Picture, ResizeMode, open_picture, to_square
from ..files.reading import check_module
from ..files.single_file import SingleFileModel
from ..model.features import CharacterFeatures
from ..versions import warn_if_newer
from .image import crops

SIGLIP_NORM = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
DINOV2_NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of each colour channel."""
SIGLIP_SHALLOW = (7, 13, 26)
DINOV2_SHALLOW = (9, 19, 29)
"""Indices of the hidden states that are the shallow features; 0 is the embedding's output."""


class CharacterEncoder(nn.Module):
    """Both vision encoders; call it with a picture, see :meth:`forward`.

    Args:
        siglip: the vision tower, without its pooling head.
        dinov2: with its class token.
    """

    def __init__(self, siglip: SiglipVisionModel, dinov2: Dinov2Model) -> None:
        super().__init__()
        self.siglip = siglip.eval().requires_grad_(False)
        self.dinov2 = dinov2.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        siglip: str | Path,
        dinov2: str | Path,
        dtype: torch.dtype | Literal["auto"] | None = None,
        device: str | torch.device = "cpu",
    ) -> CharacterEncoder:
        """Load the encoders, each from a hub folder, a hub id, or one ``.safetensors`` file.

        Args:
            siglip: ``google/siglip-so400m-patch14-384``, with or without its text tower.
            dinov2: ``facebook/dinov2-giant``.
            dtype: of the weights and of the features, float32 if None. ``"auto"``: of each encoder's file, whose
                weights are then memory-mapped, not copied; give both encoders one dtype before they run.
            device: of the weights.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: a file is cut off, of another model, or lacks weights, or has some that are not finite.
            OSError: the hub has no such id, or cannot be reached (transformers).
        """
        warn_if_newer("transformers")
        dtype = dtype or torch.float32
        encoders = []
        for model, source, shallow in ((SIGLIP, siglip, SIGLIP_SHALLOW), (DINOV2, dinov2, DINOV2_SHALLOW)):
            config = model.read_config(source)
            if config.num_hidden_layers < max(shallow):
                raise ValueError(f"{source} has {config.num_hidden_layers} layers; expected {model.expected}")
            config.vision_use_head = False  # the pooling head, which the features do not need
            encoders.append(model.load(source, config, None if dtype == "auto" else dtype))
            check_module(encoders[-1], f"{escaped(source)} has weights", "fetch the file again")
        return cls(*encoders).to(device)

    @torch.no_grad()
    def forward(self, image: Picture, fit: ResizeMode = "pad") -> CharacterFeatures:
        """The features of a picture.

        Args:
            image: anything that :func:`~instantcharacter.files.pictures.open_picture` takes.
            fit: how it becomes a square, see :func:`~instantcharacter.files.pictures.to_square`.

        Raises:
            ValueError: not a picture, or an unknown ``fit``.
        """
        return self.encode_images(image_to_crops(image, fit)[None])

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> CharacterFeatures:
        """The features of a batch of pictures.

        Args:
            images: [B, 5, H, W, 3] in uint8, the crops of each from :func:`image_to_crops`.
        """
        images = images.to(next(self.parameters()).device)
        low_res, high_res = images[:, 0], images[:, 1:].flatten(0, 1)
        siglip, dinov2 = self._encode(low_res, output_hidden_states=True)
        shallow = concat_features(
            [siglip.hidden_states[i] for i in SIGLIP_SHALLOW], [dinov2.hidden_states[i] for i in DINOV2_SHALLOW]
        )
        deep = concat_features([siglip.last_hidden_state], [dinov2.last_hidden_state])
        siglip, dinov2 = self._encode(high_res)
        tiles = concat_features([siglip.last_hidden_state], [dinov2.last_hidden_state])
        return CharacterFeatures(shallow, deep, tiles.unflatten(0, (-1, 4)).flatten(1, 2))

    def _encode(self, images: Tensor, **settings: Any) -> tuple[Any, Any]:
        """The outputs of SigLIP and DINOv2 for images [P, H, W, 3] in uint8."""
        dtype = next(self.parameters()).dtype
        return (
            self.siglip(normalise(images, *SIGLIP_NORM).to(dtype), **settings),
            self.dinov2(normalise(images, *DINOV2_NORM).to(dtype), **settings),
        )


def image_to_crops(image: Picture, fit: ResizeMode = "pad") -> Tensor:
    """The encoders' input for a picture, [5, H, W, 3] in uint8: the whole, then its four tiles.

    Raises:
        ValueError: not a picture, see :func:`~instantcharacter.files.pictures.open_picture`.
    """
    whole, tiles = crops(to_square(open_picture(image), fit))
    return torch.from_numpy(np.stack([np.asarray(crop) for crop in (*whole, *tiles)]))


def concat_features(siglip: list[Tensor], dinov2: list[Tensor]) -> Tensor:
    """Layers [P, N, …] of both encoders, concatenated along tokens, then channels; drops DINOv2's class token."""
    return torch.cat([torch.cat(siglip, dim=1), torch.cat([layer[:, 1:] for layer in dinov2], dim=1)], dim=-1)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Images [P, H, W, 3] in uint8 as [P, 3, H, W] in float32, ``(x / 255 − mean) / std`` per channel."""
    mean_, std_ = (torch.tensor(channels, device=images.device) for channels in (mean, std))
    return ((images.float() / 255 - mean_) / std_).permute(0, 3, 1, 2)


SIGLIP = SingleFileModel(
    name="SigLIP (google/siglip-so400m-patch14-384)",
    model=SiglipVisionModel,
    config=SiglipVisionConfig,
    released={
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    prefix="vision_model.",
    prefixes=("embeddings.", "encoder.", "post_layernorm."),
    width_key=("embeddings.patch_embedding.weight", 0, "hidden_size"),
)
DINOV2 = SingleFileModel(
    name="DINOv2 (facebook/dinov2-giant)",
    model=Dinov2Model,
    config=Dinov2Config,
    released={
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "mlp_ratio": 4,
        "use_swiglu_ffn": True,
        "image_size": 518,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
    prefix="",
    prefixes=("embeddings.", "encoder.", "layernorm."),
    width_key=("embeddings.patch_embeddings.projection.weight", 0, "hidden_size"),
)
