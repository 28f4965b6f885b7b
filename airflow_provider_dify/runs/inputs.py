# SPDX-License-Identifier: Apache-2.0
"""
Checks inputs against a workflow's input form before a start, so that a wrong one costs neither a run nor a wait.

From 1.13 on, Dify answers a streaming start before it looks at the inputs: 1.13 and 1.14 then say nothing about
inputs that they reject, and later versions report a run that they know nothing of.

Every rule here holds on Dify 1.12.1, 1.13.0, 1.14.2, 1.15.0 and 1.16.1 alike. Source of the rules: Dify's
``core/app/apps/base_app_generator.py`` (``_prepare_user_inputs``, ``_validate_inputs``), and for files
``factories/file_factory``. What one of these versions takes is never a problem here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any
from uuid import UUID

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Client
from airflow_provider_dify.api.models import one_line
from airflow_provider_dify.exceptions import DifyError, DifyInputsRejected
from airflow_provider_dify.files import DifyFile, files_in, with_files_as
from airflow_provider_dify.runs.log import parse_number


@dataclass(frozen=True)
class InputField:
    """One field of the form: a variable of the workflow's start node."""

    variable: str
    type: str  # such as "text-input"; "" where the form contradicts itself
    label: str = ""  # what the console shows instead of the name
    required: bool = False  # whether a start without it is rejected, default or not
    default: Any = None  # what Dify takes for a missing input
    max_length: int | None = None  # characters of a text, or files of a list
    options: tuple[str, ...] = ()  # of a select; empty for not known
    file_types: tuple[str, ...] = ()  # empty for any
    file_extensions: tuple[str, ...] = ()  # of a file of type custom
    file_transfer_methods: tuple[str, ...] = ()  # empty for any


@dataclass(frozen=True)
class InputForm:
    """The input form of a workflow."""

    fields: tuple[InputField, ...] = ()
    complete: bool = False  # whether every other input is known to be dropped
    limits: tuple[tuple[str, int], ...] = ()  # megabytes of a file, as `system_parameters` has them

    def limits_only(self) -> InputForm:
        """Return what of the form counts for another version of the workflow, too."""
        return InputForm(limits=self.limits)

    def describe(self) -> str:
        """Return the inputs with their types, and the task that gives those which are required."""
        shown = self.fields[:_LISTED]
        inputs = ", ".join(
            f"{_excerpt(f.variable)} ({one_line(f.type, _EXCERPT) or 'unknown'}{', required' if f.required else ''})"
            for f in shown
        )
        more = f" and {len(self.fields) - len(shown)} more" if len(self.fields) > len(shown) else ""
        values = {one_line(f.variable, _EXCERPT): "..." for f in shown if f.required}
        task = f"DifyRunWorkflowOperator(task_id='run', inputs={values!r})"
        return f"{f'Its inputs: {inputs}{more}' if inputs else 'It has no inputs'}. A task that runs it: {task}"


async def read_form(client: Client) -> InputForm | None:
    """Read the app's form; ``None`` where the server refuses it, which leaves the check out: the start tells why."""
    with suppress(DifyError):
        return parse_input_form(await client.perform(calls.parameters()))
    return None


def parse_input_form(parameters: Any) -> InputForm:
    """
    Parse the form out of the JSON of ``GET {base}/parameters``. Never raises: what can't be read makes it incomplete.
    Dify 1.12.1 to 1.16.1, ``Workflow.user_input_form``: a list of ``{type: field}``, each field as the graph has it.
    """
    entries = parameters.get("user_input_form") if isinstance(parameters, dict) else None
    if not isinstance(entries, list):
        return InputForm()
    limits = parameters.get("system_parameters")
    limits = limits if isinstance(limits, dict) else {}
    known = tuple((name, limit) for name, limit in limits.items() if type(limit) is int)
    items = (item for entry in entries for item in (entry.items() if isinstance(entry, dict) else [("", None)]))
    found = [_parse_field(*item) for item in items]
    return InputForm(tuple(item for item in found if item is not None), complete=None not in found, limits=known)


