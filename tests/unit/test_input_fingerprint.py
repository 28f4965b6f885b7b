"""How a run of ours is recognised by its inputs."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import pytest
from hypothesis import strategies as st

from airflow_provider_dify.runs.log import fingerprint, fits
from tests.unit.fuzzing import fuzzed
from tests.unit.test_input_form import JSON

SYSTEM = {"sys.user_id": "u1", "sys.files": [], "sys.timestamp": 1795299664, "sys.workflow_run_id": "5c0c"}


@pytest.mark.parametrize(
    ("sent", "run"),
    [
        ("hello", "hello"),
        ("", ""),
        ("a\0b", "ab"),
        ("二\ud83c", "二\ud83c"),
        (3, 3),
        ("3", 3),
        ("3", "3"),
        (" 3 ", 3),
        ("3.50", 3.5),
        (3.0, 3),
        ("1_000", 1000),
        ("1.0e3", 1000.0),
        (2**64 - 1, 2**64 - 1),
        (10**20 + 1, 1e20),
        (str(10**20 + 1), 10**20 + 1),
        (1e300, 1e300),
        ("1", True),
        (1, True),
        (1.0, True),
        ("0", False),
        (0, False),
        ("Yes ", True),
        ("off", False),
        (True, True),
        ("true", "true"),
        ("maybe", "maybe"),
    ],
)
def test_a_run_with_what_dify_makes_of_an_input_fits(sent: Any, run: Any) -> None:
    assert fits(fingerprint({"v": sent}), {"v": run, **SYSTEM}) is True


@pytest.mark.parametrize(
    ("sent", "run"),
    [
        ("hello", "Hello"),
        ("3", 4),
        (3, 3.5),
        (2**63, 2**63 + 1),
        (True, False),
        ("yes", "no"),
        ("a", ""),
        ("text 3", "3"),
    ],
)
def test_a_run_with_another_value_does_not_fit(sent: Any, run: Any) -> None:
    assert fits(fingerprint({"v": sent}), {"v": run, **SYSTEM}) is False


def test_one_input_that_differs_is_enough() -> None:
    assert fits(fingerprint({"a": "x", "b": "y"}), {"a": "x", "b": "z"}) is False


def test_defaults_that_dify_added_and_inputs_that_it_dropped_do_not_count() -> None:
    assert fits(fingerprint({"a": "x", "dropped": "y"}), {"a": "x", "added": "z", **SYSTEM}) is True


@pytest.mark.parametrize("value", [None, {"k": 1}, [1], float("nan"), float("inf"), "1.0e999", 10**400, b"x"])
def test_what_can_not_be_compared_is_not_in_the_fingerprint(value: Any) -> None:
    assert fingerprint({"v": value}) == {}


@pytest.mark.parametrize(
    ("sent", "run"),
    [({}, {"a": "x"}), ({"a": "x"}, {}), ({"a": {}}, {"a": {}}), ({"a": " "}, {"a": None}), ({"b": 1}, {"a": 1})],
)
def test_where_nothing_can_be_compared_the_answer_is_neither(sent: dict[str, Any], run: dict[str, Any]) -> None:
    assert fits(fingerprint(sent), {**run, **SYSTEM}) is None


def test_an_input_named_like_one_of_the_system_is_left_out() -> None:
    assert fits(fingerprint({"sys.user_id": "me", "a": "x"}), {"a": "x", **SYSTEM}) is True


def test_a_fingerprint_holds_names_and_hashes_but_no_values() -> None:
    made = fingerprint({"password": "a very secret text", "again": "a very secret text"})
    assert json.loads(json.dumps(made)) == made
    assert all(re.fullmatch("[0-9a-f]{8}", digest) for digest in made.values())
    assert made["password"] != made["again"]


def test_a_fingerprint_is_the_same_in_every_process_and_version() -> None:
    # A trigger may wait while the package is upgraded.
    normalized = {"query": "text hello", "num": "number 31", "price": "number 0.25", "flag": "true"}
    assert fingerprint({"query": "hello", "num": "31.0", "price": 0.25, "flag": True}) == {
        name: hashlib.sha256(f"{name}\0{text}".encode()).hexdigest()[:8] for name, text in normalized.items()
    }


@fuzzed(st.dictionaries(st.text(), JSON))
def test_inputs_fit_themselves_whatever_they_are(inputs: dict[str, Any]) -> None:
    made = fingerprint(inputs)
    assert fits(made, inputs) is (True if made else None)
