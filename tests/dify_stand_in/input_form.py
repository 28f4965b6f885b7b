"""The form of a workflow's inputs, as ``GET /parameters`` shows it, and what Dify does to inputs because of it."""

from __future__ import annotations

from typing import Any

Form = list[dict[str, dict[str, Any]]]


def form_field(
    variable: str,
    kind: str = "text-input",
    *,
    required: bool = False,
    max_length: int | None = None,
    options: tuple[str, ...] = (),
    **more: Any,
) -> dict[str, dict[str, Any]]:
    """
    Return one field of a ``user_input_form``.

    :param variable: the input's name.
    :param kind: ``text-input``, ``paragraph``, ``select``, ``number``, ``checkbox``, ``file``, ``file-list`` or
        ``json_object``.
    :param required: whether a start without it is rejected.
    :param max_length: characters of a text, or files of a list.
    :param options: values of a select.
    :param more: further keys of the field, such as ``default``.
    :return: the field, under its kind, as Dify writes it.
    """
    field = {"label": variable, "variable": variable, "required": required, "type": kind, "max_length": max_length}
    return {kind: field | {"options": list(options)} | more}


def nothing_required(form: Form) -> Form:
    """Return the form with no required field in it."""
    return [{kind: {**field, "required": False} for kind, field in entry.items()} for entry in form]


def keep_known(form: Form, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs that the form knows. Dify drops the others without a word."""
    known = {field["variable"] for entry in form for field in entry.values()}
    return {name: value for name, value in inputs.items() if name in known}


def rejection(form: Form, inputs: dict[str, Any]) -> str | None:
    """Return why Dify rejects these inputs, in its own words, or ``None``."""
    for entry in form:
        for field in entry.values():
            value = inputs.get(field["variable"])
            if value is None and field["required"]:
                return f"{field['variable']} is required in input form"
            wrong = _wrong_value(field, value) if value is not None else None
            if wrong:
                return f"{field['variable']} in input form must be {wrong}"
    return None


def _wrong_value(field: dict[str, Any], value: Any) -> str | None:
    kind, limit = field["type"], field.get("max_length")
    if kind in ("text-input", "paragraph", "select") and not isinstance(value, str):
        return "a string"
    if kind == "select":
        return None if value in field["options"] else f"one of the following: {field['options']}"
    if kind in ("text-input", "paragraph"):
        return f"less than {limit} characters" if limit and len(value) > limit else None
    if kind == "number":
        return None if _is_number(value) else "a valid number"
    if kind == "file":
        return None if isinstance(value, dict) else "a file"
    if kind == "file-list":
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            return "a list of files"
        return f"less than {limit} files" if limit and len(value) > limit else None
    if kind == "json_object":
        return "a dict" if value and not isinstance(value, dict) else None
    return None


def _is_number(value: Any) -> bool:
    if isinstance(value, str) and value.strip():
        try:
            float(value) if "." in value else int(value)
        except ValueError:
            return False
    return isinstance(value, (int, float, str))


def uploaded_files(inputs: dict[str, Any]) -> list[str]:
    """Return the ids of the uploaded files among the inputs."""
    values = [item for value in inputs.values() for item in (value if isinstance(value, list) else [value])]
    return [value["upload_file_id"] for value in values if isinstance(value, dict) and "upload_file_id" in value]
