"""Which run a try owns: a new one, an earlier try's, or one that has to be looked for."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pendulum
import pytest

from airflow_provider_dify.airflow_versions import UI_SECTION
from airflow_provider_dify.api.calls import Call
from airflow_provider_dify.api.models import LoggedWorkflowRun
from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConnectionError,
    DifyError,
    DifyRequestError,
    DifyWorkflowRunNotFound,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.runs.log import fingerprint
from airflow_provider_dify.runs.waiting import WaitArguments
from airflow_provider_dify.tasks.start import (
    STATE_KEY,
    RunArguments,
    StartMemory,
    TaskStart,
    default_user,
    find_earlier_start,
    installation_id,
    new_start,
    starts_of_earlier_tries,
    stop_start,
)
from tests.unit.scripted_client import ScriptedClient
from tests.unit.test_workflow_run import RUN_ID, make_run

RUNNING = make_run("running", finished_at=None)


class Store(dict[str, Any]):
    """Airflow's memory of a task, which takes no ``None``."""

    def set(self, key: str, value: Any) -> None:
        assert value is not None
        self[key] = value

    def delete(self, key: str) -> None:
        self.pop(key, None)


def context_of(try_number: int, max_tries: int, store: Store | None = None) -> dict[str, Any]:
    ti = SimpleNamespace(dag_id="d", task_id="t", run_id="r", map_index=-1, try_number=try_number, max_tries=max_tries)
    dag_run = SimpleNamespace(start_date=datetime.now(timezone.utc) - timedelta(minutes=5))
    return {"ti": ti, "dag_run": dag_run, **({} if store is None else {"task_state_store": store})}


def arguments_of(**fields: Any) -> RunArguments:
    """Return the operator's arguments; those of its wait stand among the others, as in a Dag."""
    given = {"inputs": {"q": "1"}, "user": None, "workflow_id": None, "retries": 2, **fields}
    wait = {"poll_interval": 0.0, "not_found_grace": 1.0}
    wait |= {name: given.pop(name) for name in WaitArguments.__dataclass_fields__ if name in given}
    return RunArguments(**given, wait=WaitArguments(**wait))


def look(context: dict[str, Any], arguments: RunArguments, respond: Callable[[Call[Any]], Any]) -> Any:
    """Look for an earlier start, over a Dify that responds like this."""
    client: Any = ScriptedClient(respond)
    remembered = StartMemory(context).load()
    searches = list(starts_of_earlier_tries(context, arguments))
    number = context["ti"].try_number
    return asyncio.run(find_earlier_start(client, arguments.wait, remembered, searches, number))


def play(
    context: dict[str, Any], arguments: RunArguments, log: list[LoggedWorkflowRun], run: Any = RUNNING
) -> tuple[Any, list[str]]:
    """Look for an earlier start, with this log and this run; return the users that the log was asked for, too."""
    asked: list[str] = []

    def respond(call: Call[Any]) -> Any:
        if call.path == "/workflows/logs":
            assert call.params is not None
            asked.append(call.params["created_by_end_user_session_id"])
            return [row for row in log if row.user == asked[-1]]
        assert call.path == f"/workflows/run/{RUN_ID}"
        return run

    return look(context, arguments, respond), asked


def row_of(context: dict[str, Any], try_number: int, age: float = 60.0) -> LoggedWorkflowRun:
    created_at = pendulum.from_timestamp(time.time() - age)
    return LoggedWorkflowRun(
        RUN_ID, "running", default_user(context["ti"], try_number), None, 0, 0, created_at, None, 0.0
    )


def remembered(store: Store, context: dict[str, Any], **fields: Any) -> None:
    start = new_start(context["ti"], None, {"q": "1"}, (), time.time())
    StartMemory({**context, "task_state_store": store}).save(replace(start, **fields))


def test_a_remembered_run_that_is_alive_is_continued() -> None:
    store = Store()
    remembered(store, context_of(1, 2), workflow_run_id=RUN_ID, task_id="t")
    (start, run), asked = play(context_of(2, 2, store), arguments_of(), [])
    assert (start.workflow_run_id, start.task_id, run) == (RUN_ID, "t", RUNNING)
    assert asked == []


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_a_remembered_run_that_cannot_succeed_is_not(status: str) -> None:
    store = Store()
    remembered(store, context_of(1, 2), workflow_run_id=RUN_ID)
    assert play(context_of(2, 2, store), arguments_of(), [], make_run(status))[0] is None


