"""The API key and the passwords of proxies, in whatever a person, a log or Airflow's database may get to see."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import traceback
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest

from airflow_provider_dify.exceptions import DifyConfigurationError, DifyConnectionError, DifyError
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger
from tests.dify_stand_in import API_KEY, DifyStandIn, Start, gateway, redirect, rejects, respond
from tests.unit.relays import RawServer, TunnelProxy

RUN_ID = "2d7a7544-770c-496f-8ef9-4e622682b330"
PASSWORD = "p@ss/of:the proxy"
USERINFO = f"bob:{quote(PASSWORD, safe='')}"
SPELLINGS = (
    PASSWORD,
    quote(PASSWORD, safe=""),
    base64.b64encode(f"bob:{PASSWORD}".encode()).decode(),
)
REFUSAL_BODY = json.dumps(
    {"you sent": SPELLINGS, "message": f"{SPELLINGS[2]}, {PASSWORD} and http://{USERINFO}@proxy are wrong"}
)

Connect = Callable[..., None]
Ask = Callable[[], BaseException]


pytestmark = pytest.mark.usefixtures("quick_resumption")


@pytest.fixture(autouse=True)
def no_proxy_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Make the connection ``dify_default`` lead to this host with these extras."""

    def make(host: str, **extra: Any) -> None:
        fields = {"conn_type": "dify", "host": host, "password": API_KEY, "extra": {"timeout": 3, **extra}}
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(fields))

    return make


def error_of_the_hook() -> BaseException:
    with DifyHook(retry_limit=1, retry_delay=0.001) as hook, pytest.raises(DifyError) as caught:
        hook.get_workflow_run(RUN_ID)
    return caught.value


def error_of_the_start() -> BaseException:
    with DifyHook(retry_limit=1, retry_delay=0.001) as hook, pytest.raises(DifyError) as caught:
        hook.start_workflow_run({}, "airflow")
    return caught.value


def error_of_the_async_hook() -> BaseException:
    async def ask() -> None:
        async with DifyAsyncHook() as hook:
            await hook.get_workflow_run(RUN_ID)

    with pytest.raises(DifyError) as caught:
        asyncio.run(ask())
    return caught.value


ask_with_each_client = pytest.mark.parametrize(
    "ask", [error_of_the_hook, error_of_the_start, error_of_the_async_hook], ids=["worker", "start", "triggerer"]
)


def event_of_the_trigger() -> Any:
    async def wait() -> list[Any]:
        trigger = DifyWorkflowRunTrigger(RUN_ID, poll_interval=0.01, max_consecutive_failures=1)
        trigger.retry_delay = 0.001
        assert_shows_none_of(json.dumps(trigger.serialize()), API_KEY)
        return [event.payload async for event in trigger.run()]

    (payload,) = asyncio.run(wait())
    return payload


def assert_shows_none_of(shown: str, *secrets: str) -> None:
    for secret in secrets:
        assert secret not in shown
        assert json.dumps(secret)[1:-1] not in shown


def all_that_is_shown_of(error: BaseException) -> str:
    """Return the error as logs, tracebacks, events and pickles show it, with what caused it."""
    shown = ["".join(traceback.format_exception(error)), str(vars(error)), str(pickle.dumps(error))]
    if isinstance(error, DifyError):
        shown.append(json.dumps(error.to_event()))
    # Also what a traceback leaves out, because `from None` only hides it.
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is not None:
            shown += [str(link), repr(link)]
            chain += [link.__cause__, link.__context__]
    return "\n".join(shown)


# --- passwords of proxies


def refusing_proxy(kind: str) -> Any:
    body = REFUSAL_BODY.encode()
    head = f"HTTP/1.1 407 {PASSWORD}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    response = f"{head}Proxy-Authenticate: Basic realm={PASSWORD}\r\nConnection: close\r\n\r\n".encode() + body
    return TunnelProxy(0, refusal=response) if kind == "https" else RawServer(response)


@pytest.mark.parametrize("kind", ["http", "https"])
@pytest.mark.parametrize("source", ["connection", "environment"])
@ask_with_each_client
def test_a_proxy_that_refuses_its_password_shows_it_nowhere(
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    kind: str,
    source: str,
    ask: Ask,
) -> None:
    with refusing_proxy(kind) as proxy:
        url = f"http://{USERINFO}@127.0.0.1:{proxy.port}"
        if source == "environment":
            monkeypatch.setenv(f"{kind}_proxy", url)
        connect(f"{kind}://dify.example", **({"proxies": {kind: url}} if source == "connection" else {}))
        error = ask()
        event = event_of_the_trigger()
    # The password did go to the proxy, so this is the answer to it.
    heads = b"".join(proxy.requests if isinstance(proxy, RawServer) else proxy.heads)
    assert SPELLINGS[2].encode() in heads
    assert "407" in str(error)
    shown = all_that_is_shown_of(error) + json.dumps(event) + caplog.text + "".join(capfd.readouterr())
    assert_shows_none_of(shown, *SPELLINGS, API_KEY)


