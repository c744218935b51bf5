"""Whole pictures under memory plans: real sizes, random weights, one CUDA device.

    python benchmarks/memory.py                       # caps of 24 to 6 GiB, fp8, compiled: about 6 minutes on an H100
    python benchmarks/memory.py --run 24 --many 50    # 50 pictures in a row: does anything grow?
    python benchmarks/memory.py --tiny                # the same code at a tiny size on the CPU: shows that it runs

Each run is a process of its own, in which ``set_per_process_memory_fraction`` takes away the memory above the cap.
It draws a picture from words and a reference picture: encode, 28 steps, decode; and before it another in 3 steps, which
is not timed. Ratios are to the run with everything on the GPU. Latents are compared with that run's.
Times and memory do not depend on the weights' values. What is learned is kept in ``benchmarks/RESULTS.md``.
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

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import psutil
import torch
from adapter import DTYPE, GIB, Device, built, print_versions, random_adapter, random_encoder, random_flux
from diffusers import AutoencoderKL
from PIL import Image
from support import tiny
from transformers import CLIPTextModel, T5EncoderModel

from instantcharacter import InstantCharacterPipeline
from instantcharacter.flux import load as flux_files
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
    parser.add_argument("--many", type=int, default=0, help="in place of two alike, so many different pictures")
    parser.add_argument("--chart", type=Path, help="draw the results to this .svg")
    parser.add_argument("--alone", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("benchmarks/memory.py measures on a CUDA device, and there is none here; --tiny runs it on the CPU")
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
    """What a run measures in a process of its own; what else it says goes on to stderr."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--run" and argument not in RUNS]
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--run", run, "--alone", folder],
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
    result |= arrange(pipeline, cap, device)
    result["arrange"] = time.perf_counter() - begin
    if "compile" in run:
        pipeline.enable_character_compile()
    if options.many:
        return result | draw_many(Drawing(pipeline, device, options.steps), options.many)
    first = Drawing(pipeline, device, steps=3)
    first()
    draw = Drawing(pipeline, device, options.steps)
    latents = draw()
    result |= {"picture": draw.seconds, "step": draw.step} | draw.peaks()
    if what != "compile" and cap != "compile":
        result["error"] = compare(latents, options.alone)
    else:
        result |= {"recompiled": recompiles(draw), "first": first.seconds}
    return result


def random_pipeline(device: Device, fp8: bool) -> InstantCharacterPipeline:
    """All the models at their real sizes; made on the GPU, then taken to host memory, as if they had been loaded."""
    if device.tiny:
        pipeline = tiny.tiny_pipeline().to(DTYPE)
        pipeline.set_character_adapter(pipeline.character_adapter.to(DTYPE))
        pipeline.character_encoder.to(DTYPE)
    else:
        vae = {name: value for name, value in flux_files.VAE.items() if name != "_class_name"}
        parts = {
            "scheduler": flux_scheduler(),
            "tokenizer": tiny.byte_tokenizer(flux_files.CLIP_LENGTH),
            "tokenizer_2": tiny.byte_tokenizer(flux_files.T5_LENGTH),
            "transformer": random_flux(device),
            "vae": built(AutoencoderKL, device, **vae, sample_size=1024),
            "text_encoder": built(CLIPTextModel, device, config=released(flux_files.CLIP_L)),
            "text_encoder_2": built(T5EncoderModel, device, config=released(flux_files.T5_XXL)),
        }
        pipeline = InstantCharacterPipeline(**parts)
        pipeline.set_character_adapter(random_adapter(device))
        pipeline.set_character_encoder(random_encoder(device))
    if fp8:
        pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=DTYPE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def released(model: Any) -> Any:
    return model.config(**model.released)


def plain_step(pipeline: InstantCharacterPipeline, device: Device) -> float:
    """Seconds for a step of plain FLUX, neither compiled nor offloaded."""
    draw = Drawing(pipeline, device, steps=10, plain=True)
    draw()
    return draw.step


def arrange(pipeline: InstantCharacterPipeline, cap: str, device: Device) -> dict[str, Any]:
    """Take the models to where the plan has them, and then away what is above the cap."""
    strategy = cap if cap in STRATEGIES else "none" if cap in ("fp8", "compile") else "auto"
    gib = float(cap) if strategy == "auto" else None
    plan = pipeline.enable_character_offload(strategy, gib)
    if not device.tiny:
        pipeline.character_adapter.attention.to("cpu")  # folded into FLUX, where it is wanted
        torch.cuda.empty_cache()
        if gib:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(gib * GIB / total)
        torch.cuda.reset_peak_memory_stats()
    return {"predicted": plan.predicted_peak / GIB, "streamed": plan.streamed_blocks, "host": plan.host_bytes / GIB}