@pytest.mark.parametrize("has_memory", [True, False])
def test_a_run_that_is_overdue_is_not_continued(has_memory: bool) -> None:
    store = Store() if has_memory else None
    if store is not None:
        remembered(store, context_of(1, 2), workflow_run_id=RUN_ID)
    context = context_of(2, 2, store)
    old = make_run("running", finished_at=None, created_at=int(time.time()) - 100)
    assert play(context, arguments_of(run_timeout=99.0), [row_of(context, 1)], old)[0] is None
    assert play(context, arguments_of(run_timeout=300.0), [row_of(context, 1)], old)[0] is not None


@pytest.mark.parametrize("has_memory", [True, False])
def test_a_run_that_has_vanished_is_not_continued(has_memory: bool) -> None:
    store = Store() if has_memory else None
    if store is not None:
        remembered(store, context_of(1, 2), workflow_run_id=RUN_ID)
    context = context_of(2, 2, store)
    assert play(context, arguments_of(), [row_of(context, 1)], DifyWorkflowRunNotFound("gone"))[0] is None


@pytest.mark.parametrize("second", [RUNNING, DifyWorkflowRunNotFound("gone")], ids=["there", "gone"])
def test_a_run_is_given_up_only_after_dify_has_said_twice_that_it_is_gone(second: Any) -> None:
    store = Store()
    remembered(store, context_of(1, 2), workflow_run_id=RUN_ID)
    details = iter([DifyWorkflowRunNotFound("gone"), second])
    found = look(context_of(2, 2, store), arguments_of(), lambda call: next(details))
    assert (found is not None) == (second is RUNNING)
    assert list(details) == []


def test_a_run_that_cannot_be_looked_up_is_not_given_up() -> None:
    # Dify 1.13.0 responds so for a run that it does not know.
    context = context_of(2, 2)
    with pytest.raises(DifyConnectionError):
        play(context, arguments_of(), [row_of(context, 1)], DifyConnectionError("broken", status_code=500))


def test_a_partial_success_that_counts_as_failure_is_not_continued() -> None:
    store = Store()
    remembered(store, context_of(1, 2), workflow_run_id=RUN_ID)
    arguments = arguments_of(fail_on_partial_success=True)
    assert play(context_of(2, 2, store), arguments, [], make_run("partial-succeeded"))[0] is None


def test_a_run_that_dify_was_asked_to_stop_is_never_continued() -> None:
    store = Store()
    context = context_of(2, 2, store)
    remembered(store, context_of(1, 2), workflow_run_id=RUN_ID, stop_was_asked=True)
    found, asked = play(context, arguments_of(), [row_of(context, 1)])
    assert found is None
    assert asked == []


def test_a_start_that_was_under_way_is_looked_for() -> None:
    store = Store()
    remembered(store, context_of(1, 2), was_accepted=True)
    (start, run), asked = play(context_of(2, 2, store), arguments_of(), [])
    assert (start.workflow_run_id, start.was_accepted, run) == (None, True, None)
    assert asked == [default_user(context_of(1, 2)["ti"], 1)]


def test_a_try_that_airflow_runs_twice_continues_its_own_run() -> None:
    store = Store()
    remembered(store, context_of(1, 2), workflow_run_id=RUN_ID)
    (start, _), _ = play(context_of(1, 2, store), arguments_of(), [])
    assert start.workflow_run_id == RUN_ID


def test_a_try_that_airflow_runs_twice_finds_its_own_run_in_the_log_without_a_memory() -> None:
    context = context_of(1, 2)
    (start, _), asked = play(context, arguments_of(), [row_of(context, 1)])
    assert start.workflow_run_id == RUN_ID
    assert asked == [default_user(context["ti"], 1)]


