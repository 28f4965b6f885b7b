"""What broke off, and when: a start that may have arrived is never sent again, one that never went out is."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dify.exceptions import DifyConnectionError, DifyWorkflowRunUncertain
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from tests.dify_stand_in import API_KEY, DifyStandIn, Start, unchunked
from tests.unit.relays import Change, ForwardProxy, Listener, Relay, SocksProxy, TunnelProxy


class LoopHook:
    """Starts runs on an event loop of its own each time."""

    # The hook for event loops sends nothing again by itself.
    attempts = 1

    def start_workflow_run(self, inputs: dict[str, Any], user: str) -> tuple[str, list[str]]:
        async def start() -> tuple[str, list[str]]:
            async with DifyAsyncHook() as hook, await hook.start_workflow_run(inputs, user) as run:
                return run.workflow_run_id, [event.name async for event in run]

        return asyncio.run(start())


class WorkerHook:
    """Starts runs on a worker."""

    attempts = 4

    def start_workflow_run(self, inputs: dict[str, Any], user: str) -> tuple[str, list[str]]:
        with DifyHook(retry_delay=0.01, retry_limit=3) as hook, hook.start_workflow_run(inputs, user) as run:
            return run.workflow_run_id, [event.name for event in run]


Hook = LoopHook | WorkerHook
Connect = Callable[..., Hook]


@pytest.fixture(autouse=True)
def no_proxy_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=[WorkerHook, LoopHook])
def connect(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Make a hook of a connection to this base URL with these extras, for a worker and for an event loop."""

    def make(base_url: str, **extra: Any) -> Hook:
        fields = {"conn_type": "dify", "host": base_url, "password": API_KEY, "extra": {"timeout": 3, **extra}}
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(fields))
        hook: Hook = request.param()
        return hook

    return make


def after_the_start(dify: DifyStandIn, change: Change) -> Change:
    """Change a response from when Dify has taken the start; a handshake before that is passed on as it is."""
    return lambda piece: change(piece) if dify.started else piece


def cut(piece: bytes) -> bytes:
    """Let nothing of the response arrive."""
    return b""


def damage(piece: bytes) -> bytes:
    """Flip the bits behind a TLS record's head, so that it does not fit its checksum any more."""
    return piece[:5] + bytes(byte ^ 0xFF for byte in piece[5:])


def assert_one_uncertain_start(hook: Hook, dify: DifyStandIn) -> None:
    with pytest.raises(DifyWorkflowRunUncertain, match=r"may or may not have started.*'airflow'"):
        hook.start_workflow_run({}, "airflow")
    # Long enough for a retry that should not come.
    time.sleep(0.1)
    assert len(dify.started) == 1


def test_a_forward_proxy_that_cuts_after_the_start_leaves_it_uncertain(dify: DifyStandIn, connect: Connect) -> None:
    with ForwardProxy(dify.port, after_the_start(dify, cut)) as proxy:
        hook = connect(dify.base_url, proxies={"http": f"http://127.0.0.1:{proxy.port}"})
        assert_one_uncertain_start(hook, dify)
    assert proxy.connections == 1


@pytest.mark.parametrize("change", [cut, damage])
def test_a_tunnel_that_breaks_after_the_start_leaves_it_uncertain(
    secure_dify: DifyStandIn, certificate: tuple[ssl.SSLContext, Path], connect: Connect, change: Change
) -> None:
    with TunnelProxy(secure_dify.port, after_the_start(secure_dify, change)) as proxy:
        proxies = {"https": f"http://127.0.0.1:{proxy.port}"}
        hook = connect(secure_dify.base_url, proxies=proxies, verify=str(certificate[1]))
        assert_one_uncertain_start(hook, secure_dify)
    assert proxy.connections == 1


@pytest.mark.parametrize("change", [cut, damage])
def test_a_tls_connection_that_breaks_after_the_start_leaves_it_uncertain(
    secure_dify: DifyStandIn, certificate: tuple[ssl.SSLContext, Path], connect: Connect, change: Change
) -> None:
    with Relay(secure_dify.port, after_the_start(secure_dify, change)) as relay:
        hook = connect(f"https://127.0.0.1:{relay.port}/v1", verify=str(certificate[1]))
        assert_one_uncertain_start(hook, secure_dify)
    assert relay.connections == 1


