"""
Which inputs are wrong before a start.

What is taken and what is rejected here was compared with Dify's own validation code of 1.12.1, 1.13.0, 1.14.2,
1.15.0 and 1.16.1, value by value.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st

from airflow_provider_dify.runs.inputs import InputCheck, InputField, InputForm, check_inputs, parse_input_form
from tests.unit.fuzzing import fuzzed
from tests.unit.test_input_form import JSON, recorded_parameters

FILE_ID = "3f1e9c0a-5d0f-4b0e-9a70-5b4a1f2f7c11"
LOCAL = {"transfer_method": "local_file", "upload_file_id": FILE_ID}
DOCUMENT = {"type": "document", **LOCAL}
LINK = {"type": "image", "transfer_method": "remote_url", "url": "https://example.org/a.png"}
TOOL_FILE = {"transfer_method": "tool_file", "tool_file_id": "x"}
SOURCE_FILE = {"transfer_method": "datasource_file", "datasource_file_id": "x"}
TYPES = ["text-input", "paragraph", "select", "number", "checkbox", "json_object", "file", "file-list"]


def v(field_type: str, **facts: Any) -> InputField:
    return InputField("v", field_type, **facts)


def check(field: InputField, value: Any) -> InputCheck:
    return check_inputs(InputForm((field,), complete=True), {field.variable: value})


def problem(field: InputField, value: Any) -> str:
    (text,) = check(field, value).problems
    return text


# --- inputs that are missing


@pytest.mark.parametrize("version", ["1.12.1", "1.16.1"])
def test_a_start_without_the_required_input_of_the_recorded_forms_is_wrong(version: str) -> None:
    form = parse_input_form(recorded_parameters(version))
    assert check_inputs(form, {}) == InputCheck(("Input 'query' is required and missing.",))
    assert check_inputs(form, {"query": "hello"}) == InputCheck()


@pytest.mark.parametrize("field_type", TYPES)
@pytest.mark.parametrize("inputs", [{}, {"v": None}], ids=["left out", "null"])
def test_a_required_input_is_missed_whatever_its_type_and_its_default(field_type: str, inputs: dict[str, Any]) -> None:
    required = v(field_type, required=True, default="3", options=("3",))
    missing = ("Input 'v' is required and missing.",)
    assert check_inputs(InputForm((required,), complete=True), inputs).problems == missing
    assert check_inputs(InputForm((v(field_type),), complete=True), inputs) == InputCheck()


def test_an_unknown_input_of_a_similar_name_is_named_beside_the_missing_one() -> None:
    form = InputForm((InputField("query", "paragraph", required=True),), complete=True)
    assert check_inputs(form, {"Querry": "x"}) == InputCheck(
        ("Input 'query' is required and missing. The form does not know 'Querry', which is given.",),
        ("The workflow's form has no input 'Querry': Dify drops it. Is 'query' meant?",),
    )


def test_an_optional_input_that_is_missing_is_checked_as_its_default() -> None:
    form = InputForm((InputField("choice", "select", default="", options=("red", "green")),))
    assert check_inputs(form, {}).problems == (
        "Input 'choice' is missing, and the form's default for it must be one of 'red', 'green', not ''.",
    )
    assert check_inputs(form, {"choice": "red"}) == InputCheck()


# --- values


SELECT = v("select", options=("red", "green"))
NUMBERS = [0, -1, 3.5, True, 10**400]
NUMBER_TEXTS = ["", " ", "3", " 3 ", "+5", "-5.", ".5", "3.5", "1.0e3", "1_000", "１２", "1.e999"]
# What some version takes.
FILES = [
    DOCUMENT,
    LINK,
    LOCAL,
    {**LOCAL, "type": None},
    {**LOCAL, "upload_file_id": FILE_ID.replace("-", "").upper()},
    {**LOCAL, "upload_file_id": "dify-file-ref:eyJyZWNvcmRfaWQiOiJ4In0="},
    {**LOCAL, "upload_file_id": 5},
    {"transfer_method": "local_file", "related_id": FILE_ID, "dify_model_identity": "__dify__file__"},
    {"transfer_method": "local_file", "reference": "x"},
    {"transfer_method": "remote_url", "remote_url": "x", "type": ""},
    {**TOOL_FILE, "type": "video"},
    SOURCE_FILE,
]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        # An empty text is not missing; a file's is only where the file is optional.
        *((v(field_type, required=True), [""]) for field_type in ("text-input", "paragraph", "number", "checkbox")),
        *((v(field_type), [""]) for field_type in ("file", "file-list")),
        (v("text-input", max_length=8), ["", "12345678", "二" * 8, "🎉" * 8]),
        (v("paragraph"), ["x" * 1_000_000]),
        (SELECT, ["red"]),
        # Without known options.
        (v("select"), ["blue"]),
        (v("number"), NUMBERS + NUMBER_TEXTS),
        (v("checkbox"), [True, 0, 2, 0.5, "true", "YES ", "maybe", "", [], ["a"]]),
        (v("json_object", required=True), [{}, {"a": [1]}, "", 0, 0.0, False, []]),
        (v("file", required=True), FILES),
        (v("file-list", required=True), [[], *([file] for file in FILES)]),
        (v("file-list", max_length=2), [[DOCUMENT, DOCUMENT]]),
        # A form with extensions may take a file without its type.
        (
            v("file", file_types=("image",), file_extensions=(".csv",)),
            [{**DOCUMENT, "type": file_type} for file_type in ("custom", "", None)],
        ),
        # A type that some version allows.
        (v("file", file_types=("document",)), [DOCUMENT]),
        (v("file", file_types=("image", "custom")), [DOCUMENT]),
        (v("file", file_types=("custom",)), [LOCAL]),
        (v("file", file_types=("image",)), [{"type": "document", **file} for file in (TOOL_FILE, SOURCE_FILE)]),
        (v("file", file_transfer_methods=("local_file",)), [LINK, TOOL_FILE]),
        # What only an encoder could turn into JSON is not checked; nor is a type that is not known.
        *((v(field_type), [object(), {1, 2}, b"x", [object()]]) for field_type in TYPES),
        (v("hologram", required=True), [5, None]),
    ],
    ids=lambda value: value.type if isinstance(value, InputField) else "values",
)
def test_what_some_version_takes_is_taken(field: InputField, values: list[Any]) -> None:
    for value in values:
        assert check(field, value) == InputCheck(), value


NATIVE = " With render_template_as_native_obj=True a template gives that."
NO_TEXTS = [(5, "a number"), (True, "true"), (False, "false"), ([], "a list"), ({}, "an object"), (("a",), "a list")]
NO_NUMBERS = ["abc", "1e3", "inf", "nan", "0x10", "1,5", "1__0", ".", "3 4", "i.nf"]
NO_OBJECTS = [('{"a": 1}', """'{"a": 1}'"""), (5, "a number"), (True, "true"), ([{}], "a list"), (["a"], "a list")]
NO_FILES = [("report.pdf", "'report.pdf'"), ([DOCUMENT], "a list"), ([], "a list"), (5, "a number")]
NO_LISTS = [(DOCUMENT, "an object"), ("a", "'a'"), (5, "a number")]
OF_ANOTHER_TYPE = [("document", "'document'"), ("custom", "'custom'"), ("", "''"), (None, "null")]


@pytest.mark.parametrize(
    ("field", "expected", "values"),
    [
        *((v(field_type, options=("5", "true")), f"be text, not {{}}.{NATIVE}", NO_TEXTS) for field_type in TYPES[:3]),
        *((v(field_type, max_length=8), "have at most 8 characters, not 9.", ["1" * 9]) for field_type in TYPES[:2]),
        (SELECT, "be one of 'red', 'green', not {!r}.", ["", "Red", " red", "blue"]),
        (v("number"), "be a number, not {!r}.", NO_NUMBERS),
        (v("number"), "be a number, not {}.", [([], "a list"), ({}, "an object")]),
        (v("checkbox"), "be true or false, not {}.", [({}, "an object"), ([{}], "a list"), ([1, {}], "a list")]),
        (v("json_object"), "be an object, not {}.", NO_OBJECTS),
        (v("file"), "be a file (an object with 'transfer_method'), not {}.", [*NO_FILES]),
        (v("file", required=True), "be a file (an object with 'transfer_method'), not {!r}.", [""]),
        (
            v("file"),
            "be a file, but has no 'transfer_method'.",
            [{}, {"type": "document", "upload_file_id": FILE_ID}, {"transfer_method": ""}],
        ),
        (
            v("file"),
            "have 'url', because its 'transfer_method' is 'remote_url'.",
            [{"transfer_method": "remote_url"}],
        ),
        (
            v("file", file_types=("image", "audio")),
            "have a 'type' of 'image', 'audio', not {}.",
            [({**DOCUMENT, "type": file_type}, described) for file_type, described in OF_ANOTHER_TYPE],
        ),
        # Except for images, which the other test has.
        (
            v("file", file_transfer_methods=("local_file",)),
            "have a 'transfer_method' of 'local_file', not 'remote_url'.",
            [{**LINK, "type": "document"}],
        ),
        (v("file-list"), "be a list of files, not {}.", NO_LISTS),
        (
            v("file-list"),
            f"be a list of files (objects with 'transfer_method'), but item 2 is {FILE_ID!r}.",
            [[DOCUMENT, FILE_ID]],
        ),
        (v("file-list", max_length=2), "have at most 2 files, not 3.", [[DOCUMENT, DOCUMENT, {}]]),
        # A value is shown as an excerpt on one line.
        (
            v("number"),
            "be a number, not 'a\\nb\\x1b[31m\\u202e" + "x" * 51 + "...'.",
            ["a\nb\x1b[31m\u202e" + "x" * 10_000],
        ),
    ],
    ids=lambda value: value.type if isinstance(value, InputField) else None,
)
def test_what_no_version_takes_is_wrong(field: InputField, expected: str, values: list[Any]) -> None:
    for each in values:
        value, shown = each if isinstance(each, tuple) else (each, each)
        assert problem(field, value) == f"Input 'v' must {expected.format(shown)}"


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ({"transfer_method": "url"}, "'local_file', 'remote_url', 'tool_file', 'datasource_file', not 'url'"),
        ({"transfer_method": ["local_file"]}, "not a list"),
        (
            {"transfer_method": "local_file"},
            "have 'upload_file_id', because its 'transfer_method' is 'local_file'",
        ),
        ({"transfer_method": "local_file", "upload_file_id": ""}, "must have 'upload_file_id'"),
        ({"transfer_method": "local_file", "url": "https://example.org"}, "must have 'upload_file_id'"),
        ({**DOCUMENT, "upload_file_id": "a.pdf"}, "UUID of an uploaded file as 'upload_file_id', not 'a.pdf'"),
        ({"transfer_method": "tool_file"}, "must have 'tool_file_id'"),
        ({**DOCUMENT, "type": "pdf"}, "'type' of 'image', 'document', 'audio', 'video', 'custom', not 'pdf'"),
        ({**DOCUMENT, "type": 5}, "not a number"),
        ({**LINK, "upload_file_id": "report.pdf"}, "UUID of an uploaded file"),
    ],
    ids=str,
)
def test_a_file_that_no_version_takes_is_wrong_also_in_a_list(file: dict[str, Any], expected: str) -> None:
    text = problem(v("file"), file)
    assert text.startswith("Input 'v' must have ")
    assert expected in text
    text = problem(v("file-list"), [DOCUMENT, file])
    assert text.startswith("Input 'v' has a wrong file: item 2 must have ")
    assert expected in text


def test_files_that_dify_drops_are_a_warning() -> None:
    found = check(v("file-list"), [DOCUMENT, {"transfer_method": "remote_url"}, {}])
    assert found == InputCheck((), ("Input 'v' has files that Dify drops (2 of 3): item 2 has no 'url'.",))


# --- unknown inputs, and messages


FORM = InputForm((InputField("query", "paragraph", label="Your question"), InputField("lang", "select")), complete=True)


@pytest.mark.parametrize(
    ("name", "nearest"), [("Query", "query"), ("qery", "query"), ("language", "lang"), ("your_question", "query")]
)
def test_an_unknown_input_is_a_warning_with_the_nearest_name(name: str, nearest: str) -> None:
    warning = f"The workflow's form has no input {name!r}: Dify drops it. Is {nearest!r} meant?"
    assert check_inputs(FORM, {name: {}}) == InputCheck((), (warning,))


def test_unknown_inputs_like_no_other_are_a_few_warnings_without_a_name() -> None:
    assert check_inputs(FORM, {"zzz": 1}).warnings == ("The workflow's form has no input 'zzz': Dify drops it.",)
    warnings = check_inputs(FORM, {f"x{number}": 1 for number in range(1000)}).warnings
    assert len(warnings) == 11
    assert warnings[-1] == "The workflow's form has none of 990 more inputs: Dify drops them."
    # A form that could not be read whole warns of nothing.
    assert check_inputs(InputForm(FORM.fields, complete=False), {"zzz": 1}) == InputCheck()


def test_many_long_options_and_a_long_name_are_not_all_shown() -> None:
    field = v("select", options=tuple(f"{number}{'x' * 1000}" for number in range(100)))
    text = problem(field, "y" * 1000)
    assert "or 90 more" in text
    assert len(text) < 1000
    text = problem(InputField("n\n" * 1000, "number"), "a")
    assert len(text) < 150
    assert "\n" not in text


def test_every_wrong_input_is_named_once_in_the_order_of_the_form() -> None:
    form = parse_input_form(recorded_parameters("1.12.1"))
    problems = check_inputs(form, {"short": "123456789", "num": "x", "flag": True}).problems
    assert [text.split("'")[1] for text in problems] == ["query", "num", "short"]
    # A variable that the form names twice.
    assert len(check_inputs(InputForm((v("number"), v("number"))), {"v": "x"}).problems) == 1


def test_names_that_are_no_text_leave_the_check_out() -> None:
    inputs: dict[Any, Any] = {5: 1}
    form = InputForm((InputField("5", "number", required=True),), complete=True)
    assert check_inputs(form, inputs) == InputCheck()


FIELDS = st.builds(
    InputField,
    variable=st.sampled_from(["a", "b"]) | st.text(),
    type=st.sampled_from(TYPES) | st.text(),
    label=st.text(),
    required=st.booleans(),
    default=JSON,
    max_length=st.none() | st.integers(min_value=1),
    options=st.lists(st.text()).map(tuple),
    file_types=st.lists(st.sampled_from(["image", "custom", "pdf"])).map(tuple),
    file_extensions=st.lists(st.text()).map(tuple),
    file_transfer_methods=st.lists(st.sampled_from(["local_file", "remote_url"])).map(tuple),
)
ANY_FILES = st.dictionaries(
    st.sampled_from(["transfer_method", "type", "upload_file_id", "url"]),
    st.sampled_from(["local_file", "remote_url", "tool_file", "image", FILE_ID]) | JSON,
)
INPUTS = st.dictionaries(st.sampled_from(["a", "b"]) | st.text(), JSON | ANY_FILES | st.lists(ANY_FILES))


@fuzzed(st.builds(InputForm, st.lists(FIELDS).map(tuple), st.booleans()), INPUTS)
def test_no_form_and_no_inputs_make_the_check_raise_or_say_more_than_short_lines(
    form: InputForm, inputs: dict[str, Any]
) -> None:
    found = check_inputs(form, inputs)
    for text in found.problems + found.warnings:
        assert text.isprintable()
        assert len(text) < 1500
