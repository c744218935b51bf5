"""The toy tokenizers: ``python -m toy.train.tokenizers OUT``, on alt texts."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from toy.models import train_tokenizers
from toy.world import random_shot, random_traits

TEXTS = 20_000

if __name__ == "__main__":
    out = Path(sys.argv[1])
    texts = [random_shot(rng := random.Random(i), random_traits(rng, False)).alt_text() for i in range(TEXTS)]
    for tokenizer, name in zip(train_tokenizers(texts), ("tokenizer", "tokenizer_2")):
        tokenizer.save_pretrained(out / name)
