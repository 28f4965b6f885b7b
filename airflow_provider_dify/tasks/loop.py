# SPDX-License-Identifier: Apache-2.0
"""
An event loop in a thread, on which a task's work runs while the task's main thread waits for it.

The main thread is the only one that talks to Airflow: on Airflow 3.0 and 3.1 the line to a task's supervisor has no
lock. So the work asks it to. A kill, or a task's ``execution_timeout``, cancels the work, which then has some seconds
to stop what it started. So nothing of it runs in a signal's handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from airflow_provider_dify.exceptions import DifyTaskKilled

T = TypeVar("T")

# How long the main thread waits for work that was cancelled. Airflow 3 ends a task's process 5 seconds after a kill.
SECONDS_AFTER_KILL = 6.0


class TaskLoop:
    """Runs a task's work on an event loop in a thread."""

    def __init__(self) -> None:
        # Whether Airflow has ended the task.
        self.was_killed = False
        # What the work asks of the main thread; None when the work is over.
        self._asked: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work: asyncio.Task[Any] | None = None
        # Whether a signal came in the middle of a message to Airflow, after which no other may be sent.
        self._line_is_cut = False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """
        Run the work to its end, and return or raise what it does; a DifyTaskKilled if Airflow killed the task. What a
        signal's handler raises in this thread goes on after the work has ended.
        """
        outcome: Future[T] = Future()

        def run_loop() -> None:
            try:
                outcome.set_result(asyncio.run(self._run(work)))
            except BaseException as error:
                outcome.set_exception(error)
            finally:
                self._loop = self._work = None
                self._asked.put(None)

        threading.Thread(target=run_loop, name="dify-task", daemon=True).start()
        try:
            self._serve()
        except BaseException:
            self.kill()
            self._serve(SECONDS_AFTER_KILL)
            raise
        try:
            return outcome.result()
        except asyncio.CancelledError:
            raise DifyTaskKilled(
                "Airflow killed the task while it waited for Dify. A retry starts or finds its run again."
            ) from None

    def kill(self) -> None:
        """Cancel the work, from any thread, also in a signal's handler."""
        self.was_killed = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._cancel)

    async def ask(self, function: Callable[[], T]) -> T:
        """Have the main thread call a function that talks to Airflow; return or raise what it does."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def call() -> None:
            try:
                if self._line_is_cut:
                    raise DifyTaskKilled("Airflow killed the task in the middle of a message to it.")
                result = function()
            except Exception as error:
                _answer(loop, answer, answer.set_exception, error)
            except BaseException:
                # Raised by a signal's handler.
                self._line_is_cut = True
                _answer(loop, answer, answer.set_exception, DifyTaskKilled("Airflow ended the task."))
                raise
            else:
                _answer(loop, answer, answer.set_result, result)

        self._asked.put(call)
        return await answer

    async def _run(self, work: Coroutine[Any, Any, T]) -> T:
        self._work, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        if self.was_killed:
            self._loop.call_soon(self._cancel)
        return await work

    def _cancel(self) -> None:
        work, self._work = self._work, None
        # Once: what the work does then is to be done to its end.
        if work is not None:
            work.cancel()

    def _serve(self, seconds: float | None = None) -> None:
        """Do what the work asks for until it is over, or for so many seconds."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            try:
                call = self._asked.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
            except Empty:
                return
            if call is None:
                return
            call()


def _answer(
    loop: asyncio.AbstractEventLoop, answer: asyncio.Future[T], set_answer: Callable[[Any], None], value: object
) -> None:
    # The loop may be over, where the work no longer waits for the answer.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(lambda: None if answer.done() else set_answer(value))
