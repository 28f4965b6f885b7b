"""What differs between the supported Airflows, in one place; each piece says when it can go."""

from __future__ import annotations

import inspect
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import BaseSensorOperator, Context


def execute_as_sensor(sensor: BaseSensorOperator, context: Context) -> Any:
    """
    Do what ``super().execute(context)`` does in a sensor that has an ``execute`` of its own.

    Airflow 2 guards ``execute`` against calls from outside a task, and takes a subclass's call for one: a warning in
    every log, and a failure under ``allow_nested_operators=False``. Goes with Airflow 2.11.

    :param sensor: the sensor.
    :param context: the running task's context.
    :return: what the sensor's last poke gave.
    """
    from airflow.providers.common.compat.sdk import BaseSensorOperator

    return inspect.unwrap(BaseSensorOperator.execute)(sensor, context)


def first_reschedule_date(context: Context) -> datetime | None:
    """
    Say when a rescheduled sensor first polled, as its ``timeout`` counts it.

    :param context: the running task's context.
    :return: the time, aware; ``None`` at the first poll.
    """
    ti = context["ti"]
    try:
        asked = ti.get_first_reschedule_date
    except AttributeError:
        # Airflow 2, which has it as a private function only. Goes when Airflow 2.11 is no longer supported.
        from airflow.sensors.base import _orig_start_date

        found: datetime | None = _orig_start_date(
            dag_id=ti.dag_id,
            task_id=ti.task_id,
            run_id=ti.run_id,
            map_index=ti.map_index,
            try_number=(ti.max_tries or 0) - (ti.task.retries or 0) + 1,
        )
        return found
    return asked(context)
