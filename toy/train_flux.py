"""The toy FLUX, after the VAE and the text encoders: ``python -m toy.train_flux ALBUM OUT STEPS --side 128``.

First it learns to draw what captions say, at 128 pixels, then at 256 with 128 in between, which it forgets otherwise;
every run goes on from what is in ``OUT``. Then, with ``--distil``, it is taught to draw with guidance in one pass, as
FLUX.1-dev was: what it says under a guidance of g is to be what it said before without text, and g times the way from
there to what it said with text.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from instantcharacter.training.objective import add_noise, draw_sigmas, pack, positions, velocity_losses
from toy.learning import DEVICE, learn
from toy.models import T5_LENGTH, new_flux, new_scheduler
from toy.pictures import Album, batches, to_floats
from toy.world import SIDE

WITHOUT_TEXT = 0.1
RATE = 1e-3
"""Of AdamW, and 4e-3 of Muon in the blocks: the best of those tried at a smaller size (benchmarks/RESULTS.md)."""
GUIDANCE = (1.0, 5.0)
SMALL = 128
"""Pixels; of every so many steps at the whole size, one is at this:"""
EVERY = 4


@dataclass
class Latents:
    """What FLUX learns from: latents, packed, and texts; the last text is empty.

    Attributes:
        side: of the pictures, in pixels.
        packed: [2·N, S, C]; the second half mirrored.
        places: of their tokens.
        prompts: [N + 1, 32, width].
        pooled: [N + 1, width].
    """

    side: int
    packed: Tensor
    places: Tensor
    prompts: Tensor
    pooled: Tensor


@dataclass
class Sizes:
    """The same pictures at one size or two, the largest last."""

    sizes: list[Latents]

    @property
    def count(self) -> int:
        return len(self.sizes[-1].packed)

    def at(self, step: int) -> Latents:
        """Those to learn from in a step."""
        return self.sizes[0 if step % EVERY == 0 else -1]


def train(album: Album, out: Path, steps: int, side: int, rate: float = RATE, size: int = 1024) -> None:
    """Learn from ``size`` pictures of 128 pixels a step, or from half as many of 256."""
    pipeline, data = _begin(album, out, side)
    flux = pipeline.transformer

    def given(step: int, batch: Tensor) -> Drawn:
        if step == 0 and DEVICE == "cuda":
            flux.compile_repeated_blocks(dynamic=False)
        return draw_batch(data.at(step), batch, step)

    def loss(*drawn: Tensor) -> Tensor:
        return velocity_loss(flux, Drawn(*drawn))

    hidden = [p for name, p in flux.named_parameters() if "transformer_blocks" in name and p.ndim == 2]
    drawn = batches(data.count, size, steps, 1)
    flux = learn("flux", flux, drawn, steps, loss, rate, average=0.999, hidden=hidden, given=given)
    _end(pipeline, flux, out)


def distil(album: Album, out: Path, steps: int, rate: float = 5e-4, size: int = 512) -> None:
    """Teach it to draw with guidance in one pass."""
    pipeline, data = _begin(album, out, SIDE)
    flux = pipeline.transformer
    before = copy.deepcopy(flux).requires_grad_(False)

    empty = data.sizes[-1].prompts[-1:], data.sizes[-1].pooled[-1:]
    steps_taken = itertools.count()

    def loss(batch: Tensor) -> Tensor:
        step = next(steps_taken)
        if step == 0 and DEVICE == "cuda":
            flux.compile_repeated_blocks(dynamic=False)
            before.compile_repeated_blocks(dynamic=False)
        drawn = draw_batch(data.at(step), batch, step)
        one = torch.ones_like(drawn.sigmas)
        guidance = torch.empty_like(one).uniform_(*GUIDANCE)
        prompts, pooled = (part.expand(len(one), *part.shape[1:]) for part in empty)
        with torch.no_grad():
            with_text = say(before, drawn, one)
            without = say(before, drawn._replace(prompts=prompts, pooled=pooled), one)
            wanted = without + guidance[:, None, None] * (with_text - without)
        return F.mse_loss(say(flux, drawn, guidance).float(), wanted.float())

    drawn = batches(data.count, size, steps, 2)
    _end(pipeline, learn("flux guided", flux, drawn, steps, loss, rate, average=0.998), out)


class Drawn(NamedTuple):
    """What a step learns from, drawn at random: [B, S, C] latents and noise, [B] noise levels, texts, [S, 3] places."""

    latents: Tensor
    noise: Tensor
    sigmas: Tensor
    prompts: Tensor
    pooled: Tensor
    places: Tensor


def draw_batch(data: Latents, batch: Tensor, step: int) -> Drawn:
    """What a step learns from; of large pictures, half the batch."""
    batch = batch[: len(batch) * SMALL // data.side]
    latents = data.packed[batch]
    generator = torch.Generator(DEVICE).manual_seed(step)
    sigmas = draw_sigmas(len(batch), latents.shape[1], generator)
    without = torch.rand(len(batch), generator=generator, device=DEVICE) < WITHOUT_TEXT
    text = torch.where(without, len(data.prompts) - 1, batch % (len(data.prompts) - 1))
    noise = torch.randn(latents.shape, generator=generator, device=DEVICE, dtype=latents.dtype)
    return Drawn(latents, noise, sigmas, data.prompts[text], data.pooled[text], data.places)


def say(flux: FluxTransformer2DModel, drawn: Drawn, guidance: Tensor) -> Tensor:
    """FLUX's velocity."""
    return flux(
        hidden_states=add_noise(drawn.latents, drawn.noise, drawn.sigmas),
        timestep=drawn.sigmas,
        guidance=guidance,
        encoder_hidden_states=drawn.prompts,
        pooled_projections=drawn.pooled,
        txt_ids=torch.zeros(drawn.prompts.shape[1], 3, device=DEVICE),
        img_ids=drawn.places,
        return_dict=False,
    )[0]


