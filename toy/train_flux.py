"""The toy FLUX: ``python -m toy.train_flux ALBUM OUT STEPS DISTILLING``, after the VAE and the text encoders.

First it learns to draw what captions say, at 256 and at 128 pixels. Then, as FLUX.1-dev was, it is taught to draw with
guidance in one pass: what it says under a guidance of g is to be what it said before without text, and g times the way
from there to what it said with text.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from instantcharacter.training.objective import add_noise, draw_sigmas, pack, positions, velocity_losses
from toy.learning import DEVICE, learn
from toy.models import T5_LENGTH, new_flux, new_scheduler
from toy.pictures import Album, batches, to_floats

WITHOUT_TEXT = 0.1
SMALL = (0.9, 0.15)
"""Of the steps are at half the side, where a step takes a third of the time: before and after the turn."""
TURN = 0.6
"""Of the steps are before it."""
RATE = 1e-3
"""Of AdamW, and 4e-3 of Muon in the blocks: the best of those tried at a smaller size (benchmarks/RESULTS.md)."""
GUIDANCE = (1.0, 5.0)


@dataclass
class Latents:
    """What FLUX learns from: latents at both sizes, packed, and texts; the last text is empty.

    Attributes:
        packed: [2·N, 256, 64] and [2·N, 64, 64]; the second half mirrored.
        places: of their tokens.
        prompts: [N + 1, 32, width].
        pooled: [N + 1, width].
    """

    packed: tuple[Tensor, Tensor]
    places: tuple[Tensor, Tensor]
    prompts: Tensor
    pooled: Tensor


def train(album: Album, out: Path, steps: int, distilling: int, size: int = 512) -> None:
    torch.manual_seed(0)
    pipeline = _pipeline(out)
    shots = album.pictures[:, 1:].flatten(0, 1)
    data = encode(pipeline, shots, [shot.caption() for shots in album.shots for shot in shots])
    flux = pipeline.transformer.to(DEVICE)

    def loss(step: int, batch: Tensor) -> Tensor:
        if step == 0 and DEVICE == "cuda":
            flux.compile_repeated_blocks(dynamic=False)
        latents, noise, sigmas, places, text = draw_batch(data, batch, step, SMALL[step > TURN * steps])
        one = torch.ones(len(latents), device=DEVICE)
        said = say(flux, data, add_noise(latents, noise, sigmas), sigmas, places, text, one)
        return velocity_losses(said, latents, noise).mean()

    hidden = [p for name, p in flux.named_parameters() if "transformer_blocks" in name and p.ndim == 2]
    drawn = batches(2 * len(shots), size, steps, 1)
    kept = learn("flux", flux, drawn, steps, loss, rate=RATE, average=0.999, hidden=hidden)
    flux = distil(kept, data, distilling, size) if distilling else kept
    pipeline.transformer = flux
    pipeline.to("cpu", torch.float16).save_pretrained(out / "flux")


def distil(before: FluxTransformer2DModel, data: Latents, steps: int, size: int) -> FluxTransformer2DModel:
    """Teach it to draw with guidance in one pass."""
    flux, before = copy.deepcopy(before).requires_grad_(True), before.requires_grad_(False)

    def loss(step: int, batch: Tensor) -> Tensor:
        if step == 0 and DEVICE == "cuda":
            flux.compile_repeated_blocks(dynamic=False)
            before.compile_repeated_blocks(dynamic=False)
        latents, noise, sigmas, places, text = draw_batch(data, batch, step, SMALL[1])
        noisy, one = add_noise(latents, noise, sigmas), torch.ones_like(sigmas)
        guidance, empty = torch.empty_like(sigmas).uniform_(*GUIDANCE), torch.full_like(text, len(data.prompts) - 1)
        with torch.no_grad():
            with_text, without = (say(before, data, noisy, sigmas, places, t, one) for t in (text, empty))
            wanted = without + guidance[:, None, None] * (with_text - without)
        return F.mse_loss(say(flux, data, noisy, sigmas, places, text, guidance).float(), wanted.float())

    count = len(data.packed[0])
    return learn("flux guided", flux, batches(count, size, steps, 2), steps, loss, rate=5e-4, average=0.998)


def draw_batch(data: Latents, batch: Tensor, step: int, share: float) -> tuple[Tensor, ...]:
    """Latents, noise, noise levels, places, and which texts; small ones with a probability of ``share``, or half as many."""
    small = torch.rand((), generator=torch.Generator().manual_seed(step)).item() < share
    batch = batch if small else batch[: len(batch) // 2]
    latents, places = data.packed[small][batch], data.places[small]
    generator = torch.Generator(DEVICE).manual_seed(step)
    sigmas = draw_sigmas(len(batch), latents.shape[1], generator)
    without = torch.rand(len(batch), generator=generator, device=DEVICE) < WITHOUT_TEXT
    text = torch.where(without, len(data.prompts) - 1, batch % (len(data.prompts) - 1))
    noise = torch.randn(latents.shape, generator=generator, device=DEVICE, dtype=latents.dtype)
    return latents, noise, sigmas, places, text


def say(
    flux: FluxTransformer2DModel,
    data: Latents,
    noisy: Tensor,
    sigmas: Tensor,
    places: Tensor,
    text: Tensor,
    guidance: Tensor,
) -> Tensor:
    """FLUX's velocity."""
    return flux(
        hidden_states=noisy,
        timestep=sigmas,
        guidance=guidance,
        encoder_hidden_states=data.prompts[text],
        pooled_projections=data.pooled[text],
        txt_ids=torch.zeros(data.prompts.shape[1], 3, device=DEVICE),
        img_ids=places,
        return_dict=False,
    )[0]


@torch.no_grad()
def encode(pipeline: FluxPipeline, pictures: Tensor, captions: list[str]) -> Latents:
    """Latents of uint8 pictures and of their mirror images, at both sizes; texts."""
    vae: AutoencoderKL = pipeline.vae.to(DEVICE)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    packed: tuple[list[Tensor], list[Tensor]] = ([], [])
    for mirrored in (False, True):
        for part in pictures.split(128):
            shown = to_floats(part.to(DEVICE))
            shown = shown.flip(-1) if mirrored else shown
            for kept, side in zip(packed, (shown, F.avg_pool2d(shown, 2))):
                with torch.autocast(DEVICE, torch.bfloat16):
                    latents = (vae.encode(side).latent_dist.mode() - shift) * scale
                kept.append(pack(latents.to(torch.bfloat16)))
    places = tuple(positions(torch.empty(1, 1, side, side, device=DEVICE)) for side in (32, 16))
    texts = [encode_prompts(pipeline, captions[i : i + 512]) for i in range(0, len(captions), 512)]
    prompts, pooled = (torch.cat(part) for part in zip(*texts, encode_prompts(pipeline, [""])))
    return Latents((torch.cat(packed[0]), torch.cat(packed[1])), places, prompts, pooled)


def encode_prompts(pipeline: FluxPipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    prompts, pooled, _ = pipeline.encode_prompt(captions, None, device=DEVICE, max_sequence_length=T5_LENGTH)
    return prompts, pooled


def _pipeline(out: Path) -> FluxPipeline:
    return FluxPipeline(
        scheduler=new_scheduler(),
        vae=AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float32).to(DEVICE),
        tokenizer=AutoTokenizer.from_pretrained(out / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(out / "text_encoder_2", dtype=torch.float32).to(DEVICE),
        tokenizer_2=AutoTokenizer.from_pretrained(out / "tokenizer_2"),
        transformer=new_flux(),
    )


if __name__ == "__main__":
    train(Album(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
