"""What may start on the triggerer: everything else is refused when the Dag is parsed, with what to write instead."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import CAN_END_FROM_TRIGGER, CAN_START_FROM_TRIGGER
from airflow_provider_dify.exceptions import DifyConfigurationError
from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor

needs_start = pytest.mark.skipif(not CAN_START_FROM_TRIGGER, reason="this Airflow cannot start it on the triggerer")


def sensor(workflow_run_id: Any = "x", **arguments: Any) -> DifyWorkflowRunSensor:
    return DifyWorkflowRunSensor(
        workflow_run_id=workflow_run_id, **{"task_id": "wait", "start_from_trigger": True, **arguments}
    )


@pytest.mark.skipif(CAN_START_FROM_TRIGGER, reason="this Airflow can")
def test_an_older_airflow_raises_a_configuration_error() -> None:
    with pytest.raises(DifyConfigurationError, match=r"needs Airflow 3\.3"):
        sensor()


@pytest.mark.skipif(CAN_END_FROM_TRIGGER, reason="this Airflow can")
def test_an_airflow_that_cannot_end_a_task_there_raises_a_configuration_error() -> None:
    with pytest.raises(DifyConfigurationError, match=r"needs Airflow 3\.0"):
        sensor(start_from_trigger=False, end_from_trigger=True)


@needs_start
@pytest.mark.parametrize(
    "run_id",
    [
        "e9d68a02-335c-48ff-bcca-2aa6ff006579",
        "{{ params.run }}",
        "{{ dag_run.conf['run'] }}",
        "{{ ti.xcom_pull(task_ids='upstream', map_indexes=-1) }}",
        "{{ (ti.xcom_pull(task_ids='upstream', key='k', map_indexes=0) or {}).get('id') }}",
    ],
)
def test_what_works_is_passed_to_the_trigger_unchanged(run_id: str) -> None:
    args = sensor(run_id, timeout=60).start_trigger_args
    assert args is not None
    assert args.trigger_cls == "airflow_provider_dify.triggers.dify.DifyWorkflowRunTrigger"
    assert args.trigger_kwargs is not None
    assert args.trigger_kwargs["workflow_run_id"] == run_id
    assert args.timeout is not None
    assert args.timeout.total_seconds() == 180


@needs_start
@pytest.mark.parametrize(
    "template",
    [
        "{{ ti.xcom_pull(task_ids='upstream') }}",
        "{{ ti.xcom_pull('upstream')['id'] }}",
        "{{ task_instance.xcom_pull(task_ids='upstream', key='k') }}",
        "{% set x = ti.xcom_pull(task_ids='upstream') %}{{ x }}",
        "{{ [ti.xcom_pull('a', map_indexes=-1), ti.xcom_pull('b')] | first }}",
    ],
)
@pytest.mark.parametrize("argument", ["workflow_run_id", "dify_conn_id"])
def test_a_template_that_would_hang_is_refused(template: str, argument: str) -> None:
    with pytest.raises(DifyConfigurationError, match=f"{argument} is .*map_indexes=-1"):
        sensor(**{argument: template})


@needs_start
def test_a_broken_template_raises_a_configuration_error() -> None:
    with pytest.raises(DifyConfigurationError, match="is no template"):
        sensor("{{ ti.xcom_pull( }}")


@needs_start
def test_an_upstream_tasks_output_becomes_the_template_that_works_and_stays_upstream() -> None:
    import pendulum
    from airflow.sdk import DAG, task

    with DAG("d", schedule=None, start_date=pendulum.datetime(2026, 1, 1)):

        @task(multiple_outputs=True)
        def upstream() -> dict[str, str]:
            return {"id": "x"}

        started = upstream()
        wait = sensor(started["id"])
    assert wait.upstream_task_ids == {"upstream"}
    assert wait.start_trigger_args is not None
    assert wait.start_trigger_args.trigger_kwargs is not None
    template = wait.start_trigger_args.trigger_kwargs["workflow_run_id"]
    assert template == "{{ ti.xcom_pull(task_ids='upstream', key='id', map_indexes=-1) }}"


@needs_start
def test_an_output_that_the_triggerer_cannot_resolve_is_refused() -> None:
    import pendulum
    from airflow.sdk import DAG, task

    with DAG("d", schedule=None, start_date=pendulum.datetime(2026, 1, 1)):

        @task
        def upstream(n: int = 0) -> str:
            return "x"

        with pytest.raises(DifyConfigurationError, match="made from an upstream task's output by"):
            sensor(upstream().map(lambda x: x))
        with pytest.raises(DifyConfigurationError, match="the mapped task"):
            sensor(upstream.override(task_id="mapped").expand(n=[1, 2]), task_id="other")


@needs_start
def test_a_mapped_sensor_is_refused() -> None:
    with pytest.raises(DifyConfigurationError, match="does not go with a mapped sensor"):
        DifyWorkflowRunSensor.partial(task_id="wait", start_from_trigger=True)


@needs_start
def test_a_sensor_in_a_mapped_task_group_is_refused() -> None:
    import pendulum
    from airflow.sdk import DAG, task_group

    with DAG("d", schedule=None, start_date=pendulum.datetime(2026, 1, 1)):

        @task_group
        def group(n: int) -> None:
            with pytest.raises(DifyConfigurationError, match="does not go with a mapped sensor"):
                sensor("x")

        group.expand(n=[1, 2])


def test_a_mapped_sensor_without_it_is_not() -> None:
    import pendulum
    from airflow.providers.common.compat.sdk import DAG

    with DAG("d", schedule=None, start_date=pendulum.datetime(2026, 1, 1)):
        DifyWorkflowRunSensor.partial(task_id="wait", deferrable=True).expand(workflow_run_id=["a", "b"])


@needs_start
def test_a_param_without_a_default_is_refused_because_the_triggerer_would_end() -> None:
    import pendulum
    from airflow.sdk import DAG, Param

    run = Param(type="string", minLength=32)
    with (
        DAG("d", schedule=None, start_date=pendulum.datetime(2026, 1, 1), params={"run": run}),
        pytest.raises(DifyConfigurationError, match=r"The Dag's param 'run' has no default.*deferrable=True"),
    ):
        sensor("{{ params.run }}")


@needs_start
@pytest.mark.parametrize("default", ["e9d68a02-335c-48ff-bcca-2aa6ff006579", None])
def test_a_param_with_a_default_is_accepted(default: str | None) -> None:
    import pendulum
    from airflow.sdk import DAG, Param

    run = Param(default, type=["null", "string"])
    with DAG("d", schedule=None, start_date=pendulum.datetime(2026, 1, 1), params={"run": run}):
        assert sensor("{{ params.run }}").start_from_trigger is True


@needs_start
def test_airflow_still_cannot_give_the_triggerer_a_param_without_a_default() -> None:
    import pendulum
    from airflow.sdk import DAG, BaseOperator, Param
    from airflow.sdk.definitions.param import process_params
    from airflow.sdk.exceptions import AirflowException
    from airflow.serialization.serialized_objects import DagSerialization

    # As the triggerer does it. What this raises ends the whole triggerer, and the next one that takes the task over.
    with DAG("d", schedule=None, start_date=pendulum.datetime(2026, 1, 1), params={"run": Param(type="string")}) as dag:
        BaseOperator(task_id="wait")
    stored = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    with pytest.raises(AirflowException, match="Invalid input for param run"):
        process_params(stored, stored.get_task("wait"), {"run": "x"}, suppress_exception=False)


@needs_start
def test_a_dag_with_such_a_sensor_is_serialized() -> None:
    import json

    import pendulum
    from airflow.sdk import DAG
    from airflow.serialization.serialized_objects import DagSerialization

    with DAG("d", schedule=None, start_date=pendulum.datetime(2026, 1, 1)) as dag:
        sensor("{{ params.run }}", end_from_trigger=True, max_wait=5)
    text = json.dumps(DagSerialization.to_dict(dag))
    task = DagSerialization.from_dict(json.loads(text)).get_task("wait")
    assert task.start_from_trigger is True
    assert "DifyWorkflowRunTrigger" in text
