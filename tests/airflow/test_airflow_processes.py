"""Every ending of a wait in every way to wait, with a real scheduler, real workers and a real triggerer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER
from airflow_provider_dify.links.dify import RUN_LOG_KEY
from tests.airflow.airflow_processes import AIRFLOW_2, AIRFLOW_3_0
from tests.airflow.airflow_runs import OPERATOR_WAYS, SENSOR_WAYS
from tests.airflow.shared_airflow import KEY, Scenario, SharedAirflow
from tests.combinations import each_or_long
from tests.dify_stand_in import Start, rejects, respond

pytestmark = pytest.mark.airflow_processes

OUTPUTS = {"answer": "héllo 你好 🎉", "nested": {"items": [1, "二", None, {"a": 1.5}]}}

WAYS: dict[str, dict[str, Any]] = dict(SENSOR_WAYS)
if CAN_START_FROM_TRIGGER:
    WAYS["start"] = {"start_from_trigger": True}
    WAYS["start_end"] = {"start_from_trigger": True, "end_from_trigger": True}

# Airflow 3's scheduler takes some tasks for dead that come back before it has heard that they left. Airflow 2 runs one
# task at a time here, and has no time to lose.
INTERVAL = 1 if AIRFLOW_2 else 2

# Statuses, sensor arguments, state of the task, exception and message.
ENDINGS: dict[str, tuple[list[str | None], dict[str, Any], str, str, str]] = {
    "succeeded": (["running", "running", "succeeded"], {}, "success", "", ""),
    "failed": (["running", "failed"], {}, "failed", "DifyWorkflowRunCannotSucceed", "Connection refused"),
    "unknown": ([None], {"not_found_grace": 2}, "failed", "DifyWorkflowRunNotFound", "still unknown"),
    "overdue": (["running"], {"run_timeout": 60}, "failed", "DifyWorkflowRunTimeout", "orphaned"),
    "timeout": (["running"], {"timeout": 3}, "failed", "AirflowSensorTimeout", "timed out after 3 seconds.*running"),
    "refused": (["running"], {}, "failed", "DifyAuthenticationError", "API service has been disabled"),
    "broken": (["running"], {"max_consecutive_failures": 0}, "failed", "DifyConnectionError", "503"),
    "soft": (["running", "stopped"], {"soft_fail": True}, "skipped", "", ""),
}
if AIRFLOW_2 or AIRFLOW_3_0:
    # Airflow 2 runs one task at a time on SQLite, and 3.0's scheduler takes many a task for dead that goes on. What is
    # the same everywhere was run by test_sensor_in_airflow.py.
    del WAYS["reschedule"]
    ENDINGS = {ending: ENDINGS[ending] for ending in ("succeeded", "failed", "timeout", "soft")}
# Each look of a rescheduled sensor starts a process, and what it does there is what a poking one does.
RESCHEDULED = {"succeeded", "failed", "timeout", "soft"}
ENDINGS_IN_WAYS = [(ending, way) for ending in ENDINGS for way in WAYS if way != "reschedule" or ending in RESCHEDULED]
# The short run has each ending and each way.
SHORT_ENDINGS_IN_WAYS = [
    ("succeeded", "deferrable"),
    ("succeeded", "start_end"),
    ("failed", "poke"),
    ("failed", "start"),
    ("unknown", "end_from_trigger"),
    ("overdue", "deferrable"),
    ("timeout", "deferrable"),
    ("refused", "end_from_trigger"),
    ("broken", "deferrable"),
    ("soft", "reschedule"),
]
SHORT_WAYS = ("deferrable", "start_end")
FAULTS = {
    "refused": rejects(403, "forbidden", "The app's API service has been disabled."),
    "broken": respond(503),
}
WITHOUT_RETRY = {"failed", "unknown", "overdue", "timeout", "refused", "soft"}

DAG = """
import json
import pendulum
from datetime import timedelta
from airflow.providers.common.compat.sdk import dag, task
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor

def keep_error(context):
    with open({kept!r}, "a") as file:
        error = context["exception"]
        file.write(json.dumps([context["ti"].task_id, type(error).__name__, str(error)]) + "\\n")