def _parse_field(field_type: str, data: Any) -> InputField | None:
    if not isinstance(data, dict) or not isinstance(data.get("variable"), str):
        return None
    max_length = data.get("max_length")
    label = data.get("label")
    return InputField(
        variable=data["variable"],
        type=field_type if data.get("type", field_type) == field_type else "",
        label=label if isinstance(label, str) else "",
        required=data.get("required") is True,
        default=data.get("default"),
        # Zero is Dify's word for no limit, too.
        max_length=max_length if type(max_length) is int and max_length > 0 else None,
        options=_parse_texts(data.get("options")),
        file_types=_parse_texts(data.get("allowed_file_types")),
        file_extensions=_parse_texts(data.get("allowed_file_extensions")),
        file_transfer_methods=_parse_texts(data.get("allowed_file_upload_methods")),
    )


def _parse_texts(data: Any) -> tuple[str, ...]:
    return tuple(data) if isinstance(data, list) and all(isinstance(text, str) for text in data) else ()


# More of a name or a value than this never gets into a message.
_EXCERPT = 60
# Nor more of a list than this.
_LISTED = 10

_FILE_TYPES = ("image", "document", "audio", "video", "custom")
# Dify 1.14 and newer also find the file by the last two, which are in the outputs of a run.
_ANY_VERSION_IDS = ("reference", "related_id")
_FILE_SOURCES = {
    "local_file": ("upload_file_id", *_ANY_VERSION_IDS),
    "remote_url": ("url", "remote_url", "upload_file_id", *_ANY_VERSION_IDS),
    "tool_file": ("tool_file_id", *_ANY_VERSION_IDS),
    "datasource_file": ("datasource_file_id", *_ANY_VERSION_IDS),
}
_OPAQUE_REFERENCE = "dify-file-ref:"


@dataclass(frozen=True)
class InputCheck:
    """What a check of inputs against a form found. Every text is one line, with at most an excerpt of a value."""

    problems: tuple[str, ...] = ()  # reasons for which Dify rejects the start, one for each input
    warnings: tuple[str, ...] = ()  # what Dify ignores without a word

    def rejection(self, server_version: str | None = None) -> DifyInputsRejected | None:
        """Return the error for inputs that Dify is sure to reject; ``None`` for others."""
        if not self.problems:
            return None
        return DifyInputsRejected(
            f"{' '.join(self.problems)} The app's form in Dify says so; no workflow run was started. Check the task's "
            "inputs.",
            server_version=server_version,
        )


def check_inputs(form: InputForm, inputs: Mapping[str, Any]) -> InputCheck:
    """
    Return what Dify would reject, and what it would ignore. ``null`` counts as missing, an empty text does not. A
    missing required input is rejected even if the form has a default; a missing optional one becomes its default, which
    is then checked as if it had been sent.
    """
    if not all(isinstance(name, str) for name in inputs):
        # How a key of another type is sent depends on the JSON encoder.
        return InputCheck()
    too_large = _large_files(form, inputs)
    inputs = with_files_as(inputs, DifyFile.as_input)
    known = {field.variable for field in form.fields}
    unknown = [name for name in inputs if name not in known] if form.complete else []
    named = unknown[:_LISTED]
    problems = too_large
    warnings: list[str] = []
    for field in form.fields:
        value = inputs.get(field.variable)
        rule = _RULES.get(field.type)
        if rule is None:
            continue
        if value is None and field.required:
            problems.append(_missing(field, named))
            continue
        subject = f"Input {_excerpt(field.variable)}"
        if value is None:
            value = field.default
            subject += " is missing, and the form's default for it"
        if value is None or not _is_json(value):
            continue
        if (problem := rule(field, value)) is not None:
            problems.append(f"{subject} {problem}.")
        elif field.type == "file-list" and (warning := _dropped_files(value)) is not None:
            warnings.append(f"{subject} {warning}.")
    names = tuple((field.variable, field.label) for field in form.fields) if named else ()
    warnings += [_unknown(name, names) for name in named]
    if len(unknown) > len(named):
        warnings.append(f"The workflow's form has none of {len(unknown) - len(named)} more inputs: Dify drops them.")
    # A form may name a variable twice.
    return InputCheck(tuple(dict.fromkeys(problems)), tuple(warnings))