@pytest.mark.parametrize(
    "url",
    [
        f"http://{USERINFO}@",
        f"http://{USERINFO}@/",
        f"http://{USERINFO}@host:port",
        f"http://{USERINFO}@host:99999",
        f"http://{USERINFO}@[::1",
        f"http://{USERINFO}@ho st:3128",
        f"http://{USERINFO}@127.0.0.1:1",
        f"gopher://{USERINFO}@127.0.0.1:1",
        f"socks5://{USERINFO}@127.0.0.1:1",
        f"socks6://{USERINFO}@127.0.0.1:1",
        f"{USERINFO}@127.0.0.1:1",
        f"bob:{PASSWORD}@127.0.0.1:1",
        f"http://bob:{PASSWORD}@127.0.0.1:1",
    ],
)
@pytest.mark.parametrize("source", ["connection", "environment"])
@ask_with_each_client
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, source: str, url: str, ask: Ask
) -> None:
    if source == "environment":
        monkeypatch.setenv("http_proxy", url)
        connect("http://dify.example")
    else:
        connect("http://dify.example", proxies={"http": url})
    error = ask()
    assert isinstance(error, (DifyConfigurationError, DifyConnectionError))
    # One of the libraries names a SOCKS proxy by its kind only.
    assert "prox" in str(error).lower() or (url.startswith("socks") and "SOCKS" in str(error))
    shown = all_that_is_shown_of(error) + json.dumps(event_of_the_trigger())
    assert_shows_none_of(shown, *SPELLINGS, "p@ss", API_KEY)


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (error_of_the_hook, "needs the package pysocks"),
        (error_of_the_start, "needs the package aiohttp-socks"),
        (error_of_the_async_hook, "needs the package aiohttp-socks"),
    ],
)
def test_a_socks_proxy_says_what_it_needs(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, ask: Ask, why: str
) -> None:
    monkeypatch.setattr("airflow_provider_dify.api.session.find_spec", lambda name: None)
    connect("http://dify.example", proxies={"http": "SOCKS5://127.0.0.1:1"})
    error = ask()
    assert isinstance(error, DifyConfigurationError)
    assert str(error).startswith("The proxy to Dify is a SOCKS proxy, which ")
    assert why in str(error)
    assert "the connection's extra 'proxies'" in str(error)


# --- the API key


def json_with_the_key(**fields: Any) -> bytes:
    return json.dumps({"id": RUN_ID, "status": "failed", "inputs": {}, "outputs": {}, **fields}).encode()


SERVERS_THAT_ECHO_THE_KEY = {
    "message": rejects(400, API_KEY, f"bad key {API_KEY}"),
    "message of a gateway": gateway(403, {"message": f"bad key {API_KEY}"}),
    "page": respond(502, f"<html>{API_KEY}</html>", content_type=f"text/html; {API_KEY}"),
    "redirect": redirect(f"http://other.example/?key={API_KEY}"),
    "field of a wrong type": respond(200, json_with_the_key(total_steps=API_KEY)),
    "version": respond(500, "{}", headers={"X-Version": API_KEY}),
    "retry after": respond(503, "{}", headers={"Retry-After": API_KEY}),
    "event": respond(200, f'data: {{"event": "error", "message": "{API_KEY}"}}\n\n', content_type="text/event-stream"),
    "broken event": respond(200, f"data: {{{API_KEY}\n\n", content_type="text/event-stream"),
}


@pytest.mark.parametrize("fault", SERVERS_THAT_ECHO_THE_KEY.values(), ids=SERVERS_THAT_ECHO_THE_KEY.keys())
@ask_with_each_client
def test_a_server_that_echoes_the_key_gets_it_into_no_error(
    dify: DifyStandIn, connect: Connect, fault: Any, ask: Ask
) -> None:
    connect(dify.base_url)
    dify.misbehave_always(fault)
    shown = all_that_is_shown_of(ask()) + json.dumps(event_of_the_trigger())
    assert_shows_none_of(shown, API_KEY)


@pytest.fixture(params=["worker", "triggerer"])
def read_run(request: pytest.FixtureRequest) -> Callable[[], Any]:
    async def read() -> Any:
        async with DifyAsyncHook() as hook:
            return await hook.get_workflow_run(RUN_ID)

    return (lambda: DifyHook().get_workflow_run(RUN_ID)) if request.param == "worker" else lambda: asyncio.run(read())


def test_a_run_whose_error_echoes_the_key_is_an_xcom_without_it(
    dify: DifyStandIn, connect: Connect, read_run: Callable[[], Any]
) -> None:
    connect(dify.base_url)
    dify.misbehave(respond(200, json_with_the_key(error=f"HTTP node sent {API_KEY}", outputs={"text": API_KEY})))
    run = read_run()
    assert run.error == "HTTP node sent ***"
    assert_shows_none_of(repr(run) + json.dumps(run.without_payload()) + json.dumps(run.outputs), API_KEY)


def test_a_key_that_arrives_in_two_pieces_of_a_stream_is_in_no_event(dify: DifyStandIn, connect: Connect) -> None:
    connect(dify.base_url)
    # Byte by byte, so that no piece holds the whole key.
    dify.starts.append(Start(insert=({"event": "text_chunk", "data": {"text": API_KEY}},), piece=1))
    with DifyHook().start_workflow_run({}, "airflow") as run:
        events = list(run)
    assert "text_chunk" in [event.name for event in events]
    assert_shows_none_of(repr(events), API_KEY)
