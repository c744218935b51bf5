"""What the benchmarks share: the device and its clock, models of random weights, inputs of a step."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FluxTransformer2DModel
from support import tiny
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from instantcharacter import CharacterAdapter, CharacterEncoder
from instantcharacter.character import encoders
from instantcharacter.model.conditioning import Subject

DTYPE = torch.bfloat16
GIB = 2**30


class Device:
    """A CUDA device, or, for ``--tiny``, the CPU."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.name = "cpu" if tiny else "cuda"

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds of a call on the device's own clock, launching included."""
        if self.tiny:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def peak(self) -> float:
        """The peak of allocated GiB since the last call."""
        if self.tiny:
            return float("nan")
        peak = torch.cuda.max_memory_allocated() / GIB
        torch.cuda.reset_peak_memory_stats()
        return peak


def require_cuda(name: str, tiny: bool) -> None:
    """Exit without a CUDA device, unless the benchmark runs at its tiny size."""
    if not tiny and not torch.cuda.is_available():
        sys.exit(f"benchmarks.{name} measures on a CUDA device, and there is none here; --tiny runs it on the CPU")


def print_versions(device: Device) -> None:
    name = platform.processor() if device.tiny else torch.cuda.get_device_name()
    print(
        f"{time.strftime('%Y-%m-%d')}, {name}, Python {platform.python_version()}, torch {torch.__version__}, ", end=""
    )
    print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}")


def random_flux(device: Device) -> FluxTransformer2DModel:
    if device.tiny:
        return tiny.tiny_components()["transformer"].to(DTYPE)
    return build(FluxTransformer2DModel, device, guidance_embeds=True)


def random_adapter(device: Device) -> CharacterAdapter:
    return tiny.tiny_adapter().to(DTYPE) if device.tiny else build(CharacterAdapter, device)


def random_encoder(device: Device) -> CharacterEncoder:
    if device.tiny:
        return tiny.tiny_encoder().to(DTYPE)
    siglip = build(SiglipVisionModel, device, config=SiglipVisionConfig(**encoders.SIGLIP.released))
    return CharacterEncoder(siglip, build(Dinov2Model, device, config=Dinov2Config(**encoders.DINOV2.released)))


def build(model: Callable, device: Device, **settings: object) -> torch.nn.Module:
    """A module constructed in bfloat16 on the device, so that it never is in host memory."""
    torch.set_default_dtype(DTYPE)
    with torch.device(device.name):
        module = model(**settings)
    torch.set_default_dtype(torch.float32)
    return module.eval().requires_grad_(False)


def tokens_at(device: Device, adapter: CharacterAdapter, fused: torch.Tensor, folded: bool) -> torch.Tensor:
    return adapter.projector.resample(fused, torch.tensor([700.0], device=device.name), folded)


def with_subject(tokens: torch.Tensor, call: dict[str, Any]) -> dict[str, object]:
    subject = Subject(tokens, torch.tensor(0.9))
    return {"subjects": [subject], "image_tokens": call["hidden_states"].shape[1]}


def step_inputs(device: Device, transformer: FluxTransformer2DModel, batch: int) -> dict[str, Any]:
    """1024×1024 pixels are 64×64 image tokens; 512 text tokens."""
    side, text = (8, 16) if device.tiny else (64, 512)
    config = transformer.config
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, device=device.name, dtype=DTYPE)

    return {
        "hidden_states": random(side * side, config.in_channels),
        "encoder_hidden_states": random(text, config.joint_attention_dim),
        "pooled_projections": random(config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.7, device=device.name, dtype=DTYPE),
        "guidance": torch.full((batch,), 3.5, device=device.name),
        "txt_ids": torch.zeros(text, 3, device=device.name),
        "img_ids": torch.nn.functional.pad(grid, (1, 0)).to(device.name),
        "return_dict": False,
    }
