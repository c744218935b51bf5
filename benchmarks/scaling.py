"""How generating and training scale over the GPUs of a machine: real sizes, random weights.

    python -m benchmarks.scaling                    # on 1, 2, 4 … GPUs; on four H100s expect 12 minutes
    python -m benchmarks.scaling --only together    # one part: apart, together or training
    python -m benchmarks.scaling --tiny             # one and two processes on a CPU: shows that it runs

``apart`` is a batch of which each GPU generates its own pictures, as many on each. ``together`` is one picture by
context parallelism, plain FLUX beside FLUX with a character, its latents compared with one GPU's, and what its kernels
do. ``training`` is stage 1, sharded over the GPUs, by ``benchmarks.training``. Ratios are to one GPU in the same run.
``SCALING.md`` has what was measured, and what follows from it for more GPUs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import GIB, Device, print_versions, require_cuda
from benchmarks.memory import Generation, compare, random_pipeline
from instantcharacter import InstantCharacterPipeline, generate_batch, read_jobs
from instantcharacter.flux.parallel import enable_context_parallel

PARTS = ("apart", "together", "training")
PICTURES, STEPS = 6, 28
"""Of a GPU in a batch; of a picture."""
KINDS = ("nccl", "gemm", "attention")
KERNELS = (r"nccl", r"gemm|cutlass|nvjet|xmma", r"flash|fmha|sdpa|attention")
TORCHRUN = ("torch.distributed.run", "--standalone")
FSDP = "instantcharacter/training/stages/fsdp.yaml"

Row = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny size, on the CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--gpus", type=int, nargs="+", help="numbers of GPUs (1, 2, 4 … up to all)")
    parser.add_argument("--process", nargs=2, metavar=("PART", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    require_cuda("scaling", options.tiny)
    if options.process:
        part, folder = options.process
        run_process(part, Path(folder), options.tiny)
        return
    print_versions(Device(options.tiny))
    there = 2 if options.tiny else torch.cuda.device_count()
    counts = options.gpus or [count for count in (1, 2, 4, 8) if count <= there]
    with tempfile.TemporaryDirectory() as folder:
        for part in options.only:
            rows: dict[int, Row] = {}
            for count in counts:
                rows[count] = train(count, options.tiny) if part == "training" else launch(part, count, folder, options)
                print(line(part, count, rows), flush=True)


def launch(part: str, count: int, folder: str, options: argparse.Namespace) -> Row:
    """The row of a part on a number of GPUs, each with a process of its own."""
    command = ["-m", *TORCHRUN, f"--nproc_per_node={count}", "-m", "benchmarks.scaling", "--process", part, folder]
    printed = _output([*command, *(["--tiny"] if options.tiny else [])])
    return json.loads([text for text in printed.splitlines() if text.startswith("{")][-1])


def run_process(part: str, folder: Path, tiny: bool) -> None:
    """Measure a part in one process among others; the main one prints the row."""
    state, device = PartialState(cpu=tiny), Device(tiny)
    torch.manual_seed(0)  # weights are the same in every process
    pipeline = random_pipeline(device, fp8=False)
    measure = apart if part == "apart" else together
    row = measure(pipeline, device, folder, state)
    peak = 0.0 if tiny else torch.cuda.max_memory_allocated() / GIB
    if state.is_main_process:
        print(json.dumps(row | {"peak": peak}), flush=True)
    if state.num_processes > 1:
        state.destroy_process_group()


def apart(pipeline: InstantCharacterPipeline, device: Device, folder: Path, state: PartialState) -> Row:
    """Pictures a minute of a batch, from the first picture of every process to the last one."""
    folder, processes = folder / f"apart {state.num_processes}", state.num_processes
    if state.is_main_process:
        write_jobs(folder, PICTURES * processes, device.tiny)
    state.wait_for_everyone()
    jobs, _ = read_jobs(folder / "jobs.jsonl")
    generate_batch(jobs, folder / "out", lambda: pipeline, batch_size=1)
    written = sorted(path.stat().st_mtime for path in folder.rglob("*.png"))[1:]  # without the reference
    minutes = (written[-1] - written[processes - 1]) / 60
    return {"pictures a minute": (len(written) - processes) / minutes}


def write_jobs(folder: Path, count: int, tiny: bool) -> None:
    """A job of this many pictures of one character."""
    folder.mkdir()
    Image.effect_noise((640, 832), 80).convert("RGB").save(folder / "0.png")
    settings = {"reference": "0.png", "steps": 2 if tiny else STEPS, "size": "64x64" if tiny else "1024x1024"}
    rows = ({"prompt": f"a fox {i}", "seed": i, **settings} for i in range(count))
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def together(pipeline: InstantCharacterPipeline, device: Device, folder: Path, state: PartialState) -> Row:
    """Seconds of a step of one picture, plain and with a character, and how far its latents are from one GPU's."""
    if state.num_processes > 1:
        with mock.patch("torch.accelerator.device_count", lambda: 1) if device.tiny else nullcontext():
            enable_context_parallel(pipeline.transformer)
    row: Row = {}
    for kind in ("plain", "character"):
        generate = Generation(pipeline, device, 4 if device.tiny else STEPS, plain=kind == "plain")
        generate()  # the first picture warms up
        latents = generate()
        row[kind] = generate.step
        if state.is_main_process:
            (folder / kind).mkdir(exist_ok=True)
            row[f"{kind} off"] = compare(latents, folder / kind)
    if state.num_processes > 1 and not device.tiny:
        row |= kernel_shares(Generation(pipeline, device, 3))
    return row


