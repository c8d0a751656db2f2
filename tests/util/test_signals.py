"""Stopping on request."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from util.signals import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def _hangups_count() -> Iterator[None]:
    """Under nohup they are ignored, and stay so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]
)
def test_a_signal_is_noted_and_the_block_goes_on(number: int, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopRequest() as stop:
        assert not stop.is_set and stop.signum is None and stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop.is_set and stop.signum == number and stop.exit_code == code
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert stop.exit_code == code  # still known afterwards
    assert signal.Signals(number).name in capfd.readouterr().err


def test_a_second_ctrl_c_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(repeat_after_s=0.0) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before and stop.signum == signal.SIGINT


def test_the_same_ctrl_c_twice_is_one_request() -> None:
    with StopRequest(repeat_after_s=60.0) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signum == signal.SIGINT


def test_handlers_come_back_after_an_exception() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="loss"), StopRequest():
        raise ValueError("loss is not finite")
    assert signal.getsignal(signal.SIGTERM) == before


def test_nohup_stays_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_set and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
