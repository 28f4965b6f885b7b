"""Waits of a task's main thread, which a signal interrupts: its handler stops the run, which takes seconds."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty
from typing import Any

import pytest

from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.run_stream import WorkflowRunStream
from airflow_provider_dify.api.session import DifySession, Mailbox, call_within
from tests.dify_stand_in import API_KEY, DifyStandIn


def test_a_wait_goes_on_after_an_item_that_was_there_before_it() -> None:
    mailbox: Mailbox[int] = Mailbox()
    mailbox.put(1)
    assert mailbox.get(5) == 1
    threading.Timer(0.2, mailbox.put, [2]).start()
    assert mailbox.get(5) == 2
    began = time.monotonic()
    with pytest.raises(Empty):
        mailbox.get(0.2)
    assert 0.15 < time.monotonic() - began < 3


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], Any]], None]]:
    """What to do when a signal comes in a tenth of a second; a wait that does not end is ended by another one."""
    before = signal.getsignal(signal.SIGALRM)
    handlers: list[Callable[[], Any]] = []

    def handle(*_: Any) -> None:
        if not handlers:
            raise AssertionError("The wait did not end.")
        signal.setitimer(signal.ITIMER_REAL, 5)
        handlers.pop()()

    def prepare(handler: Callable[[], Any]) -> None:
        handlers.append(handler)
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.1)

    yield prepare
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_wait_for_an_event_ends_in_time_if_a_signals_handler_waits_longer(
    on_signal: Callable[[Callable[[], Any]], None],
) -> None:
    with DifyStandIn("1.16.1") as dify:
        dify.slots = 0
        connection = DifyConnection("my_dify", dify.base_url, API_KEY)
        session = DifySession(connection, connection.timeouts())
        body = b'{"inputs": {}, "user": "us", "response_mode": "streaming"}'
        with WorkflowRunStream(connection, session, f"{dify.base_url}/workflows/run", body, "us") as stream:
            while not stream.is_accepted:
                stream.next_event(0.5)
            # The ping that comes at once.
            stream.next_event(0.5)
            began = time.monotonic()
            on_signal(lambda: stream.next_event(1.0))
            assert stream.next_event(0.3) is None
            assert time.monotonic() - began < 4


def test_a_request_ends_in_time_if_a_signals_handler_takes_longer(
    on_signal: Callable[[Callable[[], Any]], None],
) -> None:
    was_aborted = threading.Event()
    began = time.monotonic()
    on_signal(lambda: time.sleep(1.0))
    with pytest.raises(TimeoutError):
        call_within(0.3, lambda: was_aborted.wait(20), was_aborted.set)
    assert was_aborted.is_set()
    assert time.monotonic() - began < 4
