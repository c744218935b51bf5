"""Requests to stop a training: noted when a signal comes, followed by all processes after the same step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import distributed


@contextmanager
def stop_requests(processes: int) -> Iterator[Callable[[], bool]]:
    """Note the first SIGINT and the first SIGTERM inside this context; a second one has its former effect.

    Yields a function for the end of each step: whether any of the processes got a signal. All processes have to call it
    together and get the same answer. It communicates through host memory, so that no process waits for its GPU.

    Python delivers signals to the main thread only: in another thread the answer is that of the other processes.

    Args:
        processes: the number of processes that train together.
    """
    noted: list[int] = []
    handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}
    group = distributed.new_group(backend="gloo") if processes > 1 else None

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.signal(number, handlers[signal.Signals(number)])

    def requested() -> bool:
        if group is None:
            return bool(noted)
        anywhere = torch.tensor(len(noted))
        distributed.all_reduce(anywhere, group=group)
        return bool(anywhere)

    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    try:
        for number in handlers:
            signal.signal(number, note)
        yield requested
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
