"""Stopping on request: a signal is noted, and the loop ends at a point of its own choosing.

with StopRequest() as stop:
    for batch in batches:
        step(batch)
        if any_rank(stop.is_set):
            save()
            break
sys.exit(stop.exit_code)
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Schedulers send SIGTERM or, before the time is up, SIGUSR1; a terminal SIGINT and, when it closes, SIGHUP."""


class StopRequest:
    """Handlers of SIGNALS within a `with` block (main thread only); the old ones come back afterwards. A SIGHUP that is
    ignored, as under nohup, stays so.

    A second SIGINT raises KeyboardInterrupt at once. SIGINTs within `repeat_after_s` seconds of the first request count
    as one: torchrun passes a Ctrl-C on to processes that already got it from the terminal.
    """

    def __init__(self, repeat_after_s: float = 1.0) -> None:
        self.signum: int | None = None
        self._repeat_after_s = repeat_after_s
        self._first_time = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def is_set(self) -> bool:
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it; 0 if there was none."""
        return 0 if self.signum is None else 128 + self.signum

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._first_time = signum, time.monotonic()
            name = signal.Signals(signum).name
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{name}: stopping at the next safe point (Ctrl-C to stop at once)\n".encode())
        elif signum == signal.SIGINT and time.monotonic() - self._first_time >= self._repeat_after_s:
            raise KeyboardInterrupt
