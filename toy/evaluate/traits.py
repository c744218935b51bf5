"""What blurs, and which traits come through: ``python -m toy.evaluate.traits ASSETS``.

The same held-out characters, actions, scenes and styles as code draws them, after the VAE, after FLUX with and without
the adapter; then the same as pixel art. Each row has the share of right answers for each trait, see
:mod:`toy.evaluate.trait_judge`, for who it is, and figures of the edges, see :mod:`toy.evaluate.edges`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from multiprocessing import Pool
from pathlib import Path

import torch
from diffusers import FluxImg2ImgPipeline
from torch import Tensor

from instantcharacter import CharacterAdapter
from instantcharacter.training.flow import CharacterFlow
from toy.device import DEVICE
from toy.evaluate.edges import is_pixel_art, share_on_grid, sharpness
from toy.evaluate.judge import retrieved
from toy.evaluate.measure import (
    BATCH,
    DECODED,
    GUIDANCE,
    STEPS,
    HeldOut,
    Toy,
    decode,
    generate,
    in_style,
    random_held_out,
    to_tensors,
)
from toy.evaluate.trait_judge import TRAITS, TraitJudge, labels_of, rarest_value, right_traits
from toy.world import LORA_STYLE, SIDE, Traits, draw_reference, random_traits

SCALE = 0.9
ALIKE = 64
"""Number of characters of one shape and body colour, among which one is identified."""
HALF = 0.5
"""The part of the steps that image-to-image takes."""


@dataclass
class Row:
    """Pictures of the table's row.

    Attributes:
        name: what drew or generated them.
        test: what they show.
        pictures: [N, 3, 256, 256] from -1 to 1.
        code: the same, drawn by code.
    """

    name: str
    test: HeldOut
    pictures: Tensor
    code: Tensor


def rows(toy: Toy, adapter: CharacterAdapter, lora: Path, test: HeldOut, steps: int) -> Iterator[Row]:
    """The table's pictures; the adapter, and at last the LoRA, stay in FLUX."""
    flow = CharacterFlow(toy.pipeline.transformer, adapter, checkpointing=False).eval()
    code = draw(test)
    yield Row("drawn by code", test, code, code)
    yield Row("VAE", test, reconstruct(toy, code), code)
    yield Row("FLUX, half of the steps", test, regenerate(toy, test, code, steps), code)
    for name, scale in (("FLUX", 0.0), (f"adapter {SCALE}", SCALE)):
        for suffix, guidance in (("", GUIDANCE), (", guidance 1", 1.0)):
            yield Row(name + suffix, test, generate(toy, flow, test, scale, steps, guidance), code)
    test = in_style(toy, test, LORA_STYLE)
    code = draw(test)
    yield Row("pixel art, drawn by code", test, code, code)
    yield Row("pixel art, VAE", test, reconstruct(toy, code), code)
    toy.pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    for name, scale in (("pixel art, LoRA", 0.0), (f"pixel art, LoRA, adapter {SCALE}", SCALE)):
        yield Row(name, test, generate(toy, flow, test, scale, steps), code)


def figures(toy: Toy, judge: TraitJudge, alike: Tensor, row: Row) -> dict[str, float]:
    """A row's figures; ``alike`` has identities of characters alike, [N, ALIKE, D], each row's own first."""
    labels = labels_of(row.test.shots)
    right = right_traits(judge.read(row.pictures), labels)
    found = {name: share.nanmean().item() for name, share in right.items()}
    found["traits"] = sum(found[name] for name in TRAITS) / len(TRAITS)
    value, share = rarest_value(right, labels)
    found[f"least, {value}"] = share
    identity = identities(toy, row.pictures)
    found["identity of 16"] = retrieved(identity, row.test.references).float().mean().item()
    nearest = torch.einsum("nd,nkd->nk", identity, alike).argmax(dim=1)
    found[f"identity of {alike.shape[1]} alike"] = (nearest == 0).float().mean().item()
    found["sharpness"] = (sharpness(row.pictures).mean() / sharpness(row.code).mean()).item()
    found["on a grid"] = share_on_grid(row.pictures).mean().item()
    found["pixel art"] = is_pixel_art(row.pictures).float().mean().item()
    found["pixels off"] = (row.pictures - row.code).abs().mean().item()
    return found


