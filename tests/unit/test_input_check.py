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
DOCUMENT = {"type": "document", "transfer_method": "local_file", "upload_file_id": FILE_ID}
LINK = {"type": "image", "transfer_method": "remote_url", "url": "https://example.org/a.png"}
TYPES = ["text-input", "paragraph", "select", "number", "checkbox", "json_object", "file", "file-list"]


def check(field: InputField, value: Any) -> InputCheck:
    return check_inputs(InputForm((field,), complete=True), {field.variable: value})


def problem(field: InputField, value: Any) -> str:
    (text,) = check(field, value).problems
    return text


class TestMissing:
    @pytest.mark.parametrize("version", ["1.12.1", "1.16.1"])
    def test_a_start_without_the_required_input_of_the_recorded_forms_is_wrong(self, version: str) -> None:
        form = parse_input_form(recorded_parameters(version))
        assert check_inputs(form, {}) == InputCheck(("Input 'query' is required and missing.",))
        assert check_inputs(form, {"query": "hello"}) == InputCheck()

    @pytest.mark.parametrize("field_type", TYPES)
    @pytest.mark.parametrize("inputs", [{}, {"v": None}], ids=["left out", "null"])
    def test_a_required_input_is_missed_whatever_its_type_and_its_default(
        self, field_type: str, inputs: dict[str, Any]
    ) -> None:
        form = InputForm((InputField("v", field_type, required=True, default="3", options=("3",)),), complete=True)
        assert check_inputs(form, inputs).problems == ("Input 'v' is required and missing.",)

    @pytest.mark.parametrize("field_type", TYPES)
    @pytest.mark.parametrize("inputs", [{}, {"v": None}], ids=["left out", "null"])
    def test_an_optional_input_may_be_missing(self, field_type: str, inputs: dict[str, Any]) -> None:
        assert check_inputs(InputForm((InputField("v", field_type),), complete=True), inputs) == InputCheck()

    @pytest.mark.parametrize("field_type", ["text-input", "paragraph", "number", "checkbox", "json_object"])
    def test_an_empty_text_does_not_count_as_missing(self, field_type: str) -> None:
        assert check(InputField("v", field_type, required=True), "") == InputCheck()

    @pytest.mark.parametrize("field_type", ["file", "file-list"])
    def test_an_empty_text_counts_as_a_missing_file_only_where_the_file_is_optional(self, field_type: str) -> None:
        assert check(InputField("v", field_type), "") == InputCheck()
        assert "not ''" in problem(InputField("v", field_type, required=True), "")

    def test_an_unknown_input_of_a_similar_name_is_named_beside_the_missing_one(self) -> None:
        form = InputForm((InputField("query", "paragraph", required=True),), complete=True)
        assert check_inputs(form, {"Querry": "x"}) == InputCheck(
            ("Input 'query' is required and missing. The form does not know 'Querry', which is given.",),
            ("The workflow's form has no input 'Querry': Dify drops it. Is 'query' meant?",),
        )

    def test_an_optional_input_that_is_missing_is_checked_as_its_default(self) -> None:
        form = InputForm((InputField("choice", "select", default="", options=("red", "green")),))
        assert check_inputs(form, {}).problems == (
            "Input 'choice' is missing, and the form's default for it must be one of 'red', 'green', not ''.",
        )
        assert check_inputs(form, {"choice": "red"}) == InputCheck()


