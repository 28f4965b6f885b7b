# SPDX-License-Identifier: Apache-2.0
"""
What an Airflow connection of type ``dify`` says: where Dify is and how to talk to it. No transport.

Every HTTP client of this package takes its settings from here, so that they behave alike.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import math
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urlsplit

from airflow_provider_dify import __version__
from airflow_provider_dify.api.models import one_line, redact
from airflow_provider_dify.exceptions import CONNECTION_SECTION, DifyConfigurationError

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Connection


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
    Return the API's base URL, without a slash at the end. An empty host means Dify Cloud, no path ``/v1``, no schema
    ``https``. Raises a DifyConfigurationError if that makes no URL, or if two of the three contradict each other.
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


DEFAULT_TIMEOUT = 30.0
# A connection is there within seconds or not at all; only the response may take its time.
MAX_CONNECT_TIMEOUT = 10.0
# A longer one is a slip, and overflows the operating system's timers.
MAX_TIMEOUT = 86400.0
HEADERS = {"User-Agent": f"airflow-provider-dify/{__version__}", "Accept": "application/json"}

# Dify Cloud alone has its console on another host than its API.
CLOUD_API_HOST = "api.dify.ai"
CLOUD_CONSOLE_URL = "https://cloud.dify.ai"

# What an HTTP header takes without encoding; anything else in a key is a slip of copy and paste.
_API_KEY = re.compile(r"[\x21-\x7e]+")
# What documentation and settings' files put around a key, and no key has.
_WRAPPING = "{}\"'"
# What both HTTP clients send as it is: they encode other characters differently.
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\x21-\x7e]([\t\x20-\x7e]*[\x21-\x7e])?")
# A shorter text may be a part of any word.
_SHORTEST_SECRET = 3
# What the key or the request itself needs: another value would break it.
_RESERVED_HEADER = re.compile(
    r"authorization|host|content-.*|accept(-encoding)?|transfer-encoding|connection|keep-alive|te|trailer|upgrade|expect"
    r"|range|if-.*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class DifyConnection:
    """
    The settings that an Airflow connection of type ``dify`` holds, checked.

    :param conn_id: the Airflow connection.
    :param base_url: base URL of the API, without a slash at the end.
    :param api_key: the app's API key.
    :param timeout: seconds to wait for a response; ``None`` where the connection doesn't say.
    :param verify: whether to verify TLS certificates, or the path of a CA bundle.
    :param proxies: proxy URLs by URL scheme, as ``requests`` takes them.
    :param console_url: URL of Dify's console, without a slash at the end; ``None`` where the connection doesn't say.
    :param headers: further headers of each request, for what stands in front of Dify. Their values are secrets.
    :param files_url: where a run's files are, if their URLs don't say; ``None`` where the connection doesn't either.
    """

    conn_id: str
    base_url: str
    api_key: str = field(repr=False)
    timeout: float | None = None
    verify: bool | str = True
    # A proxy URL may hold a password.
    proxies: dict[str, str] = field(default_factory=dict, repr=False, hash=False)
    console_url: str | None = None
    headers: dict[str, str] = field(default_factory=dict, repr=False, hash=False)
    files_url: str | None = None

    @classmethod
    def from_airflow(cls, connection: Connection, *, has_name: bool = True) -> DifyConnection:
        """
        Parse an Airflow connection.

        :param connection: ``password`` is the API key; ``host``, ``schema`` and ``port`` make the base URL; ``extra``
            may hold ``timeout`` (seconds), ``verify`` (a bool or the path of a CA bundle), ``proxies``,
            ``console_url``, ``headers`` and ``files_url``. Other extras are ignored.
        :param has_name: whether messages name the connection; Airflow's Test button makes up an id for a copy of it.
        :return: the settings.
        :raises DifyConfigurationError: if the key is missing or no URL can be made; names the connection.
        """
        conn_id = connection.conn_id if has_name else ""
        try:
            extra = _extra(connection)
            return cls(
                conn_id=conn_id,
                base_url=make_base_url(connection.host, connection.schema, connection.port),
                api_key=_api_key(connection.password),
                timeout=_timeout(extra.get("timeout")),
                verify=_verify(extra.get("verify")),
                proxies=_proxies(extra.get("proxies")),
                console_url=_http_url("console_url", extra.get("console_url")),
                headers=_headers(extra.get("headers")),
                files_url=_http_url("files_url", extra.get("files_url")),
            )
        except DifyConfigurationError as error:
            name = name_connection(conn_id)
            # The key may have been put into another field, too.
            reason = one_line(redact(str(error), (connection.password or "",)))
            raise DifyConfigurationError(f"{name[0].upper()}{name[1:]} cannot be used: {reason}").explained_in(
                CONNECTION_SECTION
            ) from None

    @property
    def console(self) -> str:
        """The URL of Dify's console, without a slash at the end: where links for people lead."""
        if self.console_url:
            return self.console_url
        url = urlsplit(self.base_url)
        return CLOUD_CONSOLE_URL if url.hostname == CLOUD_API_HOST else f"{url.scheme}://{url.netloc}"

    @cached_property
    def secrets(self) -> tuple[str, ...]:
        """What no message may show: key and headers, and the passwords of the proxies here and in the environment."""
        environment = (value for name, value in os.environ.items() if name.lower().endswith("_proxy"))
        urls = (*self.proxies.values(), *environment)
        return (self.api_key, *self.secret_headers, *(secret for url in urls for secret in _secrets_in(url)))

    @property
    def secret_headers(self) -> tuple[str, ...]:
        """The values of the headers, and what follows a word such as ``Bearer`` in them; but for the shortest."""
        values = {value for whole in self.headers.values() for value in (whole, whole.split()[-1])}
        return tuple(sorted(value for value in values if len(value) > _SHORTEST_SECRET))

    def timeouts(self, timeout: float | None = None) -> tuple[float, float]:
        """
        Return the seconds to wait for a connection, and for a whole response.

        :param timeout: seconds that take the place of the connection's own.
        """
        seconds = timeout or self.timeout or DEFAULT_TIMEOUT
        return min(seconds, MAX_CONNECT_TIMEOUT), seconds

    def check_key(self) -> None:
        """
        Check that the key is an app's. One of a knowledge base is good for the session of ``get_conn`` only.

        :raises DifyConfigurationError: if it is of a knowledge base.
        """
        if self.api_key.lower().startswith("dataset-"):
            name = name_connection(self.conn_id)
            raise DifyConfigurationError(
                f"{name[0].upper()}{name[1:]} cannot be used: its password is the API key of a knowledge base, which "
                "runs no workflow. Put the API key of the workflow app there (in Dify: the app's page, API Access, API "
                "Key)."
            ).explained_in(CONNECTION_SECTION)

    def owns(self, url: str) -> bool:
        """
        Return whether a URL is on the connection's own server: the only one that the API key may be sent to.

        :param url: an absolute URL, which may be malformed.
        :return: whether scheme, host and port are the connection's.
        """
        origin = _origin(url)
        return origin is not None and origin == _origin(self.base_url)


