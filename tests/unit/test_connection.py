"""What an Airflow connection means: base URL, API key and extras."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from airflow_provider_dify.api.connection import DifyConnection, make_base_url
from airflow_provider_dify.exceptions import DifyConfigurationError

KEY = "app-some-key"
NO_CONSOLES = """
    dify.example.com //dify.example.com ftp://dify.example.com javascript://dify.example.com https:// https://dify:port
    https://dify:99999 https://dify/?x=1 https://dify/#x https://me:secret@dify
"""


def read(**fields: Any) -> DifyConnection:
    from airflow.models.connection import Connection

    extra = fields.pop("extra", None)
    fields = {"conn_id": "my_dify", "conn_type": "dify", "password": KEY, **fields}
    return DifyConnection.from_airflow(
        Connection(**fields, extra=json.dumps(extra) if isinstance(extra, dict) else extra)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("fields", "base_url"),
    [
        ({}, "https://api.dify.ai/v1"),
        ({"host": "  "}, "https://api.dify.ai/v1"),
        ({"schema": "https"}, "https://api.dify.ai/v1"),
        ({"host": "api.dify.ai"}, "https://api.dify.ai/v1"),
        ({"host": "https://dify.example.com/"}, "https://dify.example.com/v1"),
        ({"host": "https://dify.example.com/v1/"}, "https://dify.example.com/v1"),
        ({"host": "HTTPS://Dify.Example.com//v1//"}, "https://dify.example.com/v1"),
        ({"host": "http://localhost:5001"}, "http://localhost:5001/v1"),
        ({"host": "dify.example.com:8443/gateway/v1"}, "https://dify.example.com:8443/gateway/v1"),
        ({"host": "dify", "port": 5001, "schema": "http"}, "http://dify:5001/v1"),
        ({"host": "dify.example.com", "schema": "HTTP"}, "http://dify.example.com/v1"),
        ({"host": "http://dify/v1", "port": 80, "schema": "http"}, "http://dify:80/v1"),
        ({"host": "http://dify:80", "port": 80}, "http://dify:80/v1"),
        ({"host": "dify.example.com/gateway", "port": 8443}, "https://dify.example.com:8443/gateway"),
        ({"host": "http://[::1]:5001"}, "http://[::1]:5001/v1"),
        ({"host": "[::1]:5001/v1", "schema": "http"}, "http://[::1]:5001/v1"),
        ({"host": "::1", "port": 5001, "schema": "http"}, "http://[::1]:5001/v1"),
        ({"host": "2001:db8::7"}, "https://[2001:db8::7]/v1"),
        ({"host": "192.168.1.7:5001", "schema": "http"}, "http://192.168.1.7:5001/v1"),
        ({"host": "my_compose_service"}, "https://my_compose_service/v1"),
        ({"host": "dify.münchen.example"}, "https://dify.münchen.example/v1"),
    ],
)
def test_a_host_becomes_the_expected_base_url(fields: dict[str, Any], base_url: str) -> None:
    assert read(**fields).base_url == base_url


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {"host": host}
            for host in ["https://", "http:///v1", "ftp://dify.example.com", "dify..example.com", "[::1", "[zz]", "-"]
        ),
        *({"host": f"dify.example.com:{port}"} for port in ("port", "99999", "0")),
        *({"host": f"https://dify.example.com/{path}"} for path in ("v 1", "v1?x=1", "v1#x")),
        {"host": "dify example.com"},
        {"host": "https://dify.example.com", "schema": "http"},
        {"host": "https://dify.example.com:8443", "port": 443},
        {"host": "dify", "schema": "v1"},
        {"host": "dify", "port": 99999},
        {"schema": "http"},
        {"port": 8443},
    ],
    ids=str,
)
def test_an_invalid_host_is_reported_with_its_connection(fields: dict[str, Any]) -> None:
    with pytest.raises(DifyConfigurationError, match="'my_dify'") as caught:
        print(read(**fields))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("password", [None, "", "   ", "app-some key", "app-some\nkey", "app-ключ", "app-\x00"])
def test_a_missing_or_broken_key_is_reported_and_not_shown(password: str | None) -> None:
    with pytest.raises(DifyConfigurationError, match=r"'my_dify'.*password") as caught:
        read(password=password)
    assert "app-" not in str(caught.value)


@pytest.mark.parametrize(
    "password", ["{app-some-key}", '"app-some-key"', "'app-some-key'", "'app-some-key", '"dataset-some-key"']
)
def test_a_key_in_braces_or_quotes_is_told_so_and_not_shown(password: str) -> None:
    why = "'my_dify' cannot be used: its password stands in braces or quotes"
    with pytest.raises(DifyConfigurationError, match=why) as caught:
        read(password=password)
    assert "some-key" not in str(caught.value)
    assert read(password=f" {KEY}\n").api_key == KEY


@pytest.mark.parametrize(
    ("host", "instead"),
    [
        ("https://dify.example.com/v1/workflows/run", "https://dify.example.com/v1"),
        ("https://dify.example.com/v1/workflows/run/", "https://dify.example.com/v1"),
        ("dify.example.com:8080/v1/workflows/run/2d7a7544-770c-496f-8ef9", "https://dify.example.com:8080/v1"),
        ("http://dify.example.com/gateway/v1/workflows/logs", "http://dify.example.com/gateway/v1"),
        ("http://dify.example.com/workflows/run", "http://dify.example.com/v1"),
        ("https://dify.example.com/v1/workflows/tasks/some-task/stop", "https://dify.example.com/v1"),
        ("https://dify.example.com/v1/workflows/some-workflow/run", "https://dify.example.com/v1"),
        ("https://dify.example.com/v1/workflows", "https://dify.example.com/v1"),
        ("https://dify.example.com/v1/parameters", "https://dify.example.com/v1"),
        ("https://dify.example.com/v1/chat-messages", "https://dify.example.com/v1"),
        ("https://cloud.dify.ai", "https://api.dify.ai/v1"),
        ("Cloud.Dify.ai./apps", "https://api.dify.ai/v1"),
    ],
)
def test_a_host_that_is_an_endpoint_or_the_console_is_told_what_to_write_instead(host: str, instead: str) -> None:
    with pytest.raises(DifyConfigurationError, match=r"'my_dify' cannot be used: the host ") as caught:
        read(host=host)
    assert re.search(f" {re.escape(instead)}(:| )", str(caught.value))


@pytest.mark.parametrize("path", ["workflows", "workflows/v1", "v1/dify", "info", "run/v1", "v1/workflows/v1"])
def test_a_path_of_a_gateway_is_taken(path: str) -> None:
    assert read(host=f"https://example.com/{path}").base_url == f"https://example.com/{path}"


def test_a_user_and_password_in_the_host_are_reported_and_not_shown() -> None:
    with pytest.raises(DifyConfigurationError, match="user name or password") as caught:
        read(host="https://me:secret@dify.example.com/v1")
    assert "secret" not in str(caught.value)


def test_the_key_is_not_in_the_repr_of_a_connection() -> None:
    shown = repr(read(extra={"proxies": {"https": "http://me:secret@proxy:3128"}}))
    assert KEY not in shown
    assert "secret" not in shown


PROXIES = {"http": "http://proxy:3128"}


@pytest.mark.parametrize(
    ("extra", "timeout", "verify", "proxies"),
    [
        ({"timeout": 5, "verify": __file__, "proxies": PROXIES, "team": "data"}, 5.0, __file__, PROXIES),
        # The text that a form saves.
        ({"timeout": "2.5", "verify": "False", "proxies": json.dumps(PROXIES)}, 2.5, False, PROXIES),
        *((empty, None, True, {}) for empty in (None, {}, {"timeout": "", "verify": "", "proxies": ""})),
        ({"timeout": None}, None, True, {}),
    ],
)
def test_extras_are_read_and_unknown_ones_ignored(
    extra: dict[str, Any] | None, timeout: float | None, verify: Any, proxies: dict[str, str]
) -> None:
    connection = read(extra=extra)
    assert (connection.timeout, connection.verify, connection.proxies) == (timeout, verify, proxies)


@pytest.mark.parametrize(
    "extra",
    [
        *({"timeout": value} for value in ("soon", 0, -1, "nan", True, [5])),
        *({"verify": value} for value in ("/no/such/file", 5)),
        {"proxies": "http://me:secret@proxy:3128"},
        {"proxies": {"https": 5, "http": "http://me:secret@proxy:3128"}},
        {"proxies": ["http://proxy"]},
        *({"console_url": url} for url in (5, "https://dify example.com", *NO_CONSOLES.split())),
    ],
    ids=str,
)
def test_a_wrong_extra_is_named(extra: dict[str, Any]) -> None:
    with pytest.raises(DifyConfigurationError, match=rf"'my_dify'.*'{next(iter(extra))}'") as caught:
        read(extra=extra)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "console"),
    [
        ({}, "https://cloud.dify.ai"),
        ({"host": "https://api.dify.ai/v1"}, "https://cloud.dify.ai"),
        ({"host": "API.dify.ai:443"}, "https://cloud.dify.ai"),
        ({"host": "https://dify.example.com/v1"}, "https://dify.example.com"),
        ({"host": "http://dify.example.com:8080/gateway/v1"}, "http://dify.example.com:8080"),
        ({"host": "http://[::1]:5001"}, "http://[::1]:5001"),
        ({"host": "https://api.dify.ai.example.com"}, "https://api.dify.ai.example.com"),
        ({"extra": {"console_url": " https://Dify.example.com/ "}}, "https://dify.example.com"),
        ({"extra": {"console_url": "http://dify:3000/console//"}}, "http://dify:3000/console"),
        ({"host": "http://dify:5001", "extra": {"console_url": "http://[::1]:3000"}}, "http://[::1]:3000"),
        ({"host": "http://dify:5001", "extra": {"console_url": " "}}, "http://dify:5001"),
    ],
)
def test_a_connection_knows_its_console(fields: dict[str, Any], console: str) -> None:
    assert read(**fields).console == console


def test_an_airflow_uri_is_read() -> None:
    assert make_base_url("dify.example.com/v1///") == "https://dify.example.com/v1"
    from airflow.models.connection import Connection

    uri = f"dify://:{KEY}@https%3A%2F%2Fdify.example.com%2Fv1/?timeout=5"
    connection = DifyConnection.from_airflow(Connection(conn_id="my_dify", uri=uri))  # type: ignore[arg-type]
    assert connection.base_url == "https://dify.example.com/v1"
    assert connection.timeout == 5.0
