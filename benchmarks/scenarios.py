"""
What the package does most, once each: public classes in a process of its own, against the tests' stand-in for Dify.

Only public classes and their arguments stand here, so that the same script measures a package with other internals.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.dify_stand_in import DifyStandIn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "airflow_provider_dify"
# Fixed, so that a newer recording changes no number.
DIALECT = "1.16.1"
# Longer than any measurement: a run that is to go on is not over before.
LONG_SECONDS = 600.0

# What is measured; what it needs is made before.
Work = Callable[[], None]


class TaskInstance(SimpleNamespace):
    """A task instance as far as an operator looks at it; Airflow's own would bring Airflow's own cost."""

    def __init__(self, task: Any, run_id: str) -> None:
        super().__init__(task=task, task_id=task.task_id, dag_id="bench", run_id=run_id, map_index=-1)
        self.try_number, self.max_tries = 1, 0
        self.start_date = datetime.now(timezone.utc)
        self.xcoms: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any, **_: Any) -> None:
        """Keep an XCom."""
        self.xcoms[key] = value

    def xcom_pull(self, *_: Any, key: str = "return_value", **__: Any) -> Any:
        """Return an XCom of this task."""
        return self.xcoms.get(key)


class TaskStateStore(dict[str, Any]):
    """Airflow's memory of a task, as Airflow 3.3 has it."""

    def set(self, key: str, value: Any) -> None:
        """Keep a value."""
        self[key] = value

    def delete(self, key: str) -> None:
        """Forget a value."""
        self.pop(key, None)


def context_of(task: Any, run_id: str = "run") -> Any:
    """Return the context of a task's first try."""
    ti = TaskInstance(task, run_id)
    dag_run = SimpleNamespace(start_date=ti.start_date, run_id=run_id, dag_id="bench")
    return {"ti": ti, "task_instance": ti, "task": task, "dag_run": dag_run, "task_state_store": TaskStateStore()}


def check(holds: bool, what: object) -> None:
    """Fail where a scenario went otherwise than it was to go; its numbers would mean nothing."""
    if not holds:
        raise RuntimeError(f"It went otherwise: {what}")


def poke_of_ended_run(run_id: str) -> Work:
    """Return one poke of the sensor, of a run that is over."""
    from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor

    sensor = DifyWorkflowRunSensor(task_id="wait", workflow_run_id=run_id, deferrable=False)

    def work() -> None:
        outputs = sensor.execute(context_of(sensor))
        check(isinstance(outputs, dict), outputs)

    return work


def poke_of_live_run(run_id: str) -> Work:
    """Return one poke of the sensor, of a run that goes on."""
    from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor

    sensor = DifyWorkflowRunSensor(task_id="wait", workflow_run_id=run_id, deferrable=False)

    def work() -> None:
        answer = sensor.poke(context_of(sensor))
        check(not answer, answer)

    return work


def start_and_wait(_: str) -> Work:
    """Return a start and a wait on a worker."""
    return operator_work("run")


def operator_work(airflow_run_id: str) -> Work:
    """Return a start and a wait on a worker, in this Dag run."""
    from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator

    operator = DifyRunWorkflowOperator(task_id="run", inputs={"query": "x"}, deferrable=False)

    def work() -> None:
        outputs = operator.execute(context_of(operator, airflow_run_id))
        check(isinstance(outputs, dict), outputs)

    return work


def deferred_start(_: str) -> Work:
    """Return a start that leaves the wait to the triggerer at once."""
    from airflow.providers.common.compat.sdk import TaskDeferred

    from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator

    # An argument that not every version of this package has.
    known = inspect.signature(DifyRunWorkflowOperator.__init__).parameters
    at_once: dict[str, Any] = {"defer_after": 0} if "defer_after" in known else {}
    operator = DifyRunWorkflowOperator(task_id="run", inputs={"query": "x"}, deferrable=True, **at_once)

    def work() -> None:
        try:
            outputs = operator.execute(context_of(operator))
        except TaskDeferred:
            return
        check(False, outputs)

    return work


def poll_of_trigger(run_id: str) -> Work:
    """Return one poll of the trigger, of a run that is over."""
    from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger

    # Else the event comes 10 seconds later. A version without this attribute ignores it.
    DifyWorkflowRunTrigger.resume_delay = 0.0
    trigger = DifyWorkflowRunTrigger(run_id, "dify_default", poll_interval=0.05)

    async def first_event() -> Any:
        async with contextlib.aclosing(trigger.run()) as events:  # type: ignore[type-var]
            async for event in events:
                return event.payload
        return None

    def work() -> None:
        payload = asyncio.run(first_event())
        check(isinstance(payload, dict) and payload["status"] == "succeeded", payload)

    return work


def batch_of_one_row(_: str) -> Work:
    """Return a batch of one row, whose result is its return value."""
    from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

    operator = DifyRunWorkflowBatchOperator(task_id="batch", inputs=[{"query": "x"}])

    def work() -> None:
        results = operator.execute(context_of(operator))
        check([row["status"] for row in results] == ["succeeded"], results)

    return work


SCENARIOS: dict[str, Callable[[str], Work]] = {
    "one poke of the sensor, run is over": poke_of_ended_run,
    "one poke of the sensor, run goes on": poke_of_live_run,
    "operator: start and wait on a worker": start_and_wait,
    "operator: deferred start": deferred_start,
    "one poll of the trigger, run is over": poll_of_trigger,
    "batch of one row": batch_of_one_row,
}


def run_in_process(dify: DifyStandIn, script: str, work: Callable[[str], Work]) -> Any:
    """Let a script of this folder do one scenario in a new process, and return what that printed last, of JSON."""
    from tests.dify_stand_in import API_KEY

    goes_on = work in (poke_of_live_run, deferred_start)
    dify.run_duration = LONG_SECONDS if goes_on else 0.0
    run_id = dify.add_run("running" if goes_on else "succeeded")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW_", "DIFY_"))}
    connection = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY}
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        environment = {
            **kept,
            "AIRFLOW_HOME": home,
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW_CONN_DIFY_DEFAULT": json.dumps(connection),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            # This folder's package, whatever is installed.
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, str(ROOT / "benchmarks" / script), "--measure", work.__name__, run_id]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        sys.exit(f"{work.__name__} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def work_named(name: str, run_id: str) -> Work:
    """Return the work of a scenario, in the process that is to do it."""
    return next(scenario for scenario in SCENARIOS.values() if scenario.__name__ == name)(run_id)


@contextlib.contextmanager
def stand_in() -> Iterator[DifyStandIn]:
    """Start the tests' stand-in for Dify, in this process and none of those that are measured."""
    sys.path.insert(0, str(ROOT))
    from tests.dify_stand_in import DifyStandIn

    with DifyStandIn(DIALECT) as dify:
        yield dify