def velocity_loss(flux: FluxTransformer2DModel, drawn: Drawn) -> Tensor:
    """FLUX's, told a guidance of 1: a picture as the data has it."""
    return velocity_losses(say(flux, drawn, torch.ones_like(drawn.sigmas)), drawn.latents, drawn.noise).mean()


@torch.no_grad()
def encode(pipeline: FluxPipeline, pictures: Tensor, captions: list[str], side: int = SIDE) -> Latents:
    """Latents of uint8 pictures, made ``side`` pixels wide, and of their mirror images; texts."""
    vae: AutoencoderKL = pipeline.vae.to(DEVICE)
    packed = []
    for mirrored in (False, True):
        for part in pictures.split(128):
            shown = F.avg_pool2d(to_floats(part.to(DEVICE)), SIDE // side)
            with torch.autocast(DEVICE, torch.bfloat16):
                latents = vae.encode(shown.flip(-1) if mirrored else shown).latent_dist.mode()
            latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
            packed.append(pack(latents.to(torch.bfloat16)))
    texts = [encode_prompts(pipeline, captions[i : i + 512]) for i in range(0, len(captions), 512)]
    prompts, pooled = (torch.cat(part) for part in zip(*texts, encode_prompts(pipeline, [""])))
    return Latents(side, torch.cat(packed), positions(latents), prompts, pooled)


def encode_prompts(pipeline: FluxPipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    prompts, pooled, _ = pipeline.encode_prompt(captions, None, device=DEVICE, max_sequence_length=T5_LENGTH)
    return prompts, pooled


def _begin(album: Album, out: Path, side: int) -> tuple[FluxPipeline, Sizes]:
    torch.manual_seed(0)
    known = out / "flux/transformer"
    flux = FluxTransformer2DModel.from_pretrained(known, torch_dtype=torch.float32) if known.is_dir() else new_flux()
    pipeline = FluxPipeline(
        scheduler=new_scheduler(),
        vae=AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(out / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(out / "text_encoder_2", dtype=torch.float32),
        tokenizer_2=AutoTokenizer.from_pretrained(out / "tokenizer_2"),
        transformer=flux.train().requires_grad_(True),
    ).to(DEVICE)
    shots = [shot.caption() for row in album.shots for shot in row]
    pictures = album.pictures[:, 1:].flatten(0, 1)
    return pipeline, Sizes([encode(pipeline, pictures, shots, each) for each in (SMALL, SIDE) if each <= side])


def _end(pipeline: FluxPipeline, flux: FluxTransformer2DModel, out: Path) -> None:
    pipeline.transformer = flux
    pipeline.to("cpu", torch.float16).save_pretrained(out / "flux")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("album", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--side", type=int, choices=(SMALL, SIDE), default=SIDE)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--distil", action="store_true")
    options = parser.parse_args()
    if options.distil:
        distil(Album(options.album), options.out, options.steps)
    else:
        train(Album(options.album), options.out, options.steps, options.side, options.rate)
