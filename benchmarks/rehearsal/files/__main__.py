"""Random files with the released ones' names, layouts and sizes, and pictures.

    python -m benchmarks.rehearsal.files --comfyui ~/comfy/ComfyUI /tmp/base models           # 46 GB: 75 s on an H100
    python -m benchmarks.rehearsal.files --comfyui ~/comfy/ComfyUI /tmp/base diffusers gguf   # 24 and 13 GB more
    python -m benchmarks.rehearsal.files --comfyui ~/comfy/ComfyUI /tmp/base models --tiny    # the tests' models

``benchmarks.rehearsal`` runs this with ComfyUI's Python. The files go into ``models`` and ``input`` of a ComfyUI base
folder; existing ones stay as they are. They wait in host memory to be written: 64 GiB of it are needed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rehearsal.files",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", type=Path, help="ComfyUI's base folder, created if it is missing")
    parser.add_argument("kind", nargs="+", choices=("models", "diffusers", "gguf"))
    parser.add_argument("--comfyui", type=Path, required=True, help="its folder")
    parser.add_argument("--tiny", action="store_true", help="the tests' models, which have the same layouts")
    options = parser.parse_args()
    sys.argv = ["comfyui", *([] if torch.cuda.is_available() else ["--cpu"])]
    sys.path.insert(0, str(options.comfyui))
    import comfy.options

    comfy.options.enable_args_parsing()
    from . import diffusers_folders, gguf_file, pictures, released, tiny
    from .writer import Writer

    begin = time.perf_counter()
    makers = {
        "models": released.write_models,
        "diffusers": diffusers_folders.write_folders,
        "gguf": gguf_file.write_gguf,
    }
    with Writer() as writer:
        for kind in options.kind:
            (tiny.MAKERS if options.tiny else makers)[kind](options.base / "models", writer)
        pictures.write_pictures(options.base / "input")
    print(f"files: {' '.join(options.kind)} in {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
