"""The base URL of Dify's API, out of what a connection says about its host."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from urllib.parse import SplitResult, urlsplit

from airflow_provider_dify.exceptions import DifyConfigurationError

DEFAULT_BASE_URL = "https://api.dify.ai/v1"
# Dify Cloud and a default self-hosted Dify both serve the API here.
DEFAULT_PATH = "/v1"
_CLOUD_CONSOLE = "cloud.dify.ai"
# A path of the API itself, as Dify's documentation shows it, after the base URL's own; a gateway may have a folder with
# the name of a short one.
_ENDPOINT = re.compile(
    r"(.*?)/?workflows/(?:run|logs|tasks|[^/]+/run)(?:/.*)?|"
    r"(.*?v1)/(?:workflows|parameters|info|files/upload|chat-messages|completion-messages)"
)

_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\.?", re.IGNORECASE)


def make_base_url(host: str | None, schema: str | None = None, port: int | None = None) -> str:
    """
    Return the API's base URL, made of what a connection says.

    :param host: a host name, a ``host:port``, a URL, or nothing for Dify Cloud; without a path, ``/v1`` is meant.
    :param schema: ``http`` or ``https``, where the host doesn't say; ``https`` if nobody does.
    :param port: the port, where the host doesn't say.
    :return: the base URL, without a slash at the end.
    :raises DifyConfigurationError: if that makes no URL, or if two of the three contradict each other.
    """
    host = (host or "").strip()
    schema = (schema or "").strip().lower()
    if schema and schema not in ("http", "https"):
        raise DifyConfigurationError(
            f"the schema must be http or https, but it is {schema!r}. A path such as /v1 belongs in the host."
        )
    if not host:
        if schema == "http" or port not in (None, 443):
            raise DifyConfigurationError("it has no host, and Dify Cloud answers at https and port 443 only.")
        return DEFAULT_BASE_URL

    url = split_url(host)
    if url.scheme and schema and url.scheme != schema:
        raise DifyConfigurationError(f"the host says {url.scheme} and the schema says {schema}.")
    try:
        url_port = url.port
    except ValueError:
        raise DifyConfigurationError(f"the host {host!r} has no valid port.") from None
    if url_port is not None and port is not None and url_port != port:
        raise DifyConfigurationError(f"the host says port {url_port} and the port says {port}.")
    final_port = port if url_port is None else url_port
    if final_port is not None and not 0 < final_port < 65536:
        raise DifyConfigurationError(f"{final_port} is no port.")

    path = "/".join(part for part in url.path.split("/") if part)
    name = host_in_url(url, host)
    if name.rstrip(".") == _CLOUD_CONSOLE:
        raise DifyConfigurationError(
            f"the host is Dify Cloud's console. Its API is at {DEFAULT_BASE_URL}: write that, or leave the host empty."
        )
    endpoint = _ENDPOINT.fullmatch(path)
    path = (endpoint[1] or endpoint[2] or "") if endpoint else path
    base_url = (
        f"{url.scheme or schema or 'https'}://{name}"
        f"{f':{final_port}' if final_port else ''}{f'/{path}' if path else DEFAULT_PATH}"
    )
    if endpoint:
        raise DifyConfigurationError(
            f"the host {host!r} is the address of one request. Write {base_url} there: each request adds the rest."
        )
    return base_url


def split_url(host: str) -> SplitResult:
    """Return the parts of a host or an http or https URL; raise if it is none, or holds what a base URL can't."""
    scheme, separator, rest = host.partition("://")
    if separator and scheme.lower() not in ("http", "https"):
        raise DifyConfigurationError(f"the host must be an http or https URL, but its scheme is {scheme!r}.")
    if not separator:
        rest = host
        # The one host with colons and no port.
        with contextlib.suppress(ValueError):
            rest = f"[{ipaddress.IPv6Address(host)}]"
    if "@" in rest.partition("/")[0]:
        # Not shown: what stands before the @ is likely a secret.
        raise DifyConfigurationError("the host holds a user name or password. The API key belongs in the password.")
    try:
        url = urlsplit(f"{scheme.lower()}://{rest}" if separator else f"//{rest}")
    except ValueError as error:
        raise DifyConfigurationError(f"the host {host!r} makes no URL ({error}).") from None
    if url.query or url.fragment:
        raise DifyConfigurationError(f"the host {host!r} has a query or a fragment, which a base URL cannot have.")
    return url


def host_in_url(url: SplitResult, host: str) -> str:
    """Return a host name as it stands in a URL; raise if it is none."""
    name = url.hostname or ""
    if "[" in url.netloc:
        try:
            return f"[{ipaddress.IPv6Address(name)}]"
        except ValueError:
            name = ""
    # Names beyond ASCII are left to the HTTP clients, which encode them.
    if not _HOST_NAME.fullmatch(name) and (name.isascii() or not all(c.isalnum() or c in "-._" for c in name)):
        raise DifyConfigurationError(f"the host {host!r} makes no URL.")
    if re.search(r"[\s\\]", url.path):
        raise DifyConfigurationError(f"the host {host!r} has a path that makes no URL.")
    return name
