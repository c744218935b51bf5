"""How it scales: measured at the tiny size by two processes, and on paper."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scaling_model import HEADS, Machine, apart, tables, together, training

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_part_is_measured_on_one_and_on_two():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "benchmarks.scaling", "--tiny"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [line for line in run.stdout.splitlines() if " GPUs: " in line]
    assert [row[:17].split() for row in rows] == [
        [part, count, "GPUs:"] for part in ("apart", "together", "training") for count in "12"
    ]
    shared = rows[3]
    assert "off" in shared and all(float(text.split()[0]) < 0.05 for text in shared.split(", ") if text.endswith("off"))


def test_on_paper_one_gpu_is_what_was_measured():
    machine = Machine()
    assert together(machine, 1) == machine.step
    assert training(machine, 1, 1) == machine.training_step
    reading, generating, _ = apart(machine, 1, 100)
    assert generating == 100 * machine.picture > reading


def test_on_paper_more_gpus_are_sooner_until_hosts_or_links_are_the_bound():
    machine = Machine()
    steps = [together(machine, count) for count in range(1, 9) if HEADS % count == 0]
    assert steps == sorted(steps, reverse=True)
    assert together(machine, 24) > together(machine, 8), "a slower link between hosts"
    assert training(machine, 64, 64) > training(machine, 64, 8), "weights that cross hosts"
    reading = [apart(machine, count, 10_000)[0] for count in (8, 64, 512)]
    assert reading == sorted(reading), "more hosts read the models from one folder"


def test_scaling_md_has_the_tables():
    text = (ROOT / "benchmarks/SCALING.md").read_text(encoding="utf-8")
    for table in tables(Machine()).split("\n\n"):
        assert table in text
