"""What goes over the wire, and what comes of an answer or of none. Real sockets, but where a request is the unit."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import requests_mock

from airflow_provider_dify import __version__
from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConfigurationError,
    DifyConnectionError,
    DifyError,
    DifyRequestError,
    DifyWorkflowRunNotFound,
)
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from tests.dify_stand_in import (
    API_KEY,
    DifyStandIn,
    Fault,
    form_field,
    html,
    redirect,
    replay,
    reset,
    respond,
    retry_after_date,
    slow_body,
    stall,
    too_many_requests,
    truncate_body,
)

Connect = Callable[..., DifyHook]


@pytest.fixture
def connect(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Make a hook of a connection with these fields; without, one that leads to the stand-in."""

    def make(fields: dict[str, Any] | None = None, **arguments: Any) -> DifyHook:
        connection = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY, **(fields or {})}
        monkeypatch.setenv("AIRFLOW_CONN_MY_DIFY", json.dumps(connection))
        return DifyHook("my_dify", **{"retry_delay": 0.01, **arguments})

    return make


async def look_up_on_an_event_loop(hook: DifyHook) -> None:
    async with DifyAsyncHook(hook.dify_conn_id) as async_hook:
        await async_hook.get_workflow_run(str(uuid.uuid4()))


@pytest.mark.parametrize(
    "ask",
    [
        lambda hook: hook.get_workflow_run(str(uuid.uuid4())),
        lambda hook: hook.start_workflow_run({}, "me"),
        lambda hook: hook.run_workflow({}, "me"),
        lambda hook: hook.upload_file(__file__, "me"),
        lambda hook: asyncio.run(look_up_on_an_event_loop(hook)),
    ],
)
def test_the_key_of_a_knowledge_base_is_refused_before_anything_is_sent(
    dify: DifyStandIn, connect: Connect, ask: Callable[[DifyHook], Any]
) -> None:
    why = "Connection 'my_dify' cannot be used: its password is the API key of a knowledge base"
    with connect({"password": "dataset-some-key"}) as hook, pytest.raises(DifyConfigurationError, match=why) as caught:
        ask(hook)
    assert "some-key" not in str(caught.value)
    assert dify.requests == []
    # It opens the session for its own routes.
    with connect({"password": "dataset-some-key"}) as hook:
        hook.get_conn().get(f"{hook.connection.base_url}/datasets")
    (request,) = dify.requests
    assert request.headers["Authorization"] == "Bearer dataset-some-key"


def test_a_run_is_looked_up_with_the_key_and_a_user_agent(dify: DifyStandIn, dialect: str, connect: Connect) -> None:
    run_id = dify.add_run("succeeded", outputs={"answer": "二"})
    with connect() as hook:
        run = hook.get_workflow_run(run_id.upper())
    assert run.outputs == {"answer": "二"}
    (request,) = dify.requests
    assert (request.method, request.path) == ("GET", f"/v1/workflows/run/{run_id}")
    assert request.headers["Authorization"] == f"Bearer {API_KEY}"
    assert request.headers["User-Agent"] == f"airflow-provider-dify/{__version__}"


def test_an_unknown_run_is_recognized_over_the_wire(dify: DifyStandIn, dialect: str, connect: Connect) -> None:
    # 1.13.0 can't say it: its 500 is that of a broken server, which may pass.
    cannot_say = dialect == "1.13.0"
    expected = DifyConnectionError if cannot_say else DifyWorkflowRunNotFound
    with connect(retry_limit=1) as hook, pytest.raises(expected):
        hook.get_workflow_run(str(uuid.uuid4()))
    assert len(dify.requests) == (2 if cannot_say else 1)


def test_the_request_is_what_the_documentation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps({"conn_type": "dify", "password": "key"}))
    run_id = str(uuid.uuid4())
    fields = {"id": run_id, "status": "succeeded", "outputs": {"a": 1}}
    with requests_mock.Mocker() as mock:
        mock.get(f"https://api.dify.ai/v1/workflows/run/{run_id}", json=fields)
        assert DifyHook().get_workflow_run(run_id).outputs == {"a": 1}
        sent = mock.request_history[0]
        assert sent.headers["Authorization"] == "Bearer key"
        assert sent.timeout == (10.0, 30.0)
        assert sent.verify is not False


