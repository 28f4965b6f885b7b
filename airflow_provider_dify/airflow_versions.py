# SPDX-License-Identifier: Apache-2.0
"""What differs between the supported Airflows, in one place; each piece says when it can be removed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any

from airflow import __version__ as airflow_version

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import BaseSensorOperator, Context


# Seconds by which a trigger's own deadline comes before Airflow's, which tells less of what happened.
TRIGGER_TIMEOUT_MARGIN = 120.0

_AIRFLOW = tuple(int(part) for part in airflow_version.split(".")[:2])

# The section of Airflow's settings that has the UI's address. Goes with Airflow 2.11.
UI_SECTION = "api" if _AIRFLOW >= (3, 0) else "webserver"
# Whether a trigger may end its task and push its XComs. Goes with Airflow 2.11.
CAN_END_FROM_TRIGGER = _AIRFLOW >= (3, 0)
# Whether templates are rendered where a task starts on the triggerer. Goes with Airflow 3.2.
CAN_START_FROM_TRIGGER = _AIRFLOW >= (3, 3)
# Whether an XCom may be None: Airflow 3.0 fails the task that pushes one. Goes with Airflow 3.0.
CAN_PUSH_NONE = _AIRFLOW != (3, 0)
# Whether a task's rendered fields may be written after it has run. Airflow 3.0 to 3.2 refuse those of a try that will
# be retried: 3.0 and 3.1 then end the task's process before its callbacks, 3.2 logs a traceback. Goes with Airflow 3.2.
CAN_RENDER_AFTER_EXECUTION = _AIRFLOW >= (3, 3)
# Whether clearing a task discards its state unless the user keeps it. Goes with Airflow 3.3.
CLEARING_DISCARDS_STATE = _AIRFLOW >= (3, 4)
# Whether an event trigger may be for the triggerers of a queue. Goes with Airflow 3.3.
EVENT_TRIGGERS_HAVE_QUEUES = _AIRFLOW >= (3, 4)
# Whether a trigger's on_kill is called also where another triggerer has taken the trigger over. Goes with Airflow 3.3.
KILLS_WHAT_IT_HANDS_OVER = _AIRFLOW < (3, 4)
# What no XCom's key may have on Airflow 3, which puts it into a URL as it is: the XCom would have another key, or the
# task fail (measured on 3.0.6 and 3.3.2). 3.0 takes one part of a path. Goes with the last Airflow that quotes no key.
_NOT_IN_XCOM_KEY = re.compile(
    r"[?#\x00-\x1f\x7f]|%[0-9A-Fa-f]{2}|(^|/)\.\.?(/|$)" + ("|/" if _AIRFLOW == (3, 0) else "")
)
# Whether XComs travel as strict JSON, without NaN and the like. Goes with Airflow 2.11.
XCOMS_ARE_STRICT_JSON = _AIRFLOW >= (3, 0)


def region_of(ti: Any) -> tuple[int, str]:
    """
    Return a task instance's map index or iteration, -1 for none, and the id of its region, empty for none: one
    execution of a map or loop (Airflow 3.4). All iterations have the map index -1. Goes with Airflow 3.3.
    """
    region = getattr(ti, "region_id", None)
    index = ti.map_index if region is None else ti.region_index
    return -1 if index is None else int(index), str(region) if region is not None and region.int else ""


def may_batch_events() -> bool:
    """Return whether one Dag run may be for several events of an asset: before Airflow 3.4 always."""
    from airflow.providers.common.compat.sdk import conf

    return _AIRFLOW < (3, 4) or bool(conf.getboolean("scheduler", "batch_asset_events", fallback=False))


def is_xcom_key(name: str) -> bool:
    """Return whether Airflow stores an XCom under this name, which is not empty."""
    return _AIRFLOW < (3, 0) or _NOT_IN_XCOM_KEY.search(name) is None


def mask_secrets(secrets: Collection[str]) -> None:
    """
    Let Airflow show ``***`` in place of these texts in logs and rendered fields, as of a connection's password. Not on
    an event loop. The list goes with Airflow 2.11 and 3.0.
    """
    modules = ("airflow.sdk.log", "airflow.sdk.execution_time.secrets_masker", "airflow.utils.log.secrets_masker")
    for module in modules if secrets else ():
        with suppress(ImportError):
            if mask_secret := getattr(import_module(module), "mask_secret", None):
                mask_secret(list(secrets))
                return


async def mask_secrets_async(secrets: Collection[str]) -> None:
    """Do the same on a triggerer's event loop, where Airflow can: 3.2 and earlier would block it."""
    with suppress(ImportError):
        from airflow.sdk.log import amask_secret

        if secrets:
            await amask_secret(list(secrets))


