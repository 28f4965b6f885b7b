"""Airflow's own limits on a task, ``execution_timeout`` above all, on real Airflow processes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.airflow_processes import AIRFLOW_2, AIRFLOW_3_0, AIRFLOW_3_4
from tests.airflow.shared_airflow import SharedAirflow, side_by_side
from tests.dify_stand_in.runs import Started

pytestmark = [pytest.mark.airflow_processes, pytest.mark.long]

# Airflow 2 ends a deferral at the task's execution_timeout by itself; on Airflow 3 that is left to us.
# On a busy machine it takes seconds until a run is started.
SECONDS = 25
TASKS: dict[str, dict[str, Any]] = {
    "worker": {"execution_timeout": 15},
    "deferred": {"deferrable": True, "retries": 0},
    "deferred_and_retried": {"deferrable": True},
}
if AIRFLOW_2:
    TASKS["deferred_without_xcoms"] = {"deferrable": True, "do_xcom_push": False, "retries": 0}

# A sensor that waits, and one whose failures skip it.
SENSORS: dict[str, dict[str, Any]] = {"waiting": {"retries": 0}, "skipping": {"retries": 1, "soft_fail": True}}

DAG = """
import json
import pendulum
from datetime import timedelta
from airflow.providers.common.compat.sdk import dag
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor

def tell(context):
    with open({errors!r}, "a") as file:
        error = context["exception"]
        file.write(json.dumps([context["ti"].task_id, type(error).__name__, str(error)]) + "\\n")

