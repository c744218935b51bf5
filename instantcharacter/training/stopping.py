"""Requests to stop a training: noted when they come, followed by all its processes after the same step."""

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
    """Within this block the first SIGINT and the first SIGTERM are noted; a second one does what it did before.

    Yields a function for the end of each step: whether a request came to any of the processes. They have to call it
    together and all get the same answer. It passes between the hosts' memories, so that no process waits for its GPU.

    Python tells signals to the main thread alone: in another thread nothing is noted here, and the answer is the other
    processes'.

    Args:
        processes: how many train together.
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
