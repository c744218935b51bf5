"""SigLIP and DINOv2 look at the reference picture; what they see, side by side, are the character's features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from ..files.pictures import Picture, ResizeMode, open_picture, to_square
from ..files.single_file import SingleFileModel
from ..model.features import CharacterFeatures
from ..versions import warn_if_newer
from .image import crops

SIGLIP_NORM = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
DINOV2_NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIGLIP_SHALLOW = (7, 13, 26)
DINOV2_SHALLOW = (9, 19, 29)
"""Which hidden states are the shallow features; 0 is the embedding's output."""


class CharacterEncoder(nn.Module):
    """The two vision encoders. Call it with a picture; see :meth:`forward`."""

    def __init__(self, siglip: SiglipVisionModel, dinov2: Dinov2Model) -> None:
        super().__init__()
        self.siglip = siglip.eval().requires_grad_(False)
        self.dinov2 = dinov2.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        siglip: str | Path,
        dinov2: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> CharacterEncoder:
        """Load the encoders, each from a hub folder, a hub id, or one ``.safetensors`` file.

        Args:
            siglip: the vision tower of ``google/siglip-so400m-patch14-384``, with or without its text tower.
            dinov2: ``facebook/dinov2-giant``.
            dtype: of the weights and of the features, float32 if not given.
            device: where they run.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file that is cut off, of another model, or lacks weights.
            OSError: a hub id that cannot be found or reached (transformers).
        """
        warn_if_newer("transformers")
        dtype = dtype or torch.float32
        encoders = []
        for model, source, layers in ((SIGLIP, siglip, SIGLIP_SHALLOW), (DINOV2, dinov2, DINOV2_SHALLOW)):
            config = model.read_config(source)
            if config.num_hidden_layers < max(layers):
                raise ValueError(f"{source} has {config.num_hidden_layers} layers; expected {model.expected}")
            config.vision_use_head = False  # SigLIP's pooling: the features come before it
            encoders.append(model.load(source, config, dtype))
        return cls(*encoders).to(device)

    @torch.no_grad()
    def forward(self, image: Picture, fit: ResizeMode = "pad") -> CharacterFeatures:
        """Look at a picture.

        Args:
            image: anything :func:`~instantcharacter.character.image.open_picture` takes.
            fit: how it becomes a square, ``"pad"`` or ``"stretch"``.

        Raises:
            ValueError: not a picture, see :func:`~instantcharacter.character.image.open_picture`.
        """
        return self.encode_images(image_to_crops(image, fit)[None])

    @torch.no_grad()
    def encode_images(self, pictures: Tensor) -> CharacterFeatures:
        """Look at several pictures at once.

        Args:
            pictures: [B, 5, H, W, 3] in uint8, each what :func:`squares` made of a picture.
        """
        pictures = pictures.to(next(self.parameters()).device)
        low, high = pictures[:, 0], pictures[:, 1:].flatten(0, 1)
        siglip, dinov2 = self._look(low, output_hidden_states=True)
        shallow = _side_by_side(
            [siglip.hidden_states[i] for i in SIGLIP_SHALLOW], [dinov2.hidden_states[i] for i in DINOV2_SHALLOW]
        )
        deep = _side_by_side([siglip.last_hidden_state], [dinov2.last_hidden_state])
        siglip, dinov2 = self._look(high)
        tiles = _side_by_side([siglip.last_hidden_state], [dinov2.last_hidden_state])
        return CharacterFeatures(shallow, deep, tiles.unflatten(0, (-1, 4)).flatten(1, 2))

    def _look(self, pictures: Tensor, **settings: Any) -> tuple[Any, Any]:
        """What SigLIP and DINOv2 return for a batch of pictures."""
        dtype = next(self.parameters()).dtype
        return (
            self.siglip(_normalised(pictures, *SIGLIP_NORM).to(dtype), **settings),
            self.dinov2(_normalised(pictures, *DINOV2_NORM).to(dtype), **settings),
        )


def image_to_crops(image: Picture, fit: ResizeMode = "pad") -> Tensor:
    """What the encoders see of a picture, [5, H, W, 3] in uint8: the whole, then its four tiles.

    Raises:
        ValueError: not a picture, see :func:`~instantcharacter.character.image.open_picture`.
    """
    whole, tiles = crops(to_square(open_picture(image), fit))
    return torch.from_numpy(np.stack([np.asarray(square) for square in (*whole, *tiles)]))


def _side_by_side(siglip: list[Tensor], dinov2: list[Tensor]) -> Tensor:
    """Layers one after the other, the encoders along channels; DINOv2's class token is dropped."""
    return torch.cat([torch.cat(siglip, dim=1), torch.cat([layer[:, 1:] for layer in dinov2], dim=1)], dim=-1)


def _normalised(pictures: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 pictures [P, H, W, 3] as [P, 3, H, W] in float32, normalised."""
    mean_, std_ = (torch.tensor(part, device=pictures.device) for part in (mean, std))
    return ((pictures.float() / 255 - mean_) / std_).permute(0, 3, 1, 2)


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
    towers=("embeddings.", "encoder.", "post_layernorm."),
    telling=("embeddings.patch_embedding.weight", 0, "hidden_size"),
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
    towers=("embeddings.", "encoder.", "layernorm."),
    telling=("embeddings.patch_embeddings.projection.weight", 0, "hidden_size"),
)
