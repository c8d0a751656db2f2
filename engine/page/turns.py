"""One at a time: who wants pictures waits for those that came before."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_S = 0.25  # how often who waits looks whether anyone still wants the answer


class BusyError(Exception):
    """More are waiting than may."""


class Turns:
    """Turns in the order of arrival. max_waiting: how many may wait beside the one whose turn it is."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._line: deque[object] = deque()
        self._moved = threading.Condition()

    @contextmanager
    def place(self) -> Iterator[object]:
        """A place in the line, for as long as the block lasts. Raises BusyError if the line is full."""
        ticket = object()
        with self._moved:
            if len(self._line) > self.max_waiting:
                raise BusyError(f"{len(self._line) - 1} others are waiting already: try again later")
            self._line.append(ticket)
        try:
            yield ticket
        finally:
            with self._moved:
                self._line.remove(ticket)
                self._moved.notify_all()

    def wait(self, ticket: object, tell: Callable[[int], None], is_gone: Callable[[], bool]) -> bool:
        """Returns when it is the ticket's turn: True; or as soon as `is_gone` says so: False.

        tell: gets the number of those before it whenever that changes.
        """
        told = None
        while not is_gone():
            with self._moved:
                ahead = self._line.index(ticket)
                if ahead and ahead == told:
                    self._moved.wait(LOOK_S)
                    ahead = self._line.index(ticket)
            if not ahead:
                return True
            if ahead != told:
                tell(ahead)
                told = ahead
        return False
