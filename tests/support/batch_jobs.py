"""Jobs of small pictures by the toy models, in processes that can be killed at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "assets"
TOY = ("--model", "toy", "--size", "64x64", "--steps", "2", "--device", "cpu")


def write_jobs(path: Path, count: int) -> Path:
    """A job with two characters, two sizes, a LoRA and a negative prompt in some of its lines."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            picture = ("monster.png", "owl.png")[i // 7 % 2]
            row: dict[str, object] = {"prompt": f"a character waving {i % 37}", "reference": str(ASSETS / picture)}
            if i % 11 == 0:
                row["lora"] = f"{ASSETS}/toy/pixel_art.safetensors:0.8"
            if i % 13 == 0:
                row["size"] = "48x64"
            if i % 17 == 0:
                row |= {"true_cfg": 2, "negative_prompt": "snow"}
            file.write(json.dumps(row) + "\n")
    return path


def start(jobs: Path, output: Path, processes: int, arguments: Sequence[str] = TOY) -> subprocess.Popen[str]:
    """The command ``batch``, begun, alone or under ``torchrun``."""
    launch = ["-m", "instantcharacter"]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *launch]
    command = [sys.executable, *launch, "batch", str(jobs), "--output", str(output), *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(jobs: Path, output: Path, processes: int, arguments: Sequence[str] = TOY) -> None:
    """The command ``batch``, run to its end; raises ``RuntimeError`` with what it printed if it fails."""
    run = start(jobs, output, processes, arguments)
    printed, _ = run.communicate()
    if run.returncode:
        raise RuntimeError(f"status {run.returncode}:\n{printed}")


def kill_at(run: subprocess.Popen[str], output: Path, pictures: int) -> int:
    """Kill a command and all of its processes (``kill -9``) once it has this many pictures; returns how many it has."""
    while len(list(output.glob("*.png"))) < pictures and run.poll() is None:
        time.sleep(0.01)
    launcher = psutil.Process(run.pid)
    for process in (launcher, *launcher.children(recursive=True)):
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    run.communicate()
    return len(list(output.glob("*.png")))


def contents(output: Path) -> dict[str, bytes]:
    """The bytes of every picture by name."""
    return {path.name: path.read_bytes() for path in output.glob("*.png")}
