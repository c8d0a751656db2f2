"""How a program ends that cannot go on: one line on stderr that names what was wrong, exit status 1.

Every main and script runs inside `one_line_errors`. --debug shows where in the code it was found. Where torchrun
started several processes, those that fail alike say so once (util/distributed.py). Nothing here is slow to import.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program stands, as Ctrl-C is."""


class RanksFailed(Exception):
    """What failed on some of the processes, raised on all of them at the same point."""


_SAID_IN_FULL = (ValueError, OSError, ArithmeticError, ImportError, RanksFailed)
"""Their messages are written for users. Others also get their type and the line of code where they were raised."""
_TIME_TO_SPEAK_S = 3.0  # torchrun ends all processes once one has ended: the one that speaks goes first
_WORKER_ERROR = re.compile(r"^Caught \S+ in .+\nOriginal Traceback", re.MULTILINE)
_LAST_ERROR = re.compile(r"^(?:[\w.]+\.)?(\w+): ", re.MULTILINE)


@contextmanager
def one_line_errors(program: str = "", debug: bool = False) -> Iterator[None]:
    """An exception inside becomes SystemExit with one line, `PROGRAM: error: ...`, which also goes into the run's log.

    debug: the traceback is printed first. Ctrl-C becomes exit status 130 and SIGTERM 143, with one line too.
    """
    with _terminated_as_interrupted():
        try:
            yield
        except KeyboardInterrupt as stop:
            number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
            if not is_one_of_several():  # else torchrun says it
                _say(f"{program or 'error'}: interrupted ({number.name})")
            raise SystemExit(128 + number) from None
        except Exception as error:
            if debug:
                traceback.print_exc()
            line = f"{program}: error: {one_line(error)}" if program else f"error: {one_line(error)}"
            if is_one_of_several():
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, while this one still tells why
                _say_for_several(line, error)
                raise SystemExit(1) from error
            _note_in_log(line)
            raise SystemExit(line) from error


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside. Only the main thread may set handlers; forked children, which inherit this
    one, die of the signal as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise Terminated
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def one_line(error: BaseException) -> str:
    """What went wrong, for a user: the file and the reason, without a traceback."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    is_of_worker = _WORKER_ERROR.search(text) is not None
    text = " ".join((_cause_in_worker(text) if is_of_worker else text).split())
    if isinstance(error, MemoryError):
        return f"out of memory: {text}" if text else "out of memory"
    if text and (is_of_worker or isinstance(error, _SAID_IN_FULL)):
        return text
    return f"{type(error).__name__}: {text} ({_place(error)}; --debug shows all of it)"


def _cause_in_worker(text: str) -> str:
    """The last message of a traceback that a data worker sent as text."""
    found = list(_LAST_ERROR.finditer(text))
    if not found:
        return text.strip().splitlines()[-1]
    message = text[found[-1].end() :]
    system_error = re.fullmatch(r"\[Errno \d+\] (.+): '(.+)'\s*", message)
    return f"{system_error[2]}: {system_error[1]}" if system_error else message


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "no place known"
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno} in {frames[-1].name}"


def _note_in_log(line: str) -> None:
    """Into the run's log.txt, if there is one."""
    if "util.logging" in sys.modules:
        from util.logging import note_in_log  # not before: it imports numpy

        note_in_log(line)


def _say(line: str) -> None:
    _note_in_log(line)
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


# --- several processes -----------------------------------------------------------------------------------------------


def is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first_here() -> bool:
    """Whether this process speaks for its machine before the processes know one another."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def first_process_speaks() -> Iterator[None]:
    """What is printed inside, of mistakes on the command line, is printed by one process of each machine."""
    with nullcontext() if is_first_here() else redirect_stderr(io.StringIO()):
        try:
            yield
        except SystemExit as end:
            if is_first_here() or not end.code:
                raise
            time.sleep(_TIME_TO_SPEAK_S)
            raise SystemExit(1 if isinstance(end.code, str) else end.code) from end


def _say_for_several(line: str, error: Exception) -> None:
    """Prints the line if this process is the one to print it. Returns when it is printed."""
    if "torch" in sys.modules:
        from util.distributed import say_once  # not before: it imports torch

        say_once(line, error, _say)
    elif is_first_here():
        _say(line)
    else:
        time.sleep(_TIME_TO_SPEAK_S)