@dag(
    {dag_id!r}, schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False,
    params={{"run": {params_run!r}}},
)
def waits():
    for name, arguments in json.loads({tasks!r}).items():
        DifyWorkflowRunSensor(
            task_id=name,
            dify_conn_id={conn_id!r},
            poke_interval={interval},
            retries=1,
            retry_delay=timedelta(0),
            on_failure_callback=keep_error,
            on_retry_callback=keep_error,
            **arguments,
        )

    @task
    def upstream():
        return {upstream_run!r}

    @task
    def downstream(outputs):
        assert outputs["answer"] == "héllo 你好 🎉", outputs
        return outputs

    for name, way in json.loads({operator_ways!r}).items():
        run = DifyRunWorkflowOperator(
            task_id=f"run-{{name}}", dify_conn_id={conn_id!r}, inputs={{"task": name}}, poll_interval={interval},
            defer_after=0, **way,
        )
        downstream.override(task_id=f"downstream_of_run-{{name}}")(run.output)

    run_id = upstream()
    for name, way in json.loads({ways!r}).items():
        # With a retry, because rescheduling at short intervals at times costs a try on Airflow 3.
        way |= {{"dify_conn_id": {conn_id!r}, "poke_interval": {interval}, "retries": 1, "retry_delay": timedelta(0)}}
        wait = DifyWorkflowRunSensor(task_id=f"of_upstream-{{name}}", workflow_run_id=run_id, **way)
        downstream.override(task_id=f"downstream_of-{{name}}")(wait.output)
        # One that really is deferred.
        DifyWorkflowRunSensor(task_id=f"slow-{{name}}", workflow_run_id={slow_runs!r}[name], **way)
        DifyWorkflowRunSensor(task_id=f"of_params-{{name}}", workflow_run_id="{{{{ params.run }}}}", **way)