def _large_files(form: InputForm, inputs: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, value in inputs.items():
        for file in files_in({name: value}):
            limit = dict(form.limits).get(file.limit_name)
            if limit and file.size is not None and file.size > limit * 1024 * 1024:
                problems.append(
                    f"Input {_excerpt(name)} has the file {_excerpt(file.file_name)} of {file.size:,} bytes, and Dify "
                    f"takes at most {limit} MB."
                )
    return problems


def _missing(field: InputField, unknown: Iterable[str]) -> str:
    text = f"Input {_excerpt(field.variable)} is required and missing."
    names = {name: name for name in unknown}
    given = _nearest(field.variable, names) or _nearest(field.label, names)
    return text if given is None else f"{text} The form does not know {_excerpt(given)}, which is given."


# All rows of a batch may have the same one.
@lru_cache
def _unknown(name: str, form: tuple[tuple[str, str], ...]) -> str:
    text = f"The workflow's form has no input {_excerpt(name)}: Dify drops it."
    names = {variable: variable for variable, _ in form}
    # The console shows labels, so one of these may have been taken for the name.
    labels = {label: variable for variable, label in form if label}
    nearest = _nearest(name, names) or _nearest(name, labels)
    return text if nearest is None else f"{text} Is {_excerpt(nearest)} meant?"


def _nearest(name: str, candidates: Mapping[str, str]) -> str | None:
    folded = {candidate[:_EXCERPT].casefold(): result for candidate, result in candidates.items()}
    matches = get_close_matches(name[:_EXCERPT].casefold(), folded, n=1)
    return folded[matches[0]] if matches else None


def _text_problem(field: InputField, value: Any) -> str | None:
    """Only text is taken, also an empty one; characters count as in Python, before NUL characters are removed."""
    if not isinstance(value, str):
        return _no_text(value)
    if field.max_length is not None and len(value) > field.max_length:
        return f"must have at most {field.max_length} characters, not {len(value)}"
    return None


def _no_text(value: Any) -> str:
    # "4711" and "1.10" are numbers after it.
    return f"must be text, not {_describe(value)}. With render_template_as_native_obj=True a template gives that"


def _select_problem(field: InputField, value: Any) -> str | None:
    """Only one of the options is taken, letter by letter. An empty text is none, even if the input is optional."""
    if not isinstance(value, str):
        return _no_text(value)
    if not field.options or value in field.options:
        return None
    return f"must be one of {_listed(field.options)}, not {_describe(value)}"


def _number_problem(_field: InputField, value: Any) -> str | None:
    """Numbers, true and false are taken, blank texts mean no value, and of other texts ``1.0e3`` but not ``1e3``."""
    if isinstance(value, str):
        is_number = not value.strip() or parse_number(value) is not None
    else:
        is_number = isinstance(value, (int, float))
    return None if is_number else f"must be a number, not {_describe(value)}"


def _checkbox_problem(_field: InputField, value: Any) -> str | None:
    """
    1, 0 and the texts true, 1, yes, on, false, 0, no, off (upper case and blanks around them too) are converted by
    ``_prepare_user_inputs``, and other texts and numbers kept. Objects are rejected.
    """
    if isinstance(value, dict) or (isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value)):
        return f"must be true or false, not {_describe(value)}"
    return None


def _json_object_problem(_field: InputField, value: Any) -> str | None:
    """
    Anything empty (also ``""``, ``0``, ``[]``) is taken, otherwise only an object; never its JSON text. The field's own
    schema is applied later, by a run that has started and then fails.
    """
    return f"must be an object, not {_describe(value)}" if value and not isinstance(value, dict) else None


def _file_problem(field: InputField, value: Any) -> str | None:
    """Where the file is optional, an empty text is none; ``build_from_mapping`` refuses one without a method."""
    if value == "" and not field.required:
        return None
    if not isinstance(value, dict):
        return f"must be a file (an object with 'transfer_method'), not {_describe(value)}"
    if not value.get("transfer_method"):
        return "must be a file, but has no 'transfer_method'"
    return _mapping_problem(field, value)


def _file_list_problem(field: InputField, value: Any) -> str | None:
    """
    An empty text counts as missing where the list is optional; otherwise only a list of objects is taken, also an empty
    one. ``max_length`` counts every object, also those that ``build_from_mappings`` drops.
    """
    if value == "" and not field.required:
        return None
    if not isinstance(value, (list, tuple)):
        return f"must be a list of files, not {_describe(value)}"
    for number, file in enumerate(value, 1):
        if not isinstance(file, dict):
            return f"must be a list of files (objects with 'transfer_method'), but item {number} is {_describe(file)}"
    if field.max_length is not None and len(value) > field.max_length:
        return f"must have at most {field.max_length} files, not {len(value)}"
    for number, file in enumerate(value, 1):
        if _drop_reason(file) is None and (problem := _mapping_problem(field, file)) is not None:
            return f"has a wrong file: item {number} {problem}"
    return None


