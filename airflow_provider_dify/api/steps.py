"""
What runs the requests of :data:`~airflow_provider_dify.api.calls.Steps`, on a worker and on an event loop.

The two differ in the ``await`` only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")


def run_steps(steps: Generator[Any, Any, T], take_step: Callable[[Any], Any]) -> T:
    """
    Run requests that depend on each other.

    :param steps: yields each request, and is sent what its response meant.
    :param take_step: sends a request, and returns what its response means.
    :return: what the steps return.
    """
    try:
        step = next(steps)
        while True:
            try:
                result = take_step(step)
            except BaseException as error:  # noqa: PERF203
                step = steps.throw(error)
            else:
                step = steps.send(result)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


async def run_steps_async(steps: Generator[Any, Any, T], take_step: Callable[[Any], Awaitable[Any]]) -> T:
    """
    Run requests that depend on each other, on an event loop.

    :param steps: yields each request, and is sent what its response meant.
    :param take_step: sends a request, and returns what its response means.
    :return: what the steps return.
    """
    try:
        step = next(steps)
        while True:
            try:
                result = await take_step(step)
            except BaseException as error:  # noqa: PERF203
                step = steps.throw(error)
            else:
                step = steps.send(result)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