class TestText:
    @pytest.mark.parametrize("field_type", ["text-input", "paragraph", "select"])
    @pytest.mark.parametrize(
        ("value", "described"),
        [(5, "a number"), (True, "true"), (False, "false"), ([], "a list"), ({}, "an object"), (("a",), "a list")],
    )
    def test_only_text_is_taken(self, field_type: str, value: Any, described: str) -> None:
        field = InputField("v", field_type, options=("5", "true"))
        assert problem(field, value) == (
            f"Input 'v' must be text, not {described}. With render_template_as_native_obj=True a template gives that."
        )

    @pytest.mark.parametrize("value", ["", "12345678", "二二二二二二二二", "🎉🎉🎉🎉🎉🎉🎉🎉"])
    def test_a_text_as_long_as_the_limit_is_taken(self, value: str) -> None:
        assert check(InputField("short", "text-input", max_length=8), value) == InputCheck()

    @pytest.mark.parametrize("field_type", ["text-input", "paragraph"])
    def test_a_longer_text_is_wrong_and_not_shown(self, field_type: str) -> None:
        text = problem(InputField("short", field_type, max_length=8), "123456789")
        assert text == "Input 'short' must have at most 8 characters, not 9."

    def test_a_text_without_a_limit_may_be_long(self) -> None:
        assert check(InputField("v", "paragraph"), "x" * 1_000_000) == InputCheck()


class TestSelect:
    FIELD = InputField("choice", "select", options=("red", "green"))

    @pytest.mark.parametrize("value", ["", "Red", " red", "blue"])
    def test_only_an_option_is_taken_letter_by_letter(self, value: str) -> None:
        assert problem(self.FIELD, value) == f"Input 'choice' must be one of 'red', 'green', not {value!r}."

    def test_an_option_is_taken(self) -> None:
        assert check(self.FIELD, "red") == InputCheck()

    def test_without_known_options_every_text_is_taken(self) -> None:
        assert check(InputField("choice", "select"), "blue") == InputCheck()

    def test_many_long_options_are_not_all_shown(self) -> None:
        field = InputField("choice", "select", options=tuple(f"{number}{'x' * 1000}" for number in range(100)))
        text = problem(field, "y" * 1000)
        assert "or 90 more" in text
        assert len(text) < 1000


class TestNumber:
    @pytest.mark.parametrize(
        "value",
        [0, -1, 3.5, True, 10**400, "", " ", "3", " 3 ", "+5", "-5.", ".5", "3.5", "1.0e3", "1_000", "１２", "1.e999"],
    )
    def test_what_dify_reads_as_a_number_is_taken(self, value: Any) -> None:
        assert check(InputField("n", "number"), value) == InputCheck()

    @pytest.mark.parametrize("value", ["abc", "1e3", "inf", "nan", "0x10", "1,5", "1__0", ".", "3 4", "i.nf"])
    def test_a_text_that_dify_reads_as_none_is_wrong(self, value: str) -> None:
        assert problem(InputField("n", "number"), value) == f"Input 'n' must be a number, not {value!r}."

    @pytest.mark.parametrize(("value", "described"), [([], "a list"), ({}, "an object")])
    def test_lists_and_objects_are_wrong(self, value: Any, described: str) -> None:
        assert problem(InputField("n", "number"), value) == f"Input 'n' must be a number, not {described}."


class TestCheckbox:
    @pytest.mark.parametrize("value", [True, 0, 2, 0.5, "true", "YES ", "maybe", "", [], ["a"]])
    def test_everything_without_an_object_is_taken(self, value: Any) -> None:
        assert check(InputField("flag", "checkbox"), value) == InputCheck()

    @pytest.mark.parametrize(("value", "described"), [({}, "an object"), ([{}], "a list"), ([1, {}], "a list")])
    def test_objects_are_wrong(self, value: Any, described: str) -> None:
        assert problem(InputField("flag", "checkbox"), value) == f"Input 'flag' must be true or false, not {described}."


class TestJsonObject:
    @pytest.mark.parametrize("value", [{}, {"a": [1]}, "", 0, 0.0, False, []])
    def test_objects_and_whatever_is_empty_are_taken(self, value: Any) -> None:
        assert check(InputField("obj", "json_object", required=True), value) == InputCheck()

    @pytest.mark.parametrize(
        ("value", "described"),
        [('{"a": 1}', """'{"a": 1}'"""), (5, "a number"), (True, "true"), ([{}], "a list"), (["a"], "a list")],
    )
    def test_everything_else_is_wrong(self, value: Any, described: str) -> None:
        assert problem(InputField("obj", "json_object"), value) == f"Input 'obj' must be an object, not {described}."


