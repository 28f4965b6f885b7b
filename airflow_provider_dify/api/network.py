"""What the machine's environment says about the way to Dify: proxies and certificates, checked before any request."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from importlib.util import find_spec

import requests
from requests.utils import DEFAULT_CA_BUNDLE_PATH, select_proxy

from airflow_provider_dify.api.connection import DifyConnection, is_proxy_url
from airflow_provider_dify.api.text import one_line
from airflow_provider_dify.exceptions import DifyConfigurationError


@dataclass(frozen=True)
class Route:
    """The way to a connection's server, the same for both HTTP clients."""

    # Its URL may hold a password.
    proxy: str | None
    # The path of the CA bundle; False to verify nothing, True where there is no TLS on the way.
    verify: str | bool


# What the two HTTP clients need for a SOCKS proxy.
_SOCKS_PACKAGES = {"socks": "pysocks", "aiohttp_socks": "aiohttp-socks"}
_SOCKS_SCHEMES = ("socks4", "socks4a", "socks5", "socks5h")


def route_to(connection: DifyConnection, *, socks_package: str) -> Route:
    """
    Return the way that ``requests`` would take with the settings of a connection and of the environment. Raises a
    DifyConfigurationError if a proxy or a CA bundle can't be used; never quotes a proxy's URL.
    """
    with requests.Session() as session:
        verify = None if connection.verify is True else connection.verify
        settings = session.merge_environment_settings(
            connection.base_url, dict(connection.proxies), stream=None, verify=verify, cert=None
        )
    proxy = select_proxy(connection.base_url, settings["proxies"])
    if proxy is not None:
        _check_proxy(proxy, socks_package)
        # As requests reads it.
        proxy = proxy if "://" in proxy else f"http://{proxy}"
    bundle = settings["verify"]
    if bundle is False:
        return Route(proxy, verify=False)
    if not any(url.lower().startswith("https:") for url in (connection.base_url, proxy or "")):
        return Route(proxy, verify=True)
    path = str(bundle) if isinstance(bundle, (str, os.PathLike)) else DEFAULT_CA_BUNDLE_PATH
    if path != DEFAULT_CA_BUNDLE_PATH:
        load_bundle(path)
    return Route(proxy, path)


def load_bundle(path: str) -> ssl.SSLContext:
    """Return TLS settings for a CA bundle (a file, or a folder of hashed certificates), or raise what is wrong."""
    is_folder = os.path.isdir(path)
    try:
        return ssl.create_default_context(cafile=None if is_folder else path, capath=path if is_folder else None)
    except (OSError, ValueError) as error:
        what = "does not exist on this machine" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise DifyConfigurationError(
            f"The CA bundle {one_line(path, 200)!r} {what}. It comes from the connection's extra 'verify', or from "
            "REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE in the environment."
        ) from None


def _check_proxy(proxy: str, socks_package: str) -> None:
    source = "It comes from the connection's extra 'proxies', or from the environment (HTTPS_PROXY and the like)."
    if not is_proxy_url(proxy):
        # Not shown: it may hold a password.
        raise DifyConfigurationError(f"The URL of the proxy to Dify is malformed. {source}")
    # Without a scheme it is an HTTP proxy, whatever its host is called.
    scheme, separator, _ = proxy.lower().partition("://")
    if not separator or not scheme.startswith("socks"):
        return
    if scheme not in _SOCKS_SCHEMES:
        raise DifyConfigurationError(
            f"The proxy to Dify is a SOCKS proxy of the kind {one_line(scheme, 50)!r}, which is none of "
            f"{', '.join(_SOCKS_SCHEMES)}. {source}"
        )
    if find_spec(socks_package) is None:
        package = _SOCKS_PACKAGES[socks_package]
        raise DifyConfigurationError(
            f"The proxy to Dify is a SOCKS proxy, which needs the package {package}: pip install "
            f"'airflow-provider-dify[socks]'. {source}"
        )
