"""What may stand in a template that the triggerer renders: nothing that is known to get no answer there."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER
from airflow_provider_dify.exceptions import DifyConfigurationError
from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor
from airflow_provider_dify.triggers import templates
from tests.airflow.triggerer_templates import HANGS, REFUSED, WORKS

needs_start = pytest.mark.skipif(not CAN_START_FROM_TRIGGER, reason="this Airflow cannot start it on the triggerer")


def sensor(workflow_run_id: Any = "x", **arguments: Any) -> DifyWorkflowRunSensor:
    return DifyWorkflowRunSensor(
        workflow_run_id=workflow_run_id, **{"task_id": "wait", "start_from_trigger": True, **arguments}
    )


@pytest.mark.parametrize("template", WORKS)
def test_a_template_that_works_on_the_triggerer_is_taken(template: str) -> None:
    assert templates.unknown_piece(template) is None


@pytest.mark.parametrize(("template", "piece"), REFUSED.items())
def test_a_template_that_gets_no_answer_is_refused_by_the_piece_that_gets_none(template: str, piece: str) -> None:
    assert templates.unknown_piece(template) == piece


@needs_start
@pytest.mark.parametrize("argument", ["workflow_run_id", "dify_conn_id"])
def test_both_templated_arguments_of_the_sensor_are_checked(argument: str) -> None:
    with pytest.raises(DifyConfigurationError, match=rf"^{argument} is .*where task_state_store is not known to work"):
        sensor(**{argument: "{{ task_state_store.get(1) }}"})


@needs_start
@pytest.mark.parametrize("template", [template for template in HANGS if "xcom_pull" in template])
def test_who_pulls_an_xcom_in_another_way_reads_which_way_works(template: str) -> None:
    with pytest.raises(DifyConfigurationError, match=r"Write ti\.xcom_pull\(task_ids='upstream', map_indexes=-1\)"):
        sensor(template)


@needs_start
def test_who_asks_for_anything_else_reads_what_else_to_do() -> None:
    with pytest.raises(
        DifyConfigurationError,
        match=r"where prev_start_date_success is not known to work\. Let an upstream task .* use deferrable=True",
    ):
        sensor("{{ prev_start_date_success }}")


def test_a_broken_template_is_named() -> None:
    with pytest.raises(DifyConfigurationError, match="is no template"):
        templates.unknown_piece("{{ ti.xcom_pull( }}")


@needs_start
@pytest.mark.parametrize("value", [5, None, ["x"]])
def test_what_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(DifyConfigurationError, match="must be text for start_from_trigger=True"):
        sensor(value)


@needs_start
def test_the_output_of_an_upstream_task_becomes_a_template_that_works() -> None:
    import pendulum
    from airflow.sdk import DAG, task

    with DAG("d", schedule=None, start_date=pendulum.datetime(2026, 1, 1)):

        @task
        def upstream() -> str:
            return "x"

        wait = sensor(upstream())
    assert wait.start_trigger_args is not None
    assert wait.start_trigger_args.trigger_kwargs is not None
    template = wait.start_trigger_args.trigger_kwargs["workflow_run_id"]
    assert template == "{{ ti.xcom_pull(task_ids='upstream', key='return_value', map_indexes=-1) }}"
    assert templates.unknown_piece(template) is None


@needs_start
def test_the_output_of_a_task_in_a_mapped_group_is_refused_as_that_of_a_mapped_task_is() -> None:
    import pendulum
    from airflow.sdk import DAG, task, task_group

    with DAG("d", schedule=None, start_date=pendulum.datetime(2026, 1, 1)) as dag:

        @task
        def upstream(n: int) -> str:
            return str(n)

        @task_group
        def group(n: int) -> None:
            upstream(n)

        group.expand(n=[1, 2])
        with pytest.raises(DifyConfigurationError, match=r"the mapped task 'group\.upstream'"):
            sensor(dag.get_task("group.upstream").output)