ALSO_TAKEN = [
    DOCUMENT,
    LINK,
    {"transfer_method": "local_file", "upload_file_id": FILE_ID},
    {"transfer_method": "local_file", "upload_file_id": FILE_ID, "type": None},
    {"transfer_method": "local_file", "upload_file_id": FILE_ID.replace("-", "").upper()},
    {"transfer_method": "local_file", "upload_file_id": "dify-file-ref:eyJyZWNvcmRfaWQiOiJ4In0="},
    {"transfer_method": "local_file", "upload_file_id": 5},
    {"transfer_method": "local_file", "related_id": FILE_ID, "dify_model_identity": "__dify__file__"},
    {"transfer_method": "local_file", "reference": "x"},
    {"transfer_method": "remote_url", "remote_url": "x", "type": ""},
    {"transfer_method": "tool_file", "tool_file_id": "x", "type": "video"},
    {"transfer_method": "datasource_file", "datasource_file_id": "x"},
]
WRONG = [
    ({"transfer_method": "url"}, "'local_file', 'remote_url', 'tool_file', 'datasource_file', not 'url'"),
    ({"transfer_method": ["local_file"]}, "not a list"),
    ({"transfer_method": "local_file"}, "must have 'upload_file_id', because its 'transfer_method' is 'local_file'"),
    ({"transfer_method": "local_file", "upload_file_id": ""}, "must have 'upload_file_id'"),
    ({"transfer_method": "local_file", "url": "https://example.org"}, "must have 'upload_file_id'"),
    ({**DOCUMENT, "upload_file_id": "a.pdf"}, "UUID of an uploaded file as 'upload_file_id', not 'a.pdf'"),
    ({"transfer_method": "tool_file"}, "must have 'tool_file_id'"),
    ({**DOCUMENT, "type": "pdf"}, "'type' of 'image', 'document', 'audio', 'video', 'custom', not 'pdf'"),
    ({**DOCUMENT, "type": 5}, "not a number"),
    ({**LINK, "upload_file_id": "report.pdf"}, "UUID of an uploaded file"),
]