class Drawing:
    """Draws pictures, and knows of the last one how long it and a step of it took."""

    def __init__(self, pipeline: InstantCharacterPipeline, device: Device, steps: int, plain: bool = False) -> None:
        self.pipeline = pipeline
        self.device = device
        self.steps = steps
        self.plain = plain
        self.seconds = self.step = 0.0
        side = 64 if device.tiny else 1024
        self.settings = {"width": side, "height": side, "max_sequence_length": 64 if device.tiny else 512}

    def __call__(self, prompt: str = "a fox", seed: int = 0, picture: int = 0, **changes: Any) -> torch.Tensor:
        """Draw a picture; its latents before they are decoded."""
        kept: list[torch.Tensor] = []
        marks: list[Any] = []

        def mark(_: object, step: int, __: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            marks.append(self._now())
            kept[:] = [tensors["latents"]]
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
        self.pipeline.clear_cache()  # each picture is to be a whole one
        return kept[0].cpu()

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
    """How far these latents are from those of the run with everything on the GPU."""
    path = folder / "latents.pt"
    if not path.exists():
        torch.save(latents, path)
    expected = torch.load(path, weights_only=True).float()
    return ((latents.float() - expected).norm() / expected.norm()).item()


def recompiles(draw: Drawing) -> str:
    """Draw what must not be compiled anew."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    draw(prompt="another prompt", seed=1, subject_scale=0.6)
    draw(prompt="a third one", seed=2, picture=1, subject_scale=1.1)
    return f"{counters['stats']['unique_graphs'] - before} of {before} graphs"


def draw_many(draw: Drawing, count: int) -> dict[str, Any]:
    """Different prompts, references and sizes in turn, and the memory after each picture."""
    sides = (32, 48, 64) if draw.device.tiny else (768, 1024, 896)
    seen = []
    for i in range(count):
        draw(f"prompt number {i}", i, i % 5, width=sides[i % 3], height=sides[(i // 3) % 3])
        reserved = torch.cuda.memory_reserved() / GIB if not draw.device.tiny else 0.0
        allocated = torch.cuda.memory_allocated() / GIB if not draw.device.tiny else 0.0
        seen.append([allocated, reserved, psutil.Process().memory_info().rss / GIB])
        print(f"picture {i}: {seen[-1]}", file=sys.stderr)
    return {"third": seen[2], "last": seen[-1], "most": [max(column) for column in zip(*seen[3:])]} | draw.peaks()


def row(run: str, result: dict[str, Any], base: dict[str, Any]) -> str:
    if "step" not in result:
        return f"{run} {json.dumps(result)}"
    off = result["predicted"] / result["peak"] - 1
    told = f"{result['error']:.1e}" if "error" in result else f"recompiled {result['recompiled']}"
    if plain := result.get("plain_step"):
        told += f"; plain, not compiled: {plain:.4f} s, to that {result['step'] / plain:.3f}"
        told += f"; the first picture, of 3 steps, compiled on the way: {result['first']:.1f} s"
    return (
        f"{run:10s} {result['step']:.4f}  {result['step'] / base['step']:.3f}  {result['picture']:6.2f}  "
        f"{result['picture'] / base['picture']:.3f}  {result['arrange']:5.1f} s  {result['peak']:8.2f}  "
        f"{result['predicted']:8.2f} {off:+6.1%}  {result['reserved']:6.2f}  {result['streamed']:4d}      {told}"
    )


def chart(results: dict[str, dict[str, Any]]) -> str:
    """Memory against seconds a step, as SVG."""
    points = {run: (result["reserved"], result["step"]) for run, result in results.items() if "step" in result}
    right, top = (max(values) * 1.1 for values in zip(*points.values()))
    marks = []
    for run, (gib, seconds) in points.items():
        x, y = 60 + 560 * gib / right, 330 - 300 * seconds / top
        color = "#1b7f5c" if "compile" in run else "#b3541e" if "fp8" in run else "#2b5fa8"
        label = {"none": "all of it"}.get(run, run + (" GiB" if run.isdecimal() else ""))
        marks.append(
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="5" fill="{color}"/>'
            f'<text x="{x + 8:.0f}" y="{y + (16 if run.isdecimal() else -6):.0f}" fill="{color}">{label}</text>'
        )
    ticks = [
        f'<text x="{60 + 560 * gib / right:.0f}" y="350" text-anchor="middle">{gib}</text>'
        for gib in range(0, int(right) + 1, 8)
    ] + [
        f'<text x="52" y="{334 - 300 * tenths / 10 / top:.0f}" text-anchor="end">{tenths / 10:.1f}</text>'
        for tenths in range(0, int(top * 10) + 1)
    ]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 380" font-family="sans-serif" font-size="13">'
        '<rect width="680" height="380" fill="#fff"/><path d="M60 30V330H640" fill="none" stroke="#888"/>'
        '<text x="350" y="372" text-anchor="middle">GiB of GPU memory</text>'
        '<text x="12" y="20">seconds a step, FLUX.1-dev with a character, 1024×1024, one H100</text>'
        f"{''.join(ticks)}{''.join(marks)}</svg>\n"
    )


if __name__ == "__main__":
    main()