@pytest.mark.parametrize(
    "error", [DifyConnectionError("away"), DifyAuthenticationError("refused"), DifyRequestError("no such route")]
)
def test_a_log_that_cannot_be_read_does_not_keep_a_first_try_from_its_start(error: DifyError) -> None:
    assert look(context_of(1, 2), arguments_of(), lambda call: error) is None


def test_a_first_try_that_has_several_runs_already_starts_no_other() -> None:
    error = DifyWorkflowRunUncertain("each may be it", user="us")
    with pytest.raises(DifyWorkflowRunUncertain):
        look(context_of(1, 2), arguments_of(), lambda call: error)


def test_a_first_try_with_a_memory_asks_dify_for_nothing() -> None:
    assert play(context_of(1, 2, Store()), arguments_of(), []) == (None, [])


def test_a_retry_whose_memory_was_lost_looks_for_the_earlier_tries() -> None:
    context = context_of(3, 2, Store())
    (start, _), asked = play(context, arguments_of(), [row_of(context, 1)])
    assert start.workflow_run_id == RUN_ID
    assert asked == [default_user(context["ti"], number) for number in (2, 1)]


def test_a_cleared_task_starts_from_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where a clear discards the state, there is none unless the user keeps it; see test_task_loops.py.
    monkeypatch.setattr("airflow_provider_dify.tasks.start.CLEARING_DISCARDS_STATE", False)
    store = Store()
    remembered(store, context_of(1, 2), workflow_run_id=RUN_ID)
    # Cleared after its first try: Airflow adds the tries that it had.
    context = context_of(2, 3, store)
    assert play(context, arguments_of(), [row_of(context, 1)])[0] is None


@pytest.mark.parametrize(("try_number", "earlier"), [(2, []), (3, [2]), (4, [3, 2])])
def test_without_a_memory_a_cleared_task_looks_for_the_tries_since_then_only(
    try_number: int, earlier: list[int]
) -> None:
    # Two retries, cleared after its first try: the tries 2, 3 and 4 are one task.
    context = context_of(try_number, 3)
    _, asked = play(context, arguments_of(retries=2), [])
    assert asked == [default_user(context["ti"], number) for number in (try_number, *earlier)]


def test_without_a_memory_the_log_is_asked_for_the_users_of_earlier_tries_the_last_first() -> None:
    context = context_of(3, 2)
    (start, _), asked = play(context, arguments_of(), [row_of(context, 1)])
    assert start.workflow_run_id == RUN_ID
    assert asked == [default_user(context["ti"], number) for number in (3, 2, 1)]


def test_a_run_from_before_the_dag_run_is_not_taken() -> None:
    context = context_of(2, 2)
    assert play(context, arguments_of(), [row_of(context, 1, age=7 * 86400)])[0] is None


def test_retries_that_were_lowered_meanwhile_do_not_hide_an_earlier_try() -> None:
    context = context_of(2, 2)
    found, _ = play(context, arguments_of(retries=0), [row_of(context, 1)])
    assert found is not None


def test_a_start_that_started_nothing_is_forgotten() -> None:
    store = Store()
    context = context_of(1, 2, store)
    memory = StartMemory(context)
    memory.save(new_start(context["ti"], None, {}, (), time.time()))
    assert STATE_KEY in store
    memory.save(None)
    assert memory.load() is None


@pytest.mark.parametrize("data", [5, {}, {"user": "u"}, {"user": "u", "search": {}, "new_field": 1}])
def test_a_memory_of_another_version_is_none(data: Any) -> None:
    assert StartMemory(context_of(2, 2, Store({STATE_KEY: data}))).load() is None


def test_a_start_survives_its_way_through_airflow() -> None:
    start = new_start(context_of(1, 2)["ti"], "us", {"q": "1"}, ("a",), 5.0)
    assert TaskStart.deserialize(start.serialize()) == start


def test_a_start_that_another_version_stored_is_read() -> None:
    start = new_start(context_of(1, 2)["ti"], "us", {"q": "1"}, ("a",), 5.0)
    data = start.serialize()
    later = {**data, "of_a_later_version": 1, "search": {**data["search"], "of_a_later_version": [1]}}
    assert TaskStart.deserialize(later) == start
    names = ("was_accepted", "workflow_run_id", "task_id", "stop_was_asked")
    assert TaskStart.deserialize({name: data[name] for name in data if name not in names}) == start
    assert TaskStart.deserialize({"user": "us"}) is None
    assert TaskStart.deserialize(None) is None