def test_a_start_goes_through_proxies_that_do_not_break(
    dify: DifyStandIn,
    secure_dify: DifyStandIn,
    certificate: tuple[ssl.SSLContext, Path],
    connect: Connect,
) -> None:
    with ForwardProxy(dify.port) as proxy:
        connect(dify.base_url, proxies={"http": f"http://127.0.0.1:{proxy.port}"}).start_workflow_run({}, "a")
    with TunnelProxy(secure_dify.port) as tunnel:
        proxies = {"https": f"http://127.0.0.1:{tunnel.port}"}
        hook = connect(secure_dify.base_url, proxies=proxies, verify=str(certificate[1]))
        hook.start_workflow_run({}, "airflow")
    assert (len(dify.started), proxy.connections) == (1, 1)
    assert (len(secure_dify.started), tunnel.connections) == (1, 1)


@pytest.mark.parametrize("status", ["407 Proxy Authentication Required", "502 Bad Gateway", "503 Service Unavailable"])
def test_a_start_that_a_proxy_opened_no_tunnel_for_may_be_sent_again(
    secure_dify: DifyStandIn, certificate: tuple[ssl.SSLContext, Path], connect: Connect, status: str
) -> None:
    refusal = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    with TunnelProxy(secure_dify.port, refusal=refusal) as proxy:
        proxies = {"https": f"http://127.0.0.1:{proxy.port}"}
        hook = connect(secure_dify.base_url, proxies=proxies, verify=str(certificate[1]))
        with pytest.raises(DifyConnectionError, match=status[:3]):
            hook.start_workflow_run({}, "airflow")
    assert proxy.connections == hook.attempts
    assert secure_dify.started == []


@pytest.mark.parametrize("scheme", ["socks5", "SOCKS5H"])
def test_a_start_goes_through_a_socks_proxy(dify: DifyStandIn, connect: Connect, scheme: str) -> None:
    with SocksProxy(dify.port) as proxy:
        hook = connect(dify.base_url, proxies={"http": f"{scheme}://127.0.0.1:{proxy.port}"})
        run_id, _ = hook.start_workflow_run({}, "airflow")
    assert [started.workflow_run_id for started in dify.started] == [run_id]
    assert proxy.connections >= 1


def test_only_a_socks_proxy_that_may_looks_the_servers_name_up(dify: DifyStandIn, connect: Connect) -> None:
    with SocksProxy(dify.port) as proxy:
        url = f"127.0.0.1:{proxy.port}"
        connect("http://dify.invalid/v1", proxies={"http": f"socks5h://{url}"}).start_workflow_run({}, "airflow")
        hook = connect("http://dify.invalid/v1", proxies={"http": f"socks5://{url}"})
        with pytest.raises(DifyConnectionError, match="could not be reached"):
            hook.start_workflow_run({}, "airflow")
    assert proxy.names == [b"dify.invalid"]
    assert len(dify.started) == 1


def test_a_socks_proxy_gets_its_password(dify: DifyStandIn, connect: Connect) -> None:
    with SocksProxy(dify.port, takes_password=True) as proxy:
        url = f"socks5://bob:p%40ss@127.0.0.1:{proxy.port}"
        connect(dify.base_url, proxies={"http": url}).start_workflow_run({}, "airflow")
    assert proxy.passwords == [(b"bob", b"p@ss")]
    assert len(dify.started) == 1


@pytest.mark.parametrize("scheme", ["socks5", "SOCKS5H"])
def test_a_socks_proxy_that_cuts_after_the_start_leaves_it_uncertain(
    dify: DifyStandIn, connect: Connect, scheme: str
) -> None:
    with SocksProxy(dify.port, after_the_start(dify, cut)) as proxy:
        hook = connect(dify.base_url, proxies={"http": f"{scheme}://127.0.0.1:{proxy.port}"})
        assert_one_uncertain_start(hook, dify)


