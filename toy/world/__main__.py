"""``python -m toy.world OUT.png`` draws a sheet of the toy world."""

from __future__ import annotations

import argparse
from pathlib import Path

from .sheet import write_sheet

parser = argparse.ArgumentParser(prog="python -m toy.world", description="Draw a sheet of the toy world.")
parser.add_argument("out", type=Path, help="the picture to write")
parser.add_argument("--seed", type=int, default=0, help="another seed draws other characters (%(default)s)")
options = parser.parse_args()
write_sheet(options.out, options.seed)
