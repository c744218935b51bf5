"""Many pictures: a job that is killed again and again, batches against single pictures, several GPUs against one.

    python -m benchmarks.batch --tiny                 # 200 toy pictures on the CPU, killed at five moments; 5 minutes
    python -m benchmarks.batch --gpus 1 2 -- JOBS.jsonl --model flux1-dev.safetensors --clip-l …   # pictures a minute

With ``--gpus``, what follows ``--`` are the arguments of ``instantcharacter batch`` without ``--output``; pictures a
minute are counted from the first batch of each process to the last picture.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support import batch_jobs

PICTURES = 200
KILLED = ((2, 0), (2, 17), (1, 60), (3, 110), (2, 160))
"""Processes, and the number of pictures at which they are killed; at 0, characters are being encoded."""
LAST = 3
"""Processes of the last start."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the toy models on the CPU")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("arguments", nargs="*", help="of instantcharacter batch, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            compare_sizes(Path(folder))
            sys.exit(disturb(Path(folder)))
        for gpus in options.gpus:
            measure(Path(folder), gpus, options.arguments)


def disturb(folder: Path) -> int:
    """Kill a job at several moments, and compare its pictures with an undisturbed one's; returns the exit status."""
    jobs = batch_jobs.write_jobs(folder / "jobs.jsonl", PICTURES)
    begin = time.perf_counter()
    batch_jobs.finish(jobs, folder / "undisturbed", 1)
    print(f"undisturbed, 1 process: {PICTURES} pictures in {time.perf_counter() - begin:.0f} s", flush=True)
    disturbed = folder / "disturbed"
    for processes, pictures in KILLED:
        run = batch_jobs.start(jobs, disturbed, processes)
        if not pictures:
            while not list(disturbed.glob(".cache/characters/*")):
                time.sleep(0.01)
        print(f"{processes} processes, killed at {batch_jobs.kill_at(run, disturbed, pictures)} pictures", flush=True)
    batch_jobs.finish(jobs, disturbed, LAST)
    one, other = (batch_jobs.contents(folder / name) for name in ("undisturbed", "disturbed"))
    equal = sum(one[name] == other.get(name) for name in one)
    listed = (disturbed / "pictures.jsonl").read_text(encoding="utf-8").splitlines()
    print(
        f"finished by {LAST} processes: {len(other)} pictures, {equal} equal byte for byte, {len(listed)} lines listed"
    )
    return int(equal != PICTURES or len(other) != PICTURES or len(listed) != PICTURES)


def compare_sizes(folder: Path) -> None:
    """Seconds a picture in batches of four and alone."""
    jobs = folder / "alike.jsonl"
    row = {"prompt": "a character waving", "reference": str(batch_jobs.ASSETS / "monster.png"), "size": "256x256"}
    jobs.write_text((json.dumps(row) + "\n") * 16, encoding="utf-8")
    for size in (1, 4):
        output = folder / f"batches of {size}"
        batch_jobs.finish(jobs, output, 1, (*batch_jobs.TOY, "--steps=8", f"--batch-size={size}"))
        lines = (output / "pictures.jsonl").read_text(encoding="utf-8").splitlines()[4:]  # without the first batch
        seconds = [json.loads(line)["seconds"] for line in lines]
        print(f"batches of {size}, 256x256, 8 steps: {sum(seconds) / len(seconds):.3f} s a picture", flush=True)


def measure(folder: Path, gpus: int, arguments: list[str]) -> None:
    """Pictures a minute of a job on a number of GPUs."""
    output = folder / f"{gpus} GPUs"
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}", "-m", "instantcharacter"]
    subprocess.run([sys.executable, *launch, "batch", *arguments, "--output", str(output)], check=True)
    written = sorted(path.stat().st_mtime for path in output.rglob("*.png"))
    size = json.loads((output / "job.json").read_text(encoding="utf-8"))["batch_size"]
    after_first = written[gpus * size :]
    minutes = (written[-1] - written[gpus * size - 1]) / 60
    print(f"{gpus} GPUs, batches of {size}: {len(after_first) / minutes:.2f} pictures a minute", flush=True)


if __name__ == "__main__":
    main()