class TestFile:
    @pytest.mark.parametrize("file", ALSO_TAKEN, ids=str)
    def test_a_file_that_some_version_takes_is_taken(self, file: dict[str, Any]) -> None:
        assert check(InputField("doc", "file", required=True), file) == InputCheck()
        assert check(InputField("docs", "file-list", required=True), [file]) == InputCheck()

    @pytest.mark.parametrize(("file", "expected"), WRONG, ids=str)
    def test_a_file_that_no_version_takes_is_wrong(self, file: dict[str, Any], expected: str) -> None:
        text = problem(InputField("doc", "file"), file)
        assert text.startswith("Input 'doc' must have ")
        assert expected in text
        text = problem(InputField("docs", "file-list"), [DOCUMENT, file])
        assert text.startswith("Input 'docs' has a wrong file: item 2 must have ")
        assert expected in text

    @pytest.mark.parametrize(
        ("value", "described"),
        [("report.pdf", "'report.pdf'"), ([DOCUMENT], "a list"), ([], "a list"), (5, "a number")],
    )
    def test_only_an_object_is_a_file(self, value: Any, described: str) -> None:
        assert problem(InputField("doc", "file"), value) == (
            f"Input 'doc' must be a file (an object with 'transfer_method'), not {described}."
        )

    @pytest.mark.parametrize("value", [{}, {"type": "document", "upload_file_id": FILE_ID}, {"transfer_method": ""}])
    def test_a_file_needs_a_transfer_method(self, value: Any) -> None:
        assert problem(InputField("doc", "file"), value) == "Input 'doc' must be a file, but has no 'transfer_method'."

    def test_a_link_needs_a_url(self) -> None:
        assert problem(InputField("doc", "file"), {"transfer_method": "remote_url"}) == (
            "Input 'doc' must have 'url', because its 'transfer_method' is 'remote_url'."
        )

    @pytest.mark.parametrize(
        ("file_type", "described"),
        [("document", "'document'"), ("custom", "'custom'"), ("", "''"), (None, "null")],
    )
    def test_a_type_that_the_form_does_not_allow_is_wrong_and_so_is_none(self, file_type: Any, described: str) -> None:
        field = InputField("doc", "file", file_types=("image", "audio"))
        assert problem(field, {**DOCUMENT, "type": file_type}) == (
            f"Input 'doc' must have a 'type' of 'image', 'audio', not {described}."
        )

    @pytest.mark.parametrize("file_type", ["custom", "", None])
    def test_a_form_with_extensions_may_take_a_file_without_its_type(self, file_type: Any) -> None:
        field = InputField("doc", "file", file_types=("image",), file_extensions=(".csv",))
        assert check(field, {**DOCUMENT, "type": file_type}) == InputCheck()

    @pytest.mark.parametrize(
        ("file_types", "file"),
        [
            (("document",), DOCUMENT),
            (("image", "custom"), DOCUMENT),
            (("custom",), {"transfer_method": "local_file", "upload_file_id": FILE_ID}),
            (("image",), {"type": "document", "transfer_method": "tool_file", "tool_file_id": "x"}),
            (("image",), {"type": "document", "transfer_method": "datasource_file", "datasource_file_id": "x"}),
        ],
        ids=str,
    )
    def test_a_type_that_some_version_allows_is_taken(self, file_types: tuple[str, ...], file: dict[str, Any]) -> None:
        assert check(InputField("doc", "file", file_types=file_types), file) == InputCheck()

    def test_a_transfer_method_that_the_form_does_not_allow_is_wrong_except_for_images(self) -> None:
        field = InputField("doc", "file", file_transfer_methods=("local_file",))
        assert problem(field, {**LINK, "type": "document"}) == (
            "Input 'doc' must have a 'transfer_method' of 'local_file', not 'remote_url'."
        )
        assert check(field, LINK) == InputCheck()
        assert check(field, {"transfer_method": "tool_file", "tool_file_id": "x"}) == InputCheck()


class TestFileList:
    def test_an_empty_list_is_taken_even_if_files_are_required(self) -> None:
        assert check(InputField("docs", "file-list", required=True), []) == InputCheck()

    @pytest.mark.parametrize(("value", "described"), [(DOCUMENT, "an object"), ("a", "'a'"), (5, "a number")])
    def test_only_a_list_is_taken(self, value: Any, described: str) -> None:
        assert (
            problem(InputField("docs", "file-list"), value) == f"Input 'docs' must be a list of files, not {described}."
        )

    def test_every_item_is_an_object(self) -> None:
        assert problem(InputField("docs", "file-list"), [DOCUMENT, FILE_ID]) == (
            f"Input 'docs' must be a list of files (objects with 'transfer_method'), but item 2 is {FILE_ID!r}."
        )

    def test_more_files_than_the_limit_are_wrong_also_if_dify_would_drop_some(self) -> None:
        field = InputField("docs", "file-list", max_length=2)
        assert check(field, [DOCUMENT, DOCUMENT]) == InputCheck()
        assert problem(field, [DOCUMENT, DOCUMENT, {}]) == "Input 'docs' must have at most 2 files, not 3."

    def test_files_that_dify_drops_are_a_warning(self) -> None:
        found = check(InputField("docs", "file-list"), [DOCUMENT, {"transfer_method": "remote_url"}, {}])
        assert found == InputCheck((), ("Input 'docs' has files that Dify drops (2 of 3): item 2 has no 'url'.",))


