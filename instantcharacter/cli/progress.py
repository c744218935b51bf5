"""Progress bars in the terminal. huggingface_hub's ``tqdm`` respects ``disable_progress_bars``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub.utils import tqdm


@contextmanager
def stage_bar(name: str, count: int) -> Iterator[Callable[[str], None]]:
    """Context manager: a progress bar over long stages.

    Args:
        name: the bar's title.
        count: how many stages there are.

    Yields:
        A function to call at the start of each stage, with the stage's name.
    """
    with tqdm(total=count, desc=name) as bar:
        started: list[str] = []

        def start(stage: str) -> None:
            if started:
                bar.update()
            started.append(stage)
            bar.set_postfix_str(stage)

        yield start
        bar.update()


@contextmanager
def byte_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Context manager: a progress bar in bytes.

    Yields:
        A function to call with the bytes that have arrived and the bytes in total.
    """
    with tqdm(desc=title, unit="B", unit_scale=True) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report
