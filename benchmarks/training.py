"""What a training step costs: real sizes, random weights, stage 1 at 512×512.

    python -m benchmarks.training --run adamw:4:live adamw8bit:4:live    # a minute on an H100
    accelerate launch --config_file instantcharacter/training/stages/fsdp.yaml --num_processes 2 \
        -m benchmarks.training --run adamw:4:cached                      # sharded over two of them
    python -m benchmarks.training --tiny                                 # tiny, on a CPU: shows that it runs

A run is optimizer, samples of one device in a step, and how they are encoded: ``live``, by the vision encoders and the
VAE in the step, or ``cached``, with features that come from host memory.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from diffusers import AutoencoderKL, FluxTransformer2DModel
from support.tiny import ADAPTER as TINY_ADAPTER
from support.tiny import POOLED_WIDTH, TEXT_WIDTH, tiny_components, tiny_encoder
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from benchmarks.common import GIB
from instantcharacter import AdapterConfig, CharacterAdapter, CharacterEncoder
from instantcharacter.character import encoders
from instantcharacter.flux.latents import pack
from instantcharacter.flux.load import VAE
from instantcharacter.training import Source, TrainingConfig
from instantcharacter.training.data.examples import Batch
from instantcharacter.training.data.frozen_models import FEATURES
from instantcharacter.training.data.tally import Tally
from instantcharacter.training.flow import zero_values
from instantcharacter.training.trainer import Trainer

STEPS, TINY_STEPS, WARM_UP = 20, 4, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class RandomExamples:
    """Random tensors in the shapes of :class:`~instantcharacter.training.data.examples.Examples`."""

    def __init__(self, config: TrainingConfig, tiny: bool, live: bool) -> None:
        self._config, self.tally = config, Tally()
        self._dtype = getattr(torch, config.precision)
        tokens, width, pooled = (32, TEXT_WIDTH, POOLED_WIDTH) if tiny else (512, 4096, 768)
        crop_tokens, feature_dim = 729, config.sizes.feature_dim
        self.without_text = {"prompt": self._random(tokens, width), "pooled": self._random(pooled)}
        self.without_character = {
            name: self._random(count * crop_tokens, feature_dim) for name, count in zip(FEATURES, (3, 1, 4))
        }
        self._latents = (config.resolution // 16) ** 2
        self._live = _encoders(tiny, self._dtype) if live else None

    def batches(self, position: int) -> Iterator[tuple[Batch, int]]:
        count = self._config.batch_size
        cached = [tensor.cpu().expand(count, -1, -1).contiguous() for tensor in self.without_character.values()]
        while True:
            position += count
            prompts = self.without_text["prompt"].expand(count, -1, -1)
            pooled = self.without_text["pooled"].expand(count, -1)
            if self._live:
                latents, features = self._encode(count)
            else:
                latents, features = self._random(count, self._latents, 64), tuple(part.to(DEVICE) for part in cached)
            yield Batch(latents, prompts, pooled, features), position

    @torch.no_grad()
    def _encode(self, count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        encoder, vae = self._live
        side = self._config.resolution
        latents = vae.encode(torch.rand(count, 3, side, side, device=DEVICE)).latent_dist.mode()
        features = encoder.encode_images(torch.randint(0, 256, (count, 5, 384, 384, 3), dtype=torch.uint8))
        return pack(latents).to(self._dtype), tuple(features)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(self._dtype)


def _encoders(tiny: bool, dtype: torch.dtype) -> tuple[CharacterEncoder, AutoencoderKL]:
    if tiny:
        return tiny_encoder().to(DEVICE, dtype), tiny_components()["vae"].to(DEVICE)
    siglip = SiglipVisionConfig(**encoders.SIGLIP.released, vision_use_head=False)
    with torch.device(DEVICE):
        models = SiglipVisionModel(siglip), Dinov2Model(Dinov2Config(**encoders.DINOV2.released))
        return CharacterEncoder(*models).to(dtype), AutoencoderKL(**VAE)


class Measured(Exception):
    """Ends a training after its last step, before the state is written."""


class Timer:
    """Notes the time and the loss of each step.

    Args:
        steps: the last step, which ends the training.

    Attributes:
        seconds: of each step.
        losses: this process's mean loss of each step.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._begin = time.perf_counter()

    def __call__(self, step: int, loss: Tensor) -> None:
        self.losses.append(loss.item())  # waits for the device
        now = time.perf_counter()
        self.seconds.append(now - self._begin)
        self._begin = now
        if step == self._steps:
            raise Measured


