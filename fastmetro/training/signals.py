"""Signals that end a training after its step, with everything saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal came in work that may be left at any point."""


class GracefulSignals:
    """Calls ``stop`` at the first SIGINT or SIGTERM; a second one acts as usual."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._interrupts = False
        self._previous: dict[int, Any] = {}

    @contextlib.contextmanager
    def interrupting(self, wanted: bool) -> Iterator[None]:
        """A block that the first signal leaves at once, if that is wanted, with :class:`Interrupted`."""
        self._interrupts = wanted
        try:
            yield
        finally:
            self._interrupts = False

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        self._stop()
        self._restore()
        if self._interrupts:
            raise Interrupted

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, *error: object) -> None:
        self._restore()
