# SPDX-License-Identifier: Apache-2.0
"""The way to Dify (proxies, certificates), and how requests travel on a worker: bounded, and again if that may help."""

from __future__ import annotations

import math
import os
import random
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from importlib.util import find_spec
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin

import requests
from requests.auth import AuthBase
from requests.utils import DEFAULT_CA_BUNDLE_PATH, select_proxy

from airflow_provider_dify.api.connection import HEADERS, DifyConnection, is_proxy_url
from airflow_provider_dify.api.http_response import HttpResponse, no_response, reason_of
from airflow_provider_dify.api.models import one_line
from airflow_provider_dify.exceptions import (
    CONNECTION_SECTION,
    MAX_RETRY_DELAY,
    DifyConfigurationError,
    DifyConnectionError,
    DifyError,
    DifyFilesError,
)
from airflow_provider_dify.files import DifyFile

if TYPE_CHECKING:
    from airflow.sdk.types import Logger
    from requests.models import PreparedRequest, Response


@dataclass(frozen=True)
class Route:
    """The way to a connection's server, the same for both HTTP clients."""

    proxy: str | None  # its URL may hold a password
    verify: str | bool  # the path of the CA bundle; False to verify nothing, True where there is no TLS on the way


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
        ).explained_in(CONNECTION_SECTION) from None


def _check_proxy(proxy: str, socks_package: str) -> None:
    source = "It comes from the connection's extra 'proxies', or from the environment (HTTPS_PROXY and the like)."
    if not is_proxy_url(proxy):
        # Not shown: it may hold a password.
        raise DifyConfigurationError(f"The URL of the proxy to Dify is malformed. {source}").explained_in(
            CONNECTION_SECTION
        )
    # Without a scheme it is an HTTP proxy, whatever its host is called.
    scheme, separator, _ = proxy.lower().partition("://")
    if not separator or not scheme.startswith("socks"):
        return
    if scheme not in _SOCKS_SCHEMES:
        raise DifyConfigurationError(
            f"The proxy to Dify is a SOCKS proxy of the kind {one_line(scheme, 50)!r}, which is none of "
            f"{', '.join(_SOCKS_SCHEMES)}. {source}"
        ).explained_in(CONNECTION_SECTION)
    if find_spec(socks_package) is None:
        package = _SOCKS_PACKAGES[socks_package]
        raise DifyConfigurationError(
            f"The proxy to Dify is a SOCKS proxy, which needs the package {package}: pip install "
            f"'airflow-provider-dify[socks]'. {source}"
        ).explained_in(CONNECTION_SECTION)


T = TypeVar("T")


class DifySession(requests.Session):
    """A session with one connection's settings, which leaves its server for no redirect."""

    def __init__(self, connection: DifyConnection) -> None:
        """Check the environment first; raises a DifyConfigurationError for a proxy or CA bundle that can't be used."""
        super().__init__()
        route_to(connection, socks_package="socks")
        self._connection = connection
        self.auth = _BearerAuth(connection)
        self.headers.update(HEADERS)
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._settings: dict[str, Any] = {"timeout": connection.timeouts(), "proxies": connection.proxies}
        # True leaves the choice of the CA bundle to the environment, as requests does.
        if connection.verify is not True:
            self._settings["verify"] = connection.verify

    def receive(
        self, method: str, path: str, subject: str, *, time_limit_seconds: float | None, **request: Any
    ) -> HttpResponse:
        """
        Send one request and return the whole response, within a limit for all of it; a DifyConnectionError if there is
        none. Only a GET follows redirects, because a redirect would turn a POST into one.
        """
        connection = self._connection
        connection.check_key()
        url = f"{connection.base_url}{path}"

        def exchange() -> HttpResponse:
            response = self.request(method, url, allow_redirects=method == "GET", **request)
            return HttpResponse.received(connection, url, response.status_code, response.headers, response.content)

        try:
            return exchange() if time_limit_seconds is None else _call_within(time_limit_seconds, exchange)
        except DifyError:
            raise
        except Exception as error:
            # Whatever the client calls it, and whatever the server or a proxy said to cause it.
            failure = no_response(connection, subject, url, error)
        # Outside of the handler: the client's own error, which a log would show as the cause, may quote a password.
        raise failure

    def request(self, method: str | bytes, url: str | bytes, *args: Any, **kwargs: Any) -> Response:
        # Per request, because requests lets the environment override what the session says.
        return super().request(method, url, *args, **{**self._settings, **kwargs})

    def get_redirect_target(self, resp: Response) -> str | None:
        """Follow a redirect within the connection's server; return any other to the caller as the response."""
        try:
            target = super().get_redirect_target(resp)
            absolute = urljoin(resp.request.url or "", target) if target else ""
        except ValueError:
            return None
        return target if target and self._connection.owns(absolute) else None

    def rebuild_auth(self, prepared_request: PreparedRequest, response: Response) -> None:
        """Keep key and headers on a redirect, which never leaves the origin; ``requests`` asks ``.netrc`` here."""
        _BearerAuth(self._connection)(prepared_request)