@dag({dag_id!r}, schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def limited():
    for name, way in json.loads({tasks!r}).items():
        arguments = {{"retries": 1, "execution_timeout": {seconds}, "timeout": 600, **way}}
        limit = timedelta(seconds=arguments.pop("execution_timeout"))
        DifyRunWorkflowOperator(
            task_id=name, dify_conn_id={conn_id!r}, inputs={{}}, poll_interval=1, defer_after=0,
            execution_timeout=limit, retry_delay=timedelta(seconds=1),
            on_failure_callback=tell, on_retry_callback=tell, **arguments,
        )
    limit = timedelta(seconds={seconds})
    for name, way in json.loads({sensors!r}).items():
        DifyWorkflowRunSensor(
            task_id=name, dify_conn_id={conn_id!r}, workflow_run_id={run_id!r}, poke_interval=1, timeout=600,
            deferrable=True, execution_timeout=limit, on_failure_callback=tell, on_retry_callback=tell,
            retry_delay=timedelta(seconds=1), **way,
        )

limited()
"""


@dataclass
class Ended:
    """
    What became of a task: its state, its log, its errors, the runs that it started, those that were stopped, and the
    seconds of its last try.
    """

    state: str
    log: str
    errors: list[tuple[str, str]]
    started: list[Started]
    stopped: list[str]
    seconds: float


def run_limited(shared: SharedAirflow, folder: Path, dag_id: str, tasks: Any, sensors: Any, slots: int | None) -> Any:
    """Run a Dag of tasks that take too long, to its end, and return what became of each."""
    errors = folder / f"{dag_id}.jsonl"
    errors.touch()
    with shared.scenario(dag_id, dialect="1.16.1") as scenario:
        dify = scenario.dify
        dify.run_duration = 3600.0
        dify.slots = slots
        scenario.add_dag(
            DAG,
            errors=str(errors),
            tasks=json.dumps(tasks),
            sensors=json.dumps(sensors),
            run_id=dify.add_run("running"),
            seconds=SECONDS,
        )
        scenario.wait_until_over(seconds=900)
        lines = [json.loads(line) for line in errors.read_text().splitlines()]
        logs = shared.airflow.home / "logs" / f"dag_id={dag_id}"
        seconds_of_try = "(julianday(end_date) - julianday(start_date)) * 86400"
        return {
            task_id: Ended(
                state,
                "".join(path.read_text() for path in logs.rglob(f"*task_id={task_id}/*.log")),
                [(kind, text) for name, kind, text in lines if name == task_id],
                [run for run in dify.started if f"/{task_id}/" in run.user],
                [task for task, user in dify.stopped if f"/{task_id}/" in user],
                seconds,
            )
            for task_id, state, seconds in scenario.query(f"task_id, state, {seconds_of_try}", "task_instance")
        }


@pytest.fixture(scope="module")
def ended(shared: SharedAirflow, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("errors")
    dags = {"limited": partial(run_limited, shared, folder, "limited", TASKS, SENSORS, None)}
    if not AIRFLOW_2:
        queued = {"queued": {"deferrable": True, "retries": 0}}
        dags["limited_queue"] = partial(run_limited, shared, folder, "limited_queue", queued, {}, 0)
    return {name: task for dag in side_by_side(dags).values() for name, task in dag.result().items()}


@pytest.mark.skipif(AIRFLOW_3_0, reason="Airflow 3.0 does not retry a task that its own limit has ended")
def test_on_a_worker_each_try_stops_its_run_and_the_retry_starts_a_new_one(ended: dict[str, Ended]) -> None:
    task = ended["worker"]
    assert task.state == "failed"
    assert len(task.errors) == 2
    # A run that was stopped is not continued: its record may stay `running`, and the retry would wait for nothing.
    assert len(task.started) == 2
    assert task.stopped == [run.task_id for run in task.started]


@pytest.mark.skipif(not AIRFLOW_3_4, reason="before Airflow 3.4 no supervisor ends such a task")
def test_the_run_is_stopped_before_the_supervisor_would_end_the_task(ended: dict[str, Ended]) -> None:
    task = ended["worker"]
    assert len(task.stopped) == 2
    # The last try, with [core] killed_task_cleanup_time of 60 seconds after its limit of 4.
    assert task.seconds < 64
    assert "Task did not stop before execution_timeout elapsed" not in task.log


if AIRFLOW_2:

    def test_a_deferral_that_took_too_long_stops_its_run(ended: dict[str, Ended]) -> None:
        task = ended["deferred"]
        assert task.state == "failed"
        assert [kind for kind, _ in task.errors] == ["AirflowTaskTimeout"]
        assert task.stopped == [run.task_id for run in task.started]

    def test_after_a_deferral_that_took_too_long_the_retry_continues_the_run(ended: dict[str, Ended]) -> None:
        task = ended["deferred_and_retried"]
        assert [kind for kind, _ in task.errors] == ["AirflowTaskTimeout"] * 2
        assert len(task.started) == 1
        assert "Continuing the run that an earlier try started" in task.log

    def test_a_run_that_no_xcom_names_is_looked_for_and_named_if_it_cannot_be_stopped(ended: dict[str, Ended]) -> None:
        task = ended["deferred_without_xcoms"]
        assert task.state == "failed"
        # It sends no events from which its task id could be learnt.
        assert f"Workflow run {task.started[0].workflow_run_id} keeps running: its task id" in task.log

else:

    def test_a_deferral_that_took_too_long_stops_its_run(ended: dict[str, Ended]) -> None:
        task = ended["deferred"]
        assert task.state == "failed"
        ((kind, text),) = task.errors
        assert kind == "DifyTaskKilled"
        assert text.startswith("The task's execution_timeout of 0:00:25 is over (try 1). Dify workflow run ")
        assert task.stopped == [run.task_id for run in task.started]
        assert task.seconds >= SECONDS

    @pytest.mark.skipif(AIRFLOW_3_0, reason="Airflow 3.0 takes the retry of a deferred task for its resumption")
    def test_after_a_deferral_that_took_too_long_the_retry_starts_a_new_run(ended: dict[str, Ended]) -> None:
        task = ended["deferred_and_retried"]
        assert [kind for kind, _ in task.errors] == ["DifyTaskKilled"] * 2
        assert len(task.started) == 2
        assert task.stopped == [run.task_id for run in task.started]

    def test_a_deferral_that_took_too_long_in_difys_queue_is_no_uncertain_start(ended: dict[str, Ended]) -> None:
        task = ended["queued"]
        ((kind, text),) = task.errors
        assert kind == "DifyTaskKilled"
        assert text.startswith("The task's execution_timeout of 0:00:25 is over (try 1). Dify's log did not show its")
        assert task.stopped == []
        assert "is queued, and Dify stops no queued run" in task.log


def test_a_sensors_deferral_that_took_too_long_ends_as_on_a_worker(ended: dict[str, Ended]) -> None:
    task = ended["waiting"]
    assert task.state == "failed"
    assert [kind for kind, _ in task.errors] == ["AirflowTaskTimeout"]
    assert task.seconds >= SECONDS


@pytest.mark.skipif(AIRFLOW_2, reason="Airflow 2 ends the task before its sensor has a say")
def test_a_sensor_that_may_skip_does_so_after_a_deferral_that_took_too_long(ended: dict[str, Ended]) -> None:
    assert ended["skipping"].state == "skipped"
    # Its own timeout would have let it skip, too.
    assert ended["skipping"].seconds < 400
