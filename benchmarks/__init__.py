"""Benchmarks, run from the repository root: ``python -m benchmarks.memory``; ``RESULTS.md`` has what they measured."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # `support`: the tests' tiny models and their ComfyUI server
