"""Runs the command line: ``python -m instantcharacter``, or ``python path/to/instantcharacter`` from any folder."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if not (__spec__ and __spec__.parent):  # run as a folder: start again as a module of the folder above
    sys.path[0] = str(Path(__file__).absolute().parents[1])
    runpy.run_module("instantcharacter", run_name="__main__", alter_sys=True)
    sys.exit()

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
