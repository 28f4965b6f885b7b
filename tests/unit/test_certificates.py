"""Which certificates a server may show, on a worker and on an event loop."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from urllib3.util.ssl_ import create_urllib3_context

from airflow_provider_dify.exceptions import DifyConnectionError
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from tests.dify_stand_in import API_KEY, DifyStandIn
from tests.unit.relays import make_certificate


def on_a_worker(run_id: str) -> str | None:
    with DifyHook(retry_limit=0) as hook:
        return str(hook.get_workflow_run(run_id).status)


def on_an_event_loop(run_id: str) -> str | None:
    async def look_up() -> str:
        async with DifyAsyncHook() as hook:
            return str((await hook.get_workflow_run(run_id)).status)

    return asyncio.run(look_up())


both_ways = pytest.mark.parametrize("look_up", [on_a_worker, on_an_event_loop])


@pytest.fixture(autouse=True)
def no_bundle_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


def connect(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, **extra: Any) -> None:
    fields = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY, "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(fields))


@both_ways
@pytest.mark.parametrize("named_by", ["connection", "environment", "nobody"])
@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_a_certificate_is_taken_that_is_named_or_where_the_connection_says_that_nothing_is_verified(
    secure_dify: DifyStandIn,
    certificate: tuple[ssl.SSLContext, Path],
    monkeypatch: pytest.MonkeyPatch,
    named_by: str,
    look_up: Callable[[str], str],
) -> None:
    bundle = str(certificate[1])
    verify = {"connection": {"verify": bundle}, "environment": {}, "nobody": {"verify": False}}[named_by]
    connect(secure_dify, monkeypatch, **verify)
    if named_by == "environment":
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", bundle)
    assert look_up(secure_dify.add_run("succeeded")) == "succeeded"


@both_ways
def test_a_certificate_that_nobody_names_ends_the_connection_before_the_key_is_sent(
    secure_dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, look_up: Callable[[str], str]
) -> None:
    connect(secure_dify, monkeypatch)
    with pytest.raises(DifyConnectionError, match=r"(?i)certificate.verify.failed"):
        look_up(secure_dify.add_run("succeeded"))
    assert secure_dify.requests == []


def start_on_a_worker(run_id: str) -> None:
    with DifyHook(retry_limit=0) as hook:
        hook.start_workflow_run({}, "me").close()


@pytest.mark.parametrize("ask", [on_a_worker, on_an_event_loop, start_on_a_worker])
def test_a_certificate_that_does_not_name_its_issuer_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[str], object]
) -> None:
    load = ssl.SSLContext.load_verify_locations

    def load_strictly(context: ssl.SSLContext, *args: Any, **kwargs: Any) -> None:
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        load(context, *args, **kwargs)

    # On Python 3.13 and later, both clients do so by themselves; requests not with every urllib3.
    contexts = (ssl.create_default_context(), create_urllib3_context())
    if not all(context.verify_flags & ssl.VERIFY_X509_STRICT for context in contexts):
        monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", load_strictly)
    tls, bundle = make_certificate(tmp_path, names_issuer=False)
    with DifyStandIn(tls=tls) as dify:
        connect(dify, monkeypatch, verify=str(bundle))
        why = r"Python 3\.13 and later refuse the certificate \(Missing Authority Key Identifier\)\. Have it made anew"
        with pytest.raises(DifyConnectionError, match=why):
            ask(dify.add_run("succeeded"))
        assert dify.requests == []
