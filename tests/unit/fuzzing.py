"""Tests whose inputs hypothesis thinks up: a few of them in the short run, many in the long one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def fuzzed(
    *strategies: SearchStrategy[Any], short: int = 15, full: int = 150
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with values of these strategies, and with each ``hypothesis.example`` below this decorator."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def run(examples: int) -> None:
            # An example may make sockets and threads, so time says nothing.
            chosen = settings(
                deadline=None, max_examples=examples, suppress_health_check=list(HealthCheck), derandomize=True
            )
            chosen(given(*strategies)(test))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return pytest.mark.parametrize("examples", [short, pytest.param(full, marks=pytest.mark.long)])(run)

    return decorate
