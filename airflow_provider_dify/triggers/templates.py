"""
What may stand in a templated argument of a task that starts on the triggerer (Airflow 3.3 and later).

The triggerer renders such an argument, but it can ask Airflow for less than a worker can. To a request that it does not
know, Airflow sends it no answer, so the rendering hangs. Therefore a template may hold only what the lists below name.
Each entry was seen to work on Airflow 3.3.2 in ``tests/airflow/test_start_from_trigger_processes.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes

from airflow_provider_dify.exceptions import DifyConfigurationError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The values of a template, by path; * is any name. What follows such a path is data: every part of it may be read.
# Never answered: prev_start_date_success, prev_end_date_success, prev_data_interval_start_success,
# prev_data_interval_end_success, task_state_store.get(), and of ti: xcom_pull() without map_indexes,
# get_previous_dagrun(), get_first_reschedule_date(), get_task_breadcrumbs().
# Empty on the triggerer: ti.start_date, ti.hostname, the events of assets, the Dag's own macros.
VALUES = _words(
    """
    params dag_run.conf var.value.* var.json.*
    ds ds_nodash ts ts_nodash ts_nodash_with_tz logical_date data_interval_start data_interval_end run_id
    dag_run.dag_id dag_run.run_id dag_run.logical_date dag_run.run_after dag_run.start_date
    dag_run.data_interval_start dag_run.data_interval_end
    ti.dag_id ti.task_id ti.run_id ti.map_index ti.try_number ti.id
    task_instance.dag_id task_instance.task_id task_instance.run_id task_instance.map_index task_instance.try_number
    task_instance.id task_instance_key_str dag.dag_id task.task_id
    conn.*.conn_id conn.*.conn_type conn.*.host conn.*.port conn.*.schema conn.*.login conn.*.extra_dejson
    """
)
# Methods of text, dates, dicts and variables.
METHODS = _words("get isoformat lower replace split strftime strip upper")
FILTERS = _words(
    """
    capitalize count d default ds ds_nodash first float int join last length lower replace string title tojson trim ts
    ts_nodash ts_nodash_with_tz upper
    """
)
TESTS = _words("defined none string undefined")
# What only puts values together. A loop, an assignment, a macro and the filters map and attr can hide a call from this
# check. *, ** and % can make a value so large that all triggers stop while it is computed.
_STATEMENTS = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.CondExpr)
_DATA = (nodes.Const, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Slice)
_LOGIC = (nodes.And, nodes.Or, nodes.Not, nodes.Compare, nodes.Operand, nodes.Filter, nodes.Test)
_SUMS = (nodes.Add, nodes.Sub, nodes.Neg, nodes.Concat)
NODES: frozenset[type[nodes.Node]] = frozenset((*_STATEMENTS, *_DATA, *_LOGIC, *_SUMS))
# With map_indexes it asks for one XCom, which is answered; without, for a sequence of them, which is not.
PULLS = (("ti", "xcom_pull"), ("task_instance", "xcom_pull"))

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
    """Return the first piece of a template that is not known to work on the triggerer; it is parsed, never rendered."""
    try:
        return _unknown(Environment(autoescape=True).parse(template))
    except TemplateSyntaxError as error:
        raise DifyConfigurationError(f"{template!r} is no template: {error}") from error


def _unknown(node: nodes.Node) -> str | None:
    match node:
        case nodes.Name() | nodes.Getattr() | nodes.Getitem():
            return _unknown_of_path(node)
        case nodes.Call():
            return _unknown_of_call(node)
        case nodes.Filter() if node.name not in FILTERS:
            return f"the filter {node.name}"
        case nodes.Test() if node.name not in TESTS:
            return f"the test {node.name}"
        case _ if type(node) in NODES:
            return _first_unknown(node.iter_child_nodes())
        case nodes.BinExpr():
            return f"the operator {node.operator}"
    return f"{{% {_TAGS.get(type(node).__name__) or type(node).__name__.lower()} %}}"


_TAGS = {"Assign": "set", "AssignBlock": "set", "FilterBlock": "filter", "CallBlock": "call", "FromImport": "from"}


def _first_unknown(parts: Iterable[nodes.Node]) -> str | None:
    return next((piece for piece in map(_unknown, parts) if piece is not None), None)


def _unknown_of_path(node: nodes.Expr) -> str | None:
    start, names = _path(node)
    if None in names:
        return f"{_text(node)}, whose subscript is no constant,"
    if not isinstance(start, nodes.Name):
        return _unknown(start)
    known = any(
        len(value) <= len(names) and all(part in ("*", name) for part, name in zip(value, names, strict=False))
        for value in (path.split(".") for path in VALUES)
    )
    return None if known else _text(node)


def _unknown_of_call(call: nodes.Call) -> str | None:
    if call.dyn_args is not None or call.dyn_kwargs is not None:
        return f"{_text(call)} with * or **"
    if not isinstance(call.node, nodes.Getattr):
        return _text(call)
    arguments = [*call.args, *(keyword.value for keyword in call.kwargs)]
    start, names = _path(call.node)
    if isinstance(start, nodes.Name) and names in PULLS:
        has_indexes = "map_indexes" in {keyword.key for keyword in call.kwargs}
        return _first_unknown(arguments) if has_indexes else f"{_text(call)} without map_indexes"
    return _first_unknown([call.node, *arguments]) if call.node.attr in METHODS else _text(call)


def _path(node: nodes.Node) -> tuple[nodes.Node, tuple[str | None, ...]]:
    """Return what ``a.b['c']`` begins with, and its names: ``None`` for a subscript that is no constant."""
    match node:
        case nodes.Name():
            return node, (node.name,)
        case nodes.Getattr():
            start, names = _path(node.node)
            return start, (*names, node.attr)
        case nodes.Getitem():
            start, names = _path(node.node)
            return start, (*names, str(getattr(node.arg, "value", "")) if _is_constant(node.arg) else None)
    return node, ()


def _is_constant(node: nodes.Node) -> bool:
    constant = isinstance(node, (nodes.Const, nodes.Neg, nodes.Slice))
    return constant and all(map(_is_constant, node.iter_child_nodes()))


def _text(node: nodes.Node) -> str:
    """Return about how a path or a call is written in the template."""
    match node:
        case nodes.Name() | nodes.Filter():
            return str(node.name)
        case nodes.Getattr():
            return f"{_text(node.node)}.{node.attr}"
        case nodes.Getitem():
            return f"{_text(node.node)}[{repr(node.arg.value) if isinstance(node.arg, nodes.Const) else '...'}]"
        case nodes.Call():
            return f"{_text(node.node)}()"
    return "(...)"