@pytest.mark.parametrize(
    ("fields", "arguments", "timeout"),
    [
        ({}, {}, (10.0, 30.0)),
        ({"extra": {"timeout": 4}}, {}, (4.0, 4.0)),
        ({"extra": {"timeout": 60}}, {}, (10.0, 60.0)),
        ({"extra": {"timeout": 4}}, {"timeout": 7}, (7.0, 7.0)),
    ],
)
def test_settings_of_the_connection_override_the_environment(
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    arguments: dict[str, Any],
    timeout: tuple[float, float],
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", __file__)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy-of-the-environment:3128")
    extra = {"verify": False, "proxies": {"https": "http://proxy:3128"}, **fields.get("extra", {})}
    hook = connect({"host": "https://dify.example.com", "extra": extra}, **arguments)
    run_id = str(uuid.uuid4())
    with requests_mock.Mocker() as mock:
        mock.get(requests_mock.ANY, json={"id": run_id, "status": "running"})
        hook.get_workflow_run(run_id)
    sent = mock.request_history[0]
    assert sent.timeout == timeout
    assert sent.verify is False
    assert sent.proxies["https"] == "http://proxy:3128"


@pytest.mark.parametrize("wrong", ["", "None", None, "../info", "e9d68a02-335c-48ff-bcca-2aa6ff006579/x", 5, ["x"]])
def test_a_wrong_id_is_refused_before_any_request(dify: DifyStandIn, connect: Connect, wrong: Any) -> None:
    with connect() as hook, pytest.raises(DifyConfigurationError, match=re.escape(repr(wrong))):
        hook.get_workflow_run(wrong)
    assert dify.requests == []


# --- the key and where it goes


