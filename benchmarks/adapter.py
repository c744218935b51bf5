"""What a character costs: real sizes, random weights, one CUDA device.

    python benchmarks/adapter.py            # 1024×1024, bfloat16, about 90 s on an H100
    python benchmarks/adapter.py --tiny     # the same code at a tiny size on a CPU: shows that it runs

Times and memory do not depend on the weights' values. Plain FLUX and FLUX with a character are timed in turn in one
run, and compared by their medians. What is learned from it is kept in ``benchmarks/RESULTS.md``.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import diffusers
import torch
import transformers
from diffusers import FluxTransformer2DModel
from PIL import Image
from support import tiny
from torch.profiler import ProfilerActivity, profile
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from instantcharacter import Character, CharacterAdapter, CharacterEncoder
from instantcharacter.character import encoders
from instantcharacter.character.tokens import TokenCache
from instantcharacter.flux.attn_processor import attach, detach
from instantcharacter.model.conditioning import Subject
from instantcharacter.model.folding import fold

DTYPE = torch.bfloat16
GIB = 2**30


class Device:
    """A CUDA device, or, for ``--tiny``, the CPU."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.name = "cpu" if tiny else "cuda"

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds on the device's own clock, the launching of the work included."""
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
        """GiB at the most since the last call."""
        if self.tiny:
            return float("nan")
        peak = torch.cuda.max_memory_allocated() / GIB
        torch.cuda.reset_peak_memory_stats()
        return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny size, on the CPU")
    parser.add_argument("--repeats", type=int, default=25, help="timed steps of each kind (25)")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("benchmarks/adapter.py measures on a CUDA device, and there is none here; --tiny runs it on the CPU")
    device = Device(options.tiny)
    torch.manual_seed(0)
    print_versions(device)
    with torch.no_grad():
        measure_encoders(device, options.repeats)
        transformer, adapter = random_flux(device), random_adapter(device)
        fused = measure_projector(device, adapter, options.repeats)
        measure_steps(device, transformer, adapter, fused, batch=1, repeats=options.repeats)
        measure_steps(device, transformer, adapter, fused, batch=4, repeats=7)
        if not options.tiny:
            measure_memory(device, transformer, adapter, fused)
            check_that_nothing_waits(transformer, adapter, fused)


def print_versions(device: Device) -> None:
    name = platform.processor() if device.tiny else torch.cuda.get_device_name()
    print(
        f"{time.strftime('%Y-%m-%d')}, {name}, Python {platform.python_version()}, torch {torch.__version__}, ", end=""
    )
    print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}")


def random_flux(device: Device) -> FluxTransformer2DModel:
    if device.tiny:
        return tiny.tiny_components()["transformer"].to(DTYPE)
    return built(FluxTransformer2DModel, device, guidance_embeds=True)


def random_adapter(device: Device) -> CharacterAdapter:
    return tiny.tiny_adapter().to(DTYPE) if device.tiny else built(CharacterAdapter, device)


def random_encoder(device: Device) -> CharacterEncoder:
    if device.tiny:
        return tiny.tiny_encoder().to(DTYPE)
    siglip = built(SiglipVisionModel, device, config=SiglipVisionConfig(**encoders.SIGLIP.released))
    return CharacterEncoder(siglip, built(Dinov2Model, device, config=Dinov2Config(**encoders.DINOV2.released)))


def built(model: Callable, device: Device, **settings: object) -> torch.nn.Module:
    """A module made in bfloat16 on the device, so that the host never holds it."""
    torch.set_default_dtype(DTYPE)
    with torch.device(device.name):
        module = model(**settings)
    torch.set_default_dtype(torch.float32)
    return module.eval().requires_grad_(False)


def measure_encoders(device: Device, repeats: int) -> None:
    encoder = random_encoder(device)
    picture = Image.effect_noise((640, 832), 80).convert("RGB")
    report(device, "encode (SigLIP and DINOv2, five views)", lambda: encoder(picture), min(repeats, 7))


def measure_projector(device: Device, adapter: CharacterAdapter, repeats: int) -> torch.Tensor:
    """Times of fuse, resample and fold; returns fused features."""
    width, tokens = adapter.config.feature_dim, 729
    features = [torch.randn(1, n * tokens, width, device=device.name, dtype=DTYPE) for n in (3, 1, 4)]
    timestep = torch.tensor([700.0], device=device.name)
    report(device, "fuse", lambda: adapter.projector.fuse(*features), repeats)
    fused = adapter.projector.fuse(*features)
    report(device, "resample, one timestep, one call", lambda: adapter.projector.resample(fused, timestep), repeats)
    if not device.tiny:
        print_kernels("  of which the GPU works", lambda: adapter.projector.resample(fused, timestep))
    timesteps = [1000.0 - 30 * i for i in range(28)]

    def schedule() -> None:
        TokenCache(adapter.projector).tokens(Character(fused, ""), timesteps, fused.device, DTYPE)

    report(device, "resample, 28 timesteps, as a pipeline does", schedule, 7)
    report(device, "fold the adapter", lambda: list(fold(adapter, fused.device, DTYPE)), 3)
    measure_rounding(device, adapter, fused, timestep)
    return fused


