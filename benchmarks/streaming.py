"""Streaming FLUX's blocks: ours beside diffusers' group offloading. Real sizes, random weights, one CUDA device.

    python -m benchmarks.streaming            # about a minute on an H100
    python -m benchmarks.streaming --tiny     # the same code at a tiny size on the CPU: shows that it runs

The same blocks of the same FLUX, from the same pinned memory, one step of 1024×1024 with a character. diffusers streams
all of a model's blocks or none: here only some blocks get its hooks, linked by hand in the order in which they run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import nn

from benchmarks.common import (
    GIB,
    Device,
    print_versions,
    random_adapter,
    random_flux,
    require_cuda,
    step_inputs,
    tokens_at,
    with_subject,
)
from instantcharacter.flux.attn_processor import attach
from instantcharacter.offload.planning import spread
from instantcharacter.offload.sizes import blocks_of, module_bytes
from instantcharacter.offload.streaming import OffloadedModule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny size, on the CPU")
    options = parser.parse_args()
    require_cuda("streaming", options.tiny)
    device = Device(options.tiny)
    print_versions(device)
    torch.manual_seed(0)
    with torch.no_grad():
        transformer, adapter = random_flux(device), random_adapter(device)
        attach(transformer, adapter)
        call = step_inputs(device, transformer, batch=1)
        fused = torch.randn(1, 1458, adapter.config.feature_dim, device=device.name, dtype=transformer.dtype)
        joint = with_subject(tokens_at(device, adapter, fused, folded=True), call)
        adapter.to("cpu")

        def step() -> object:
            return transformer(**call, joint_attention_kwargs=joint)

        print(f"all resident: {milliseconds(device, step):.1f} ms")
        blocks = blocks_of("transformer", transformer)
        sizes = [module_bytes(block) for block in blocks]
        for rate in (0.1, 0.43, 1.0):
            streamed = [blocks[i] for i in spread(sizes, rate * max(sizes))]
            print(f"{len(streamed)} blocks, {sum(map(module_bytes, streamed)) / GIB:.2f} GiB a step:")
            measure(device, transformer, streamed, step)


def measure(device: Device, transformer: nn.Module, streamed: Sequence[nn.Module], step: Callable) -> None:
    where = torch.device(device.name)
    offloaded = OffloadedModule(transformer, streamed, where, resident=True, pinned=True, on_out_of_memory=sys.exit)
    print(f"  ours: {milliseconds(device, step):.1f} ms")
    offloaded.remove()  # the weights stay in pinned host memory, and diffusers streams them from there
    for settings in ({"record_stream": False}, {"record_stream": True}):
        group_offload(device, streamed, settings)
        print(f"  diffusers, {settings}: {milliseconds(device, step):.1f} ms")
        for block in streamed:
            HookRegistry.check_if_exists_or_initialize(block).remove_hook("group_offloading", recurse=True)
    for block in streamed:
        block.to(where)


def group_offload(device: Device, blocks: Sequence[nn.Module], settings: dict[str, bool]) -> None:
    shell = nn.Module()
    shell.blocks = nn.ModuleList(blocks)
    streams = {} if device.tiny else {"use_stream": True, **settings}
    apply_group_offloading(shell, torch.device(device.name), num_blocks_per_group=1, **streams)
    registries = [HookRegistry.check_if_exists_or_initialize(block) for block in blocks]
    hooks = [registry.get_hook("group_offloading") for registry in registries]
    for hook, following in itertools.pairwise(hooks if streams else []):
        hook.next_group = following.group
        following.group.onload_self = False


def milliseconds(device: Device, step: Callable, repeats: int = 8) -> float:
    step()
    step()
    return statistics.median(device.timed(step) for _ in range(repeats)) * 1000


if __name__ == "__main__":
    main()
