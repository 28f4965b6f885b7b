"""Run a Dag in this process with ``dag.test()`` on whichever Airflow is installed, and tell what became of it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import itertools
import logging
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import CAN_END_FROM_TRIGGER
from airflow_provider_dify.links.dify import RUN_LOG_KEY
from tests.conftest import AIRFLOW_HOME
from tests.dify_stand_in import DifyStandIn

_numbers = itertools.count(1)

# Each way to wait, as the arguments that ask for it. Starting on the triggerer takes a scheduler, and is tried in
# test_airflow_processes.py.
SENSOR_WAYS: dict[str, dict[str, Any]] = {
    "poke": {"mode": "poke"},
    "reschedule": {"mode": "reschedule"},
    "deferrable": {"deferrable": True},
}
OPERATOR_WAYS: dict[str, dict[str, Any]] = {"worker": {}, "deferrable": {"deferrable": True}}
if CAN_END_FROM_TRIGGER:
    SENSOR_WAYS["end_from_trigger"] = OPERATOR_WAYS["end_from_trigger"] = {"end_from_trigger": True}
# What a start comes to does not depend on where its run is waited for.
START_WAYS = {**OPERATOR_WAYS, "no wait": {"wait_for_completion": False}}

DAG_FILE = """
import datetime

import pendulum

try:
    from airflow.sdk import DAG, task
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.decorators import task

from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor
from airflow_provider_dify.sensors.dify_latest import DifyLatestWorkflowRunSensor
from tests.airflow.airflow_runs import clear_task, received, raised

with DAG({dag_id!r}, schedule=None, start_date=pendulum.datetime(2026, 1, 1), params={params!r}) as dag:
{body}
"""

# What tasks and callbacks of the Dag under test left here; they run in this process.
_received: dict[str, Any] = {}
_raised: dict[str, list[BaseException]] = {}


def received(name: str, value: Any) -> None:
    """Keep a value that a downstream task was given."""
    _received[name] = value


def raised(context: Any) -> None:
    """Keep the exception that a try ended with, as a callback of the task."""
    _raised.setdefault(context["ti"].task_id, []).append(context["exception"])


def clear_task(dag: Any, ti: Any, task_id: str) -> None:
    """Clear a task that is over, as a user does in the UI; for a later task of the same Dag run."""
    from airflow.models.taskinstance import TaskInstance, clear_task_instances
    from airflow.utils.session import create_session

    # Airflow 2 looks the Dag up where dag.test() doesn't put it.
    options = {"dag": dag} if "dag" in inspect.signature(clear_task_instances).parameters else {}
    with create_session() as session:
        which = {"dag_id": ti.dag_id, "run_id": ti.run_id, "task_id": task_id}
        clear_task_instances(session.query(TaskInstance).filter_by(**which).all(), session, **options)


def without_masking(text: str) -> str:
    """Leave out the one line that is Airflow's own: dag.test() tells at DEBUG what it was asked to mask."""
    return "\n".join(line for line in text.splitlines() if "MaskSecret(" not in line)


@dataclass
class DagRunResult:
    """What became of a Dag run."""

    state: str
    states: dict[str, str]
    tries: dict[str, int]
    xcoms: dict[str, dict[str, Any]]
    links: dict[str, dict[str, str]]
    received: dict[str, Any] = field(default_factory=dict)
    raised: dict[str, list[BaseException]] = field(default_factory=dict)


@functools.cache
def _api_server() -> Any:
    # One server for all tasks: before Airflow 3.3 dag.test() makes one for each, which takes seconds.
    from airflow.api_fastapi.execution_api.app import InProcessExecutionAPI

    return InProcessExecutionAPI()


@contextlib.contextmanager
def as_on_a_worker() -> Iterator[None]:
    """Correct where ``dag.test()`` of Airflow 3 treats a task otherwise than a worker does."""
    try:
        from airflow.sdk.api.client import TaskInstanceOperations
        from airflow.sdk.execution_time import supervisor, task_runner
        from airflow.sdk.execution_time.comms import TaskRescheduleStartDate
    except ImportError:  # Airflow 2
        yield
        return
    finalize = task_runner.finalize
    get_reschedule_start_date = TaskInstanceOperations.get_reschedule_start_date

    def finalize_with_exception(ti: Any, state: Any, context: Any, log: Any, error: Any = None) -> None:
        # Callbacks get it on every worker, but in dag.test() from Airflow 3.3 on only.
        context["exception"] = error
        finalize(ti, state, context, log, error)

    def get_as_date(self: Any, *args: Any, **kwargs: Any) -> TaskRescheduleStartDate:
        # A text on Airflow 3.0, on which each of its sensors fails in mode reschedule.
        found = get_reschedule_start_date(self, *args, **kwargs)
        return TaskRescheduleStartDate(start_date=found.start_date)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_runner, "finalize", finalize_with_exception)
        patch.setattr(TaskInstanceOperations, "get_reschedule_start_date", get_as_date)
        patch.setattr(supervisor, "in_process_api_server", _api_server)
        yield


