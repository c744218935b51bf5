"""Writes files in the background."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import save_file


class Writer:
    """Writes files in its own threads; each gets its name when it is complete."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(6)
        self._jobs: list[Future] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        for job in self._jobs:
            job.result()

    def put(self, path: Path, make: Callable[[], Any], save: Callable[[Any, Path], Any] = save_file) -> None:
        """Make the content of a file or folder that does not exist, and save it in the background."""
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        content = make()

        def write() -> None:
            partial = path.with_name(f"{path.name}.part")
            save(content, partial)
            partial.rename(path)

        self._jobs.append(self._pool.submit(write))