def test_a_redirect_within_the_server_is_followed_with_the_key_and_not_with_a_netrc(
    dify: DifyStandIn, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password from-netrc\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    run_id = dify.add_run("running")
    # Dify itself redirects where there are two slashes.
    dify.misbehave(redirect(f"{dify.origin}/v1//workflows/run/{run_id}", 308))
    with connect() as hook:
        assert hook.get_workflow_run(run_id).status == "running"
    assert [request.headers["Authorization"] for request in dify.requests] == [f"Bearer {API_KEY}"] * 3


@pytest.mark.parametrize("kind", ["another host", "another port", "another scheme"])
def test_the_key_follows_no_redirect_elsewhere(dify: DifyStandIn, connect: Connect, kind: str) -> None:
    with DifyStandIn() as other:
        target = {
            "another host": f"http://localhost:{dify.port}/v1/info",
            "another port": f"{other.base_url}/info",
            "another scheme": f"https://127.0.0.1:{dify.port}/v1/info",
        }[kind]
        dify.misbehave(redirect(target, 307))
        with connect(retry_limit=0) as hook, pytest.raises(DifyConnectionError, match=f"redirect to {target}"):
            hook.get_workflow_run(dify.add_run("running"))
        assert len(dify.requests) == 1
        assert other.requests == []


def test_the_session_sends_the_key_to_the_connections_own_origin_only(dify: DifyStandIn, connect: Connect) -> None:
    with DifyStandIn() as other, connect() as hook:
        hook.get_conn().get(f"{other.base_url}/info")
        hook.get_conn().get(f"{dify.base_url}/info")
        assert "Authorization" not in other.requests[0].headers
        assert "Authorization" in dify.requests[0].headers


def test_one_session_serves_a_hook_until_it_is_closed_and_keeps_no_cookie(dify: DifyStandIn, connect: Connect) -> None:
    run_id = dify.add_run("running")
    dify.misbehave(respond(503, headers={"Set-Cookie": "session=1; Path=/"}))
    hook = connect()
    for _ in range(3):
        hook.get_workflow_run(run_id)
    assert dify.connections_opened == 1
    assert not any("Cookie" in request.headers for request in dify.requests)
    first = hook.get_conn()
    assert hook.get_conn() is first
    hook.close()
    hook.close()
    assert hook.get_conn() is not first
    assert isinstance(hook.get_conn(), requests.Session)
    hook.close()


# --- trouble


def stalls() -> Fault:
    return stall(60)


PASSING = [
    pytest.param(lambda: replay("detail_not_a_uuid"), id="recorded-500"),
    pytest.param(lambda: html(502, "<html><h1>502 Bad Gateway</h1></html>"), id="502-html"),
    pytest.param(lambda: respond(503), id="503-empty"),
    pytest.param(lambda: respond(408), id="408"),
    pytest.param(lambda: too_many_requests(), id="429"),
    pytest.param(lambda: replay("run_rate_limited_streaming"), id="400-too-many-requests"),
    pytest.param(lambda: reset(), id="reset-before-the-answer"),
    pytest.param(lambda: truncate_body(reset=True), id="reset-in-the-body"),
    pytest.param(lambda: truncate_body(reset=False), id="truncated-body"),
    pytest.param(stalls, id="stall"),
    pytest.param(lambda: html(), id="html"),
    pytest.param(lambda: respond(200, '{"hello": "world"}'), id="other-json"),
    pytest.param(lambda: respond(200, "OK", content_type="text/plain"), id="no-json"),
    pytest.param(lambda: redirect("https://login.example.com/"), id="redirect-elsewhere"),
]  # fmt: skip


@pytest.mark.parametrize("fault", PASSING)
def test_a_temporary_failure_is_retried(dify: DifyStandIn, connect: Connect, fault: Callable[[], Any]) -> None:
    run_id = dify.add_run("succeeded", outputs={"a": 1})
    dify.misbehave(fault(), times=3)
    with connect(timeout=0.5 if fault is stalls else 30) as hook:
        assert hook.get_workflow_run(run_id).outputs == {"a": 1}
    assert len(dify.requests) == 4


@pytest.mark.parametrize("fault", PASSING)
def test_a_lasting_failure_is_raised_after_the_last_retry(
    dify: DifyStandIn, connect: Connect, fault: Callable[[], Any]
) -> None:
    run_id = dify.add_run("running")
    dify.misbehave_always(fault())
    hook = connect(timeout=0.5 if fault is stalls else 30, retry_limit=1)
    with hook, pytest.raises(DifyConnectionError) as caught:
        hook.get_workflow_run(run_id)
    assert len(dify.requests) == 2
    assert run_id in str(caught.value)
    assert dify.origin in str(caught.value)
    assert API_KEY not in str(caught.value)


def test_a_refused_connection_is_retried_and_then_raised(dify: DifyStandIn, connect: Connect) -> None:
    run_id = dify.add_run("running")
    with connect() as hook:
        hook.get_workflow_run(run_id)
        why = rf"refused.*could not be reached for workflow run {run_id} at {dify.base_url}/workflows/run/{run_id}\."
        with dify.refusing_connections(), pytest.raises(DifyConnectionError, match=why):
            hook.get_workflow_run(run_id)
        assert hook.get_workflow_run(run_id).status == "running"


REJECTED = [
    ("auth_none", DifyAuthenticationError, 401),
    ("auth_bad_key", DifyAuthenticationError, 401),
    ("detail_disabled_api", DifyAuthenticationError, 403),
    ("detail_key_of_chat_app", DifyRequestError, 400),
    ("detail_unknown_uuid", DifyWorkflowRunNotFound, None),
]


@pytest.mark.parametrize(("recording", "exception", "status"), REJECTED)
def test_a_rejection_is_raised_at_once(
    dify: DifyStandIn, connect: Connect, recording: str, exception: type[DifyError], status: int | None
) -> None:
    dify.misbehave_always(replay(recording))
    with connect() as hook, pytest.raises(exception) as caught:
        hook.get_workflow_run(str(uuid.uuid4()))
    assert type(caught.value) is exception
    assert len(dify.requests) == 1
    if isinstance(caught.value, DifyRequestError):
        assert caught.value.status_code == status


def test_a_base_url_without_v1_is_hinted_at(dify: DifyStandIn, connect: Connect) -> None:
    with connect({"host": f"{dify.origin}/api"}, retry_limit=0) as hook:  # noqa: SIM117
        with pytest.raises(DifyConnectionError, match=r"404 Not Found.*/v1: is that missing"):
            hook.get_workflow_run(dify.add_run("running"))


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(
    dify: DifyStandIn, connect: Connect, monkeypatch: pytest.MonkeyPatch, as_date: bool
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(
        "airflow_provider_dify.api.session.time",
        SimpleNamespace(sleep=slept.append, time=time.time, monotonic=time.monotonic),
    )
    in_half_a_minute = datetime.now(timezone.utc) + timedelta(seconds=30)
    dify.misbehave(too_many_requests(retry_after_date(in_half_a_minute) if as_date else "30"))
    with connect() as hook:
        hook.get_workflow_run(dify.add_run("running"))
    (seconds,) = slept
    assert (0 if as_date else 30) < seconds <= 31


def test_a_retry_after_beyond_a_minute_is_not_asked_early_but_ends_the_attempts(
    dify: DifyStandIn, connect: Connect
) -> None:
    dify.misbehave_always(too_many_requests("61"))
    with connect() as hook, pytest.raises(DifyConnectionError) as caught:
        hook.get_workflow_run(dify.add_run("running"))
    assert caught.value.retry_after == 61
    assert len(dify.requests) == 1


def test_a_whole_response_is_bounded_by_the_timeout_also_when_bytes_keep_coming(
    dify: DifyStandIn, connect: Connect
) -> None:
    run_id = dify.add_run("succeeded", outputs={"text": "x" * 1000})
    dify.misbehave_always(slow_body(dify, 60.0, 1200))
    began = time.monotonic()
    why = "no whole response within"
    with connect(timeout=1.5, retry_limit=0) as hook, pytest.raises(DifyConnectionError, match=why):
        hook.get_workflow_run(run_id)
    assert time.monotonic() - began < 30


def test_a_slow_and_a_huge_body_arrive_whole(dify: DifyStandIn, dialect: str, connect: Connect) -> None:
    outputs = {"text": "二" * 800_000}
    run_id = dify.add_run("succeeded", outputs=outputs)
    dify.misbehave(slow_body(dify, 0.3))
    with connect(timeout=60) as hook:
        assert hook.get_workflow_run(run_id).outputs == outputs
    assert len(dify.requests) == 1


def test_a_stall_is_bounded_by_the_timeout_of_the_connection(dify: DifyStandIn, connect: Connect) -> None:
    dify.misbehave_always(stall(60))
    began = time.monotonic()
    fields = {"extra": {"timeout": 0.2}}
    with connect(fields, retry_limit=0) as hook, pytest.raises(DifyConnectionError, match="Timeout"):
        hook.get_workflow_run(str(uuid.uuid4()))
    assert time.monotonic() - began < 30


# --- the Test button


def test_the_test_names_the_apps_inputs_and_a_task_to_copy(dify: DifyStandIn, connect: Connect) -> None:
    dify.user_input_form = [
        form_field("query", "paragraph", required=True),
        form_field("mode", "select", options=("fast", "slow")),
    ]
    _, message = connect().test_connection()
    assert message.endswith(
        " Its inputs: 'query' (paragraph, required), 'mode' (select). "
        "A task that runs it: DifyRunWorkflowOperator(task_id='run', inputs={'query': '...'})"
    )


def test_a_form_that_can_not_be_read_fails_no_test(dify: DifyStandIn, connect: Connect) -> None:
    dify.misbehave_always(respond(500), only="/parameters")
    works, message = connect().test_connection()
    assert works
    assert message.endswith("'echo' (workflow).")


def test_the_test_reports_an_app_without_workflow_runs(dify: DifyStandIn, connect: Connect) -> None:
    dify.app_info = "app_info_chat"
    works, message = connect().test_connection()
    assert not works
    assert "'chat' of mode chat, which has no workflow runs" in message


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"password": "wrong"}, "Access token is invalid"),
        ({"password": "wrong"}, "refused the API key of the connection when"),
        ({"password": ""}, "The connection cannot be used: it has no password"),
        ({"host": "http://127.0.0.1:9"}, "could not be reached"),
    ],
)
def test_the_test_reports_at_once_what_is_wrong_without_the_id_that_airflow_made_up(
    connect: Connect, fields: dict[str, Any], text: str
) -> None:
    began = time.monotonic()
    hook = connect(fields, retry_delay=60)
    works, message = hook.test_connection()
    assert not works
    assert text in message
    assert hook.dify_conn_id not in message
    assert time.monotonic() - began < 30


def test_airflow_itself_can_press_the_button(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.models.connection import Connection

    connection = Connection(conn_id="new_dify", conn_type="dify", host=dify.base_url, password=API_KEY)
    monkeypatch.setenv("AIRFLOW_CONN_NEW_DIFY", connection.get_uri())
    works, message = connection.test_connection()
    assert works, message
    assert "'echo' (workflow)" in message
    assert dify.base_url in message