@contextlib.contextmanager
def _short_pauses(dag: Any) -> Iterator[None]:
    """Look for tasks to run 20 times a second; ``dag.test()`` does it once a second."""
    module = inspect.unwrap(type(dag).test).__module__
    sleep = time.sleep

    def sleep_less(seconds: float) -> None:
        sleep(0.05 if sys._getframe(1).f_globals["__name__"] == module else seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", sleep_less)
        yield


def run_dag(body: str, *, conf: dict[str, Any] | None = None, params: dict[str, Any] | None = None) -> DagRunResult:
    """
    Write a Dag file, parse it and run it.

    :param body: the statements below ``with DAG(...)``.
    :param conf: the Dag run's conf.
    :param params: the Dag's params.
    :return: states, XComs and links (by task id, mapped ones as ``task_id[map_index]``) and what the tasks left. The
        links' own XComs are left out.
    """
    dag_id = f"dag_{next(_numbers)}"
    code = DAG_FILE.format(dag_id=dag_id, params=params or {}, body=textwrap.indent(textwrap.dedent(body), " " * 4))
    with dag_file(dag_id, code) as path:
        spec = importlib.util.spec_from_file_location(dag_id, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[dag_id] = module
        try:
            spec.loader.exec_module(module)
            return run_parsed(module.dag, conf or {})
        finally:
            del sys.modules[dag_id]


@contextlib.contextmanager
def dag_file(name: str, code: str) -> Iterator[Path]:
    """Put a file into the Dags folder, outside of which Airflow 3.3 runs no Dag."""
    path = AIRFLOW_HOME / "dags" / f"{name}.py"
    path.write_text(code, encoding="utf-8")
    try:
        yield path
    finally:
        path.unlink()


def dag_bag(path: Path) -> Any:
    """Parse a file as Airflow does."""
    try:
        from airflow.dag_processing.dagbag import DagBag
    except ImportError:  # Airflow 2 and 3.0
        from airflow.models.dagbag import DagBag

    return DagBag(path)


def run_parsed(dag: Any, conf: dict[str, Any]) -> DagRunResult:
    """Run a Dag of a file that is in the Dags folder, with this Dag run's conf."""
    _received.clear()
    _raised.clear()
    logging.getLogger("airflow.task").propagate = True  # for caplog
    with as_on_a_worker(), _short_pauses(dag):
        dag_run = dag.test(run_conf=conf)
    return _result(dag, dag_run)


def run_sensor(**arguments: Any) -> DagRunResult:
    """Run a Dag of one sensor ``wait`` with these arguments, and a task that uses its outputs."""
    arguments = {"poke_interval": 0.05, **arguments}
    return run_dag(
        f"""
        wait = DifyWorkflowRunSensor(
            task_id="wait", on_failure_callback=raised, on_retry_callback=raised, **{arguments!r}
        )

        @task
        def use(outputs):
            received("outputs", outputs)

        use(wait.output)
        """
    )


def run_operator(**arguments: Any) -> DagRunResult:
    """Run a Dag of one operator ``run`` with these arguments, and a task that uses its outputs."""
    arguments = {"poll_interval": 0.05, "inputs": {}, "defer_after": 0, **arguments}
    return run_dag(
        f"""
        run = DifyRunWorkflowOperator(
            task_id="run", on_failure_callback=raised, on_retry_callback=raised, **{arguments!r}
        )

        @task
        def use(outputs):
            received("outputs", outputs)

        use(run.output)
        """
    )


def error_of(result: DagRunResult, task_id: str = "run", *, tries: int = 1) -> Any:
    """Return what the task's last try failed with, once it is sure that it had so many."""
    assert (result.states[task_id], result.tries[task_id]) == ("failed", tries)
    assert len(result.raised[task_id]) == tries
    return result.raised[task_id][-1]


def posts(dify: DifyStandIn) -> int:
    """Return how many starts were sent."""
    return sum(request.method == "POST" and request.path.endswith("/run") for request in dify.requests)


def _result(dag: Any, dag_run: Any) -> DagRunResult:
    from airflow.utils.session import create_session

    try:
        from airflow.models.xcom import XComModel

        value_of = XComModel.deserialize_value
    except ImportError:  # Airflow 2, whose rows come with their values read
        # The table of users, which other tables point at, is in a provider that nothing has imported yet.
        import airflow.providers.fab.auth_manager.models  # noqa: F401
        from airflow.models.xcom import XCom as XComModel

        def value_of(row: Any) -> Any:
            return row.value

    with create_session() as session:
        tis = dag_run.get_task_instances(session=session)
        for ti in tis:
            ti.refresh_from_db(session=session)
        of_this_run = (XComModel.dag_id == dag_run.dag_id, XComModel.run_id == dag_run.run_id)
        rows = session.query(XComModel).filter(*of_this_run).all()
        xcoms: dict[str, dict[str, Any]] = {}
        for row in (row for row in rows if row.key != RUN_LOG_KEY):
            xcoms.setdefault(_name(row), {})[row.key] = value_of(row)
        return DagRunResult(
            state=str(dag_run.state.value if hasattr(dag_run.state, "value") else dag_run.state),
            states={_name(ti): str(ti.state and getattr(ti.state, "value", ti.state)) for ti in tis},
            tries={_name(ti): ti.try_number for ti in tis},
            xcoms=xcoms,
            links=_links(dag, tis),
            received=dict(_received),
            raised=dict(_raised),
        )


def _links(dag: Any, tis: Any) -> dict[str, dict[str, str]]:
    """Return the links of every task that can have any as the UI does: from the serialized Dag."""
    try:
        from airflow.serialization.serialized_objects import DagSerialization
    except ImportError:  # before Airflow 3.3
        from airflow.serialization.serialized_objects import SerializedDAG as DagSerialization
    # As the API server does; who clears a task leaves it off.
    DagSerialization._load_operator_extra_links = True
    serialized = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    links = {}
    for ti in tis:
        task = serialized.get_task(ti.task_id)
        if task.extra_links:
            links[_name(ti)] = {name: task.get_extra_links(ti, name) or "" for name in task.extra_links}
    return links


def _name(row: Any) -> str:
    return row.task_id if row.map_index < 0 else f"{row.task_id}[{row.map_index}]"
