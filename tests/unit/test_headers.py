"""Headers of one's own: on each request to the connection's server, nowhere else, and shown to nobody."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest

from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.exceptions import DifyConfigurationError, DifyError
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger
from tests.dify_stand_in import API_KEY, DifyStandIn, gateway, redirect, replay, respond
from tests.unit.test_secrets import all_that_is_shown_of, assert_shows_none_of

SECRET = "9f2c-the-secret-of-the-gateway"
TOKEN = "eyJ0b2tlbi1vZi10aGUtcHJveHk"
HEADERS = {"CF-Access-Client-Secret": SECRET, "Proxy-Authorization": f"Bearer {TOKEN}", "user-agent": "ours/1"}
RUN_ID = "2d7a7544-770c-496f-8ef9-4e622682b330"

Connect = Callable[..., None]


@pytest.fixture
def connect(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Make the connection ``dify_default`` lead to the stand-in, with these headers."""

    def make(headers: Any = HEADERS) -> None:
        fields = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY, "extra": {"headers": headers}}
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(fields))

    return make


def read(headers: Any) -> DifyConnection:
    from airflow.models.connection import Connection

    extra = json.dumps({"headers": headers})
    return DifyConnection.from_airflow(
        Connection(conn_id="my_dify", conn_type="dify", password=API_KEY, extra=extra)  # type: ignore[arg-type]
    )


def look_up(run_id: str) -> Any:
    with DifyHook(retry_limit=0) as hook:
        return hook.get_workflow_run(run_id)


def look_up_on_a_loop(run_id: str) -> Any:
    async def ask() -> Any:
        async with DifyAsyncHook() as hook:
            return await hook.get_workflow_run(run_id)

    return asyncio.run(ask())


def start(run_id: str) -> Any:
    with DifyHook(retry_limit=0) as hook, hook.start_workflow_run({}, "airflow") as run:
        return run.workflow_run_id


def press_test(run_id: str) -> Any:
    return DifyHook().test_connection()


def assert_has_headers(received: dict[str, str]) -> None:
    names = {name.lower(): value for name, value in received.items()}
    assert len(names) == len(received)
    assert {name.lower(): names[name.lower()] for name in HEADERS} == {k.lower(): v for k, v in HEADERS.items()}
    assert names["authorization"] == f"Bearer {API_KEY}"


@pytest.mark.parametrize("ask", [look_up, look_up_on_a_loop, start, press_test])
def test_each_request_has_the_headers_and_the_key(dify: DifyStandIn, connect: Connect, ask: Callable[..., Any]) -> None:
    connect()
    ask(dify.add_run("succeeded"))
    assert dify.requests
    for request in dify.requests:
        assert_has_headers(request.headers)


@pytest.mark.parametrize("ask", [look_up, look_up_on_a_loop])
def test_the_headers_follow_a_redirect_within_the_server_and_none_elsewhere(
    dify: DifyStandIn, connect: Connect, ask: Callable[..., Any]
) -> None:
    connect()
    run_id = dify.add_run("succeeded")
    dify.misbehave(redirect(f"/v1/workflows/run/{run_id}"))
    assert ask(run_id).id == run_id
    assert len(dify.requests) == 2
    assert_has_headers(dify.requests[1].headers)

    with DifyStandIn() as other:
        # The same machine on another port is another server.
        dify.misbehave(redirect(f"{other.base_url}/workflows/run/{run_id}", 307))
        with pytest.raises(DifyError, match="redirect to"):
            ask(run_id)
        assert other.requests == []


def test_the_session_of_get_conn_sends_the_headers_to_no_other_server(dify: DifyStandIn, connect: Connect) -> None:
    connect()
    with DifyStandIn() as other, DifyHook() as hook:
        hook.get_conn().get(f"{other.base_url}/info", timeout=5)
        hook.get_conn().get(f"{dify.base_url}/info", timeout=5)
        assert not {name.lower() for name in HEADERS if name != "user-agent"} & {
            name.lower() for name in other.requests[0].headers
        }
    assert_has_headers(dify.requests[0].headers)


@pytest.mark.parametrize("headers", [None, "", "  ", {}, "{}"])
def test_a_connection_without_headers_has_none(headers: Any) -> None:
    assert read(headers).headers == {}


