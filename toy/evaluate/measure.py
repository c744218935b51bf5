"""Accuracies of the toy adapter on held-out characters: ``python -m toy.evaluate.measure ASSETS``."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from instantcharacter import CharacterAdapter, CharacterEncoder, CharacterFeatures, InstantCharacterPipeline
from instantcharacter.character.encoders import image_to_crops
from instantcharacter.flux.latents import img_ids, unpack
from instantcharacter.training.flow import CharacterFlow, sample
from toy.data.pictures import to_floats
from toy.device import DEVICE
from toy.evaluate.judge import Judge, retrieved
from toy.models import LATENT_CHANNELS, T5_LENGTH
from toy.world import ACTIONS, SCENES, SIDE, STYLES, Shot, draw_reference, random_shot, random_traits

SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
STEPS = 20
GUIDANCE = 3.5
BATCH = 125
"""Pictures in one batch."""
DECODED = 25
"""Pictures that the VAE takes at once."""


@dataclass
class Toy:
    """The toy models, on a device."""

    pipeline: FluxPipeline
    encoder: CharacterEncoder
    judge: Judge

    @classmethod
    def load(cls, assets: Path) -> Toy:
        pipeline = FluxPipeline.from_pretrained(str(assets / "flux"), torch_dtype=torch.float32).to(DEVICE)
        encoder = CharacterEncoder.from_pretrained(assets / "siglip", assets / "dinov2", torch.float32, DEVICE)
        return cls(pipeline, encoder, Judge.from_file(assets / "judge.safetensors").to(DEVICE))


@dataclass
class HeldOut:
    """Held-out characters, and a picture to generate of each.

    Attributes:
        shots: the pictures as data.
        features: of the references.
        references: the judge's identities of the references, [N, D].
        prompts: T5's, [N, T, W].
        pooled: CLIP's, [N, V].
    """

    shots: list[Shot]
    features: CharacterFeatures
    references: Tensor
    prompts: Tensor
    pooled: Tensor


@torch.no_grad()
def random_held_out(toy: Toy, count: int, seed: int = 0) -> HeldOut:
    """Random held-out characters, encoded."""
    rng = random.Random(f"test {seed}")
    shots = [random_shot(rng, random_traits(rng, held_out=True)) for _ in range(count)]
    pictures = [draw_reference(shot.traits) for shot in shots]
    features = encode(toy, pictures)
    return HeldOut(shots, features, toy.judge(to_tensors(pictures))[0], *encode_captions(toy, shots))


@torch.no_grad()
def in_style(toy: Toy, test: HeldOut, style: str) -> HeldOut:
    """The same characters, actions and scenes in one style."""
    shots = [replace(shot, style=style) for shot in test.shots]
    return HeldOut(shots, test.features, test.references, *encode_captions(toy, shots))


def encode_captions(toy: Toy, shots: list[Shot]) -> tuple[Tensor, Tensor]:
    """T5's and CLIP's embeddings of the shots' captions."""
    captions = [shot.caption() for shot in shots]
    return toy.pipeline.encode_prompt(captions, None, device=DEVICE, max_sequence_length=T5_LENGTH)[:2]


def encode(toy: Toy, pictures: list[Image.Image]) -> CharacterFeatures:
    """The features of pictures, one row each."""
    encoded = [toy.encoder.encode_images(torch.stack([image_to_crops(p) for p in part])) for part in _parts(pictures)]
    return CharacterFeatures(*(torch.cat(rows) for rows in zip(*encoded)))


def to_tensors(pictures: list[Image.Image]) -> Tensor:
    """Pictures for the judge, [N, 3, 256, 256] from -1 to 1."""
    return to_floats(torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).to(DEVICE))


@torch.no_grad()
def generate(
    toy: Toy, flow: CharacterFlow, test: HeldOut, scale: float, steps: int = STEPS, guidance: float = GUIDANCE
) -> Tensor:
    """The generated pictures, [N, 3, 256, 256] from -1 to 1."""
    side, config = SIDE // 16, toy.pipeline.vae.config
    positions = img_ids(side, side, DEVICE)
    pictures = []
    for part in _parts(range(len(test.shots))):
        generator = torch.Generator(DEVICE).manual_seed(part[0])
        noise = torch.randn(len(part), len(positions), 4 * LATENT_CHANNELS, generator=generator, device=DEVICE)
        rows = slice(part[0], part[-1] + 1)
        conditioning = test.prompts[rows], test.pooled[rows], tuple(tensor[rows] for tensor in test.features)
        settings = {"img_ids": positions, "steps": steps, "guidance": guidance, "scale": scale}
        tokens = sample(flow, toy.pipeline.scheduler, noise, *conditioning, **settings)
        pictures.append(decode(toy, unpack(tokens, side, side) / config.scaling_factor + config.shift_factor))
    return torch.cat(pictures)


