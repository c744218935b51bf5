"""Threads take turns at a transformer: one generates or changes it, the others wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary


class Turns:
    """The turns at one transformer, whichever pipelines have it. A thread may take a turn within its own."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._generating = False

    @contextmanager
    def one(self, changes: bool = False) -> Iterator[None]:
        """Context manager of a turn; it waits for those of other threads.

        Args:
            changes: whether it changes what a run of the pipeline relies on.

        Raises:
            RuntimeError: it changes that, and this thread's own run, which called back, is not over.
        """
        with self._lock:
            if changes and self._generating:
                raise RuntimeError(
                    "the pipeline is generating a picture, and its callback cannot start another one, or change its "
                    "adapter, encoder or offloading: do so after the call, or set pipe._interrupt = True to end it"
                )
            yield

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Context manager of a turn that generates, see :meth:`one`."""
        with self.one(changes=True):
            self._generating = True
            try:
                yield
            finally:
                self._generating = False


_TURNS: WeakKeyDictionary[Any, Turns] = WeakKeyDictionary()


def turns_at(model: Any) -> Turns:
    """The turns at a transformer; the same ones for as long as it lives."""
    return _TURNS.setdefault(model, Turns())
