"""The toy FLUX, after the VAE and the text encoders: ``python -m toy.train.flux ALBUM OUT STEPS --side 128``.

It learns at 128 pixels, then at 256 with 128 in between, which it forgets otherwise; every run continues from the model
in ``OUT``. ``--distil`` then distills guidance into one pass, as FLUX.1-dev has it: under guidance g the student
predicts the teacher's velocity without text, plus g times its difference to the velocity with text.
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

from instantcharacter.flux.latents import img_ids, pack
from instantcharacter.training.objective import add_noise, sample_sigmas, velocity_losses
from toy.data.pictures import Album, batches, to_floats
from toy.device import DEVICE
from toy.models import T5_LENGTH, new_flux, new_scheduler
from toy.train.learning import learn
from toy.world import SIDE

WITHOUT_TEXT = 0.1
RATE = 1e-3
"""AdamW's; Muon's in the blocks is 4e-3: the best of those tried at a smaller size (benchmarks/RESULTS.md)."""
GUIDANCE = (1.0, 5.0)
SMALL = 128
"""Pixels of the smaller resolution."""
EVERY = 4
"""One step in this many is at the smaller resolution, when there are two."""


@dataclass
class Latents:
    """Encoded pictures and captions; the last caption is empty.

    Attributes:
        side: of the pictures, in pixels.
        packed: [2·N, S, C]; the second half mirrored.
        img_ids: [S, 3], positions of the image tokens.
        prompts: [N + 1, 32, width].
        pooled: [N + 1, width].
    """

    side: int
    packed: Tensor
    img_ids: Tensor
    prompts: Tensor
    pooled: Tensor


@dataclass
class Resolutions:
    """The same pictures at one or two resolutions, the largest last."""

    latents: list[Latents]

    @property
    def count(self) -> int:
        return len(self.latents[-1].packed)

    def at(self, step: int) -> Latents:
        """The latents of a step's resolution."""
        return self.latents[0 if step % EVERY == 0 else -1]


def train(album: Album, out: Path, steps: int, side: int, rate: float = RATE, size: int = 1024) -> None:
    """Train on ``size`` pictures of 128 pixels a step, or on half as many of 256."""
    pipeline, data = _load(album, out, side)
    flux = pipeline.transformer

    def prepare(step: int, batch: Tensor) -> NoisyBatch:
        if step == 0 and DEVICE == "cuda":
            flux.compile_repeated_blocks(dynamic=False)
        return sample_batch(data.at(step), batch, step)

    def loss(*tensors: Tensor) -> Tensor:
        return velocity_loss(flux, NoisyBatch(*tensors))

    hidden = [p for name, p in flux.named_parameters() if "transformer_blocks" in name and p.ndim == 2]
    indices = batches(data.count, size, steps, 1)
    flux = learn("flux", flux, indices, steps, loss, rate, average=0.999, hidden=hidden, prepare=prepare)
    _save(pipeline, flux, out)


def distil(album: Album, out: Path, steps: int, rate: float = 5e-4, size: int = 512) -> None:
    """Distill guidance into one pass."""
    pipeline, data = _load(album, out, SIDE)
    flux = pipeline.transformer
    teacher = copy.deepcopy(flux).requires_grad_(False)

    empty = data.latents[-1].prompts[-1:], data.latents[-1].pooled[-1:]
    steps_taken = itertools.count()

    def loss(batch: Tensor) -> Tensor:
        step = next(steps_taken)
        if step == 0 and DEVICE == "cuda":
            flux.compile_repeated_blocks(dynamic=False)
            teacher.compile_repeated_blocks(dynamic=False)
        noisy = sample_batch(data.at(step), batch, step)
        ones = torch.ones_like(noisy.sigmas)
        guidance = torch.empty_like(ones).uniform_(*GUIDANCE)
        prompts, pooled = (part.expand(len(ones), *part.shape[1:]) for part in empty)
        with torch.no_grad():
            with_text = predict_velocity(teacher, noisy, ones)
            without = predict_velocity(teacher, noisy._replace(prompts=prompts, pooled=pooled), ones)
            target = without + guidance[:, None, None] * (with_text - without)
        return F.mse_loss(predict_velocity(flux, noisy, guidance).float(), target.float())

    indices = batches(data.count, size, steps, 2)
    _save(pipeline, learn("flux guided", flux, indices, steps, loss, rate, average=0.998), out)