def kernel_shares(generate: Generation) -> Row:
    """Where the GPU's time goes in a picture, its encoding included: shares of the time of all kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        generate()
    times = {event.key: event.self_device_time_total for event in profiled.key_averages()}
    of_kind = {kind: sum(time for name, time in times.items() if re.search(kernels, name.lower()))
               for kind, kernels in zip(KINDS, KERNELS)}  # fmt: skip
    return {kind: time / sum(times.values()) for kind, time in of_kind.items()}


def train(count: int, tiny: bool) -> Row:
    """Seconds of a step of stage 1, four samples on each GPU."""
    sharded = ["accelerate.commands.launch", "--config_file", FSDP, f"--num_processes={count}"]
    launcher = [*TORCHRUN, f"--nproc_per_node={count}"] if tiny else sharded  # which shards on GPUs alone
    arguments = ["--tiny"] if tiny else ["--run", "adamw:4:cached"]
    printed = _output(["-m", *([*launcher, "-m"] if count > 1 else []), "benchmarks.training", *arguments])
    seconds, peak = re.findall(r"steps, ([\d.]+) s a step.*?peak ([\d.nan]+) GiB", printed)[-1]
    return {"step": float(seconds), "peak": float(peak)}


def line(part: str, count: int, rows: dict[int, Row]) -> str:
    """A row with its ratios to one GPU, which is the first."""
    row, first = rows[count], rows[min(rows)]
    name = f"{part:9s} {count} GPUs: "
    if part == "apart":
        name += f"{row['pictures a minute']:.2f} pictures a minute, "
        name += f"{row['pictures a minute'] / first['pictures a minute'] / count * min(rows):.3f} of linear"
    elif part == "training":
        name += f"{row['step']:.3f} s a step of {4 * count}, {first['step'] / row['step']:.3f} of linear"
    else:
        name += ", ".join(
            f"{kind} {row[kind] * 1000:.1f} ms a step, {row[kind] / first[kind]:.3f}, {row[f'{kind} off']:.1e} off"
            for kind in ("plain", "character")
        )
        name += "".join(f"; {kind} {row[kind]:.1%} of kernels" for kind in KINDS if kind in row)
    return f"{name}; peak {row['peak']:.1f} GiB on the first"


def _output(command: Sequence[str]) -> str:
    """What a command prints; its errors go to stderr, and one that fails ends the benchmark."""
    return subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, check=True, text=True).stdout


if __name__ == "__main__":
    main()
