"""Runs the tests in ``inside/`` with ComfyUI's own Python, in which ComfyUI can be imported.

Those of what runs on the GPU are run on pretended ones, too, see ``inside/conftest.py``.
"""

from __future__ import annotations

import os
import subprocess

import pytest
from support import server as comfyui

REASON = comfyui.why_not("pytest")
INSIDE = comfyui.PACK / "tests/comfyui/inside"
FILES = sorted(path.name for path in INSIDE.glob("test_*.py") if path.name != "test_several_gpus.py")
ON_GPUS = [
    (file, gpu)
    for file in ("test_model_patch.py", "test_patchers.py", "test_sampler.py")
    for gpu in ("static", "novram", "dynamic", "tight")
]
ON_GPUS += [("test_toy.py", gpu) for gpu in ("static", "novram")]
ON_GPUS += [("test_sampler.py", gpu) for gpu in ("second", "cpu")]
ON_GPUS += [("test_several_gpus.py", gpu) for gpu in ("second", "dynamic-second")]


@pytest.mark.skipif(bool(REASON), reason=str(REASON))
@pytest.mark.parametrize(("file", "gpu"), [*((file, "") for file in FILES), *ON_GPUS])
def test_inside_comfyui(file, gpu):
    found = comfyui.find_comfyui()
    command = [comfyui.comfyui_python(found), "-m", "pytest", INSIDE / file, "-p", "no:cacheprovider"]
    environment = {**os.environ, "INSIDE_COMFYUI": str(found), "PRETENDED_CUDA": gpu, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=comfyui.PACK, env=environment, capture_output=True, text=True)
    print(run.stdout[-10_000:])
    assert run.returncode == 0, run.stderr[-1000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
