"""Files and servers of a rehearsal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support import server as comfyui
from support.server import Server


def make_files(base: Path, kinds: Iterable[str], tiny: bool) -> None:
    """Make the files of these kinds that are missing, with ComfyUI's Python, see ``benchmarks.rehearsal.files``."""
    found = comfyui.find_comfyui()
    maker = [comfyui.comfyui_python(found), "-m", "benchmarks.rehearsal.files", base, *kinds, "--comfyui", found]
    environment = {**os.environ, "PYTHONPATH": str(comfyui.PACK)}
    if subprocess.run([*maker, *(["--tiny"] if tiny else [])], check=False, env=environment).returncode:
        sys.exit("the files could not be made; see above")


@contextmanager
def serving(name: str, base: Path, output: Path, *, static: bool, cpu: bool) -> Iterator[Server]:
    """A ComfyUI server without its frontend, whose log is added to ``NAME.log`` in the output folder.

    Args:
        name: of what runs on it.
        base: ComfyUI's base folder.
        output: for the log.
        static: without dynamic VRAM.
        cpu: without a GPU.
    """
    page = base / "page/index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("<html></html>", encoding="utf-8")
    flags = ["--front-end-root", str(page.parent), "--disable-api-nodes"]
    flags += ["--disable-dynamic-vram"] if static else []
    try:
        with comfyui.serving(base, *flags, cpu=cpu) as server:
            print(f"--- {name}: {_described(server)}", flush=True)
            yield server
    finally:
        with (output / f"{name}.log").open("a") as log:
            log.write((base / "comfyui.log").read_text(errors="replace"))


def _described(server: Server) -> str:
    """Card, versions and commit."""
    stats = server.get("/system_stats")
    git = subprocess.run(["git", "-C", comfyui.PACK, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return (
        f"{stats['devices'][0]['name']}, ComfyUI {stats['system']['comfyui_version']}, "
        f"torch {stats['system']['pytorch_version']}, commit {git.stdout.strip() or 'unknown'}"
    )
