"""Whether a task whose trigger is killed here waits on another triggerer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.sdk.types import Logger


async def is_waiting_elsewhere(ti: Any, log: Logger) -> bool:
    """
    Return whether a task still waits, on another triggerer.

    Airflow 3.3 calls a trigger's ``on_kill`` also on a triggerer that was silent for so long (a minute under load, say)
    that another one has taken its triggers over.

    :param ti: the trigger's task instance; ``None`` where Airflow gave it none.
    :param log: the trigger's log.
    :return: whether it does; ``False`` where Airflow doesn't say.
    """
    if ti is None:
        return False
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
    from asgiref.sync import sync_to_async

    task = {"dag_id": ti.dag_id, "task_ids": [ti.task_id], "run_ids": [ti.run_id], "map_index": ti.map_index}
    try:
        states = await sync_to_async(RuntimeTaskInstance.get_task_states)(**task)
    except Exception:
        log.warning("Airflow did not say whether the task still waits; its run is stopped.", exc_info=True)
        return False
    return "deferred" in states.get(ti.run_id, {}).values()
