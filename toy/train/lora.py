"""A style LoRA for the toy FLUX: ``python -m toy.train.lora OUT STEPS``, pixel art."""

from __future__ import annotations

import random
import sys
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from toy.data.pictures import batches
from toy.device import DEVICE
from toy.train.flux import NoisyBatch, encode, sample_batch, velocity_loss
from toy.train.learning import learn
from toy.world import LORA_STYLE, Shot, random_shot, random_traits

PICTURES = 2000
RANK = 8
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out", "ff.net.0.proj", "ff.net.2"]


def train(out: Path, steps: int, size: int = 512) -> None:
    torch.manual_seed(0)
    rng = random.Random("lora")
    shots = [random_shot(rng, random_traits(rng, False), LORA_STYLE) for _ in range(PICTURES)]
    with Pool() as pool:
        pictures = torch.from_numpy(np.stack(pool.map(_pixels, shots, chunksize=16)))
    pipeline = FluxPipeline.from_pretrained(str(out / "flux"), torch_dtype=torch.float32).to(DEVICE)
    data = encode(pipeline, pictures, [shot.caption() for shot in shots])
    flux = pipeline.transformer.requires_grad_(False)
    flux.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))

    trained = torch.nn.ParameterList(parameter for parameter in flux.parameters() if parameter.requires_grad)
    indices = batches(2 * PICTURES, size, steps, 1)

    def prepare(step: int, batch: Tensor) -> NoisyBatch:
        return sample_batch(data, batch, step)

    def loss(*tensors: Tensor) -> Tensor:
        return velocity_loss(flux, NoisyBatch(*tensors))

    learn("lora", trained, indices, steps, loss, rate=2e-3, decay=0.0, prepare=prepare)
    layers = {key: tensor.half() for key, tensor in get_peft_model_state_dict(flux).items()}
    FluxPipeline.save_lora_weights(out, transformer_lora_layers=layers, weight_name="pixel_art.safetensors")


def _pixels(shot: Shot) -> np.ndarray:
    return np.asarray(shot.draw()).transpose(2, 0, 1)


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
