"""
What may stand in a templated argument of a task that starts on the triggerer (Airflow 3.3 and later).

There the triggerer renders it, where less works than on a worker: an XComArg arrives unresolved, and an ``xcom_pull``
without ``map_indexes`` breaks the triggerer's channel to Airflow, so that the task hangs for ever.
"""

from __future__ import annotations

from typing import Any

from airflow_provider_dify.exceptions import DifyConfigurationError


def argument_for_triggerer(name: str, value: Any) -> str:
    """
    Give a templated argument in the form that the triggerer renders.

    :param name: the argument, for messages.
    :param value: a literal, a template or an upstream task's output.
    :return: text; an upstream task's output as the template that works.
    :raises DifyConfigurationError: if it would not work or hang; says what to write instead.
    """
    from airflow.sdk.definitions.xcom_arg import PlainXComArg, XComArg

    if isinstance(value, PlainXComArg):
        if value.operator.is_mapped:
            raise DifyConfigurationError(
                f"{name} is the output of the mapped task {value.operator.task_id!r}, a list, which "
                "start_from_trigger=True cannot take one of. Leave start_from_trigger out, or pull one value by a "
                f"template: {{{{ ti.xcom_pull(task_ids={value.operator.task_id!r}, map_indexes=0) }}}}"
            )
        # -1 is the index of a task that is not mapped; named, the triggerer has nothing to look up for it.
        return f"{{{{ ti.xcom_pull(task_ids={value.operator.task_id!r}, key={value.key!r}, map_indexes=-1) }}}}"
    if isinstance(value, XComArg):
        raise DifyConfigurationError(
            f"{name} is made from an upstream task's output by {type(value).__name__}, which start_from_trigger=True "
            "cannot resolve. Let the upstream task return the value itself, or leave start_from_trigger out."
        )
    if not isinstance(value, str):
        raise DifyConfigurationError(f"{name} must be text for start_from_trigger=True, but it is {value!r}.")
    for call in _pulls_that_would_hang(value):
        raise DifyConfigurationError(
            f"{name} is {value!r}: with start_from_trigger=True {call} without map_indexes would hang for ever. Write "
            f"it with map_indexes=-1, as in {{{{ ti.xcom_pull(task_ids='upstream', map_indexes=-1) }}}}, or pass the "
            "upstream task's output itself."
        )
    return value


def _pulls_that_would_hang(template: str) -> list[str]:
    from jinja2 import Environment, TemplateSyntaxError, nodes

    try:
        # Parsed only, never rendered.
        tree = Environment(autoescape=True).parse(template)
    except TemplateSyntaxError as error:
        raise DifyConfigurationError(f"{template!r} is no template: {error}") from error
    return [
        f"{call.node.attr}()"
        for call in tree.find_all(nodes.Call)
        if isinstance(call.node, nodes.Getattr)
        and call.node.attr == "xcom_pull"
        and "map_indexes" not in {argument.key for argument in call.kwargs}
    ]
