from __future__ import annotations

import pytest
import torch
from support import recorded

from instantcharacter import Character
from instantcharacter.batch.cache import JobCache, Prompt
from instantcharacter.batch.jobs import Source

LORAS = ((Source("0" * 32, recorded.LORA), 0.5),)


@pytest.fixture
def cache(tmp_path) -> JobCache:
    return JobCache(tmp_path / "cache")


def test_a_character_is_missing_until_it_is_saved(cache, jobs_of, character):
    (job,) = jobs_of({"prompt": "a"})
    (reference,) = job.settings.reference
    assert cache.missing([reference, reference]) == [reference]
    cache.save(reference, character)
    assert cache.missing([reference]) == []
    assert torch.equal(cache.character(reference).fused, character.fused)
    assert cache.character(reference) is cache.character(reference)
    (file,) = cache.characters.iterdir()
    assert Character.load(file).is_same(character)


def test_a_prompt_is_encoded_once_for_each_set_of_loras(cache, tmp_path):
    encoded = []

    def encode(prompt: Prompt) -> dict[str, torch.Tensor]:
        encoded.append(prompt)
        return {"prompt_embeds": torch.full((1, 2, 4), float(len(encoded)), dtype=torch.bfloat16)}

    prompts = [Prompt("a", ()), Prompt("b", ()), Prompt("a", LORAS), Prompt("a", ((LORAS[0][0], 0.6),))]
    for _ in range(2):
        values = [cache.embeddings(prompt, encode)["prompt_embeds"] for prompt in prompts]
        cache = JobCache(tmp_path / "cache")
    assert encoded == prompts
    assert [value.mean().item() for value in values] == [1, 2, 3, 4]
    assert values[0].dtype == torch.bfloat16
