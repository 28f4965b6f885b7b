"""What an input form says, as Dify's ``/parameters`` shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from airflow_provider_dify.runs.inputs import InputField, InputForm, parse_input_form
from tests.unit.fuzzing import fuzzed

RECORDED = Path(__file__).parents[1] / "recorded"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
KEYS = ["variable", "type", "label", "required", "default", "max_length", "options", "allowed_file_types"]


def recorded_parameters(version: str) -> Any:
    return json.loads((RECORDED / version / "app_parameters.http").read_bytes().partition(b"\r\n\r\n")[2])


def parameters(*entries: Any) -> dict[str, Any]:
    return {"user_input_form": list(entries)}


def test_the_recorded_form_of_1_12_has_every_kind_of_plain_field() -> None:
    assert parse_input_form(recorded_parameters("1.12.1")) == InputForm(
        (
            InputField("query", "paragraph", label="query", required=True),
            InputField("num", "number", label="num"),
            InputField("flag", "checkbox", label="flag"),
            InputField("obj", "json_object", label="obj"),
            InputField("choice", "select", label="choice", options=("red", "green")),
            InputField("short", "text-input", label="short", max_length=8),
        ),
        complete=True,
        limits=(
            ("image_file_size_limit", 10),
            ("video_file_size_limit", 100),
            ("audio_file_size_limit", 50),
            ("file_size_limit", 15),
            ("workflow_file_upload_limit", 10),
        ),
    )


def test_the_recorded_form_of_1_16_is_read_too() -> None:
    form = parse_input_form(recorded_parameters("1.16.1"))
    assert form.complete
    assert [(field.variable, field.required, field.max_length) for field in form.fields] == [
        ("query", True, 100000),
        ("mode", False, 100000),
        ("seconds", False, 100000),
    ]


def test_a_file_field_says_which_files_it_takes() -> None:
    file = {
        "variable": "doc",
        "type": "file",
        "allowed_file_types": ["document", "custom"],
        "allowed_file_extensions": [".csv"],
        "allowed_file_upload_methods": ["local_file"],
    }
    (field,) = parse_input_form(parameters({"file": file})).fields
    assert field.file_types == ("document", "custom")
    assert field.file_extensions == (".csv",)
    assert field.file_transfer_methods == ("local_file",)


@pytest.mark.parametrize(
    ("key", "values", "field"),
    [
        # No positive whole number.
        ("max_length", [None, 0, -1, "48", 4.5, True, []], InputField("v", "select")),
        # No list of texts.
        ("options", [None, "red", {"red": 1}, ["red", 5]], InputField("v", "select")),
        # Only a plain true makes a field required.
        ("required", [None, "true", 1, False], InputField("v", "select")),
        ("required", [True], InputField("v", "select", required=True)),
        # It contradicts itself.
        ("type", ["file"], InputField("v", "")),
    ],
)
def test_what_a_field_says_wrongly_is_not_known(key: str, values: list[Any], field: InputField) -> None:
    for value in values:
        assert parse_input_form(parameters({"select": {"variable": "v", key: value}})).fields == (field,)


@pytest.mark.parametrize("response", [None, [], "text", {}, {"user_input_form": None}, {"user_input_form": {}}])
def test_a_response_without_a_form_says_nothing_about_inputs(response: Any) -> None:
    assert parse_input_form(response) == InputForm((), complete=False)
    # An empty form is known to take no input.
    assert parse_input_form(parameters()) == InputForm((), complete=True)


@pytest.mark.parametrize(
    "entry",
    [None, "text", {"text-input": None}, {"text-input": {}}, {"text-input": {"variable": 5}}],
    ids=["null", "text", "field that is null", "field without a name", "field with a number as its name"],
)
def test_an_entry_that_can_not_be_read_leaves_the_others_and_makes_the_form_incomplete(entry: Any) -> None:
    form = parse_input_form(parameters(entry, {"number": {"variable": "n"}}))
    assert form == InputForm((InputField("n", "number"),), complete=False)


@fuzzed(
    st.fixed_dictionaries({"user_input_form": JSON | st.lists(st.dictionaries(st.text(), JSON))})
    | JSON
    | st.lists(st.dictionaries(st.text(), st.dictionaries(st.sampled_from(KEYS), JSON))).map(lambda x: parameters(*x))
)
def test_no_response_makes_parsing_raise(response: Any) -> None:
    form = parse_input_form(response)
    assert all(isinstance(field.variable, str) and isinstance(field.type, str) for field in form.fields)
