"""FLUX on the second of two GPUs: the picture of the first one, and nothing of it on the first. Two CUDA devices.

    python -m benchmarks.second_gpu                                  # the library, under every memory plan
    python -m benchmarks.second_gpu --comfyui ~/comfy/ComfyUI        # Apply and the Sampler, with ComfyUI's Python
    python -m benchmarks.second_gpu --tiny                           # the same code, twice on the CPU

The pack's toy, each picture in a process of its own: on cuda:0, on cuda:1, and, in the library, on the CPU. ComfyUI's
own device stays cuda:0, where it has a context itself; the MODEL and the pipeline are made for cuda:1, as multi-GPU
packs do. For each picture the bytes that torch had at most on each GPU, and the GPUs on which the process had a
context. The exit code is 1 if latents differ between the GPUs, or a byte was on a GPU that was not asked for.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from instantcharacter.files.catalog import TOY_FOLDER, toy
from instantcharacter.offload import STRATEGIES

PROMPT = "a picture of a character waving on a beach"
PICTURE = TOY_FOLDER.parent / "monster.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, help="its folder")
    parser.add_argument("--tiny", action="store_true", help="on the CPU")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "DEVICE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        generate(*options.one, options.comfyui)
        return
    devices = ["cpu", "cpu"] if options.tiny else ["cuda:0", "cuda:1"]
    ways = ["Apply", "Sampler"] if options.comfyui else [*STRATEGIES]
    print(f"torch {torch.__version__}, {options.comfyui or 'the library'}")
    right = [compare(way, devices, options.comfyui) for way in ways]
    sys.exit(not all(right))


def compare(way: str, devices: list[str], comfyui: Path | None) -> bool:
    """Print what is on each GPU; whether the latents are equal, and nothing is where it should not be."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for device in [*devices, *([] if comfyui else ["cpu"])]:
            file = Path(folder) / "result.pt"
            command = [sys.executable, "-m", "benchmarks.second_gpu", "--one", way, device, str(file)]
            subprocess.run([*command, *([f"--comfyui={comfyui}"] if comfyui else [])], check=True)
            results.append({"device": device, **torch.load(file)})
    equal = torch.equal(results[0]["latents"], results[1]["latents"])
    alone = True
    for result in results:
        others = [peak for i, peak in enumerate(result["peaks"]) if f"cuda:{i}" != result["device"]]
        alone &= not any(others)
        peaks = ", ".join(f"{peak / 2**20:.1f} MiB on cuda:{i}" for i, peak in enumerate(result["peaks"]))
        print(f"{way:>10s} on {result['device']:6s}: {peaks or 'no GPU'}; contexts on {result['contexts']}", flush=True)
    print(f"{way:>10s}: latents {'equal' if equal else 'DIFFER'}, other GPUs {'free' if alone else 'USED'}", flush=True)
    return equal and alone


def generate(way: str, device: str, file: str, comfyui: Path | None) -> None:
    """Save the latents of one picture, the peak of bytes on each GPU, and the GPUs with a context."""
    latents = in_comfyui(way, torch.device(device), comfyui) if comfyui else in_the_library(way, device)
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    result = {
        "latents": latents.cpu(),
        "peaks": [torch.cuda.max_memory_allocated(i) for i in range(count)],
        "contexts": [i for i in range(count) if torch._C._cuda_hasPrimaryContext(i)],
    }
    torch.save(result, file)


def in_the_library(strategy: str, device: str) -> torch.Tensor:
    from instantcharacter import CharacterAdapter, CharacterEncoder, InstantCharacterPipeline

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipeline = InstantCharacterPipeline.from_pretrained(toy("flux"), torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_character_adapter(CharacterAdapter.from_file(toy("adapter"), dtype=dtype), device)
    pipeline.set_character_encoder(CharacterEncoder.from_pretrained(toy("siglip"), toy("dinov2"), dtype=dtype))
    pipeline.enable_character_offload(strategy, device=device)
    settings = {"height": 256, "width": 256, "num_inference_steps": 8, "output_type": "latent", "return_dict": False}
    return pipeline(PROMPT, subject_image=PICTURE, generator=torch.Generator().manual_seed(7), **settings)[0]


def in_comfyui(way: str, device: torch.device, comfyui: Path) -> torch.Tensor:
    """With ComfyUI's device cuda:0, but for while FLUX is loaded; the character is encoded on the CPU."""
    sys.argv = ["comfyui", *(["--cpu"] if device.type == "cpu" else [])]
    sys.path.insert(0, str(comfyui))
    import comfy.options

    comfy.options.enable_args_parsing()
    from instantcharacter import CharacterEncoder
    from instantcharacter.comfyui.hosting import HostedCharacter
    from instantcharacter.comfyui.loading import load_adapter

    adapter = load_adapter(toy("adapter"))
    encoder = CharacterEncoder.from_pretrained(toy("siglip"), toy("dinov2"))
    character = adapter.adapter.create_character(encoder(PICTURE))
    run = with_apply if way == "Apply" else with_sampler
    return run(HostedCharacter(character, adapter), device)


def loading_for(device: torch.device) -> Any:
    """Context manager in which ComfyUI's device is this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@torch.inference_mode()
def with_apply(who: Any, device: torch.device) -> torch.Tensor:
    import nodes
    from instantcharacter.comfyui.conditioning import CharacterConditioning
    from instantcharacter.comfyui.model_patch import apply
    from instantcharacter.comfyui.toy import load_toy

    with loading_for(device):
        model, clip, _ = load_toy()
    (positive,), (latent,) = nodes.CLIPTextEncode().encode(clip, PROMPT), nodes.EmptyLatentImage().generate(256, 256)
    patched = apply(model, CharacterConditioning(who.adapter, who.character, 0.9))
    settings = (7, 8, 1.0, "euler", "simple")
    return nodes.KSampler().sample(patched, *settings, positive, positive, latent)[0]["samples"]


@torch.inference_mode()
def with_sampler(who: Any, device: torch.device) -> torch.Tensor:
    from instantcharacter.comfyui.init_image import Prompt
    from instantcharacter.comfyui.loading import load_flux_pipeline
    from instantcharacter.comfyui.sampler import HostedPipeline

    with loading_for(device):
        hosted = HostedPipeline(load_flux_pipeline({"flux": toy("flux")}), "auto")
    return hosted.generate(who, Prompt(PROMPT), (256, 256), 8, 7).samples


if __name__ == "__main__":
    main()
