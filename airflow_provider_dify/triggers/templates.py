# SPDX-License-Identifier: Apache-2.0
"""
What may not stand in a templated argument of a task that starts on the triggerer (Airflow 3.3 and later).

The triggerer renders such an argument, but it can ask Airflow for less than a worker can. To a request that it does not
know, Airflow sends it no answer, so the rendering hangs until the trigger ends it after a minute. What is known to hang
or to fail is refused when the Dag is parsed. Seen on Airflow 3.3.2, in
``tests/airflow/test_start_from_trigger_processes.py``.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes

from airflow_provider_dify.exceptions import DifyConfigurationError

UNANSWERED = frozenset(
    {
        "prev_start_date_success",
        "prev_end_date_success",
        "prev_data_interval_start_success",
        "prev_data_interval_end_success",
        "task_state_store",
        "get_previous_dagrun",
        "get_previous_ti",
        "get_previous_start_date",
        "get_first_reschedule_date",
        "get_task_breadcrumbs",
    }
)
_PULL = "xcom_pull"
_HOW_TO_PULL = "Write ti.xcom_pull(task_ids='upstream', map_indexes=-1): without map_indexes it gets no answer there. "
_OTHER_WAYS = (
    "Let an upstream task return the value and pass its output, or use deferrable=True without start_from_trigger, "
    "so that a worker renders it."
)


def argument_for_triggerer(name: str, value: Any) -> str:
    """Return a literal, template or upstream task's output as text that the triggerer renders; raise if it can't."""
    from airflow.sdk.definitions.xcom_arg import PlainXComArg, XComArg

    if isinstance(value, PlainXComArg):
        if value.operator.is_mapped or value.operator.get_closest_mapped_task_group():
            raise DifyConfigurationError(
                f"{name} is the output of the mapped task {value.operator.task_id!r}, a list, of which "
                "start_from_trigger=True cannot take one. Leave start_from_trigger out, or pull one value by a "
                f"template: {{{{ ti.xcom_pull(task_ids={value.operator.task_id!r}, map_indexes=0) }}}}"
            )
        # -1 is the index of a task that is not mapped.
        return f"{{{{ ti.xcom_pull(task_ids={value.operator.task_id!r}, key={value.key!r}, map_indexes=-1) }}}}"
    if isinstance(value, XComArg):
        raise DifyConfigurationError(
            f"{name} is made from an upstream task's output by {type(value).__name__}, which start_from_trigger=True "
            "cannot resolve. Let the upstream task return the value itself, or leave start_from_trigger out."
        )
    if not isinstance(value, str):
        raise DifyConfigurationError(f"{name} must be text for start_from_trigger=True, but it is {value!r}.")
    piece = unknown_piece(value)
    if piece is not None:
        raise DifyConfigurationError(
            f"{name} is {value!r}: start_from_trigger=True renders it on the triggerer, where {piece} is not known to "
            f"work. {_HOW_TO_PULL if 'xcom_pull' in value else ''}{_OTHER_WAYS}"
        )
    return value


def unknown_piece(template: str) -> str | None:
    """Return the first piece of a template that gets no answer on the triggerer; it is parsed, never rendered."""
    try:
        tree = Environment(autoescape=True).parse(template)
    except TemplateSyntaxError as error:
        raise DifyConfigurationError(f"{template!r} is no template: {error}") from error
    # With map_indexes it asks for one XCom, which is answered; without, for a sequence of them, which is not.
    answered = {
        id(call.node) for call in tree.find_all(nodes.Call) if "map_indexes" in {word.key for word in call.kwargs}
    }
    for node in tree.find_all((nodes.Name, nodes.Getattr, nodes.Const)):
        # A name may also be the text of a subscript, or a filter's argument.
        name = getattr(node, "name", None) or getattr(node, "attr", None) or getattr(node, "value", None)
        if name == _PULL and id(node) not in answered:
            return f"{_PULL} without map_indexes"
        if isinstance(name, str) and name in UNANSWERED:
            return name
    return None