def measure(run: str, tiny: bool) -> None:
    """Print a line of the table."""
    optimizer, size, how = run.split(":")
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(
            output=Path(folder),
            data=(Source("random"),),
            sizes=TINY_ADAPTER if tiny else AdapterConfig(),
            resolution=128 if tiny else 512,
            steps=TINY_STEPS if tiny else STEPS,
            batch_size=int(size),
            learning_rate=1e-4,
            warmup=5,
            optimizer=optimizer,
            precision="float32" if tiny else "bfloat16",
            log_every=10**9,
            save_every=10**9,
            preview_every=10**9,
        )
        measure_training(run, config, tiny, live=how == "live")


def measure_training(run: str, config: TrainingConfig, tiny: bool, live: bool) -> None:
    transformer = tiny_components()["transformer"] if tiny else _flux()
    with torch.device(DEVICE):
        adapter = zero_values(CharacterAdapter(config.sizes))
    examples, timer = RandomExamples(config, tiny, live), Timer(config.steps)
    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bfloat16" else "no")
    training = Trainer(config, accelerator, transformer, adapter, examples, timer)
    before, flux = _some_values(adapter), _sums(transformer)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        training.run()
    except Measured:
        pass
    except torch.OutOfMemoryError as error:
        print(f"{run}: out of memory after {len(timer.seconds)} steps ({str(error).splitlines()[0][:90]})")
        return
    peak = torch.cuda.max_memory_allocated() / GIB if DEVICE == "cuda" else float("nan")
    reserved = torch.cuda.max_memory_reserved() / GIB if DEVICE == "cuda" else float("nan")
    seconds = statistics.median(timer.seconds[WARM_UP:])
    moved = sum(not torch.equal(old, new) for old, new in zip(before, _some_values(adapter)))
    PartialState().print(
        f"{run}: {len(timer.seconds)} steps, {seconds:.3f} s a step, {seconds / config.batch_size:.3f} s a sample; "
        f"peak {peak:.1f} GiB allocated, {reserved:.1f} reserved; loss {timer.losses[0]:.3f} to "
        f"{timer.losses[-1]:.3f}, all finite: {all(map(math.isfinite, timer.losses))}; "
        f"adapter tensors moved: {moved} of {len(before)}; FLUX unchanged: {flux == _sums(transformer)}",
        flush=True,
    )


def _flux() -> FluxTransformer2DModel:
    """FLUX.1-dev's sizes with small random weights, initialized in place, so that the device holds it only once."""
    with torch.device("meta"):
        flux = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
    flux.to_empty(device=DEVICE)
    for name, parameter in flux.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 and "norm_" in name else 0.0, 0.02)
    flux.pos_embed = type(flux.pos_embed)(theta=10000, axes_dim=flux.config.axes_dims_rope)
    return flux


def _some_values(adapter: CharacterAdapter) -> list[Tensor]:
    """About 64 values of each parameter."""
    parts = [_local(parameter).flatten() for parameter in adapter.parameters()]
    return [part[:: max(1, part.numel() // 64)].clone() for part in parts]


def _local(parameter: Tensor) -> Tensor:
    """This process's shard of a parameter."""
    return parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()


def _sums(flux: FluxTransformer2DModel) -> list[float]:
    """Sums over the bits of each of FLUX's own weights."""
    own = [_local(p).contiguous() for name, p in flux.named_parameters() if ".processor." not in name]
    integers = {2: torch.int16, 4: torch.int32}
    return [part.view(integers[part.element_size()]).sum(dtype=torch.int64).item() for part in own]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", default=["adamw:4:live", "adamw8bit:4:live"], metavar="OPTIMIZER:SIZE:HOW")
    parser.add_argument("--tiny", action="store_true", help="a tiny size, on the CPU")
    options = parser.parse_args()
    state = PartialState()  # from here on, "cuda" is this process's own
    state.print(torch.__version__, torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU", state.num_processes)
    for run in ["adamw:2:live", "adamw:1:cached"] if options.tiny else options.run:
        measure(run, options.tiny)
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
