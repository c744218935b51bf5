"""Whole pictures under memory plans: real sizes, random weights, one CUDA device.

    python -m benchmarks.memory                       # caps of 24 to 6 GiB, fp8, compiled: about 6 minutes on an H100
    python -m benchmarks.memory --run 24 --many 50    # 50 pictures in a row: does anything grow?
    python -m benchmarks.memory --tiny                # the same code at a tiny size on the CPU: shows that it runs

Each run is a process of its own, in which ``set_per_process_memory_fraction`` takes away the memory above the cap.
It generates a picture from a prompt and a reference: encode, 28 steps, decode; a picture of 3 steps before it is not
timed. Ratios are to the run with everything on the GPU. Latents are compared with that run's.
Times and memory do not depend on the weights' values. ``RESULTS.md`` has the figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKL
from PIL import Image
from support import tiny
from transformers import CLIPTextModel, T5EncoderModel

from benchmarks.chart import chart
from benchmarks.common import (
    DTYPE,
    GIB,
    Device,
    build,
    print_versions,
    random_adapter,
    random_encoder,
    random_flux,
    require_cuda,
)
from instantcharacter import InstantCharacterPipeline
from instantcharacter.flux import load
from instantcharacter.flux.fp8 import store_in_fp8
from instantcharacter.flux.scheduler import flux_scheduler
from instantcharacter.offload import STRATEGIES

RUNS = ("none", "24", "16", "12", "8", "6", "16+fp8", "compile", "compile+again", "16+compile")
"""A cap in GiB or a strategy, and what else; again: in a process that finds on disk what another one compiled."""
STEPS = 28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny size, on the CPU")
    parser.add_argument("--run", nargs="+", default=RUNS, help="which runs; none is always the first")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--many", type=int, default=0, help="generate this many different pictures instead")
    parser.add_argument("--chart", type=Path, help="write a chart to this .svg")
    parser.add_argument("--alone", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    require_cuda("memory", options.tiny)
    if options.alone:
        print(json.dumps(measure(options.run[0], options)))
        return
    print_versions(Device(options.tiny))
    with tempfile.TemporaryDirectory() as folder:
        runs = options.run if options.many else ["none", *(run for run in options.run if run != "none")]
        results: dict[str, dict[str, Any]] = {}
        print(
            "run        s/step  ratio   picture ratio   arrange  peak GiB  predicted  off   reserved  streamed  error"
        )
        for run in runs:
            results[run] = alone(run, folder)
            print(row(run, results[run], results[runs[0]]), flush=True)
    if options.chart:
        options.chart.write_text(chart(results), encoding="utf-8")


def alone(run: str, folder: str) -> dict[str, Any]:
    """The results of a run in its own process, whose other output goes to stderr."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--run" and argument not in RUNS]
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *arguments, "--run", run, "--alone", folder],
        stdout=subprocess.PIPE,
        check=False,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled"},
    )
    lines = done.stdout.decode().strip().splitlines()
    print(f"{run}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return json.loads(lines[-1]) if done.returncode == 0 else {"failed": done.returncode}


def measure(run: str, options: argparse.Namespace) -> dict[str, Any]:
    device = Device(options.tiny)
    torch.manual_seed(0)
    cap, _, what = run.partition("+")
    pipeline = random_pipeline(device, fp8="fp8" in run)
    result: dict[str, Any] = {"plain_step": plain_step(pipeline, device)} if "compile" in run else {}
    begin = time.perf_counter()
    result |= offload(pipeline, cap, device)
    result["arrange"] = time.perf_counter() - begin
    if "compile" in run:
        pipeline.enable_character_compile()
    if options.many:
        return result | generate_many(Generation(pipeline, device, options.steps), options.many)
    first = Generation(pipeline, device, steps=3)
    first()
    generate = Generation(pipeline, device, options.steps)
    latents = generate()
    result |= {"picture": generate.seconds, "step": generate.step} | generate.peaks()
    if what != "compile" and cap != "compile":
        result["error"] = compare(latents, options.alone)
    else:
        result |= {"recompiled": recompiles(generate), "first": first.seconds}
    return result


def random_pipeline(device: Device, fp8: bool) -> InstantCharacterPipeline:
    """All models at their real sizes, with random weights."""
    if device.tiny:
        pipeline = tiny.tiny_pipeline().to(DTYPE)
        pipeline.set_character_adapter(pipeline.character_adapter.to(DTYPE))
        pipeline.character_encoder.to(DTYPE)
    else:
        vae = {name: value for name, value in load.VAE.items() if name != "_class_name"}
        parts = {
            "scheduler": flux_scheduler(),
            "tokenizer": tiny.byte_tokenizer(load.CLIP_LENGTH),
            "tokenizer_2": tiny.byte_tokenizer(load.T5_LENGTH),
            "transformer": random_flux(device),
            "vae": build(AutoencoderKL, device, **vae, sample_size=1024),
            "text_encoder": build(CLIPTextModel, device, config=released(load.CLIP_L)),
            "text_encoder_2": build(T5EncoderModel, device, config=released(load.T5_XXL)),
        }
        pipeline = InstantCharacterPipeline(**parts)
        pipeline.set_character_adapter(random_adapter(device))
        pipeline.set_character_encoder(random_encoder(device))
    if fp8:
        store_in_fp8(pipeline.transformer, DTYPE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def released(model: Any) -> Any:
    return model.config(**model.released)


def plain_step(pipeline: InstantCharacterPipeline, device: Device) -> float:
    """Seconds for a step of plain FLUX, neither compiled nor offloaded."""
    generate = Generation(pipeline, device, steps=10, plain=True)
    generate()
    return generate.step


def offload(pipeline: InstantCharacterPipeline, cap: str, device: Device) -> dict[str, Any]:
    """Offload by the plan for this cap, and then forbid the memory above it."""
    strategy = cap if cap in STRATEGIES else "none" if cap in ("fp8", "compile") else "auto"
    gib = float(cap) if strategy == "auto" else None
    plan = pipeline.enable_character_offload(strategy, gib)
    if not device.tiny:
        pipeline.character_adapter.attention.to("cpu")  # its folded form is in FLUX's processors
        torch.cuda.empty_cache()
        if gib:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(gib * GIB / total)
        torch.cuda.reset_peak_memory_stats()
    return {"predicted": plan.predicted_peak / GIB, "streamed": plan.streamed_blocks, "host": plan.host_bytes / GIB}


class Generation:
    """Generates pictures.

    Attributes:
        seconds: time of the last picture.
        step: median time of its steps, in seconds.
    """

    def __init__(self, pipeline: InstantCharacterPipeline, device: Device, steps: int, plain: bool = False) -> None:
        self.pipeline = pipeline
        self.device = device
        self.steps = steps
        self.plain = plain
        self.seconds = self.step = 0.0
        side = 64 if device.tiny else 1024
        self.settings = {"width": side, "height": side, "max_sequence_length": 64 if device.tiny else 512}

    def __call__(self, prompt: str = "a fox", seed: int = 0, picture: int = 0, **changes: Any) -> torch.Tensor:
        """Generate a picture; returns its latents."""
        latents: list[torch.Tensor] = []
        marks: list[Any] = []

        def mark(_: object, step: int, __: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            marks.append(self._now())
            latents[:] = [tensors["latents"]]
            return {}

        noise = torch.randint(
            0, 256, (832, 640, 3), generator=torch.Generator().manual_seed(picture), dtype=torch.uint8
        )
        begin = time.perf_counter()
        self.pipeline(
            prompt,
            subject_image=None if self.plain else Image.fromarray(noise.numpy()),
            num_inference_steps=self.steps,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=mark,
            **{**self.settings, **changes},
        )
        self.seconds = time.perf_counter() - begin
        self.step = statistics.median(self._between(*pair) for pair in itertools.pairwise(marks))
        self.pipeline.clear_cache()  # each picture encodes its prompt and its reference
        return latents[0].cpu()

    def _now(self) -> Any:
        if self.device.tiny:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, second: Any) -> float:
        return second - first if self.device.tiny else first.elapsed_time(second) / 1000

    def peaks(self) -> dict[str, float]:
        if self.device.tiny:
            return {"peak": 1.0, "reserved": 1.0}  # nothing counts them on a CPU
        return {
            "peak": torch.cuda.max_memory_allocated() / GIB,
            "reserved": torch.cuda.max_memory_reserved() / GIB,
        }


def compare(latents: torch.Tensor, folder: Path) -> float:
    """Relative distance of these latents to those of the first run, which has everything on the GPU."""
    path = folder / "latents.pt"
    if not path.exists():
        torch.save(latents, path)
    expected = torch.load(path, weights_only=True).float()
    return ((latents.float() - expected).norm() / expected.norm()).item()


def recompiles(generate: Generation) -> str:
    """Generate with another prompt, character and scale, which must not recompile."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    generate(prompt="another prompt", seed=1, subject_scale=0.6)
    generate(prompt="a third one", seed=2, picture=1, subject_scale=1.1)
    return f"{counters['stats']['unique_graphs'] - before} of {before} graphs"


def generate_many(generate: Generation, count: int) -> dict[str, Any]:
    """Generate with different prompts, references and sizes in turn; returns the memory after some pictures."""
    sides = (32, 48, 64) if generate.device.tiny else (768, 1024, 896)
    seen = []
    for i in range(count):
        generate(f"prompt number {i}", i, i % 5, width=sides[i % 3], height=sides[(i // 3) % 3])
        reserved = torch.cuda.memory_reserved() / GIB if not generate.device.tiny else 0.0
        allocated = torch.cuda.memory_allocated() / GIB if not generate.device.tiny else 0.0
        seen.append([allocated, reserved, psutil.Process().memory_info().rss / GIB])
        print(f"picture {i}: {seen[-1]}", file=sys.stderr)
    return {"third": seen[2], "last": seen[-1], "most": [max(column) for column in zip(*seen[3:])]} | generate.peaks()


def row(run: str, result: dict[str, Any], base: dict[str, Any]) -> str:
    if "step" not in result:
        return f"{run} {json.dumps(result)}"
    off = result["predicted"] / result["peak"] - 1
    checks = f"{result['error']:.1e}" if "error" in result else f"recompiled {result['recompiled']}"
    if plain := result.get("plain_step"):
        checks += f"; plain, not compiled: {plain:.4f} s, to that {result['step'] / plain:.3f}"
        checks += f"; the first picture, of 3 steps, compiled on the way: {result['first']:.1f} s"
    return (
        f"{run:10s} {result['step']:.4f}  {result['step'] / base['step']:.3f}  {result['picture']:6.2f}  "
        f"{result['picture'] / base['picture']:.3f}  {result['arrange']:5.1f} s  {result['peak']:8.2f}  "
        f"{result['predicted']:8.2f} {off:+6.1%}  {result['reserved']:6.2f}  {result['streamed']:4d}      {checks}"
    )


if __name__ == "__main__":
    main()
