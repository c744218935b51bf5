"""What a training step costs: real sizes, random weights, stage 1 at 512×512.

    python benchmarks/training.py --run adamw:4:live adamw8bit:4:live    # a minute on an H100
    accelerate launch --config_file instantcharacter/training/stages/fsdp.yaml --num_processes 2 \
        benchmarks/training.py --run adamw:4:cached                      # in pieces on two of them
    python benchmarks/training.py --tiny                                 # tiny, on a CPU: shows that it runs

A run is the optimiser, the samples of one device in a step, and whether the vision encoders and the VAE run in the step
(``live``) or what they make of samples comes from host memory (``cached``).
"""

from __future__ import annotations

import argparse
import gc
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from accelerate import Accelerator, PartialState
from diffusers import AutoencoderKL, FluxTransformer2DModel
from support.tiny import ADAPTER as TINY_ADAPTER
from support.tiny import POOLED_WIDTH, TEXT_WIDTH, tiny_components, tiny_encoder
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from instantcharacter import AdapterConfig, CharacterAdapter, CharacterEncoder
from instantcharacter.character import encoders
from instantcharacter.flux.load import VAE
from instantcharacter.training import Source, TrainingConfig
from instantcharacter.training.examples import FEATURES, Batch
from instantcharacter.training.flow import new_adapter
from instantcharacter.training.objective import pack
from instantcharacter.training.samples import Tally
from instantcharacter.training.trainer import Trainer

GIB = 2**30
STEPS, WARM_UP = 20, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class RandomExamples:
    """Stands for :class:`~instantcharacter.training.examples.Examples`: the same shapes, nothing to see in them."""

    def __init__(self, config: TrainingConfig, tiny: bool, live: bool) -> None:
        self._config, self.tally = config, Tally()
        self._dtype = getattr(torch, config.precision)
        tokens, width, pooled = (32, TEXT_WIDTH, POOLED_WIDTH) if tiny else (512, 4096, 768)
        views, feature_dim = 729, config.sizes.feature_dim
        self.without_text = {"prompt": self._random(tokens, width), "pooled": self._random(pooled)}
        self.without_character = {
            name: self._random(count * views, feature_dim) for name, count in zip(FEATURES, (3, 1, 4))
        }
        self._latents = (config.resolution // 16) ** 2
        self._live = _encoders(tiny, self._dtype) if live else None

    def batches(self, position: int) -> Iterator[tuple[Batch, int]]:
        count = self._config.batch_size
        kept = [tensor.cpu().expand(count, -1, -1).contiguous() for tensor in self.without_character.values()]
        while True:
            position += count
            prompts = self.without_text["prompt"].expand(count, -1, -1)
            pooled = self.without_text["pooled"].expand(count, -1)
            if self._live:
                latents, features = self._look(count)
            else:
                latents, features = self._random(count, self._latents, 64), tuple(part.to(DEVICE) for part in kept)
            yield Batch(latents, prompts, pooled, features), position

    @torch.no_grad()
    def _look(self, count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
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
        towers = SiglipVisionModel(siglip), Dinov2Model(Dinov2Config(**encoders.DINOV2.released))
        return CharacterEncoder(*towers).to(dtype), AutoencoderKL(**VAE)


def measure(run: str, tiny: bool) -> None:
    """Print a line of the table."""
    optimizer, size, live = run.split(":")
    folder = Path(tempfile.mkdtemp())
    config = TrainingConfig(
        output=folder,
        data=(Source("random"),),
        sizes=TINY_ADAPTER if tiny else AdapterConfig(),
        resolution=128 if tiny else 512,
        steps=STEPS,
        batch_size=int(size),
        learning_rate=1e-4,
        warmup=5,
        optimizer=optimizer,
        precision="float32" if tiny else "bfloat16",
        log_every=1,
        save_every=10**9,
    )
    transformer = tiny_components()["transformer"] if tiny else _flux()
    with torch.device(DEVICE):
        adapter = new_adapter(CharacterAdapter(config.sizes))
    training = Timed(config, transformer, adapter, RandomExamples(config, tiny, live == "live"))
    before, flux = _sample(adapter), _sums(transformer)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        training.run_steps()
    except torch.OutOfMemoryError as error:
        print(f"{run}: out of memory after {len(training.seconds)} steps ({str(error).splitlines()[0][:90]})")
        return
    finally:
        shutil.rmtree(folder)
    peak = torch.cuda.max_memory_allocated() / GIB if DEVICE == "cuda" else float("nan")
    reserved = torch.cuda.max_memory_reserved() / GIB if DEVICE == "cuda" else float("nan")
    seconds = statistics.median(training.seconds[WARM_UP:])
    moved = sum(not torch.equal(a, b) for a, b in zip(before, _sample(adapter)))
    PartialState().print(
        f"{run}: {len(training.seconds)} steps, {seconds:.3f} s a step, {seconds / int(size):.3f} s a sample; "
        f"peak {peak:.1f} GiB allocated, {reserved:.1f} reserved; loss {training.losses[0]:.3f} to "
        f"{training.losses[-1]:.3f}, all finite: {all(map(math.isfinite, training.losses))}; "
        f"adapter tensors moved: {moved} of {len(before)}; FLUX unchanged: {flux == _sums(transformer)}",
        flush=True,
    )


class Timed(Trainer):
    """A training whose steps are timed; it writes nothing."""

    def __init__(self, config, transformer, adapter, examples) -> None:
        accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bfloat16" else "no")
        super().__init__(config, accelerator, transformer, adapter, examples)
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def run_steps(self) -> None:
        batches = self._examples.batches(0)
        for _ in range(STEPS):
            begin = time.perf_counter()
            self._take_step(batches)
            self.losses.append(self._log())  # waits for the device
            self.seconds.append(time.perf_counter() - begin)


def _flux() -> FluxTransformer2DModel:
    """FLUX.1-dev's sizes; small random weights, block by block, so that no more than it is ever on the device."""
    with torch.device("meta"):
        flux = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
    flux.to_empty(device=DEVICE)
    for name, parameter in flux.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 and "norm_" in name else 0.0, 0.02)
    flux.pos_embed = type(flux.pos_embed)(theta=10000, axes_dim=flux.config.axes_dims_rope)
    return flux


def _sample(adapter: CharacterAdapter) -> list[Tensor]:
    parts = [_own(parameter).flatten() for parameter in adapter.parameters()]
    return [part[:: max(1, part.numel() // 64)].clone() for part in parts]


def _own(parameter: Tensor) -> Tensor:
    """This process's piece of it."""
    return parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()


def _sums(flux: FluxTransformer2DModel) -> list[float]:
    """Of the bits of each of FLUX's own weights."""
    own = [_own(p).contiguous() for name, p in flux.named_parameters() if ".processor." not in name]
    view = {2: torch.int16, 4: torch.int32}
    return [part.view(view[part.element_size()]).sum(dtype=torch.int64).item() for part in own]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", default=["adamw:4:live", "adamw8bit:4:live"], metavar="OPTIMIZER:SIZE:HOW")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    state = PartialState()  # from here on, "cuda" is this process's own
    state.print(torch.__version__, torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU", state.num_processes)
    for run in ["adamw:2:live", "adamw:1:cached"] if options.tiny else options.run:
        measure(run, options.tiny)
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
