"""The toy SigLIP and CLIP: ``python -m toy.train_siglip ALBUM OUT STEPS``.

One vision tower and one text tower learn which alt text belongs to which picture, by SigLIP's sigmoid loss
(arXiv 2303.15343). The vision tower becomes the pack's SigLIP, the text tower FLUX's CLIP.
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
from toy.learning import DEVICE, learn
from toy.models import CLIP, CLIP_LENGTH, SIGLIP, new_clip, new_siglip, save_half
from toy.pictures import SHOTS, Album, batches, crop

SMALLEST = 0.6
"""Part of a picture's side in a crop."""


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = new_siglip(), new_clip()
        self.project = nn.Linear(SIGLIP.hidden_size, CLIP.hidden_size)
        self.scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, pictures: Tensor, ids: Tensor) -> Tensor:
        """How well each picture fits each text."""
        seen = self.project(self.vision(pictures).pooler_output)
        read = self.text(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
        return F.normalize(seen, dim=-1) @ F.normalize(read, dim=-1).T * self.scale.exp() + self.bias


def train(album: Album, out: Path, steps: int, size: int = 512) -> None:
    torch.manual_seed(0)
    pictures, ids = album.on(DEVICE), _texts(album, out).to(DEVICE)
    towers = Towers().to(DEVICE)

    def logits(batch: Tensor) -> Tensor:
        return towers(as_siglip_sees(pictures[batch]), ids[batch]).float()

    def loss(batch: Tensor) -> Tensor:
        sign = 2 * torch.eye(len(batch), device=DEVICE) - 1
        return -F.logsigmoid(sign * logits(batch)).sum() / len(batch)

    towers = learn("siglip", towers, batches(len(pictures), size, steps, 1), steps, loss, rate=1.5e-3)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        right = logits(torch.arange(256, device=DEVICE)).argmax(dim=1) == torch.arange(256, device=DEVICE)
    print("siglip: picture to text among 256", right.float().mean().item())
    save_half(towers.vision, out / "siglip")
    save_half(towers.text, out / "text_encoder")


def as_siglip_sees(pictures: Tensor) -> Tensor:
    """At the encoders' size, and parts of a picture, too: tiles are then nothing new."""
    (mean, *_), (deviation, *_) = SIGLIP_NORM
    return (crop(pictures, SMALLEST, ENCODER_RESOLUTION) - mean) / deviation


def _texts(album: Album, out: Path) -> Tensor:
    """The alt text of each picture; a reference's is who it is."""
    texts = []
    for look, shots in zip(album.looks, album.shots):
        texts += [f"a picture of {look.describe()} on white", *(shot.alt_text() for shot in shots[:SHOTS])]
    assert len(texts) == len(album.looks) * (1 + SHOTS)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    settings = {"padding": "max_length", "max_length": CLIP_LENGTH, "truncation": True, "return_tensors": "pt"}
    return tokenizer(texts, **settings).input_ids


if __name__ == "__main__":
    train(Album(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))
