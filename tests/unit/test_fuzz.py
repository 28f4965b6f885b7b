"""Whatever a server, a proxy or a person says, what comes out is a value or a DifyError. Hypothesis thinks it up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest
from airflow.models.connection import Connection
from hypothesis import assume, example
from hypothesis import strategies as st

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.events import EventStreamReader
from airflow_provider_dify.api.http_response import HttpResponse
from airflow_provider_dify.api.session import route_to
from airflow_provider_dify.exceptions import DifyError
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from airflow_provider_dify.runs.following import RunProgress
from airflow_provider_dify.runs.inputs import check_inputs, parse_input_form
from airflow_provider_dify.runs.log import fingerprint, fits
from airflow_provider_dify.runs.waiting import WaitArguments, error_from_event
from airflow_provider_dify.tasks.xcoms import check_outputs, xcoms_from_run
from tests.dify_stand_in import API_KEY, Recording
from tests.unit.fuzzing import fuzzed
from tests.unit.relays import RawServer

RUN_ID = "2d7a7544-770c-496f-8ef9-4e622682b330"


def nested(depth: int, inner: str = "1") -> str:
    return '{"a": ' * depth + inner + "}" * depth


# Numbers, texts and dates that broke something once, beside what hypothesis thinks up.
odd_numbers = st.sampled_from([10**400, -(10**400), 2**70, 1e308, float("nan"), float("inf"), -1, 1e18, True])
odd_texts = st.sampled_from(["", "\0", "\ud800", "a\nb\x1b[31m", "x" * 30_000, API_KEY, "null", '{"a": 1}', "{"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | odd_numbers | odd_texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | odd_texts, inner, max_size=3),
    max_leaves=8,
)


def objects_with(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return objects in which each of these fields may be anything, or missing."""
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names, values))


# What Dify sends, with a few fields put wrong: else nearly all would fail at the first field.
def recorded_with_changes(name: str) -> st.SearchStrategy[dict[str, Any]]:
    fields = Recording.load(name).fields()
    return st.dictionaries(st.sampled_from(sorted(fields)), values, max_size=3).map(lambda wrong: {**fields, **wrong})


runs = (
    recorded_with_changes("detail_succeeded_echo")
    | recorded_with_changes("detail_failed")
    | objects_with("id", "status")
)
rows = st.fixed_dictionaries(
    {}, optional={"workflow_run": runs | values, "created_by_end_user": objects_with("session_id") | values}
)
errors = objects_with("code", "message", "status")
json_bodies = (
    runs
    | errors
    | values
    | objects_with("name", "mode", "id", "user_input_form")
    | st.fixed_dictionaries({"data": st.lists(rows, max_size=3) | values})
).map(lambda value: json.dumps(value).encode())
deep_bodies = st.sampled_from(range(850, 1100, 10)).flatmap(
    lambda depth: st.sampled_from(
        [
            nested(depth),
            "[" * depth + "]" * depth,
            f'{{"id": "x", "status": "failed", "outputs": {nested(depth)}}}',
            f'{{"id": "x", "status": {nested(depth)}}}',
            f'{{"code": {nested(depth)}, "message": {nested(depth)}}}',
        ]
    ).map(str.encode)
)
bodies = json_bodies | deep_bodies | st.binary(max_size=200) | st.just(b"[" * 100_000)

dates = st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30)).map(
    lambda moment: moment.strftime("%a, %d %b %Y %H:%M:%S GMT")
)
retry_afters = (
    st.integers(-5, 10**20).map(str)
    | dates
    | st.sampled_from(
        ["²", "1e5", "nan", "-", "Fri, 31 Dec 9999 23:59:59 -2359", "Mon, 01 Jan 0001 00:00:00 +2359", "9" * 5000]
    )
    | st.text(max_size=10)
)
locations = st.sampled_from(
    ["http://[::1/x", "http://host:99999/", "http://host:port/", "//", "\\\\x", "?", "http://[", "//[v1.x]"]
) | st.text(max_size=20)
header_texts = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30)
headers = st.fixed_dictionaries(
    {},
    optional={
        "Retry-After": retry_afters,
        "Location": locations,
        "Content-Type": st.sampled_from(["application/json", "text/html; charset=x", "text/event-stream", ""])
        | header_texts,
        "X-Version": st.sampled_from(["1.13.0", "1.16.1", "x.y", "9" * 5000]) | header_texts,
    },
)
statuses = st.sampled_from(
    [200, 201, 204, 301, 302, 304, 307, 400, 401, 403, 404, 407, 408, 413, 425, 429, 500, 502, 599]
)