def print_kernels(what: str, call: Callable[[], object]) -> None:
    """How many kernels a call launches, and the sum of their times on the GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    milliseconds = sum(kernel.self_device_time_total for kernel in kernels) / 1000
    print(f"{what:40s} {milliseconds:8.2f} ms   {len(kernels)} kernels")


def measure_rounding(device: Device, adapter: CharacterAdapter, fused: torch.Tensor, timestep: torch.Tensor) -> None:
    """How far one block's attention is from float32, as the checkpoint has it and folded, on weights of bfloat16."""
    exact = copy.deepcopy(adapter.projector.resampler).float()
    block = copy.deepcopy(adapter.attention[0]).float()
    config = adapter.config
    head_dim = config.attention_dim // config.attention_heads
    query = torch.randn(1, 1024, config.attention_heads, head_dim, device=device.name, dtype=DTYPE)
    scale = torch.ones(head_dim, device=device.name)
    key_scale = block.key_scale(scale)
    strength = torch.tensor(1.0)
    truth = block(query.float(), exact(fused.float(), timestep), key_scale, strength)

    def error(seen: torch.Tensor) -> float:
        return ((seen.float() - truth).norm() / truth.norm()).item()

    tokens = {folded: adapter.projector.resample(fused, timestep, folded) for folded in (False, True)}
    low_scale = adapter.attention[0].key_scale(scale.to(DTYPE))
    unfolded = error(adapter.attention[0](query, tokens[False], low_scale, strength))
    in_bfloat16, high = next(fold(adapter, query.device, DTYPE)), next(fold(adapter, query.device, torch.float32))
    folded = error(in_bfloat16(query, tokens[True], key_scale.to(DTYPE), strength))
    in_float32 = error(high(query.float(), exact(fused.float(), timestep, folded=True), key_scale, strength))
    print(
        f"one block against float32: unfolded {unfolded:.1e}, folded {folded:.1e}, folded in float32 {in_float32:.1e}"
    )


def measure_steps(
    device: Device,
    transformer: FluxTransformer2DModel,
    adapter: CharacterAdapter,
    fused: torch.Tensor,
    batch: int,
    repeats: int,
) -> None:
    """One forward of FLUX: plain; with a character on unfolded attention; as the pipeline does it, folded."""
    call = step_inputs(device, transformer, batch)
    processors = {}
    for folded in (False, True):
        attach(transformer, adapter, folded)
        processors[folded] = transformer.attn_processors
    tokens = {folded: tokens_at(device, adapter, fused, folded) for folded in (False, True)}

    def step(folded: bool | None) -> float:
        transformer.set_attn_processor(dict(processors[folded is not False]))
        joint = None if folded is None else with_subject(tokens[folded], call)
        return device.timed(lambda: transformer(**call, joint_attention_kwargs=joint))

    kinds = {"plain FLUX": None, "with a character, unfolded": False, "with a character": True, "plain, again": None}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for repeat in range(repeats + 2):
        for kind, folded in kinds.items():
            seconds = step(folded)
            if repeat >= 2:  # the first two warm up
                times[kind].append(seconds)
    print(
        f"\none step, {call['hidden_states'].shape[1]} image tokens, batch {batch}, {repeats} of each in turn, medians"
    )
    base = statistics.median(times["plain FLUX"])
    for kind, seconds in times.items():
        median = statistics.median(seconds)
        print(f"  {kind:28s} {median * 1000:8.2f} ms   {median / base:.4f} ×")


def measure_memory(
    device: Device, transformer: FluxTransformer2DModel, adapter: CharacterAdapter, fused: torch.Tensor
) -> None:
    """Peak of one step, with on the GPU only what a pipeline needs there to draw."""
    call = step_inputs(device, transformer, batch=1)
    tokens = tokens_at(device, adapter, fused, folded=True)
    adapter.to("cpu")
    detach(transformer)
    torch.cuda.empty_cache()
    device.peak()
    transformer(**call)
    print(f"\npeak of a step: plain FLUX {device.peak():.2f} GiB, ", end="")
    attach(transformer, adapter)
    device.peak()
    transformer(**call, joint_attention_kwargs=with_subject(tokens, call))
    print(f"with a character {device.peak():.2f} GiB")


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


def check_that_nothing_waits(
    transformer: FluxTransformer2DModel, adapter: CharacterAdapter, fused: torch.Tensor
) -> None:
    """Run pipeline steps with CUDA made to fail on any wait of the host for the GPU."""
    from diffusers import AutoencoderKL

    from instantcharacter import InstantCharacterPipeline
    from instantcharacter.flux.scheduler import flux_scheduler

    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=16)
    scheduler = flux_scheduler()
    pipeline = InstantCharacterPipeline(scheduler, vae, None, None, None, None, transformer)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.to("cuda")
    pipeline.set_character_adapter(adapter)
    begun = []

    def forbid_waiting(pipe: object, step: int, timestep: object, tensors: dict) -> dict:
        """From the end of the first step to the end of the last."""
        begun.append(step)
        torch.cuda.set_sync_debug_mode("error" if step < 3 else "default")
        return {}

    character = Character(fused, adapter.fingerprint())
    try:
        pipeline(
            prompt_embeds=torch.randn(1, 512, 4096, device="cuda", dtype=DTYPE),
            pooled_prompt_embeds=torch.randn(1, 768, device="cuda", dtype=DTYPE),
            num_inference_steps=4,
            subject_image=character,
            output_type="latent",
            callback_on_step_end=forbid_waiting,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    print(f"\nno wait for the GPU inside steps 2 to {len(begun)} of a pipeline run")


def report(device: Device, what: str, call: Callable[[], object], repeats: int) -> None:
    call()
    device.peak()
    seconds = statistics.median(device.timed(call) for _ in range(repeats))
    print(f"{what:40s} {seconds * 1000:8.2f} ms   peak {device.peak():.2f} GiB")


if __name__ == "__main__":
    main()
