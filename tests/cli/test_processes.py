from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instantcharacter.cli.main import main

ROOT = Path(__file__).parents[2]
TOY = ("--model=toy", "--steps=2", "--size=64x64", "--device=cpu")
REFERENCE = str(ROOT / "assets/monster.png")


def together(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command that two processes run, with ``--parallel context``."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "support.command_together"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *launch, *map(str, arguments), *TOY, "--parallel=context"],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def distance(path: Path, other: Path) -> int:
    """The greatest difference of two pictures' values."""
    one, two = (np.asarray(Image.open(each), dtype=int) for each in (path, other))
    return int(np.abs(one - two).max())


def test_processes_generate_one_picture_together(tmp_path):
    """Of a random seed, which they share; it is the picture that one process generates of it."""
    shared, alone = tmp_path / "shared.png", tmp_path / "alone.png"
    settings = ["generate", "--prompt", "a character waving", "--reference", REFERENCE]
    run = together(*settings, "--output", shared)
    assert run.returncode == 0, run.stdout
    assert run.stdout.count(f"wrote {shared}") == 1
    seed = json.loads(Image.open(shared).text["instantcharacter"])["seed"]
    assert main([*settings, *TOY, f"--output={alone}", f"--seed={seed}"]) == 0
    assert distance(shared, alone) <= 2


def test_processes_generate_each_picture_of_a_batch_together(tmp_path, capfd):
    rows = [
        {"prompt": "a character waving", "reference": REFERENCE},
        {"prompt": "a character that jumps", "reference": REFERENCE, "seed": 3, "size": "48x64"},
        {"prompt": "a bad size", "reference": REFERENCE, "size": "48x48"},
    ]
    jobs, shared, alone = tmp_path / "jobs.jsonl", tmp_path / "shared", tmp_path / "alone"
    jobs.write_text("\n".join(map(json.dumps, rows)))
    run = together("batch", jobs, "--output", shared, "--skip-bad")
    assert f"{jobs}:3: 48x48: 2 processes cannot share its 9 image tokens equally" in run.stdout
    assert f"2 of 3 pictures are in {shared / 'index.html'}" in run.stdout
    main(["batch", str(jobs), f"--output={alone}", *TOY])
    for name in ("0001.png", "0002.png"):
        assert distance(shared / name, alone / name) <= 2
    lines = [json.loads(line) for line in (shared / "pictures.jsonl").read_text().splitlines()]
    assert [(line["output"], "error" in line) for line in lines] == [("0001.png", False), ("0002.png", False)]


@pytest.mark.parametrize("command", [("generate", "--prompt=a fox"), ("batch", "jobs.jsonl")])
def test_one_process_is_told_how_to_start_several(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    Path("jobs.jsonl").write_text(json.dumps({"prompt": "a fox", "reference": REFERENCE}))
    assert main([*command, "--reference", REFERENCE, "--output=out.png", "--model=toy", "--parallel=context"]) == 2
    assert "torchrun --nproc-per-node GPUS -m instantcharacter" in capsys.readouterr().err


def test_processes_do_not_all_generate_the_same_picture(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate", "--prompt=a fox", "--reference", REFERENCE, "--model=toy", "--output=out.png"]) == 2
    assert "2 processes for one picture: give --parallel context, too" in capsys.readouterr().err
