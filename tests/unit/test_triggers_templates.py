"""What may stand in a template that the triggerer renders: what is known to work there, and nothing else."""

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
def test_any_other_template_is_refused_by_the_piece_that_is_unknown(template: str, piece: str) -> None:
    assert templates.unknown_piece(template) == piece


def named_in(template: str) -> set[str]:
    """Return every name of a template, in dots and subscripts, in filters and in tests."""
    from jinja2 import Environment, nodes

    tree: Any = Environment(autoescape=True).parse(template)
    return {
        *(str(node.name) for kind in (nodes.Name, nodes.Filter, nodes.Test) for node in tree.find_all(kind)),
        *(str(node.attr) for node in tree.find_all(nodes.Getattr)),
        *(str(node.arg.value) for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Const)),
    }


@pytest.mark.parametrize(
    "entry",
    sorted(templates.VALUES | templates.METHODS | templates.FILTERS | templates.TESTS),
)
def test_each_entry_of_the_lists_stands_in_a_template_that_a_triggerer_rendered(entry: str) -> None:
    parts = {part for part in entry.split(".") if part != "*"}
    assert any(parts <= named_in(template) for template in WORKS)


@pytest.mark.parametrize("node", sorted(templates.NODES, key=str))
def test_each_kind_of_node_stands_in_a_template_that_a_triggerer_rendered(node: Any) -> None:
    from jinja2 import Environment

    trees = [Environment(autoescape=True).parse(template) for template in WORKS]
    assert any(isinstance(tree, node) or tree.find(node) for tree in trees)


@needs_start
@pytest.mark.parametrize("argument", ["workflow_run_id", "dify_conn_id"])
def test_both_templated_arguments_of_the_sensor_are_checked(argument: str) -> None:
    with pytest.raises(DifyConfigurationError, match=rf"^{argument} is .*where the operator % is not known to work"):
        sensor(**{argument: "{{ '%s' % ds }}"})


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