class TestUnknownInputs:
    FORM = InputForm((InputField("query", "paragraph", label="Your question"), InputField("lang", "select")), True)

    @pytest.mark.parametrize(
        ("name", "nearest"), [("Query", "query"), ("qery", "query"), ("language", "lang"), ("your_question", "query")]
    )
    def test_an_unknown_input_is_a_warning_with_the_nearest_name(self, name: str, nearest: str) -> None:
        assert check_inputs(self.FORM, {name: {}}) == InputCheck(
            (), (f"The workflow's form has no input {name!r}: Dify drops it. Is {nearest!r} meant?",)
        )

    def test_an_unknown_input_like_no_other_is_a_warning_without_a_name(self) -> None:
        assert check_inputs(self.FORM, {"zzz": 1}).warnings == (
            "The workflow's form has no input 'zzz': Dify drops it.",
        )

    def test_a_form_that_could_not_be_read_whole_warns_of_nothing(self) -> None:
        assert check_inputs(InputForm(self.FORM.fields, complete=False), {"zzz": 1}) == InputCheck()

    def test_an_input_of_a_type_that_is_not_known_is_known_and_not_checked(self) -> None:
        form = InputForm((InputField("v", "hologram", required=True),), complete=True)
        assert check_inputs(form, {"v": 5}) == InputCheck()
        assert check_inputs(form, {}) == InputCheck()

    def test_a_thousand_unknown_inputs_are_a_few_lines(self) -> None:
        warnings = check_inputs(self.FORM, {f"x{number}": 1 for number in range(1000)}).warnings
        assert len(warnings) == 11
        assert warnings[-1] == "The workflow's form has none of 990 more inputs: Dify drops them."


class TestMessages:
    def test_a_value_is_shown_as_an_excerpt_on_one_line(self) -> None:
        text = problem(InputField("n", "number"), "a\nb\x1b[31m\u202e" + "x" * 10_000)
        assert text == "Input 'n' must be a number, not 'a\\nb\\x1b[31m\\u202e" + "x" * 51 + "...'."

    def test_a_name_is_shown_so_too(self) -> None:
        text = problem(InputField("n\n" * 1000, "number"), "a")
        assert len(text) < 150
        assert "\n" not in text

    def test_every_wrong_input_is_named_in_the_order_of_the_form(self) -> None:
        form = parse_input_form(recorded_parameters("1.12.1"))
        problems = check_inputs(form, {"short": "123456789", "num": "x", "flag": True}).problems
        assert [text.split("'")[1] for text in problems] == ["query", "num", "short"]

    def test_a_variable_that_the_form_names_twice_is_named_once(self) -> None:
        field = InputField("n", "number")
        assert len(check_inputs(InputForm((field, field)), {"n": "x"}).problems) == 1


class TestWhatIsNotJson:
    @pytest.mark.parametrize("field_type", TYPES)
    @pytest.mark.parametrize("value", [object(), {1, 2}, b"x", [object()]], ids=["object", "set", "bytes", "list"])
    def test_a_value_that_only_an_encoder_could_turn_into_json_is_not_checked(
        self, field_type: str, value: Any
    ) -> None:
        assert check(InputField("v", field_type), value) == InputCheck()

    def test_names_that_are_no_text_leave_the_check_out(self) -> None:
        form = InputForm((InputField("5", "number", required=True),), complete=True)
        inputs: dict[Any, Any] = {5: 1}
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
FILES = st.dictionaries(
    st.sampled_from(["transfer_method", "type", "upload_file_id", "url"]),
    st.sampled_from(["local_file", "remote_url", "tool_file", "image", FILE_ID]) | JSON,
)
INPUTS = st.dictionaries(st.sampled_from(["a", "b"]) | st.text(), JSON | FILES | st.lists(FILES))


@fuzzed(st.builds(InputForm, st.lists(FIELDS).map(tuple), st.booleans()), INPUTS)
def test_no_form_and_no_inputs_make_the_check_raise_or_say_more_than_short_lines(
    form: InputForm, inputs: dict[str, Any]
) -> None:
    found = check_inputs(form, inputs)
    for text in found.problems + found.warnings:
        assert text.isprintable()
        assert len(text) < 1500
