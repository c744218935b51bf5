"""What caches leave out, and what it costs in meaning: ``python -m toy.evaluate.caches ASSETS``.

The same characters, prompts and noise are generated without a cache and with each, one picture at a time by the pack's
pipeline, and judged as :mod:`toy.evaluate.measure` does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel, TaylorSeerCacheConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from instantcharacter import Character, CharacterAdapter, CharacterFeatures, InstantCharacterPipeline
from toy.device import DEVICE
from toy.evaluate.measure import HeldOut, Toy, pipeline_with, random_held_out, right_answers
from toy.world import SIDE

STEPS = 28
SCALE = 0.9
COUNTED = 2
"""Number of pictures whose arithmetic is counted, too."""
CACHES: dict[str, Any] = {
    "none": 0.0,
    **{f"cache_threshold {threshold}": threshold for threshold in (0.12, 0.2, 0.08, 0.04)},
    **{f"FirstBlockCache {threshold}": FirstBlockCacheConfig(threshold) for threshold in (0.16, 0.12, 0.2, 0.08)},
    "TaylorSeerCache, every 3rd": TaylorSeerCacheConfig(cache_interval=3, taylor_factors_dtype=torch.float32),
    "the same, lite": TaylorSeerCacheConfig(cache_interval=3, taylor_factors_dtype=torch.float32, use_lite_mode=True),
}
"""The caches: a number is the pipeline's ``cache_threshold``, anything else a configuration of diffusers'."""


class Generated(NamedTuple):
    """Pictures, [N, 3, 256, 256] from -1 to 1, and FLUX's arithmetic for a picture, in FLOP."""

    pictures: Tensor
    flop: float


def evaluate(assets: Path, names: list[str], count: int, steps: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Names and figures of the table's rows.

    ``computed`` is the share of FLUX's arithmetic. ``± …`` is the standard error of the difference from the row without
    a cache, picture by picture.
    """
    toy = Toy.load(assets)
    test = random_held_out(toy, count)
    adapter = CharacterAdapter.from_file(assets / "adapter.safetensors").to(DEVICE)
    pipeline = pipeline_with(toy, adapter)
    rows = [CharacterFeatures(*(tensor[i : i + 1] for tensor in test.features)) for i in range(count)]
    characters = [adapter.create_character(features) for features in rows]
    plain = generate(pipeline, test, characters, 0.0, steps)
    expected = right_answers(toy, test, plain.pictures)
    for name in names:
        generated = plain if name == "none" else generate(pipeline, test, characters, CACHES[name], steps)
        figures = {"computed": generated.flop / plain.flop}
        figures["pixels off"] = (generated.pictures - plain.pictures).abs().mean().item() / 2
        for question, right in right_answers(toy, test, generated.pictures).items():
            figures[question] = right.mean().item()
            figures[f"± {question}"] = (right - expected[question]).std().item() / count**0.5
        yield name, figures


@torch.no_grad()
def generate(
    pipeline: InstantCharacterPipeline, test: HeldOut, characters: list[Character], cache: Any, steps: int
) -> Generated:
    """The pictures with one of :data:`CACHES`."""
    ours = isinstance(cache, float)
    if not ours:
        pipeline.transformer.enable_cache(cache)
    pictures, flop = [], 0
    for i, character in enumerate(characters):
        settings = {
            "prompt_embeds": test.prompts[i : i + 1],
            "pooled_prompt_embeds": test.pooled[i : i + 1],
            "subject_image": character,
            "subject_scale": SCALE,
            "cache_threshold": cache if ours else 0.0,
            "height": SIDE,
            "width": SIDE,
            "num_inference_steps": steps,
            "return_dict": False,
        }
        pictures.append(pipeline(**settings, generator=torch.Generator().manual_seed(i), output_type="pt")[0])
        if i < COUNTED:
            with FlopCounterMode(display=False) as counter:
                pipeline(**settings, generator=torch.Generator().manual_seed(i), output_type="latent")
            flop += sum(counter.get_flop_counts()[FluxTransformer2DModel.__name__].values())
    if not ours:
        pipeline.transformer.disable_cache()
    return Generated(torch.cat(pictures) * 2 - 1, flop / COUNTED)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=[*CACHES])
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    for name, figures in evaluate(options.assets, options.caches, options.pictures, options.steps):
        print(json.dumps({"": name, **{key: round(value, 4) for key, value in figures.items()}}), flush=True)