def name_connection(conn_id: str) -> str:
    """Return the words for a connection in the middle of a message."""
    return f"connection {conn_id!r}" if conn_id else "the connection"


def _origin(url: str) -> tuple[str, str, int | None] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        return parts.scheme, _ascii_host(parts.hostname or ""), port
    except ValueError:
        return None


def _ascii_host(host: str) -> str:
    """Return a host's name as the HTTP clients send it."""
    if host.isascii():
        return host
    import idna  # comes with requests and aiohttp, and only such a name needs it

    return idna.encode(host, uts46=True).decode()


def _secrets_in(url: str) -> list[str]:
    userinfo = url.partition("://")[2].rpartition("@")[0] or url.rpartition("@")[0]
    password = userinfo.partition(":")[2]
    # What a proxy is sent, and may send back.
    sent = base64.b64encode(unquote(userinfo).encode("utf-8", "replace")).decode()
    return [secret for secret in (userinfo, password, unquote(password), sent) if len(secret) > _SHORTEST_SECRET]


def _api_key(password: str | None) -> str:
    api_key = (password or "").strip()
    if not api_key:
        raise DifyConfigurationError(
            "it has no password. Put the API key of the Dify app there (in Dify: the app's page, API Access, API Key)."
        )
    if api_key[0] in _WRAPPING or api_key[-1] in _WRAPPING:
        raise DifyConfigurationError("its password stands in braces or quotes. Put the API key there without them.")
    if not _API_KEY.fullmatch(api_key):
        raise DifyConfigurationError(
            "its password holds white space or characters that no API key has. Copy the app's API key again."
        )
    return api_key


