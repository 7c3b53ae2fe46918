"""The queue in front of an engine: order of arrival, exclusive tickets, and waits that end early."""

from __future__ import annotations

import threading

import pytest

from ov_phi3 import StreamError
from ov_phi3.backends.request_queue import RequestQueue, Ticket


class TestOrder:
    def test_an_exclusive_ticket_waits_for_all_before_it_and_holds_back_all_behind_it(self) -> None:
        queue = RequestQueue(3)
        first, second, exclusive, behind = Ticket(), Ticket(), Ticket(exclusive=True), Ticket()
        for ticket in (first, second, exclusive, behind):
            queue.join(ticket)
        in_other_thread(lambda: queue.start(first, 0))
        in_other_thread(lambda: queue.start(second, 0))
        assert not exclusive.wait(0)
        assert not behind.wait(0)
        queue.leave(second)
        assert not exclusive.wait(0)
        queue.leave(first)
        in_other_thread(lambda: queue.start(exclusive, 0))
        assert not behind.wait(0)
        queue.leave(exclusive)
        in_other_thread(lambda: queue.start(behind, 0))

    def test_an_abandoned_ticket_lets_the_next_one_run(self) -> None:
        queue = RequestQueue(1)
        first, second, third = Ticket(), Ticket(), Ticket()
        for ticket in (first, second, third):
            queue.join(ticket)
        assert queue.start(first, 0)
        queue.abandon(second)
        assert not queue.start(second, 0)
        queue.leave(second)
        assert not third.wait(0)
        queue.leave(first)
        assert queue.start(third, 0)

    def test_a_withdrawn_ticket_leaves_the_queue(self) -> None:
        queue = RequestQueue(1)
        first, second = Ticket(), Ticket()
        queue.join(first)
        queue.join(second)
        queue.withdraw(first)
        assert not queue.start(first, 0)
        assert queue.start(second, 0)
        queue.withdraw(second)  # it runs: no effect
        third = Ticket()
        in_other_thread(lambda: queue.join(third) or True)
        assert not third.wait(0)

    def test_abandoning_a_started_ticket_has_no_effect(self) -> None:
        queue = RequestQueue(1)
        ticket = Ticket()
        queue.join(ticket)
        assert queue.start(ticket, 0)
        queue.abandon(ticket)
        assert ticket.started
        assert not ticket.abandoned


class TestReentrancy:
    """A thread that runs a request may not wait for the same queue."""

    def test_a_request_inside_a_request_is_refused(self) -> None:
        queue = RequestQueue(1)
        with queue.turn():
            with pytest.raises(StreamError, match="from inside a callback"):
                queue.join(Ticket())
            with pytest.raises(StreamError, match=r"close\(\) was made from inside a callback"):
                queue.check_not_inside("close()")
            with pytest.raises(StreamError), queue.turn():
                pass
        with queue.turn():  # nothing was left in the queue
            pass

    def test_another_thread_may_wait(self) -> None:
        queue = RequestQueue(2)
        ticket = Ticket()
        with queue.turn():
            in_other_thread(lambda: queue.join(ticket) or queue.start(ticket, 0))

    def test_another_queue_may_be_used(self) -> None:
        first, second = RequestQueue(), RequestQueue()
        with first.turn(), second.turn():
            pass

    def test_the_end_of_the_request_ends_the_refusal(self) -> None:
        queue = RequestQueue()
        ticket = Ticket()
        queue.join(ticket)
        assert queue.start(ticket, 0)
        queue.leave(ticket)
        queue.check_not_inside("a request")


def in_other_thread(work: object) -> None:
    """Run some work in a thread of its own; it must return True."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(work()))  # type: ignore[operator]
    thread.start()
    thread.join(30)
    assert results == [True]
