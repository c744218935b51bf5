"""What a character costs on ComfyUI's own FLUX: real sizes, random weights, one CUDA device.

    python -m benchmarks.comfyui --comfyui ~/comfy/ComfyUI               # 1024×1024, bfloat16
    python -m benchmarks.comfyui --comfyui ~/comfy/ComfyUI --gib 24 12   # on cards of 24 and 12 GiB
    python -m benchmarks.comfyui --comfyui ~/comfy/ComfyUI --fast        # in fp8, compiled, and both: 10 minutes
    python -m benchmarks.comfyui --comfyui ~/comfy/ComfyUI --tiny        # the same code at a tiny size on a CPU

ComfyUI's sampling as KSampler calls it, plain and with InstantCharacter Apply in turn. A card of 24 GiB is a real
limit: another process holds the rest of the GPU's memory. Times are medians of steps, without the first of a sampling.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.card import card

GIB = 2**30
STORAGE = ("bf16", "fp8_e4m3fn_fast")
"""Load Diffusion Model's dtypes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="its folder")
    parser.add_argument("--tiny", action="store_true", help="a tiny size, on the CPU")
    parser.add_argument("--static", action="store_true", help="without dynamic VRAM, ComfyUI's default on NVIDIA")
    parser.add_argument("--gib", type=int, nargs="*", default=[0, 24, 16, 12], help="cards, 0 for the whole one")
    parser.add_argument(
        "--fast", nargs="*", choices=STORAGE, help="as it is and with TorchCompileModel, in these weights (all)"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1, help="pictures at once")
    options = parser.parse_args()
    sys.argv = ["comfyui", *(["--cpu", "--use-pytorch-cross-attention"] if options.tiny else [])]
    sys.path.insert(0, str(options.comfyui))
    import comfy.options

    comfy.options.enable_args_parsing()
    fast = options.fast is not None
    if not (options.tiny or options.static or fast):  # TorchCompileModel turns it off by itself
        enable_dynamic_vram()
    if fast:
        measure_fast(options.fast or list(STORAGE), options.tiny, options.steps)
    else:
        measure([0] if options.tiny else options.gib, options.tiny, options.steps, options.batch)


def enable_dynamic_vram() -> None:
    """As ComfyUI's ``main.py`` does it."""
    import comfy_aimdo.control

    comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    if not comfy_aimdo.control.init_device(comfy.model_management.get_torch_device().index):
        sys.exit("comfy-aimdo does not work here")
    comfy_aimdo.control.set_log_critical()
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    print("dynamic VRAM")


def print_versions(tiny: bool) -> None:
    import comfyui_version
    import torch

    name = "cpu" if tiny else torch.cuda.get_device_name()
    print(f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}, ComfyUI {comfyui_version.__version__}")


def with_a_character(model: Any, adapter: Any) -> Any:
    from instantcharacter.comfyui.hosting import HostedAdapter
    from instantcharacter.comfyui.model_patch import CharacterConditioning, apply

    hosted = HostedAdapter(adapter)
    return apply(model, CharacterConditioning(hosted, make_character(adapter, hosted), 0.9))


def measure(cards: list[int], tiny: bool, steps: int, batch: int) -> None:
    """Steps of so many pictures at once on cards of these GiB, 0 for the whole one."""
    import comfy.model_management as management

    print_versions(tiny)
    model, adapter = build(tiny)
    patched = with_a_character(model, adapter)
    for on, which in ((model, "plain"), (patched, "with a character")):
        begin = time.perf_counter()
        sample(on, 1, tiny)
        print(f"first sampling, one step, {which}: {time.perf_counter() - begin:.1f} s")
    for gib in cards:
        management.unload_all_models()
        management.soft_empty_cache()
        with card(gib, Path(sys.executable)) if gib else nullcontext():
            line = compare(model, patched, steps, tiny, batch)
        print(f"{f'{gib} GiB' if gib else 'whole card':>10s}: {line}", flush=True)


def measure_fast(names: list[str], tiny: bool, steps: int) -> None:
    """Steps on the whole card in these weights, as they are and compiled, and how far one step is off the first."""
    import comfy.model_management as management
    import torch
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    print_versions(tiny)
    fp8 = {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True}
    exact: list[Any] = []
    for name in names:
        torch.manual_seed(0)
        model, adapter = build(tiny, fp8 if name != "bf16" else {})
        patched = with_a_character(model, adapter)
        for compiled in (False, True):
            both = [
                TorchCompileModel.execute(each, "inductor").args[0] if compiled else each for each in (model, patched)
            ]
            line = compare(*both, steps, tiny)
            latents = [sample(each, 1, tiny)[2] for each in both]
            exact = exact or latents
            off = " and ".join(f"{(one - other).norm() / other.norm():.1e}" for one, other in zip(latents, exact))
            print(
                f"{name + ', compiled' * compiled:>26s}: {line}; one step of each is {off} off {names[0]}", flush=True
            )
        del model, patched, both
        management.unload_all_models()