def _call_within(seconds: float, call: Callable[[], T]) -> T:
    """
    Return what a blocking call returns, or raise what it raises; a TimeoutError once the time is over. A timeout of
    ``requests`` counts for each piece of a response, and not at all for the look-up of a name.
    """
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="dify-request", daemon=True).start()
    wait([outcome], max(0.0, seconds))
    if not outcome.done():
        raise TimeoutError(f"no whole response within {seconds:.3g} seconds")
    return outcome.result()


# Bytes of a file in memory.
CHUNK = 1 << 20


class UploadBody:
    """The body of an upload. Each iteration opens the file anew and reads it in pieces, so that no size matters."""

    def __init__(
        self, file: DifyFile, user: str, size: int, open_file: Callable[[], AbstractContextManager[IO[bytes]]]
    ) -> None:
        boundary = uuid.uuid4().hex
        part = f'--{boundary}\r\nContent-Disposition: form-data; name="'
        # Without a type Dify refuses the upload (415).
        kind = f"Content-Type: {file.mime_type}\r\n\r\n"
        self._head = f'{part}user"\r\n\r\n{user}\r\n{part}file"; filename="{file.file_name}"\r\n{kind}'.encode()
        self._tail = f"\r\n--{boundary}--\r\n".encode()
        self._size, self._open = size, open_file
        self.subject = f"the upload of {one_line(file.file_name, 100)!r}"
        self.headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(len(self)),
        }

    def __len__(self) -> int:
        return len(self._head) + self._size + len(self._tail)

    def __iter__(self) -> Iterator[bytes]:
        front, left = self._head, self._size
        try:
            with self._open() as opened:
                while left and (piece := opened.read(min(CHUNK, left))):
                    yield front + piece
                    front, left = b"", left - len(piece)
                has_changed = bool(left or opened.read(1))
        except DifyError:
            raise
        except Exception as error:
            # Storages are packages of others, with errors of their own.
            raise DifyFilesError(f"{reason_of(error, ())}: the file of {self.subject} could not be read.") from None
        if has_changed:
            raise DifyFilesError(f"The file of {self.subject} changed while it was read. It was not uploaded.")
        yield front + self._tail


@contextmanager
def open_upload(
    file: str | os.PathLike[str] | IO[bytes], user: str, file_name: str | None, mime_type: str | None
) -> Iterator[UploadBody]:
    """Open a file to upload; one that is open already is sent from where it stands, and stays open."""
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(open(file, "rb")) if isinstance(file, (str, os.PathLike)) else file
            start = opened.tell()
            size = opened.seek(0, os.SEEK_END) - start
        except OSError as error:
            raise DifyConfigurationError(f"The file to upload cannot be read: {error}") from error

        def open_again() -> AbstractContextManager[IO[bytes]]:
            opened.seek(start)
            return nullcontext(opened)

        name = file_name or os.path.basename(str(getattr(opened, "name", "file")))
        yield UploadBody(DifyFile(name, file_name=name, mime_type=mime_type), user, size, open_again)


@dataclass(frozen=True)
class RequestRetries:
    """Sends a request again that failed for a passing reason."""

    limit: int
    delay_seconds: float  # before the first retry; doubled for each further one, with jitter, up to 60 seconds
    deadline: float | None  # epoch seconds after which nothing is sent again; None for no limit
    log: Logger

    def call(self, work: Callable[[], T]) -> T:
        """Return what a request returns, after retries if need be."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return work()
            except DifyConnectionError as error:
                asked = error.retry_after or 0.0
                shortest = max(asked, min(self.delay_seconds * 2.0 ** min(attempt - 1, 16), MAX_RETRY_DELAY))
                left = math.inf if self.deadline is None else self.deadline - time.time()
                # A server that asks for more time than a minute is not asked early.
                if attempt > self.limit or asked > MAX_RETRY_DELAY or shortest >= left:
                    raise
                # With jitter, so that many tasks don't come back together.
                pause = min(shortest + random.uniform(0, self.delay_seconds), MAX_RETRY_DELAY, left)  # noqa: S311
                line = "Attempt %d of %d failed, the next one is in %.1f seconds: %s"
                self.log.warning(line, attempt, self.limit + 1, pause, error)
            time.sleep(pause)


class _BearerAuth(AuthBase):
    """
    Send the API key and the connection's headers to its own origin and nowhere else.

    An auth object rather than a session header, because ``requests`` puts a ``.netrc`` entry in place of that.
    """

    def __init__(self, connection: DifyConnection) -> None:
        self._connection = connection

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        if self._connection.owns(request.url or ""):
            request.headers.update({**self._connection.headers, "Authorization": f"Bearer {self._connection.api_key}"})
        return request