@pytest.mark.parametrize("change", [cut, damage])
def test_tls_through_a_socks_proxy_that_breaks_after_the_start_leaves_it_uncertain(
    secure_dify: DifyStandIn, certificate: tuple[ssl.SSLContext, Path], connect: Connect, change: Change
) -> None:
    with SocksProxy(secure_dify.port, after_the_start(secure_dify, change)) as proxy:
        proxies = {"https": f"socks5://127.0.0.1:{proxy.port}"}
        hook = connect(secure_dify.base_url, proxies=proxies, verify=str(certificate[1]))
        assert_one_uncertain_start(hook, secure_dify)


def test_a_start_that_a_socks_proxy_found_no_way_for_may_be_sent_again(dify: DifyStandIn, connect: Connect) -> None:
    with SocksProxy(dify.port, refuses=True) as proxy:
        hook = connect(dify.base_url, proxies={"http": f"socks5://127.0.0.1:{proxy.port}"})
        with pytest.raises(DifyConnectionError):
            hook.start_workflow_run({}, "airflow")
    assert proxy.connections == hook.attempts
    assert dify.started == []


class NoTls(Listener):
    """Answers a handshake with something else."""

    def __init__(self, response: bytes) -> None:
        super().__init__()
        self.response = response
        self.connections = 0

    def serve(self, client: socket.socket) -> None:
        self.connections += 1
        client.recv(65536)
        client.sendall(self.response)


@pytest.mark.parametrize("response", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""], ids=["no TLS", "hangs up"])
def test_a_start_whose_handshake_failed_may_be_sent_again(connect: Connect, response: bytes) -> None:
    with NoTls(response) as server:
        hook = connect(f"https://127.0.0.1:{server.port}/v1")
        with pytest.raises(DifyConnectionError, match="could not be reached for the start"):
            hook.start_workflow_run({}, "airflow")
    assert server.connections == hook.attempts


def test_a_start_to_a_server_with_an_unknown_certificate_may_be_sent_again(
    secure_dify: DifyStandIn, connect: Connect
) -> None:
    with pytest.raises(DifyConnectionError, match=r"certificate verify failed.*could not be reached"):
        connect(secure_dify.base_url).start_workflow_run({}, "airflow")
    assert secure_dify.started == []


@pytest.mark.parametrize("through_proxy", [False, True])
def test_a_start_to_a_name_that_does_not_exist_may_be_sent_again(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, through_proxy: bool
) -> None:
    names: list[str] = []

    def no_such_name(host: str, *args: Any, **kwargs: Any) -> Any:
        names.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    proxies = {"http": "http://proxy.invalid:3128"} if through_proxy else {}
    hook = connect("http://dify.invalid", proxies=proxies)
    with pytest.raises(DifyConnectionError, match="could not be reached"):
        hook.start_workflow_run({}, "airflow")
    assert names == ["proxy.invalid" if through_proxy else "dify.invalid"] * hook.attempts


@pytest.mark.parametrize("on_a_loop", [False, True])
def test_a_stream_without_chunks_names_its_run_at_once(
    dify: DifyStandIn, dify_connection: str, on_a_loop: bool
) -> None:
    dify.starts.append(Start(duration=120.0))
    dify.misbehave(unchunked(0.005))
    started = time.monotonic()
    if on_a_loop:

        async def start() -> float:
            async with DifyAsyncHook() as hook, await hook.start_workflow_run({}, "airflow"):
                return time.monotonic()

        named = asyncio.run(start())
    else:
        with DifyHook() as hook, hook.start_workflow_run({}, "airflow"):
            named = time.monotonic()
    assert named - started < 60


def test_the_key_goes_to_a_host_beyond_ascii(
    dify: DifyStandIn, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def resolve(host: str, *args: Any, **kwargs: Any) -> Any:
        return real(
            "127.0.0.1" if host in ("xn--bcher-kva.example", b"xn--bcher-kva.example") else host, *args, **kwargs
        )

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    hook = connect(f"http://bücher.example:{dify.port}/v1")
    hook.start_workflow_run({}, "airflow")
    assert {request.headers["Authorization"] for request in dify.requests} == {f"Bearer {API_KEY}"}
