"""One at a time, in order, and not too many."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest

from engine.page.turns import BusyError, Turns


def never() -> bool:
    return False


def test_a_full_line_is_refused_and_moves_up() -> None:
    turns = Turns(max_waiting=1)
    with ExitStack() as second:
        with turns.place() as first_ticket:
            assert turns.wait(first_ticket, lambda ahead: None, never)
            second_ticket = second.enter_context(turns.place())
            with pytest.raises(BusyError, match="1 others are waiting"):
                second.enter_context(turns.place())
        assert turns.wait(second_ticket, lambda ahead: None, never)


def test_who_waits_is_told_how_many_are_ahead_and_goes_in_order() -> None:
    turns, order, told = Turns(max_waiting=3), [], []
    with ExitStack() as stack:
        tickets = [stack.enter_context(turns.place()) for _ in range(2)]
        is_gone = iter([False, False, True])
        assert not turns.wait(tickets[1], told.append, lambda: next(is_gone))
        assert told == [1]

    def job(name: str, begun: threading.Event) -> None:
        with turns.place() as ticket:
            begun.set()
            assert turns.wait(ticket, lambda ahead: None, never)
            order.append(name)

    with turns.place() as ticket:
        assert turns.wait(ticket, told.append, never)
        threads = []
        for name in "abc":
            begun = threading.Event()
            threads.append(threading.Thread(target=job, args=(name, begun)))
            threads[-1].start()
            begun.wait()
        assert order == []
    for thread in threads:
        thread.join()
    assert order == ["a", "b", "c"]