def compare(model: Any, patched: Any, steps: int, tiny: bool, batch: int = 1) -> str:
    """A line: steps of both MODELs, in turn."""
    times: dict[str, list[float]] = {"plain": [], "character": []}
    peaks = {}
    for on, which in ((model, "plain"), (patched, "character")) * 3:
        seconds, peaks[which], _ = sample(on, steps, tiny, batch)
        times[which] += seconds
    plain, ours = (statistics.median(times[which]) for which in ("plain", "character"))
    return (
        f"plain {plain * 1000:8.1f} ms a step, peak {peaks['plain']:5.2f} GiB; with a character {ours * 1000:8.1f} ms, "
        f"{ours / plain:.3f} ×, peak {peaks['character']:5.2f} GiB"
    )


def build(tiny: bool, storage: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """FLUX as ComfyUI's MODEL, stored as Load Diffusion Model's options say, and an adapter for it."""
    import comfy.sd
    import torch

    from instantcharacter import CharacterAdapter

    if tiny:
        from support import recorded

        state = recorded.transformer().state_dict()
        return comfy.sd.load_diffusion_model_state_dict(state, model_options=storage or {}), recorded.adapter()
    state = random_weights(released_flux())
    model = comfy.sd.load_diffusion_model_state_dict(state, model_options=storage or {})
    with torch.device("meta"):
        adapter = CharacterAdapter()
    adapter.load_state_dict(random_weights(adapter), assign=True)
    return model, adapter.eval()


def released_flux() -> Any:
    """ComfyUI's FLUX.1-dev, without weights."""
    import comfy.ldm.flux.model
    import torch

    sizes = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072}
    blocks = {"num_heads": 24, "depth": 19, "depth_single_blocks": 38, "mlp_ratio": 4.0, "patch_size": 2}
    rest = {"axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": []}
    return comfy.ldm.flux.model.Flux(
        image_model="flux", **sizes, **blocks, **rest, dtype=torch.bfloat16, device="meta", operations=torch.nn
    )


def random_weights(module: Any) -> dict[str, Any]:
    """Random weights for a module in bfloat16, in host memory; scales of norms are 1."""
    import torch

    def fill(key: str, shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1 and key.endswith(("scale", "norm.weight")):
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(0.02).cpu()

    return {key: fill(key, tensor.shape) for key, tensor in module.state_dict().items()}


def make_character(adapter: Any, hosted: Any) -> Any:
    import torch

    from instantcharacter import Character

    width, tokens = adapter.config.feature_dim, 1458 if adapter.config.feature_dim == 2688 else 20
    weight = adapter.projector.proj.fc1.weight
    return Character(torch.randn(1, tokens, width).to(weight), hosted.fingerprint)


def sample(model: Any, steps: int, tiny: bool, batch: int = 1) -> tuple[list[float], float, Any]:
    """Seconds of every step but the first, the peak of the GPU's memory in GiB, and the latents."""
    import comfy.sample
    import comfy.samplers
    import torch

    flux = model.model.diffusion_model.params
    side = 16 if tiny else 128
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, 16, side, side, generator=random)
    pooled = {"pooled_output": torch.randn(1, flux.vec_in_dim, generator=random), "guidance": 3.5}
    positive = [[torch.randn(1, 16 if tiny else 512, flux.context_in_dim, generator=random), pooled]]
    sigmas = torch.linspace(1, 0, steps + 1)
    euler = comfy.samplers.sampler_object("euler")
    ticks: list[Any] = []

    def tick(*_: Any) -> None:
        if tiny:
            ticks.append(time.perf_counter())
        else:
            ticks.append(torch.cuda.Event(enable_timing=True))
            ticks[-1].record()

    if not tiny:
        torch.cuda.reset_peak_memory_stats()
    latents = comfy.sample.sample_custom(
        model, noise, 1.0, euler, sigmas, positive, [], noise * 0, callback=tick, disable_pbar=True
    )
    if tiny:
        return [after - before for before, after in pairwise(ticks)][1:], 0.0, latents
    torch.cuda.synchronize()
    seconds = [before.elapsed_time(after) / 1000 for before, after in pairwise(ticks)][1:]
    return seconds, torch.cuda.max_memory_allocated() / GIB, latents


if __name__ == "__main__":
    main()