def _mapping_problem(field: InputField, file: dict[str, Any]) -> str | None:
    """
    What ``build_from_mapping`` refuses; whether the file exists and is of its type is known to the server alone. Up to
    1.13 ``reference`` and ``related_id`` are no ids of a file, and from 1.14 on they are. An image may come by any
    transfer method; files of tools and data sources are not held against the form's settings.
    """
    method, file_type, upload_file_id = file["transfer_method"], file.get("type"), file.get("upload_file_id")
    if not isinstance(method, str) or method not in _FILE_SOURCES:
        return f"must have a 'transfer_method' of {_listed(_FILE_SOURCES)}, not {_describe(method)}"
    if not any(file.get(key) for key in _FILE_SOURCES[method]):
        return f"must have {_excerpt(_FILE_SOURCES[method][0])}, because its 'transfer_method' is {_excerpt(method)}"
    if file_type and file_type not in _FILE_TYPES:
        return f"must have a 'type' of {_listed(_FILE_TYPES)}, not {_describe(file_type)}"
    if method not in ("local_file", "remote_url"):
        return None
    if isinstance(upload_file_id, str) and upload_file_id and not _may_be_file_id(upload_file_id):
        return f"must have the UUID of an uploaded file as 'upload_file_id', not {_describe(upload_file_id)}"
    allowed_types, allowed_methods = field.file_types, field.file_transfer_methods
    # From 1.14 on, a form that names "custom" lets every type pass. A missing type counts as "custom", which passes
    # up to 1.13 if the form lists its extension, even where the form does not name "custom".
    may_be_custom = "custom" in allowed_types or (file_type in (None, "", "custom") and field.file_extensions)
    if allowed_types and file_type not in allowed_types and not may_be_custom:
        return f"must have a 'type' of {_listed(allowed_types)}, not {_describe(file_type)}"
    if file_type != "image" and allowed_methods and method not in allowed_methods:
        return f"must have a 'transfer_method' of {_listed(allowed_methods)}, not {_describe(method)}"
    return None


def _may_be_file_id(text: str) -> bool:
    try:
        return text.startswith(_OPAQUE_REFERENCE) or bool(UUID(text))
    except ValueError:
        return False


def _dropped_files(files: Sequence[dict[str, Any]]) -> str | None:
    dropped = [(number, reason) for number, file in enumerate(files, 1) if (reason := _drop_reason(file)) is not None]
    if not dropped:
        return None
    number, reason = dropped[0]
    return f"has files that Dify drops ({len(dropped)} of {len(files)}): item {number} has no {reason}"


def _drop_reason(file: dict[str, Any]) -> str | None:
    """Return what a list's file lacks so that ``build_from_mappings`` drops it without a word; ``None`` for nothing."""
    if not file.get("transfer_method"):
        return "'transfer_method'"
    if file["transfer_method"] == "remote_url" and not (file.get("url") or file.get("remote_url")):
        return "'url'"
    return None


# Fields of other kinds are not checked: kinds of a later Dify, and external_data_tool, which no workflow has.
_RULES: dict[str, Callable[[InputField, Any], str | None]] = {
    "text-input": _text_problem,
    "paragraph": _text_problem,
    "select": _select_problem,
    "number": _number_problem,
    "checkbox": _checkbox_problem,
    "json_object": _json_object_problem,
    "file": _file_problem,
    "file-list": _file_list_problem,
}


def _is_json(value: Any) -> bool:
    """Return whether it is known how the value looks in JSON; lists are looked into, one level deep."""
    if isinstance(value, (list, tuple)):
        return all(item is None or isinstance(item, (str, int, float, dict, list, tuple)) for item in value)
    return isinstance(value, (str, int, float, dict))


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _excerpt(value)
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, (list, tuple)) else "a number"


def _excerpt(text: str) -> str:
    # repr() escapes everything that would not print as itself, line ends first of all.
    return repr(text if len(text) <= _EXCERPT else text[:_EXCERPT] + "...")


def _listed(texts: Iterable[str]) -> str:
    shown = [_excerpt(text) for text in texts]
    more = len(shown) - _LISTED
    return ", ".join(shown[:_LISTED]) + (f" or {more} more" if more > 0 else "")