def draw(test: HeldOut) -> Tensor:
    return to_tensors([shot.draw() for shot in test.shots])


@torch.no_grad()
def reconstruct(toy: Toy, pictures: Tensor) -> Tensor:
    """The pictures, encoded and decoded."""
    parts = pictures.split(DECODED)
    return decode(toy, torch.cat([toy.pipeline.vae.encode(part).latent_dist.mode() for part in parts]))


@torch.no_grad()
def regenerate(toy: Toy, test: HeldOut, pictures: Tensor, steps: int) -> Tensor:
    """FLUX's pictures from the second half of the steps, which begins with those of code and noise."""
    pipeline = FluxImg2ImgPipeline(**toy.pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    generated = [
        pipeline(
            image=part / 2 + 0.5,
            prompt_embeds=prompts,
            pooled_prompt_embeds=pooled,
            height=SIDE,
            width=SIDE,
            strength=HALF,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator(DEVICE).manual_seed(i),
            output_type="pt",
        ).images
        for i, (part, prompts, pooled) in enumerate(
            zip(*(tensor.split(DECODED) for tensor in (pictures, test.prompts, test.pooled)))
        )
    ]
    return torch.cat(generated) * 2 - 1


@torch.no_grad()
def identities(toy: Toy, pictures: Tensor) -> Tensor:
    """The judge's, [N, D]."""
    return torch.cat([toy.judge(part)[0] for part in pictures.split(BATCH)])


def identities_alike(toy: Toy, test: HeldOut, count: int, seed: int = 0) -> Tensor:
    """The identities of ``count`` references alike for each character, its own first: [N, count, D]."""
    rng = random.Random(f"alike {seed}")
    with Pool() as pool:
        own = [
            identities(toy, to_tensors(pool.map(draw_reference, alike(rng, shot.traits, count - 1))))
            for shot in test.shots
        ]
    return torch.cat([test.references[:, None], torch.stack(own)], dim=1)


def alike(rng: random.Random, traits: Traits, count: int) -> list[Traits]:
    """Random characters of the same shape and body colour, each with another combination of discrete traits."""
    characters: list[Traits] = []
    while len(characters) < count:
        other = random_traits(rng, held_out=rng.random() < 0.125)
        other = replace(other, shape=traits.shape, hue=traits.hue, paleness=traits.paleness)
        if astuple(other)[:5] != astuple(traits)[:5]:
            characters.append(other)
    return characters


def evaluate(
    assets: Path, adapter: Path, judge: Path, count: int, steps: int, seed: int = 0
) -> Iterator[tuple[str, dict[str, float]]]:
    """Names and figures of the table's rows."""
    trait_judge = TraitJudge.from_file(judge).to(DEVICE)
    toy = Toy.load(assets)
    test = random_held_out(toy, count, seed)
    others = identities_alike(toy, test, ALIKE)
    for row in rows(toy, CharacterAdapter.from_file(adapter).to(DEVICE), assets / "pixel_art.safetensors", test, steps):
        yield row.name, figures(toy, trait_judge, others, row)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--adapter", type=Path, help="ASSETS/adapter.safetensors if not given")
    parser.add_argument("--judge", type=Path, default=Path("output/toy/trait_judge.safetensors"), help="by traits")
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0, help="of the characters and prompts")
    options = parser.parse_args()
    adapter = options.adapter or options.assets / "adapter.safetensors"
    for name, found in evaluate(options.assets, adapter, options.judge, options.pictures, options.steps, options.seed):
        print(json.dumps({"": name, **{key: round(value, 3) for key, value in found.items()}}), flush=True)