waits()
"""


@dataclass
class Task:
    """What became of a task."""

    state: str
    ran_on_a_worker: bool
    xcoms: dict[str, Any]
    errors: list[tuple[str, str]]
    was_taken_for_dead: bool
    log: str


@pytest.fixture(scope="module")
def tasks(
    request: pytest.FixtureRequest, shared: SharedAirflow, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Task]]:
    """What became of every task of the Dag; run once for all tests."""
    items = [item for item in request.session.items if item.path == request.path]
    is_long = any(item.get_closest_marker("long") for item in items)
    ways = WAYS if is_long else {way: WAYS[way] for way in SHORT_WAYS if way in WAYS}
    operator_ways = OPERATOR_WAYS if is_long else {"deferrable": OPERATOR_WAYS["deferrable"]}
    kept = tmp_path_factory.mktemp("errors") / "errors.jsonl"
    kept.touch()
    with shared.scenario("waits") as scenario:
        dify = scenario.dify
        arguments = {}
        for ending, way in ENDINGS_IN_WAYS:
            if not is_long and (ending, way) not in SHORT_ENDINGS_IN_WAYS:
                continue
            statuses, ending_arguments, *_ = ENDINGS[ending]
            fields: dict[str, Any] = {"outputs": OUTPUTS} if ending == "succeeded" else {}
            if ending == "overdue":
                fields["created_at"] = 1_700_000_000
            run_id = dify.add_run(*statuses, fault_after_first=FAULTS.get(ending), **fields)
            arguments[f"{ending}-{way}"] = {"workflow_run_id": run_id, **ending_arguments, **WAYS[way]}
        for _ in operator_ways:
            dify.starts.append(Start(statuses=("running", "running", "succeeded"), fields={"outputs": OUTPUTS}))
        upstream_run = dify.add_run("succeeded", outputs=OUTPUTS)
        scenario.add_dag(
            DAG,
            kept=str(kept),
            tasks=json.dumps(arguments),
            upstream_run=upstream_run,
            slow_runs={way: dify.add_run("running", "succeeded", outputs=OUTPUTS) for way in ways},
            params_run=upstream_run,
            ways=json.dumps(ways),
            operator_ways=json.dumps(operator_ways),
            interval=INTERVAL,
        )
        scenario.wait_until_over(seconds=600)
        for path, content in shared.airflow.everything_written():
            assert KEY.encode() not in content, path
        yield _tasks(scenario, kept)


def _tasks(scenario: Scenario, kept: Path) -> dict[str, Task]:
    xcoms: dict[str, dict[str, Any]] = {}
    for task_id, key, value in scenario.query("task_id, key, value", "xcom"):
        xcoms.setdefault(task_id, {})[key] = json.loads(value)
    errors: dict[str, list[tuple[str, str]]] = {}
    for name, kind, text in map(json.loads, kept.read_text().splitlines()):
        errors.setdefault(name, []).append((kind, text))
    # Airflow's own word on a task that it failed because it was resumed or rescheduled sooner than the scheduler heard
    # of the end of the worker process before.
    taken_for_dead = {task_id for (task_id,) in scenario.query("task_id", "log", "event = 'state mismatch'")}
    logs: dict[str, str] = {}
    for path in scenario.logs.rglob("task_id=*/**/*.log*"):
        (task_id,) = [part.removeprefix("task_id=") for part in path.parts if part.startswith("task_id=")]
        logs[task_id] = logs.get(task_id, "") + path.read_text(errors="replace")
    return {
        task_id: Task(
            state,
            pid is not None,
            xcoms.get(task_id, {}),
            errors.get(task_id, []),
            task_id in taken_for_dead,
            logs.get(task_id, ""),
        )
        for task_id, state, pid in scenario.query("task_id, state, pid", "task_instance")
    }


def ended(tasks: dict[str, Task], name: str) -> Task:
    """Return a task that ended by its own doing."""
    if tasks[name].was_taken_for_dead:
        pytest.xfail("Airflow's scheduler took this task for dead while it went on (in its log: state mismatch)")
    return tasks[name]


@pytest.mark.parametrize(
    ("ending", "way"),
    [pytest.param(*each, marks=() if each in SHORT_ENDINGS_IN_WAYS else pytest.mark.long) for each in ENDINGS_IN_WAYS],
)
def test_every_ending_is_the_same_in_every_way(tasks: dict[str, Task], ending: str, way: str) -> None:
    _, _, state, exception, message = ENDINGS[ending]
    poking = tasks.get(f"{ending}-poke")
    task = ended(tasks, f"{ending}-{way}")
    assert task.state == state
    # One error for each try. The try number itself is no measure: rescheduling raises it at times on Airflow 3, which
    # then also costs a retry.
    tries = 0 if not exception else 1 if ending in WITHOUT_RETRY else 2
    assert len(task.errors) == tries or (way == "reschedule" and len(task.errors) == 1 <= tries)
    for kind, text in task.errors:
        assert kind == exception
        assert re.search(message, text)
        assert poking is None or _without_numbers(text) == _without_numbers(poking.errors[0][1])
    if ending == "succeeded":
        assert task.xcoms["return_value"] == OUTPUTS
        assert task.xcoms.keys() == {"return_value", "workflow_run", RUN_LOG_KEY, *OUTPUTS}
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/app/[0-9a-f-]{36}/logs", task.xcoms[RUN_LOG_KEY])
        workflow_run = (poking or task).xcoms["workflow_run"]
        assert {**task.xcoms["workflow_run"], "id": ""} == {**workflow_run, "id": ""}


def _without_numbers(message: str) -> str:
    return re.sub(r"\d+", "#", re.sub(r"[0-9a-f-]{36}", "<run>", message))


@pytest.mark.parametrize("way", each_or_long(WAYS, short=SHORT_WAYS))
def test_the_run_id_may_come_from_upstream_or_from_params_in_every_way(tasks: dict[str, Task], way: str) -> None:
    for task_id in ("of_upstream", "downstream_of", "of_params", "slow"):
        task = ended(tasks, f"{task_id}-{way}")
        assert task.state == "success"
        assert task.xcoms["return_value"] == OUTPUTS


@pytest.mark.parametrize("way", each_or_long(OPERATOR_WAYS, short=("deferrable",)))
def test_the_operator_starts_a_run_and_passes_its_outputs_to_the_next_task(tasks: dict[str, Task], way: str) -> None:
    task = ended(tasks, f"run-{way}")
    assert task.state == "success"
    assert task.xcoms["return_value"] == OUTPUTS
    assert task.xcoms["workflow_run"]["id"] == task.xcoms["workflow_run_id"]
    assert ended(tasks, f"downstream_of_run-{way}").state == "success"


def test_no_task_has_a_log_or_an_xcom_about_a_link_that_is_missing(tasks: dict[str, Task]) -> None:
    # Airflow 3 reads each link of a task when it ends, and logs an error for one that is not there.
    for name, task in tasks.items():
        assert task.log or not task.ran_on_a_worker, name
        assert "XCom not found" not in task.log, name
        assert task.xcoms.get(RUN_LOG_KEY, "there is none") != "", name


@pytest.mark.skipif(not CAN_START_FROM_TRIGGER, reason="this Airflow cannot start a sensor on the triggerer")
def test_a_wait_that_starts_and_ends_on_the_triggerer_uses_no_worker(tasks: dict[str, Task]) -> None:
    for name in ("succeeded", "of_upstream", "of_params", "slow"):
        assert not tasks[f"{name}-start_end"].ran_on_a_worker
    assert tasks["failed-start"].ran_on_a_worker
