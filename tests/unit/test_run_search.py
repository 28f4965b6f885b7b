"""Which run in Dify's log is the one that a start was to start."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pendulum
import pytest

from airflow_provider_dify.api.calls import Call
from airflow_provider_dify.api.models import LoggedWorkflowRun
from airflow_provider_dify.exceptions import DifyConnectionError, DifyWorkflowRunUncertain
from airflow_provider_dify.runs.log import RunSearch, before_start, find_run, fingerprint
from airflow_provider_dify.runs.starting import Starter
from airflow_provider_dify.runs.waiting import Deadline, WaitArguments
from tests.unit.scripted_client import ScriptedClient
from tests.unit.test_workflow_run import make_run

SENT_AT = time.time()


def row(run_id: str, *, user: str = "us", age: float = 0.0) -> LoggedWorkflowRun:
    created_at = pendulum.from_timestamp(SENT_AT + 1 - age)
    return LoggedWorkflowRun(run_id, "running", user, None, 0, 0, created_at, None, 0.0)


def search_of(**fields: Any) -> RunSearch:
    return RunSearch(**{"user": "us", "sent_at": SENT_AT, "user_is_unique": False, **fields})


def play(
    search: RunSearch,
    log: list[LoggedWorkflowRun],
    inputs: dict[str, Any] | None = None,
    others: set[str] | None = None,
) -> tuple[Any, list[Call[Any]]]:
    """Run a search over a log that ignores every filter, and over details with the inputs of each run."""

    def respond(call: Call[Any]) -> Any:
        if call.path == "/workflows/logs":
            assert call.params is not None
            page, limit = call.params["page"], call.params["limit"]
            return log[(page - 1) * limit : page * limit]
        run_id = call.path.rpartition("/")[2]
        return make_run("running", finished_at=None, inputs=(inputs or {}).get(run_id, {}))

    client = ScriptedClient(respond)
    return asyncio.run(find_run(client, search, others)), client.taken


def test_the_one_run_of_a_unique_user_is_ours() -> None:
    assert play(search_of(user_is_unique=True), [row("a")])[0] == "a"


def test_no_run_is_none_yet() -> None:
    assert play(search_of(user_is_unique=True), [])[0] is None


def test_several_runs_of_a_unique_user_are_named() -> None:
    with pytest.raises(DifyWorkflowRunUncertain, match="a, b"):
        play(search_of(user_is_unique=True), [row("a"), row("b")])


def test_a_run_of_somebody_else_is_not_taken_where_the_server_ignores_the_filter() -> None:
    assert play(search_of(user_is_unique=True), [row("a", user="other")] * 3)[0] is None


def test_a_run_from_before_the_start_is_not_taken() -> None:
    assert play(search_of(user_is_unique=True), [row("a", age=3600)])[0] is None


def test_a_run_that_was_known_before_the_start_is_not_taken() -> None:
    assert play(search_of(user_is_unique=True, known_runs=("a",)), [row("a")])[0] is None


def test_ours_is_found_behind_pages_of_others() -> None:
    log = [row(f"o{number}", user="other", age=number / 10) for number in range(245)]
    found, calls = play(search_of(user_is_unique=True), [*log, row("ours", age=45)])
    assert found == "ours"
    # The second request shows that this server does not filter by time.
    assert [(call.params or {})["page"] for call in calls] == [1, 1, 2, 3]


def test_ours_is_found_behind_hundreds_of_runs_that_the_same_user_started_since() -> None:
    log = [row(f"o{number}", age=number / 10) for number in range(300)]
    inputs = {"ours": {"q": "mine"}, **{run.workflow_run_id: {"q": "theirs"} for run in log}}
    search = search_of(fingerprint=fingerprint({"q": "mine"}))
    assert play(search, [*log, row("ours", age=40)], inputs)[0] == "ours"


@pytest.mark.parametrize("user_is_unique", [True, False])
def test_more_runs_than_are_read_leave_a_start_uncertain(user_is_unique: bool) -> None:
    # To call it absent would have the next try start another run.
    log = [row(f"o{number}", user="other" if user_is_unique else "us", age=number / 50) for number in range(1100)]
    inputs = {run.workflow_run_id: {"q": "theirs"} for run in log}
    search = search_of(fingerprint=fingerprint({"q": "mine"}), user_is_unique=user_is_unique)
    with pytest.raises(DifyWorkflowRunUncertain, match="more than 1,000 runs"):
        play(search, [*log, row("ours", age=40)], {**inputs, "ours": {"q": "mine"}})


def test_the_search_stops_at_runs_from_before_the_start() -> None:
    log = [row(f"o{number}", user="other", age=7200) for number in range(1000)]
    assert len(play(search_of(user_is_unique=True), log)[1]) == 1


def test_a_shared_users_run_is_recognized_by_its_inputs() -> None:
    search = search_of(fingerprint=fingerprint({"q": "mine"}))
    inputs = {"a": {"q": "theirs", "sys.user_id": "us"}, "b": {"q": "mine", "sys.user_id": "us"}}
    assert play(search, [row("a"), row("b")], inputs)[0] == "b"


def test_one_run_of_a_shared_user_proves_nothing_without_inputs_to_compare() -> None:
    with pytest.raises(DifyWorkflowRunUncertain, match="could be compared"):
        play(search_of(), [row("a")])


def test_a_concurrent_tasks_run_with_other_inputs_is_not_taken() -> None:
    assert play(search_of(fingerprint=fingerprint({"q": "mine"})), [row("a")], {"a": {"q": "theirs"}})[0] is None


def test_a_run_with_other_inputs_is_asked_for_once_however_often_the_log_is_looked_at() -> None:
    search = search_of(fingerprint=fingerprint({"q": "mine"}))
    others: set[str] = set()
    inputs = {"a": {"q": "theirs"}, "b": {"q": "mine"}}
    assert play(search, [row("a")], inputs, others)[0] is None
    found, calls = play(search, [row("b"), row("a")], inputs, others)
    assert found == "b"
    assert [call.path for call in calls] == ["/workflows/logs", "/workflows/run/b"]


def test_a_search_survives_its_way_through_a_serialized_trigger() -> None:
    search = search_of(fingerprint={"q": "01234567"}, known_runs=("a", "b"))
    assert RunSearch.deserialize(search.serialize()) == search


def test_a_search_that_another_version_stored_is_read() -> None:
    data = {"user": "us", "sent_at": 5.0, "user_is_unique": True, "of_a_later_version": {"a": 1}}
    assert RunSearch.deserialize(data) == RunSearch("us", 5.0, True)
    # One that doesn't say finds nothing that is not surely the run.
    assert RunSearch.deserialize({"user": "us"}) == RunSearch("us", 0.0, False)
    assert "mine" not in repr(search_of(fingerprint=fingerprint({"q": "mine"})).serialize())


def test_where_the_log_cannot_be_read_before_a_start_no_run_from_before_it_fits() -> None:
    client = ScriptedClient(lambda call: DifyConnectionError("away"))
    known, sent_at = asyncio.run(before_start(client, "us"))
    assert known == ()
    assert search_of(sent_at=sent_at).not_before.timestamp() > time.time() - 5
    assert len(client.taken) == 1


@pytest.mark.parametrize(
    ("version", "queues"), [("1.12.1", False), ("1.13.0", True), ("1.16.1", True), (None, True), ("x", True)]
)
def test_runs_queue_from_1_13_on_and_where_the_version_is_not_known(version: str | None, queues: bool) -> None:
    client: Any = ScriptedClient(lambda call: None)
    client.server_version = version
    log: Any = None
    assert Starter(client, Deadline.after(1), log, WaitArguments()).may_be_queued == queues