PARSERS: list[Callable[[HttpResponse], Any]] = [
    lambda response: calls.parse_workflow_run(response, RUN_ID),
    calls.parse_app_info,
    calls.parse_parameters,
    calls.parse_log,
    calls.parse_uploaded_file_id,
    calls.parse_stop,
]


def assert_is_presentable(error: DifyError) -> None:
    """Check what every error keeps: one bounded line, no key, and an event that JSON takes."""
    text = str(error)
    assert len(text) < 3000
    assert text.isprintable()
    assert API_KEY not in text
    described = json.loads(json.dumps(error.to_event()))
    assert type(DifyError.from_event(described)) is type(error)


@contextlib.contextmanager
def only_dify_errors() -> Iterator[None]:
    try:
        yield
    except DifyError as error:
        assert_is_presentable(error)


@fuzzed(statuses, headers, bodies)
@example(429, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 -2359"}, b"")
@example(302, {"Location": "http://[::1/x"}, b"")
def test_every_response_is_a_value_or_an_error_of_ours(status: int, head: dict[str, str], body: bytes) -> None:
    url = f"https://dify.example/v1/workflows/run/{RUN_ID}"
    connection = DifyConnection("my_dify", "https://dify.example/v1", API_KEY)
    response = HttpResponse.received(connection, url, status, head, body)
    for parse in PARSERS:
        with only_dify_errors():
            parse(response)
    assert_is_presentable(calls.error_from_start(response))


@fuzzed(runs)
@example({"id": "\x1f", "status": "succeeded", "outputs": {}})
def test_every_run_has_a_verdict_and_xcoms_or_an_error_that_names_the_output(fields: dict[str, Any]) -> None:
    body = json.dumps(fields).encode()
    response = HttpResponse(200, {}, body, "https://dify.example/v1", "my_dify", (API_KEY,))
    with only_dify_errors():
        run = calls.parse_workflow_run(response, RUN_ID)
        verdict = WaitArguments(run_timeout=60).judge(run)
        assert verdict.reason.isprintable()
        assert len(verdict.reason) < 2000
        assert "return_value" in xcoms_from_run(run, multiple_outputs=True)
        check_outputs(run)
        verdict.raise_if_failed(run)


@fuzzed(values | objects_with("user_input_form"), st.dictionaries(st.text(max_size=5), values, max_size=3))
def test_every_input_form_can_be_parsed_and_checked_against(form: Any, inputs: dict[str, Any]) -> None:
    check_inputs(parse_input_form(form), inputs)
    fits(fingerprint(inputs), inputs)


# --- streams

events = st.one_of(
    st.fixed_dictionaries(
        {
            "event": st.sampled_from(
                ["workflow_started", "node_finished", "workflow_finished", "error", "human_input_required"]
            )
        },
        optional={
            "workflow_run_id": st.just(RUN_ID) | values,
            "task_id": st.just(RUN_ID) | values,
            "data": objects_with(
                "title", "node_type", "status", "error", "elapsed_time", "execution_metadata", "inputs", "outputs",
                "expiration_time", "steps", "retry_index",
            )
            | values,
        },
    ),
    values,
).map(lambda value: b"data: " + json.dumps(value).encode() + b"\n\n")  # fmt: skip
streams = st.lists(
    events
    | st.sampled_from(
        [b"event: ping\n\n", b"data:\n\n", b": comment\n\n", b"data: [\n\n", b"\r\n", b"data: " + b"[" * 5000 + b"\n\n"]
    )
    | st.binary(max_size=20),
    max_size=5,
).map(b"".join)


@fuzzed(streams, st.integers(1, 50))
def test_every_stream_is_events_or_one_value_error(stream: bytes, size: int) -> None:
    reader, progress = EventStreamReader(), RunProgress()
    # ValueError is what the reader promises, and what the stream makes an error of ours of.
    with contextlib.suppress(ValueError):
        for begin in range(0, len(stream), size):
            for event in reader.feed(stream[begin : begin + size]):
                line = progress.on_event(event)
                assert line is None or (line.isprintable() and len(line) < 1000)
                assert event.app_id is None or isinstance(event.app_id, str)
                assert all(len(text) < 100 for text in progress.price.values())


# --- a trigger's event


@fuzzed(values | objects_with("type", "text", "attributes", "end", "message", "error", "status"))
@example({"type": ["DifyError"], "attributes": 5})
@example({"type": "_ResponseError", "text": None})
def test_every_event_of_a_trigger_stands_for_an_error_of_ours_or_says_that_the_run_is_over(data: Any) -> None:
    assert isinstance(DifyError.from_event(data), DifyError)
    error = error_from_event(data, TimeoutError)
    assert error is None or isinstance(error, (DifyError, TimeoutError))


# --- connections and the environment

hosts = (
    st.sampled_from(
        ["", "dify.invalid", "http://dify.invalid:8080/x", "bücher.invalid", "http://[::1]", "::1", "[::1", "a..b", "-"]
    )
    | st.sampled_from(
        ["ß" * 70 + ".invalid", "a" * 300, "http://x:99999", "http://u:p@x", "xn--\u0378.invalid", "\ud800"]
    )
    | st.text(max_size=30)
)
proxy_urls = (
    st.sampled_from(["http://user:pw@", "http://[::1", "proxy.invalid:3128", "http://p:99999", "//", "x://y"])
    | st.sampled_from(["socks5://h:1", "socks5h://h", "SOCKS4A://u:p@h:1", "socks://h:1", "socks6://h:1"])
    | st.text(max_size=20)
)
extras = st.fixed_dictionaries(
    {},
    optional={
        "timeout": st.sampled_from([1e10, 10**400, "1e10", "nan", -1, 0, True, 0.01]) | values,
        "verify": st.sampled_from([True, "/nowhere.pem", __file__, "/", "\0"]) | values,
        "proxies": st.dictionaries(st.sampled_from(["http", "https", "all"]), proxy_urls, max_size=2) | values,
        "console_url": hosts | values,
    },
)


@pytest.fixture
def nothing_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every look-up of a name or of an address fail: nothing leaves this machine."""

    def fail(host: Any, *args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def airflow_connection(**fields: Any) -> Connection:
    extra = fields.pop("extra")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        connection = Connection(conn_id="dify_default", conn_type="dify", **fields)
        connection._extra = extra
        connection.is_extra_encrypted = False
    return connection


@fuzzed(
    hosts,
    st.sampled_from([None, "http", "https", "ftp", ""]) | st.text(max_size=8),
    st.none() | st.integers(),
    st.sampled_from([API_KEY, "", None, "bad key"]) | st.text(max_size=10),
    extras.map(json.dumps) | st.text(max_size=20),
)
@example("dify.invalid", "http", None, API_KEY, '{"timeout": 1e10}')
@example("dify.invalid", "http", None, API_KEY, '{"proxies": {"http": "http://user:pw@"}}')
@example("dify.invalid", "http", None, API_KEY, '{"proxies": {"http": "http://[::1"}}')
@example("bücher.invalid", "http", None, API_KEY, "{}")
@example("dify.invalid", "https", None, API_KEY, json.dumps({"verify": __file__}))
def test_every_connection_can_be_used_or_is_an_error_of_ours(
    host: str, schema: str | None, port: int | None, password: str | None, extra: str
) -> None:
    connection = airflow_connection(host=host, schema=schema, port=port, password=password, extra=extra)
    with only_dify_errors():
        settings_of_it = DifyConnection.from_airflow(connection)
        route_to(settings_of_it, socks_package="socks")
        for url in (f"{settings_of_it.base_url}/info", settings_of_it.console, host):
            settings_of_it.owns(url)


@pytest.mark.usefixtures("nothing_resolves")
@fuzzed(
    hosts,
    extras,
    st.dictionaries(st.sampled_from(["http_proxy", "https_proxy", "all_proxy", "no_proxy"]), proxy_urls),
    short=8,
    full=40,
)
@example("https://dify.invalid", {"verify": __file__}, {})
@example("http://dify.invalid", {}, {"http_proxy": "socks5://h:1"})
@example("https://dify.invalid", {}, {"REQUESTS_CA_BUNDLE": "/nowhere.pem"})
@example("https://dify.invalid", {}, {"CURL_CA_BUNDLE": "/nowhere.pem"})
@example("http://dify.invalid", {"proxies": {"http": "http://user:pw@"}}, {})
def test_a_hook_that_cannot_reach_anything_raises_an_error_of_ours(
    host: str, extra: dict[str, Any], environment: dict[str, str]
) -> None:
    fields = {"conn_type": "dify", "host": host, "password": API_KEY, "extra": {"timeout": 1, **extra}}
    # Airflow itself can't read a connection with a lone surrogate from its environment.
    assume("\\ud" not in json.dumps(fields).replace("\\\\", ""))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(fields))
        for name, value in environment.items():
            with contextlib.suppress(ValueError, UnicodeError):
                monkeypatch.setenv(name, value)
        ask_everything(expect_errors=True)


# --- all of it, over sockets


def ask_everything(*, expect_errors: bool = False) -> None:
    """Send a request of each kind with both clients, and let nothing through but errors of ours."""

    async def on_an_event_loop() -> None:
        async with DifyAsyncHook() as hook:
            await hook.get_workflow_run(RUN_ID)

    def start() -> None:
        with DifyHook(retry_limit=0) as hook:
            stream = hook.start_workflow_run({}, "airflow", timeout=2)
            with stream:
                list(stream)

    def look_up() -> None:
        with DifyHook(retry_limit=0) as hook:
            hook.get_workflow_run(RUN_ID)

    for ask in (look_up, start, lambda: asyncio.run(on_an_event_loop())):
        failed = True
        with only_dify_errors():
            ask()
            failed = False
        assert failed or not expect_errors
    with DifyHook() as hook:
        is_good, message = hook.test_connection()
    assert message.isprintable()
    assert not (is_good and expect_errors)


def on_the_wire(status: int, head: dict[str, str], body: bytes) -> bytes:
    lines = [f"HTTP/1.1 {status} -", *(f"{name}: {value}" for name, value in head.items()), "Connection: close"]
    return "\r\n".join(lines).encode("latin-1", "replace") + f"\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


raw_responses = (
    st.builds(on_the_wire, statuses, headers, bodies)
    | st.builds(on_the_wire, st.just(200), st.just({"Content-Type": "text/event-stream"}), streams)
    | st.sampled_from(
        [
            b"",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
            b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
            b"HTTP/9.9 999 \r\n\r\n",
            b"HTTP/1.1 302 -\r\nLocation: ?\r\nContent-Length: 0\r\n\r\n",
            b"SSH-2.0-OpenSSH_9.0\r\n\r\n",
        ]
    )
    | st.binary(max_size=100)
)


@fuzzed(raw_responses, short=8, full=40)
@example(on_the_wire(302, {"Location": "http://[::1/x"}, b""))
@example(on_the_wire(302, {"Location": "http://host:99999/x"}, b""))
def test_whatever_a_server_sends_is_a_value_or_an_error_of_ours(response: bytes) -> None:
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    with RawServer(response) as server, pytest.MonkeyPatch.context() as monkeypatch:
        host = f"http://127.0.0.1:{server.port}/v1"
        fields = {"conn_type": "dify", "host": host, "password": API_KEY, "extra": {"timeout": 2}}
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(fields))
        ask_everything()
