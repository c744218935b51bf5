"""What a character costs: real sizes, random weights, one CUDA device.

    python -m benchmarks.adapter            # 1024×1024, bfloat16, about 90 s on an H100
    python -m benchmarks.adapter --tiny     # the same code at a tiny size on a CPU: shows that it runs

Times and memory do not depend on the weights' values. Plain FLUX and FLUX with a character are timed in turn in one
run, and compared by their medians. ``RESULTS.md`` has the figures.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import (
    DTYPE,
    Device,
    print_versions,
    random_adapter,
    random_encoder,
    random_flux,
    require_cuda,
    step_inputs,
    tokens_at,
    with_subject,
)
from instantcharacter import Character, CharacterAdapter, InstantCharacterPipeline
from instantcharacter.character.tokens import TokenCache
from instantcharacter.flux.attn_processor import attach, detach
from instantcharacter.flux.scheduler import flux_scheduler
from instantcharacter.model.folding import fold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny size, on the CPU")
    parser.add_argument("--repeats", type=int, default=25, help="timed steps of each kind (25)")
    options = parser.parse_args()
    require_cuda("adapter", options.tiny)
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
            check_host_never_waits(transformer, adapter, fused)


def measure_encoders(device: Device, repeats: int) -> None:
    encoder = random_encoder(device)
    picture = Image.effect_noise((640, 832), 80).convert("RGB")
    report(device, "encode (SigLIP and DINOv2, five crops)", lambda: encoder(picture), min(repeats, 7))


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

    def error(output: torch.Tensor) -> float:
        return ((output.float() - truth).norm() / truth.norm()).item()

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
    """Peak of one step, with only FLUX and the folded attention on the GPU."""
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


def check_host_never_waits(transformer: FluxTransformer2DModel, adapter: CharacterAdapter, fused: torch.Tensor) -> None:
    """Run pipeline steps with CUDA made to fail on any wait of the host for the GPU."""
    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=16)
    scheduler = flux_scheduler()
    pipeline = InstantCharacterPipeline(scheduler, vae, None, None, None, None, transformer)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.to("cuda")
    pipeline.set_character_adapter(adapter)
    ended = []

    def forbid_waiting(pipe: object, step: int, timestep: object, tensors: dict) -> dict:
        """From the end of the first step to the end of the last."""
        ended.append(step)
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
    print(f"\nno wait for the GPU inside steps 2 to {len(ended)} of a pipeline run")


def report(device: Device, what: str, call: Callable[[], object], repeats: int) -> None:
    call()
    device.peak()
    seconds = statistics.median(device.timed(call) for _ in range(repeats))
    print(f"{what:40s} {seconds * 1000:8.2f} ms   peak {device.peak():.2f} GiB")


if __name__ == "__main__":
    main()