def decode(toy: Toy, latents: Tensor) -> Tensor:
    """The VAE's pictures, a few at once: their activations are large."""
    return torch.cat([toy.pipeline.vae.decode(part).sample.clamp(-1, 1) for part in latents.split(DECODED)])


@torch.no_grad()
def pipeline_with(toy: Toy, adapter: CharacterAdapter) -> InstantCharacterPipeline:
    """The toy FLUX as users run it, with an adapter of its own."""
    pipeline = InstantCharacterPipeline(**toy.pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_character_adapter(adapter)
    return pipeline


@torch.no_grad()
def generate_by_pipeline(
    pipeline: InstantCharacterPipeline, test: HeldOut, rows: Iterable[dict[str, Any]], steps: int
) -> Tensor:
    """A picture of each row's settings of the pipeline, with its prompt and noise: [N, 3, 256, 256] from -1 to 1."""
    pictures = [
        pipeline(
            prompt_embeds=test.prompts[i : i + 1],
            pooled_prompt_embeds=test.pooled[i : i + 1],
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(i),
            output_type="pt",
            **settings,
        ).images
        for i, settings in enumerate(rows)
    ]
    return torch.cat(pictures) * 2 - 1


@contextmanager
def guided(transformer: FluxTransformer2DModel, guidance: float) -> Iterator[None]:
    """Context manager of guidance by the character: each step is computed with and without it, and goes beyond.

    A prototype of what the pipeline does not have, for a transformer without caches. 1 is the pipeline as it is.

    Args:
        transformer: with an adapter.
        guidance: v_without + guidance · (v_with - v_without) is the velocity.
    """
    forward = transformer.forward

    def both(*args: Any, joint_attention_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> tuple[Tensor]:
        (velocity,) = forward(*args, joint_attention_kwargs=joint_attention_kwargs, **kwargs)
        if guidance == 1 or not (joint_attention_kwargs or {}).get("subjects"):
            return (velocity,)
        return (torch.lerp(forward(*args, **kwargs)[0], velocity, guidance),)

    transformer.forward = both
    try:
        yield
    finally:
        del transformer.forward


def accuracies(toy: Toy, test: HeldOut, pictures: Tensor) -> dict[str, float]:
    """Fractions of pictures with the right character of 16, the right action, scene and style."""
    return {name: right.mean().item() for name, right in right_answers(toy, test, pictures).items()}


@torch.no_grad()
def right_answers(toy: Toy, test: HeldOut, pictures: Tensor) -> dict[str, Tensor]:
    """Whether each picture has the right character of 16, the right action, scene and style: 0 or 1, [N] on the CPU."""
    answers = [toy.judge(part) for part in pictures.split(BATCH)]
    identity, *scores = (torch.cat(part) for part in zip(*answers))
    right = {"identity": retrieved(identity, test.references).float().cpu()}
    for name, names, score in zip(("action", "scene", "style"), (ACTIONS, SCENES, STYLES), scores):
        wanted = torch.tensor([[*names].index(getattr(shot, name)) for shot in test.shots])
        right[name] = (score.argmax(dim=1).cpu() == wanted).float()
    return right


def measure(assets: Path, adapter: Path, count: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Names and figures of the table's rows."""
    toy = Toy.load(assets)
    test = random_held_out(toy, count)
    yield "drawn by code", accuracies(toy, test, to_tensors([shot.draw() for shot in test.shots]))
    transformer = toy.pipeline.transformer
    flow = CharacterFlow(transformer, CharacterAdapter.from_file(adapter).to(DEVICE), checkpointing=False).eval()
    for scale in SCALES:
        yield f"scale {scale}", accuracies(toy, test, generate(toy, flow, test, scale))


def _parts(rows):
    return [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--adapter", type=Path, help="ASSETS/adapter.safetensors if not given")
    parser.add_argument("--pictures", type=int, default=500)
    options = parser.parse_args()
    adapter = options.adapter or options.assets / "adapter.safetensors"
    for name, figures in measure(options.assets, adapter, options.pictures):
        print(json.dumps({"": name, **{key: round(value, 3) for key, value in figures.items()}}), flush=True)
