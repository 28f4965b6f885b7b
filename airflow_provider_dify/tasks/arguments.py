# SPDX-License-Identifier: Apache-2.0
"""The arguments of operators and sensors, parsed when the Dag is."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow_provider_dify.airflow_versions import CAN_END_FROM_TRIGGER
from airflow_provider_dify.exceptions import DifyConfigurationError


def parse_count(name: str, value: Any) -> int:
    """Parse an argument that counts something: a whole number, not below 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DifyConfigurationError(f"{name} must be a whole number, not below 0: {value!r:.100}")
    return value


def parse_limit(name: str, value: Any) -> float:
    """Parse an argument that is a number of rows, from 0 on, or a share of them, from 0.0 to 1.0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (0 <= value <= 1 if isinstance(value, float) else value >= 0):
        raise DifyConfigurationError(
            f"{name} must be a whole number, not below 0, or a share of the rows from 0.0 to 1.0: {value!r:.100}"
        )
    number: float = value
    return number


def parse_seconds(name: str, value: Any) -> float:
    """Parse an argument that is a length of time: seconds, or a ``timedelta``."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise DifyConfigurationError(f"{name} must be a number of seconds or a timedelta, not below 0: {value!r:.100}")
    return float(value)


def parse_end_from_trigger(value: bool) -> bool:
    """Check that this Airflow lets a trigger end its task, if that is asked for: Airflow 2 doesn't."""
    if value and not CAN_END_FROM_TRIGGER:
        raise DifyConfigurationError("end_from_trigger=True needs Airflow 3.0 or later. Use deferrable=True.")
    return value