def execute_as_sensor(sensor: BaseSensorOperator, context: Context) -> Any:
    """
    Run Airflow's own ``execute`` of a sensor, for a sensor with an ``execute`` of its own. Airflow 2 guards ``execute``
    against calls from outside a task, and takes a subclass's call for one: a warning in every log, and a failure under
    ``allow_nested_operators=False``. Goes with Airflow 2.11.
    """
    from airflow.providers.common.compat.sdk import BaseSensorOperator

    return inspect.unwrap(BaseSensorOperator.execute)(sensor, context)


def is_deferral_timeout(next_kwargs: dict[str, Any] | None) -> bool:
    """Return whether a task resumes because its deferral took too long. Airflow 3 has an exception; goes with 2.11."""
    return (next_kwargs or {}).get("error") in ("Trigger timeout", "Trigger/execution timeout")


def context_of_ended_deferral() -> Context | None:
    """
    Return the context of a deferred task whose ``execution_timeout`` is over, for its ``on_kill``; ``None`` for any
    other task. Airflow 2 calls that before anything of the resumed task has run. Goes with Airflow 2.11.
    """
    from airflow.providers.common.compat.sdk import get_current_context

    if _AIRFLOW >= (3, 0):
        return None
    try:
        context: Context = get_current_context()
    except Exception:
        # Airflow's way to say that there is none.
        return None
    return context if getattr(context["ti"], "next_method", None) else None


def first_reschedule_date(context: Context) -> datetime | None:
    """Return when a rescheduled sensor first polled (aware), as ``timeout`` counts it; ``None`` at the first poll."""
    ti = context["ti"]
    if hasattr(ti, "get_first_reschedule_date"):
        return ti.get_first_reschedule_date(context)
    # Airflow 2, which has it as a private function only. Goes when Airflow 2.11 is no longer supported.
    from airflow.sensors.base import _orig_start_date

    first_try = (ti.max_tries or 0) - (ti.task.retries or 0) + 1
    found: datetime | None = _orig_start_date(
        dag_id=ti.dag_id, task_id=ti.task_id, run_id=ti.run_id, map_index=ti.map_index, try_number=first_try
    )
    return found


def params_without_default(task: Any) -> list[str]:
    """
    Return the Dag's params that have no default. When a task starts on the triggerer, Airflow 3.3.2 raises for such a
    param, although the Dag run has a value, and that ends the triggerer. Goes with the last Airflow that does so; a
    unit test tells.
    """
    from airflow.providers.common.compat.sdk import Param

    no_default = type(Param().value)
    params = task.dag.params.items() if task.has_dag() else ()
    return [name for name, param in params if isinstance(param.value, no_default)]


def asset_state_of(trigger: Any) -> Any:
    """
    Return the state store (``aget``, ``aset``) of the asset that an event trigger watches for; ``None`` where there is
    none. Airflow 3.3.2 and later have one that an event loop can use. Goes with Airflow 3.3.1.
    """
    stores = getattr(trigger, "asset_state_store", None)
    if not hasattr(stores, "aget"):
        return None
    # One trigger may watch for several assets, with the same arguments; the state stands at the first of them.
    single = [*getattr(stores, "_by_name", {}).items(), *getattr(stores, "_by_uri", {}).items()]
    return min(single, key=lambda item: str(item[0]))[1] if len(single) > 1 else stores