class NoisyBatch(NamedTuple):
    """A step's random batch: [B, S, C] latents and noise, [B] noise levels, text embeddings, [S, 3] positions."""

    latents: Tensor
    noise: Tensor
    sigmas: Tensor
    prompts: Tensor
    pooled: Tensor
    img_ids: Tensor


def sample_batch(data: Latents, batch: Tensor, step: int) -> NoisyBatch:
    """The pictures of these indices with random noise; at the larger resolution, half of them."""
    batch = batch[: len(batch) * SMALL // data.side]
    latents = data.packed[batch]
    generator = torch.Generator(DEVICE).manual_seed(step)
    sigmas = sample_sigmas(len(batch), latents.shape[1], generator)
    without = torch.rand(len(batch), generator=generator, device=DEVICE) < WITHOUT_TEXT
    text = torch.where(without, len(data.prompts) - 1, batch % (len(data.prompts) - 1))
    noise = torch.randn(latents.shape, generator=generator, device=DEVICE, dtype=latents.dtype)
    return NoisyBatch(latents, noise, sigmas, data.prompts[text], data.pooled[text], data.img_ids)


def predict_velocity(flux: FluxTransformer2DModel, batch: NoisyBatch, guidance: Tensor) -> Tensor:
    """FLUX's velocity for a batch, [B, S, C]."""
    return flux(
        hidden_states=add_noise(batch.latents, batch.noise, batch.sigmas),
        timestep=batch.sigmas,
        guidance=guidance,
        encoder_hidden_states=batch.prompts,
        pooled_projections=batch.pooled,
        txt_ids=torch.zeros(batch.prompts.shape[1], 3, device=DEVICE),
        img_ids=batch.img_ids,
        return_dict=False,
    )[0]


def velocity_loss(flux: FluxTransformer2DModel, batch: NoisyBatch) -> Tensor:
    """FLUX's mean loss at guidance 1, which stands for pictures as the data has them."""
    return velocity_losses(
        predict_velocity(flux, batch, torch.ones_like(batch.sigmas)), batch.latents, batch.noise
    ).mean()


@torch.no_grad()
def encode(pipeline: FluxPipeline, pictures: Tensor, captions: list[str], side: int = SIDE) -> Latents:
    """Latents of uint8 pictures at ``side`` pixels and of their mirror images; embeddings of the captions."""
    vae: AutoencoderKL = pipeline.vae.to(DEVICE)
    packed = []
    for mirrored in (False, True):
        for part in pictures.split(128):
            pixels = F.avg_pool2d(to_floats(part.to(DEVICE)), SIDE // side)
            with torch.autocast(DEVICE, torch.bfloat16):
                latents = vae.encode(pixels.flip(-1) if mirrored else pixels).latent_dist.mode()
            latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
            packed.append(pack(latents.to(torch.bfloat16)))
    texts = [encode_prompts(pipeline, captions[i : i + 512]) for i in range(0, len(captions), 512)]
    prompts, pooled = (torch.cat(part) for part in zip(*texts, encode_prompts(pipeline, [""])))
    return Latents(side, torch.cat(packed), img_ids(side // 16, side // 16, DEVICE), prompts, pooled)


def encode_prompts(pipeline: FluxPipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    prompts, pooled, _ = pipeline.encode_prompt(captions, None, device=DEVICE, max_sequence_length=T5_LENGTH)
    return prompts, pooled


def _load(album: Album, out: Path, side: int) -> tuple[FluxPipeline, Resolutions]:
    torch.manual_seed(0)
    saved = out / "flux/transformer"
    flux = FluxTransformer2DModel.from_pretrained(saved, torch_dtype=torch.float32) if saved.is_dir() else new_flux()
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
    return pipeline, Resolutions([encode(pipeline, pictures, shots, each) for each in (SMALL, SIDE) if each <= side])


def _save(pipeline: FluxPipeline, flux: FluxTransformer2DModel, out: Path) -> None:
    pipeline.transformer = flux
    pipeline.to("cpu", torch.float16).save_pretrained(out / "flux")
    for path in (out / "flux").rglob("*.json"):  # transformers 5 writes a class that transformers 4 does not have
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")


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
