"""The toy SigLIP and CLIP: ``python -m toy.train.siglip ALBUM OUT STEPS``.

A vision and a text encoder learn which alt text belongs to which picture, by SigLIP's sigmoid loss
(arXiv 2303.15343). The vision encoder becomes the pack's SigLIP, the text encoder FLUX's CLIP.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from instantcharacter.character.encoders import SIGLIP_NORM
from instantcharacter.character.image import ENCODER_RESOLUTION
from toy.data.pictures import SHOTS, Album, batches, crop
from toy.device import DEVICE
from toy.models import CLIP, CLIP_LENGTH, SIGLIP, new_clip, new_siglip, save_half
from toy.train.learning import learn

SMALLEST = 0.6
"""Smallest crop, in picture sides."""


class DualEncoder(nn.Module):
    """A vision and a text encoder with a common space of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = new_siglip(), new_clip()
        self.project = nn.Linear(SIGLIP.hidden_size, CLIP.hidden_size)
        self.scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, pictures: Tensor, ids: Tensor) -> Tensor:
        """Logits of each picture and each text belonging together, [pictures, texts]."""
        image = self.project(self.vision(pictures).pooler_output)
        text = self.text(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
        return F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T * self.scale.exp() + self.bias


def train(album: Album, out: Path, steps: int, size: int = 512) -> None:
    torch.manual_seed(0)
    pictures, ids = album.on(DEVICE), _texts(album, out).to(DEVICE)
    encoders = DualEncoder().to(DEVICE)

    def logits(batch: Tensor) -> Tensor:
        return encoders(augment(pictures[batch]), ids[batch]).float()

    def loss(batch: Tensor) -> Tensor:
        sign = 2 * torch.eye(len(batch), device=DEVICE) - 1
        return -F.logsigmoid(sign * logits(batch)).sum() / len(batch)

    encoders = learn("siglip", encoders, batches(len(pictures), size, steps, 1), steps, loss, rate=1.5e-3)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        right = logits(torch.arange(256, device=DEVICE)).argmax(dim=1) == torch.arange(256, device=DEVICE)
    print("siglip: picture to text among 256", right.float().mean().item())
    save_half(encoders.vision, out / "siglip")
    save_half(encoders.text, out / "text_encoder")


def augment(pictures: Tensor) -> Tensor:
    """Random crops at the encoders' resolution, normalized; crops, since the adapter shows the encoder tiles."""
    (mean, *_), (deviation, *_) = SIGLIP_NORM
    return (crop(pictures, SMALLEST, ENCODER_RESOLUTION) - mean) / deviation


def _texts(album: Album, out: Path) -> Tensor:
    """The alt text of each picture; a reference's has only the traits."""
    texts = []
    for traits, shots in zip(album.characters, album.shots):
        texts += [f"a picture of {traits.describe()} on white", *(shot.alt_text() for shot in shots[:SHOTS])]
    assert len(texts) == len(album.characters) * (1 + SHOTS)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    settings = {"padding": "max_length", "max_length": CLIP_LENGTH, "truncation": True, "return_tensors": "pt"}
    return tokenizer(texts, **settings).input_ids


if __name__ == "__main__":
    train(Album(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))