def test_two_airflows_with_the_same_dag_have_different_users(monkeypatch: pytest.MonkeyPatch) -> None:
    ti = context_of(1, 2)["ti"]
    users = []
    for key in ("one", "two"):
        monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", key)
        users.append(default_user(ti, 1))
    assert users[0] != users[1]
    assert all(key not in user for key, user in zip(("one", "two"), users, strict=True))


def test_a_user_names_installation_dag_task_map_index_dag_run_and_try() -> None:
    ti = context_of(1, 2)["ti"]
    assert default_user(ti, 7) == f"airflow/{installation_id()}/d/t/r/7"
    ti.map_index = 0
    assert default_user(ti, 7) == f"airflow/{installation_id()}/d/t[0]/r/7"
    ti.map_index = None
    assert default_user(ti, 7) == f"airflow/{installation_id()}/d/t/r/7"
    assert re.fullmatch("[0-9a-f]{8}", installation_id())


def test_two_airflows_with_different_addresses_have_different_users(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for url in ("https://one.example.com", "https://two.example.com"):
        monkeypatch.setenv(f"AIRFLOW__{UI_SECTION.upper()}__BASE_URL", url)
        names |= {installation_id(), installation_id()}
    assert len(names) == 2


@pytest.mark.parametrize("excess", [0, 1, 100])
def test_a_long_user_is_cut_at_255_characters_and_stays_one_of_its_own(excess: int) -> None:
    ti = context_of(1, 2)["ti"]
    ti.run_id = "r" * (256 - len(default_user(ti, 1)) + excess)
    users = [default_user(ti, number) for number in (1, 2)]
    assert [len(user) for user in users] == [255, 255]
    assert users[0] != users[1]
    assert users == [default_user(ti, number) for number in (1, 2)]
    is_cut = re.fullmatch(f"airflow/{installation_id()}/d/t/r+~[0-9a-f]{{16}}", users[0])
    assert bool(is_cut) == (excess > 0)


def test_a_start_has_what_its_run_is_found_by() -> None:
    ti = context_of(2, 5)["ti"]
    inputs = {"q": "1"}
    ours = new_start(ti, None, inputs, (), 12.5)
    assert (ours.user, ours.search.user) == (default_user(ti, 2),) * 2
    assert (ours.search.sent_at, ours.search.user_is_unique) == (12.5, True)
    assert ours.search.fingerprint == fingerprint(inputs)
    assert ours.search.skips_failed is False
    assert (ours.try_number, ours.max_tries) == (2, 5)
    assert (ours.was_accepted, ours.workflow_run_id, ours.task_id, ours.stop_was_asked) == (False, None, None, False)
    shared = new_start(ti, "us", inputs, ("a", "b"), 12.5)
    assert (shared.user, shared.search.user_is_unique, shared.search.known_runs) == ("us", False, ("a", "b"))
    ti.max_tries = None
    assert new_start(ti, None, inputs, (), 12.5).max_tries == 0


def test_a_start_that_was_under_way_and_stands_in_the_log_by_now_is_continued() -> None:
    store = Store()
    remembered(store, context_of(1, 2), was_accepted=True)
    context = context_of(2, 2, store)
    (start, run), _ = play(context, arguments_of(), [row_of(context, 1)])
    assert (start.workflow_run_id, start.try_number, run) == (RUN_ID, 1, RUNNING)


def test_a_run_that_was_found_in_the_log_is_taken_as_one_of_its_try() -> None:
    context = context_of(3, 3)
    (start, run), _ = play(context, arguments_of(), [row_of(context, 2)])
    assert run is RUNNING
    assert (start.user, start.search.user) == (default_user(context["ti"], 2),) * 2
    assert (start.try_number, start.max_tries) == (2, 3)
    assert (start.was_accepted, start.workflow_run_id, start.task_id) == (True, RUN_ID, None)
    assert start.search.user_is_unique
    assert start.search.skips_failed
    assert start.search.fingerprint == fingerprint({"q": "1"})


def test_a_log_that_cannot_be_read_keeps_a_retry_from_its_start() -> None:
    asked: list[Any] = []

    def respond(call: Call[Any]) -> Any:
        asked.append(call.params)
        return DifyConnectionError("away")

    with pytest.raises(DifyConnectionError):
        look(context_of(2, 2), arguments_of(), respond)
    # Of this try there may be nothing, but of the one before.
    assert len(asked) == 2


def test_a_shared_users_run_of_an_earlier_try_is_recognized_by_its_inputs() -> None:
    context = context_of(2, 2)
    row = replace(row_of(context, 1), user="us")
    ours = make_run("running", finished_at=None, inputs={"q": "1"})
    (start, _), asked = play(context, arguments_of(user="us"), [row], ours)
    assert (start.workflow_run_id, start.try_number, start.user) == (RUN_ID, 1, "us")
    assert asked == ["us"]
    theirs = make_run("running", finished_at=None, inputs={"q": "2"})
    assert play(context, arguments_of(user="us"), [row], theirs)[0] is None


def test_a_first_try_with_a_shared_user_looks_for_nothing() -> None:
    context = context_of(1, 2)
    row = replace(row_of(context, 1), user="us")
    assert play(context, arguments_of(user="us"), [row]) == (None, [])


@pytest.mark.parametrize(("age", "is_found"), [(290, True), (310, False)])
def test_a_shared_users_run_is_one_of_this_dag_run(age: float, is_found: bool) -> None:
    # The Dag run began 300 seconds ago; a minute's tolerance would let another one's run in.
    context = context_of(2, 2)
    row = replace(row_of(context, 1, age=age), user="us")
    ours = make_run("running", finished_at=None, inputs={"q": "1"})
    assert (play(context, arguments_of(user="us"), [row], ours)[0] is not None) == is_found


@pytest.mark.parametrize(("days", "is_found"), [(6, True), (8, False)])
def test_without_a_start_of_the_dag_run_a_week_is_looked_at(days: float, is_found: bool) -> None:
    context = context_of(2, 2)
    context["dag_run"].start_date = None
    found, _ = play(context, arguments_of(), [row_of(context, 1, age=days * 86400)])
    assert (found is not None) == is_found
    del context["dag_run"]
    assert (play(context, arguments_of(), [row_of(context, 1, age=days * 86400)])[0] is not None) == is_found


def test_a_memory_of_a_task_without_retries_is_its_own() -> None:
    store = Store()
    context = context_of(1, 0, store)
    context["ti"].max_tries = None
    memory = StartMemory(context)
    assert memory.is_kept
    assert memory.load() is None
    start = new_start(context["ti"], None, {}, (), 1.0)
    memory.save(start)
    assert memory.load() == start
    nothing = StartMemory(context_of(1, 0))
    nothing.save(start)
    assert (nothing.is_kept, nothing.load()) == (False, None)


def test_a_failed_run_of_a_shared_user_is_no_reason_to_doubt() -> None:
    # Its inputs could not be compared, and it need not be: a retry starts a new run.
    context = context_of(2, 2)
    row = replace(row_of(context, 1), user="us", status="failed")
    assert play(context, arguments_of(user="us", inputs={}), [row])[0] is None


@pytest.mark.parametrize(("user", "is_found"), [(None, True), ("data-team", False)])
def test_a_start_whose_run_was_never_named_is_looked_for_before_it_is_stopped(user: str | None, is_found: bool) -> None:
    context = context_of(1, 0)
    # With a user of one's own the run in the log may be somebody else's, who goes on with it.
    client: Any = ScriptedClient(
        # The run's task id is not known either.
        lambda call: [row_of(context, 1)] if call.path == "/workflows/logs" else None,
        "1.16.1",
    )
    report = asyncio.run(stop_start(client, new_start(context["ti"], user, {}, (), time.time() - 300)))
    asked = [call.path for call in client.taken]
    assert ("/workflows/logs" in asked) is is_found
    assert (RUN_ID in report.message) is is_found
    assert report.is_warning