def test_headers_may_be_the_text_that_a_form_saves_or_a_uri_holds() -> None:
    from airflow.models.connection import Connection

    assert read(json.dumps(HEADERS)).headers == HEADERS
    uri = f"dify://:{API_KEY}@dify.example.com/?headers={quote(json.dumps(HEADERS))}"
    connection = DifyConnection.from_airflow(Connection(conn_id="my_dify", uri=uri))  # type: ignore[arg-type]
    assert connection.headers == HEADERS


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ("no JSON", "'headers' must be an object"),
        ([["X-Key", SECRET]], "'headers' must be an object"),
        (SECRET, "'headers' must be an object"),
        ({f"X-Key: {SECRET}": ""}, "the name of header 1"),
        ({"X-One": "1", "": SECRET}, "the name of header 2"),
        ({"X\n": SECRET}, "the name of header 1"),
        ({"X-Ä": SECRET}, "the name of header 1"),
        ({"X-Key": f"{SECRET}\n"}, "the value of 'X-Key'"),
        ({"X-Key": f"{SECRET}\r\nX-Other: 1"}, "the value of 'X-Key'"),
        ({"X-Key": f" {SECRET}"}, "the value of 'X-Key'"),
        ({"X-Key": f"{SECRET}é"}, "the value of 'X-Key'"),
        ({"X-Key": f"{SECRET}…"}, "the value of 'X-Key'"),
        ({"X-Key": ""}, "the value of 'X-Key'"),
        ({"X-Key": 1}, "the value of 'X-Key'"),
        ({"X-Key": None}, "the value of 'X-Key'"),
        ({"X-Key": [SECRET]}, "the value of 'X-Key'"),
        ({"X-Key": SECRET, "x-key": SECRET}, "each name once"),
        *(
            ({name: SECRET}, f"cannot set {name!r}")
            for name in ("Authorization", "AUTHORIZATION", "host", "Content-Length", "content-type", "Accept", "TE")
        ),
    ],
)
def test_a_header_that_cannot_be_sent_is_named_and_its_value_is_not_shown(headers: Any, problem: str) -> None:
    with pytest.raises(DifyConfigurationError) as caught:
        read(headers)
    assert problem in str(caught.value)
    assert str(caught.value).startswith("Connection 'my_dify' cannot be used: ")
    assert_shows_none_of(all_that_is_shown_of(caught.value), SECRET)


def test_a_connection_shows_no_value_of_a_header() -> None:
    assert_shows_none_of(repr(read(HEADERS)), SECRET, TOKEN)


ECHO = f"you sent {SECRET} and {TOKEN}"
SERVERS_THAT_ECHO_THE_HEADERS = {
    "message": gateway(403, {"message": ECHO}),
    "page": respond(502, f"<html>{ECHO}</html>", content_type=f"text/html; {SECRET}"),
    "redirect": redirect(f"http://other.example/?key={SECRET}{TOKEN}"),
    "version": respond(500, "{}", headers={"X-Version": TOKEN}),
    "event": respond(200, f'data: {{"event": "error", "message": "{ECHO}"}}\n\n', content_type="text/event-stream"),
    "end": respond(
        200, f'data: {{"event": "workflow_paused", "data": {{"a": "{ECHO}"}}}}\n\n', content_type="text/event-stream"
    ),
}


@pytest.mark.parametrize("fault", SERVERS_THAT_ECHO_THE_HEADERS.values(), ids=SERVERS_THAT_ECHO_THE_HEADERS.keys())
@pytest.mark.parametrize("ask", [look_up, look_up_on_a_loop, start])
def test_a_server_that_echoes_the_headers_gets_them_into_no_error(
    dify: DifyStandIn, connect: Connect, short_reading_on: None, fault: Any, ask: Callable[..., Any]
) -> None:
    connect()
    dify.misbehave_always(fault)
    with pytest.raises(DifyError) as caught:
        ask(RUN_ID)
    assert_shows_none_of(all_that_is_shown_of(caught.value), SECRET, TOKEN)


def test_neither_the_trigger_nor_its_event_holds_a_header(dify: DifyStandIn, connect: Connect) -> None:
    connect()
    dify.misbehave_always(respond(502, ECHO))

    async def wait() -> list[Any]:
        trigger = DifyWorkflowRunTrigger(RUN_ID, poll_interval=0.01, max_consecutive_failures=1)
        trigger.retry_delay, trigger.resume_delay = 0.001, 0.0
        shown.append(json.dumps(trigger.serialize()))
        return [event.payload async for event in trigger.run()]

    shown: list[str] = []
    shown.append(json.dumps(asyncio.run(wait())))
    assert_shows_none_of("".join(shown), SECRET, TOKEN)


def test_the_form_of_airflow_2_shows_no_header_and_keeps_what_was_not_edited() -> None:
    wtforms = pytest.importorskip("wtforms")
    views = pytest.importorskip("airflow.www.views")
    field = DifyHook.get_connection_form_widgets()["headers"]
    form = type("ConnectionForm", (wtforms.Form,), {"headers": field})(headers=SECRET)
    shown = form.headers.widget(form.headers)
    assert 'type="password"' in shown
    assert f'value="{views.SENSITIVE_FIELD_PLACEHOLDER}"' in shown
    assert SECRET not in shown


@pytest.mark.parametrize("ask", [look_up, look_up_on_a_loop])
def test_airflow_masks_the_values_as_it_masks_the_key(
    dify: DifyStandIn, connect: Connect, ask: Callable[..., Any]
) -> None:
    try:
        from airflow.sdk.log import redact
    except ImportError:
        from airflow.utils.log.secrets_masker import redact

    # Of this test alone, because a process never forgets what it masks.
    secret = f"{SECRET}-{ask.__name__}"
    connect({"X-Key": f"Bearer {secret}"})
    ask(dify.add_run("succeeded"))
    assert secret not in str(redact(f"a template shows {secret}"))


def test_a_header_that_was_rotated_is_read_again_with_the_key(
    dify: DifyStandIn, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect({"X-Key": "the-old-one"})
    dify.misbehave(replay("auth_bad_key"))
    run_id = dify.add_run("succeeded")
    with DifyHook(retry_limit=0) as hook:
        assert hook.connection.headers == {"X-Key": "the-old-one"}
        connect({"X-Key": "the-new-one"})
        assert hook.get_workflow_run(run_id).id == run_id
    assert [request.headers["X-Key"] for request in dify.requests] == ["the-old-one", "the-new-one"]
