"""The bodies of requests that carry a user's data: what becomes of inputs on the way to Dify."""

from __future__ import annotations

import json
from collections import UserList
from typing import Any

import pytest

from airflow_provider_dify.api.calls import encode_start
from airflow_provider_dify.exceptions import DifyConfigurationError


@pytest.mark.parametrize("items", [("a", "b"), UserList(["a", "b"]), ["a", "b"]], ids=["tuple", "lazy", "list"])
def test_sequences_of_any_kind_become_lists(items: Any) -> None:
    # The outputs of a mapped task are a sequence of Airflow's own, and may hold another.
    body = json.loads(encode_start({"items": items, "deep": {"items": UserList([items])}}, "airflow"))
    assert body == {
        "inputs": {"items": ["a", "b"], "deep": {"items": [["a", "b"]]}},
        "user": "airflow",
        "response_mode": "streaming",
    }


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"ab", "bytes is not JSON serializable"),
        (bytearray(b"ab"), "bytearray is not JSON serializable"),
        ({"a"}, "set is not JSON serializable"),
        (float("nan"), "not JSON compliant"),
    ],
)
def test_what_is_no_json_is_refused_with_the_reason(value: Any, why: str) -> None:
    with pytest.raises(DifyConfigurationError, match=f"^inputs must be an object of JSON values: .*{why}"):
        encode_start({"value": value}, "airflow")


@pytest.mark.parametrize("inputs", [None, 5, ["a"]])
def test_inputs_that_are_no_object_are_refused(inputs: Any) -> None:
    with pytest.raises(DifyConfigurationError, match=r"^inputs must be an object of JSON values: "):
        encode_start(inputs, "airflow")


def test_letters_of_any_alphabet_arrive() -> None:
    assert json.loads(encode_start({"word": "héllo 你好 🎉"}, "airflow"))["inputs"] == {"word": "héllo 你好 🎉"}
