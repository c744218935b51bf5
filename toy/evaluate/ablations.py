"""Trains and measures adapters that lack a part: ``python -m toy.evaluate.ablations ASSETS DATA OUT VARIANT``.

Every variant gets the same number of steps and samples, from the same seed; ``toy.data.dataset`` writes ``DATA``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from instantcharacter import CharacterAdapter, CharacterFeatures
from instantcharacter.training import Source, TrainingConfig
from instantcharacter.training.data.cache import MemoryCache
from instantcharacter.training.data.examples import Batch, Examples, new_memory_cache
from instantcharacter.training.flow import CharacterFlow, zero_values
from instantcharacter.training.trainer import Trainer
from toy.device import DEVICE
from toy.evaluate.measure import Toy, accuracies, generate, random_held_out
from toy.models import ADAPTER, SIGLIP

SCALE = 0.9
RATE = 6e-4
Features = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Variant:
    """An adapter, and the parts that it has.

    Attributes:
        siglip: SigLIP's features.
        dinov2: DINOv2's features.
        shallow: features of the early layers.
        tiles: features of the tiles.
        timestep: tokens that depend on the timestep.
        stages: each stage's share of the steps.
    """

    siglip: bool = True
    dinov2: bool = True
    shallow: bool = True
    tiles: bool = True
    timestep: bool = True
    stages: tuple[float, ...] = (0.3, 0.4, 0.3)

    def mask(self, features: Features) -> Features:
        """The features with zeros for the parts that it lacks."""
        shallow, deep, tiles = features
        width = SIGLIP.hidden_size
        channels = torch.ones(deep.shape[-1], dtype=deep.dtype, device=deep.device)
        channels[:width] *= self.siglip
        channels[width:] *= self.dinov2
        return shallow * channels * self.shallow, deep * channels, tiles * channels * self.tiles

    def mask_batch(self, batch: Batch) -> Batch:
        return replace(batch, features=self.mask(batch.features))

    def fix_timestep(self, adapter: CharacterAdapter) -> CharacterAdapter:
        """The adapter, with a constant in place of the timestep if the variant lacks it."""
        if not self.timestep:
            adapter.projector.resampler.register_forward_pre_hook(_constant_timestep)
        return adapter


VARIANTS = {
    "all": Variant(),
    "SigLIP alone": Variant(dinov2=False),
    "DINOv2 alone": Variant(siglip=False),
    "deep alone": Variant(shallow=False, tiles=False),
    "deep and shallow": Variant(tiles=False),
    "deep and tiles": Variant(shallow=False),
    "without the timestep": Variant(timestep=False),
    "stage 1": Variant(stages=(1.0,)),
    "stages 1 and 2": Variant(stages=(0.5, 0.5)),
}


def train(configs: list[TrainingConfig], memory: MemoryCache, variant: Variant) -> CharacterAdapter:
    """Train an adapter of the variant through its stages."""
    torch.manual_seed(0)
    adapter = variant.fix_timestep(zero_values(CharacterAdapter(ADAPTER)))
    for config in configs:
        accelerator = Accelerator(
            mixed_precision="bf16" if DEVICE == "cuda" else "no", log_with="tensorboard", project_dir=config.output
        )
        flux = FluxTransformer2DModel.from_pretrained(
            config.model, subfolder="transformer", torch_dtype=getattr(torch, config.precision)
        )
        examples = Examples(config, torch.device(DEVICE), memory=memory, transform=variant.mask_batch)
        path = Trainer(config, accelerator, flux, adapter, examples).run()
        adapter = variant.fix_timestep(CharacterAdapter.from_file(path))
    return adapter


def stages(assets: Path, data: Path, out: Path, variant: Variant, steps: int, size: int) -> list[TrainingConfig]:
    """The configs of a variant's stages."""
    unpaired, paired = Source(str(data / "unpaired")), Source(str(data / "paired"), pairs=True)
    sources = ((unpaired,), (paired,), (unpaired, replace(paired, share=3.0)))
    return [
        TrainingConfig(
            output=out / f"stage{stage + 1}",
            data=sources[stage],
            model=str(assets / "flux"),
            siglip=str(assets / "siglip"),
            dinov2=str(assets / "dinov2"),
            sizes=ADAPTER,
            resolution=256 if stage == 2 else 128,
            steps=round(steps * share),
            batch_size=size,
            learning_rate=(RATE, RATE, RATE / 2)[stage],
            warmup=100,
            ema=0.995,
            drop_character=0.0,
            checkpointing=False,
            cuda_graph=True,
            precision="bfloat16" if DEVICE == "cuda" else "float32",
            cache=data / "cache",
            held_gib=24.0,
            held_in="device",
            workers=5,
            save_every=10**9,
        )
        for stage, share in enumerate(variant.stages)
    ]


def measure(assets: Path, adapter: CharacterAdapter, variant: Variant, count: int) -> dict[str, float]:
    toy = Toy.load(assets)
    test = random_held_out(toy, count)
    test = replace(test, features=CharacterFeatures(*variant.mask(tuple(test.features))))
    flow = CharacterFlow(toy.pipeline.transformer, adapter.to(DEVICE), checkpointing=False).eval()
    return accuracies(toy, test, generate(toy, flow, test, SCALE))


def _constant_timestep(resampler: nn.Module, arguments: tuple) -> tuple:
    fused, timestep, *rest = arguments
    return (fused, torch.full_like(timestep, 500), *rest)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=500)
    options = parser.parse_args()
    memory: MemoryCache | None = None
    for name in options.variants:
        variant = VARIANTS[name]
        folder = options.out / name.replace(" ", "_")
        configs = stages(options.assets, options.data, folder, variant, options.steps, options.size)
        memory = new_memory_cache(configs[0], torch.device(DEVICE)) if memory is None else memory
        adapter = train(configs, memory, variant)
        figures = measure(options.assets, adapter, variant, options.pictures)
        print(json.dumps({"": name, **{key: round(value, 3) for key, value in figures.items()}}), flush=True)
