"""The toy T5: ``python -m toy.train.text OUT STEPS``; it learns to fill gaps in captions; its decoder is dropped."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5EncoderModel, T5ForConditionalGeneration

from toy.data.pictures import batches
from toy.device import DEVICE
from toy.models import GAPS, T5, T5_LENGTH, save_half
from toy.train.learning import learn
from toy.world import random_shot, random_traits

TEXTS = 40_000
GAP = 0.25
"""Fraction of words that are left out; neighbours form one gap."""


def train(out: Path, steps: int, size: int = 256) -> None:
    torch.manual_seed(0)
    captions = [random_shot(rng := random.Random(i), random_traits(rng, False)).caption() for i in range(TEXTS)]
    inputs, targets = _with_gaps(captions, AutoTokenizer.from_pretrained(out / "tokenizer_2"))
    model = T5ForConditionalGeneration(T5).to(DEVICE)

    def loss(batch: Tensor) -> Tensor:
        ids, labels = inputs[batch], targets[batch]
        return model(input_ids=ids, attention_mask=ids != 0, labels=labels.masked_fill(labels == 0, -100)).loss

    model = learn("t5", model, batches(TEXTS, size, steps, 1), steps, loss, rate=2e-3, average=0.99)
    encoder = T5EncoderModel(T5)
    encoder.load_state_dict(model.encoder.state_dict(), strict=False)
    encoder.shared.load_state_dict(model.shared.state_dict())
    encoder.encoder.load_state_dict(model.encoder.state_dict())
    save_half(encoder.cpu(), out / "text_encoder_2")


def _with_gaps(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Ids of texts with gaps, and of the words in the gaps."""
    rng, pairs = random.Random(1), []
    for text in texts:
        words, inputs, targets, gaps = text.split(), [], [], 0
        left_out = [rng.random() < GAP for _ in words]
        for i, (word, out) in enumerate(zip(words, left_out)):
            if out and (i == 0 or not left_out[i - 1]):
                inputs.append(GAPS[gaps])
                targets.append(GAPS[gaps])
                gaps += 1
            (targets if out else inputs).append(word)
        pairs.append((" ".join(inputs), " ".join(targets)))
    settings = {"padding": "max_length", "max_length": T5_LENGTH, "truncation": True, "return_tensors": "pt"}
    inputs, targets = (tokenizer(list(side), **settings).input_ids.to(DEVICE) for side in zip(*pairs))
    return inputs, targets


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
