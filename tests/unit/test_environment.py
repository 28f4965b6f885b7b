"""The way to Dify: what of proxies and certificates comes from the connection, and what from the machine."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any

import certifi
import pytest

from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.session import Route, load_bundle, route_to
from airflow_provider_dify.exceptions import DifyConfigurationError


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.lower().endswith("_proxy") or name.endswith("CA_BUNDLE"):
            monkeypatch.delenv(name)


def way(host: str = "https://dify.example", **settings: Any) -> Route:
    connection = DifyConnection(conn_id="my_dify", base_url=f"{host}/v1", api_key="app-some-key", **settings)
    return route_to(connection, socks_package="no_such_package")


def test_without_settings_there_is_no_proxy_and_the_usual_certificates() -> None:
    assert way() == Route(None, certifi.where())


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_the_environment_names_the_certificates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(Path(certifi.where()).read_bytes())
    monkeypatch.setenv(name, str(bundle))
    assert way() == Route(None, str(bundle))
    # What the connection says counts more.
    assert way(verify=False) == Route(None, False)
    assert way(verify=certifi.where()) == Route(None, certifi.where())


def test_certificates_are_of_no_interest_where_there_is_no_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/bundle.pem")
    assert way("http://dify.example") == Route(None, True)
    with pytest.raises(DifyConfigurationError):
        way("http://dify.example", proxies={"http": "HTTPS://proxy.example:3128"})


@pytest.mark.parametrize("host", ["http://dify.example", "https://dify.example"])
@pytest.mark.parametrize(
    ("proxy", "shown"), [("http://p:3128", "http://p:3128"), ("p:3128", "http://p:3128"), (None, None)]
)
def test_the_proxy_is_that_of_the_hosts_scheme(host: str, proxy: str | None, shown: str | None) -> None:
    scheme = host.partition(":")[0]
    other = {"http": "https", "https": "http"}[scheme]
    proxies = {other: "http://other:1", **({scheme: proxy} if proxy else {})}
    for verify in (False, certifi.where()):
        assert way(host, proxies=proxies, verify=verify).proxy == shown


@pytest.mark.parametrize("scheme", ["socks", "socks6", "SOCKS5A"])
def test_a_socks_proxy_of_an_unknown_kind_is_named_by_its_kind_only(scheme: str) -> None:
    message = f"is a SOCKS proxy of the kind '{scheme.lower()}', which is none of socks4, socks4a, socks5, socks5h"
    with pytest.raises(DifyConfigurationError, match=message) as caught:
        way(proxies={"https": f"{scheme}://bob:secret@proxy:1080"})
    assert "secret" not in str(caught.value)


def test_a_proxy_without_a_scheme_is_no_socks_proxy_whatever_its_host_is_called() -> None:
    assert way(proxies={"https": "socks.example:3128"}).proxy == "http://socks.example:3128"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("missing.pem", None, "does not exist on this machine"),
        ("empty.pem", "", r"cannot be read \(.+\)"),
        ("broken.pem", "no certificate", r"cannot be read \(.+\)"),
    ],
)
def test_certificates_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: str | None, what: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    message = rf"^The CA bundle '{path}' {what}\. It comes from the connection's extra 'verify', or from REQUESTS_CA_"
    with pytest.raises(DifyConfigurationError, match=message):
        way(verify=str(path))


def test_a_bundle_may_be_a_file_or_a_folder(tmp_path: Path) -> None:
    assert len(load_bundle(certifi.where()).get_ca_certs()) > 10
    # A folder's certificates are read when they are needed.
    context = load_bundle(str(tmp_path))
    assert isinstance(context, ssl.SSLContext)
    assert context.get_ca_certs() == []
