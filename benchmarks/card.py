"""Makes a small card of a larger one, and watches its memory."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RESERVE = """
import sys, time, torch
reserved = None
for line in sys.stdin:
    del reserved
    torch.cuda.empty_cache()
    reserved = None
    if line.strip() != "all":
        time.sleep(2)  # processes that just ended free their memory
        free, spare = torch.cuda.mem_get_info()[0], int(float(line) * 2**30)
        if free < spare:
            sys.exit(f"the GPU has {free / 2**30:.1f} GiB free")
        reserved = torch.empty(free - spare, dtype=torch.uint8, device="cuda")
    print("done", flush=True)
"""


class GpuReserve:
    """A process that reserves the GPU's memory, so that others find less of it free.

    Args:
        python: with torch.
    """

    def __init__(self, python: Path) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([python, "-c", RESERVE], **pipes)

    def __enter__(self) -> GpuReserve:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def leave(self, gib: float | None) -> None:
        """Leave only so many GiB of the memory that is free now; None gives all of it back.

        Raises:
            OSError: less than that is free.
        """
        self._process.stdin.write(f"{'all' if gib is None else gib}\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise OSError(f"a card of {gib} GiB cannot be made here; see above")


@contextmanager
def card(gib: int | None, python: Path) -> Iterator[None]:
    """Leave only gib of the GPU's memory free inside this context: a process of this Python reserves the rest.

    Raises:
        OSError: no GPU has that much free memory.
    """
    if gib is None:
        yield
        return
    with GpuReserve(python) as reserve:
        reserve.leave(gib)
        yield


class GpuMemory:
    """Watches the memory of the GPU that ComfyUI takes with nvidia-smi: the first, or ``CUDA_VISIBLE_DEVICES``.

    Attributes:
        peak: the most in use since this was last set to 0, in GiB above what was in use at the beginning; 0 if off.
    """

    def __init__(self, on: bool) -> None:
        self.peak = 0.0
        self._on = on
        self._ended = threading.Event()

    def __enter__(self) -> GpuMemory:
        if self._on:
            threading.Thread(target=self._watch, args=(_gpu_memory(),), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self, before: float) -> None:
        while not self._ended.wait(0.15):
            self.peak = max(self.peak, _gpu_memory() - before)


def _gpu_memory() -> float:
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "-i", gpu, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024
