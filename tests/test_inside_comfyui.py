"""Runs the tests in ``in_comfyui/`` with ComfyUI's own Python, in which ComfyUI can be imported."""

from __future__ import annotations

import os
import subprocess

import comfyui
import pytest

REASON = comfyui.why_not("pytest")
INSIDE = comfyui.PACK / "tests/in_comfyui"


@pytest.mark.skipif(bool(REASON), reason=str(REASON))
@pytest.mark.parametrize("file", sorted(path.name for path in INSIDE.glob("test_*.py")))
def test_inside_comfyui(file):
    found = comfyui.find_comfyui()
    command = [comfyui.comfyui_python(found), "-m", "pytest", INSIDE / file, "-p", "no:cacheprovider"]
    environment = {**os.environ, "INSIDE_COMFYUI": str(found)}
    run = subprocess.run(command, cwd=comfyui.PACK, env=environment, capture_output=True, text=True)
    print(run.stdout[-10_000:])
    assert run.returncode == 0, run.stderr[-1000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
