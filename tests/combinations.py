"""Which parameters of a test are in the short run, ``make test``, and which only in the long one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def each_or_long(values: Iterable[Any], short: Collection[Any]) -> list[ParameterSet]:
    """Return the values as parameters; all but those of the short run are marked ``long``."""
    return [pytest.param(value, marks=() if value in short else pytest.mark.long) for value in values]


def pairs(first: Sequence[Any], second: Sequence[Any]) -> list[ParameterSet]:
    """
    Return each combination of two lists as parameters, of which the short run has the fewest that name every value.

    The others are marked ``long``. A value may be a ``pytest.param``, which keeps its id.
    """
    count = max(len(first), len(second))
    short = {(number % len(first), number % len(second)) for number in range(count)}
    return [
        pytest.param(
            *_values(one),
            *_values(other),
            id=f"{_id(one)}-{_id(other)}",
            marks=() if (row, column) in short else pytest.mark.long,
        )
        for row, one in enumerate(first)
        for column, other in enumerate(second)
    ]


def _values(value: Any) -> tuple[Any, ...]:
    return value.values if isinstance(value, ParameterSet) else (value,)


def _id(value: Any) -> str:
    if isinstance(value, ParameterSet):
        return str(value.id) if value.id else "-".join(_id(each) for each in value.values)
    return str(getattr(value, "__name__", value))