def _extra(connection: Connection) -> dict[str, Any]:
    # Not extra_dejson, which some Airflows let block the triggerer's event loop to mask what it holds.
    try:
        # Airflow itself raises a ValueError for text that is no JSON object.
        text = connection.extra
        extra = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        extra = None
    if not isinstance(extra, dict):
        raise DifyConfigurationError("its extra is no JSON object.")
    return extra


def _timeout(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if isinstance(value, bool) or not 0 < seconds <= MAX_TIMEOUT:
        raise DifyConfigurationError(
            f"the extra 'timeout' must be a number of seconds above 0, at most {MAX_TIMEOUT:.0f}, but it is "
            f"{value!r:.100}."
        )
    return seconds


def _verify(value: Any) -> bool | str:
    # A form field can only hold text.
    if isinstance(value, str):
        value = {"": None, "true": True, "false": False}.get(value.strip().lower(), value.strip())
    if value is None:
        return True
    if isinstance(value, bool) or (isinstance(value, str) and os.path.exists(value)):
        return value
    raise DifyConfigurationError(
        f"the extra 'verify' must be true, false or the path of a CA bundle that exists here, but it is {value!r}."
    )


def _proxies(value: Any) -> dict[str, str]:
    proxies = _json_object(value)
    if proxies is not None and all(is_proxy_url(url) for url in proxies.values()):
        return {str(scheme): url for scheme, url in proxies.items()}
    # Not shown: a proxy URL may hold a password.
    raise DifyConfigurationError(
        'the extra \'proxies\' must be an object such as {"https": "http://proxy.example.com:3128"}.'
    )


def _headers(value: Any) -> dict[str, str]:
    headers = _json_object(value)
    if headers is None or len({name.lower() for name in headers}) < len(headers):
        raise DifyConfigurationError(
            'the extra \'headers\' must be an object of texts such as {"CF-Access-Client-Id": "..."}, each name once.'
        )
    for number, (name, text) in enumerate(headers.items(), 1):
        # A name that is none may be a whole header, value included, and a value is a secret: neither is shown.
        if not _HEADER_NAME.fullmatch(name):
            raise DifyConfigurationError(f"the name of header {number} in the extra 'headers' is none that HTTP has.")
        if _RESERVED_HEADER.fullmatch(name):
            raise DifyConfigurationError(f"the extra 'headers' cannot set {name!r}: each request has its own.")
        if not isinstance(text, str) or not _HEADER_VALUE.fullmatch(text):
            raise DifyConfigurationError(
                f"the value of {name!r} in the extra 'headers' must be a text of ASCII characters in one line, without "
                "white space around it."
            )
    return headers


def _json_object(value: Any) -> dict[str, Any] | None:
    """Return an extra that is an object, or the JSON text of one, as forms and URIs have it; ``None`` if it is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            return None
    value = {} if value is None else value
    return value if isinstance(value, dict) else None


def is_proxy_url(url: object) -> bool:
    """Return whether a proxy's URL can be used; the HTTP clients quote a malformed one, password included."""
    if not isinstance(url, str) or re.search(r"[\s\\]", url) or ("@" in url and "://" not in url):
        return False
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def _http_url(name: str, value: Any) -> str | None:
    text = value.strip() if isinstance(value, str) else value
    if text in (None, ""):
        return None
    try:
        if not isinstance(text, str) or "://" not in text:
            raise ValueError
        url = split_url(text)
        port = f":{url.port}" if url.port else ""
        path = "/".join(part for part in url.path.split("/") if part)
        return f"{url.scheme}://{host_in_url(url, text)}{port}{f'/{path}' if path else ''}"
    except (DifyConfigurationError, ValueError):
        # Not shown: what stands before an @ is likely a secret.
        raise DifyConfigurationError(
            f"the extra {name!r} must be an http or https URL such as https://dify.example.com, "
            "without user name, query and fragment."
        ) from None
