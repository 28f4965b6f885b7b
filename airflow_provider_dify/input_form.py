"""
What the input form of a Dify workflow says: the inputs that it takes, and what each of them has to be like.

It comes out of ``GET {base}/parameters``, which shows the form of the *published* workflow. A start of another version
by its workflow id has the form of that version, which no route shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class InputField:
    """
    One field of the form: a variable of the workflow's start node.

    :param variable: name of the input.
    :param type: kind of the field, such as ``text-input``; ``""`` where the form contradicts itself.
    :param label: what the console shows instead of the name.
    :param required: whether a start without the input is rejected, default or not.
    :param default: value that Dify takes for a missing input; ``None`` for none.
    :param max_length: most characters of a text, or most files of a list; ``None`` for no limit.
    :param options: the values that a ``select`` takes; empty for not known.
    :param file_types: the types that a file may have; empty for any.
    :param file_extensions: the extensions that a file of type ``custom`` may have; empty for none.
    :param file_transfer_methods: how a file may be handed over; empty for any.
    """

    variable: str
    type: str
    label: str = ""
    required: bool = False
    default: Any = None
    max_length: int | None = None
    options: tuple[str, ...] = ()
    file_types: tuple[str, ...] = ()
    file_extensions: tuple[str, ...] = ()
    file_transfer_methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class InputForm:
    """
    The input form of a workflow.

    :param fields: the fields that could be read, in the form's order.
    :param complete: whether these are all, so that every other input is known to be dropped.
    """

    fields: tuple[InputField, ...] = ()
    complete: bool = False


def parse_input_form(parameters: Any) -> InputForm:
    """
    Parse the form out of a response of ``GET {base}/parameters``. Never raises.

    Dify 1.12.1 to 1.16.1, ``Workflow.user_input_form``: a list of ``{type: field}``, each field as the graph has it.

    :param parameters: the response's JSON.
    :return: the form; what can't be read is left out, and makes the form incomplete.
    """
    entries = parameters.get("user_input_form") if isinstance(parameters, dict) else None
    if not isinstance(entries, list):
        return InputForm()
    fields: list[InputField] = []
    complete = True
    for entry in entries:
        found = [_parse_field(*item) for item in entry.items()] if isinstance(entry, dict) else [None]
        fields += [field for field in found if field is not None]
        complete = complete and None not in found
    return InputForm(tuple(fields), complete)


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
    if isinstance(data, list) and all(isinstance(text, str) for text in data):
        return tuple(data)
    return ()
