"""How requests travel on a worker: one connection's settings, the API key to one origin only, and bounded in time."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from http.cookiejar import DefaultCookiePolicy
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urljoin
from weakref import WeakSet

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

from airflow_provider_dify.api.connection import HEADERS, DifyConnection
from airflow_provider_dify.api.http_response import HttpResponse, no_response
from airflow_provider_dify.api.network import route_to

if TYPE_CHECKING:
    from types import TracebackType

    from requests.models import PreparedRequest, Response
    from typing_extensions import Self


class Closing:
    """Mixed into what has a ``close()``: ``with ... as it: ...`` closes it at the end."""

    def close(self) -> None:
        """Close it; the class that this is mixed into says how."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


T = TypeVar("T")


class Mailbox(Generic[T]):
    """
    A queue whose wait ends in time also where a signal's handler takes longer, and waits on the same queue.

    ``SimpleQueue.get`` never ends then on Python 3.10 to 3.12 (measured): it goes on with what is left of its timeout,
    which is negative. ``Queue.get`` holds a lock, for which a handler in the same thread would wait for ever.
    """

    def __init__(self) -> None:
        self._items: SimpleQueue[T] = SimpleQueue()
        # Free once something has arrived since the last wait.
        self._arrival = threading.Lock()
        self._arrival.acquire()

    @property
    def waiting(self) -> int:
        """How many items nobody has taken yet."""
        return self._items.qsize()

    def put(self, item: T) -> None:
        """Hand over an item, from any thread."""
        self._items.put(item)
        # Free already where nobody has waited since the last one.
        with contextlib.suppress(RuntimeError):
            self._arrival.release()

    def get(self, timeout: float) -> T:
        """
        Return the next item.

        :param timeout: seconds to wait for it.
        :raises Empty: if none came in time.
        """
        until = time.monotonic() + timeout
        while True:
            with contextlib.suppress(Empty):
                return self._items.get_nowait()
            left = until - time.monotonic()
            if left <= 0 or not self._arrival.acquire(timeout=left):
                # What came meanwhile, and a handler has taken note of.
                return self._items.get_nowait()


class DifySession(requests.Session):
    """
    A session with one connection's settings, which leaves its server for no redirect.

    :param connection: the connection's settings.
    :param timeouts: seconds to wait for a connection, and for a piece of a response.
    :raises DifyConfigurationError: if the environment's or the connection's proxy or CA bundle can't be used.
    :ivar was_sent: whether any byte of the last request went out; ``None`` where that was not observed.
    """

    def __init__(self, connection: DifyConnection, timeouts: tuple[float, float]) -> None:
        super().__init__()
        route_to(connection, takes_socks=True)
        self._connection = connection
        self.auth = _BearerAuth(connection)
        self.headers.update(HEADERS)
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._settings: dict[str, Any] = {"timeout": timeouts, "proxies": connection.proxies}
        # True leaves the choice of the CA bundle to the environment, as requests does.
        if connection.verify is not True:
            self._settings["verify"] = connection.verify
        self.was_sent: bool | None = None
        self._sockets: WeakSet[socket.socket] = WeakSet()
        adapter = _WatchedAdapter(self)
        self.mount("https://", adapter)
        self.mount("http://", adapter)

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
        """Keep the key on a redirect, which never leaves the origin; ``requests`` would look into ``.netrc``."""

    def abort(self) -> None:
        """End what other threads send and receive through this session."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def send(
    session: DifySession,
    connection: DifyConnection,
    method: str,
    path: str,
    subject: str,
    *,
    time_limit: float | None,
    **request: Any,
) -> HttpResponse:
    """
    Send one request and return the whole response.

    :param session: the session, made for the connection.
    :param connection: the connection's settings.
    :param method: HTTP method; only a GET follows redirects, because a redirect would turn a POST into one.
    :param path: path below the base URL.
    :param subject: what is requested, in the middle of a message.
    :param time_limit: seconds for all of it, whatever the server does; ``None`` for no limit.
    :param request: the rest, as ``requests`` takes it.
    :return: the response.
    :raises DifyConnectionError: if there is none.
    :raises DifyConfigurationError: if the key is no app's.
    """
    connection.check_key()
    url = f"{connection.base_url}{path}"

    def exchange() -> HttpResponse:
        response = session.request(method, url, allow_redirects=method == "GET", **request)
        return HttpResponse.received(connection, url, response.status_code, response.headers, response.content)

    try:
        return exchange() if time_limit is None else call_within(time_limit, exchange, session.abort)
    except Exception as error:
        # Whatever the client calls it, and whatever the server or a proxy said to cause it.
        failure = no_response(connection, subject, url, error)
    # Outside of the handler: the client's own error, which a log would show as the cause, may quote a password.
    raise failure


def call_within(seconds: float, call: Callable[[], T], abort: Callable[[], None]) -> T:
    """
    Return what a blocking call returns, or raise what it raises, within a time limit.

    A timeout of ``requests`` counts for each piece of a response, and not at all for the look-up of a name.

    :param seconds: the limit.
    :param call: the call, made in a thread of its own.
    :param abort: ends the call as soon as possible, once nobody waits for it any more.
    :raises TimeoutError: if the limit is over.
    """
    results: Mailbox[tuple[bool, Any]] = Mailbox()

    def work() -> None:
        try:
            results.put((True, call()))
        except BaseException as error:
            results.put((False, error))

    threading.Thread(target=work, name="dify-request", daemon=True).start()
    try:
        is_result, result = results.get(timeout=max(0.0, seconds))
    except BaseException as error:
        # The time is over, or a signal's handler wants this thread back.
        abort()
        if isinstance(error, Empty):
            raise TimeoutError(f"no whole response within {seconds:.3g} seconds") from None
        raise
    if is_result:
        return result  # type: ignore[no-any-return]
    raise result


class _BearerAuth(AuthBase):
    """
    Send the API key to the connection's own origin and nowhere else.

    An auth object rather than a session header, because ``requests`` puts a ``.netrc`` entry in place of that.
    """

    def __init__(self, connection: DifyConnection) -> None:
        self._connection = connection

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        if self._connection.owns(request.url or ""):
            request.headers["Authorization"] = f"Bearer {self._connection.api_key}"
        return request


class _WatchedAdapter(HTTPAdapter):
    """An adapter whose connections say when a request goes out, and can be ended from another thread."""

    def __init__(self, session: DifySession) -> None:
        watch = {"session": session}
        self._session = session
        # Named as in urllib3, because its messages show the names.
        self._pool_classes = {
            "http": type(
                "HTTPConnectionPool",
                (HTTPConnectionPool,),
                {"ConnectionCls": type("HTTPConnection", (_Watched, HTTPConnection), watch)},
            ),
            "https": type(
                "HTTPSConnectionPool",
                (HTTPSConnectionPool,),
                {"ConnectionCls": type("HTTPSConnection", (_Watched, HTTPSConnection), watch)},
            ),
        }
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pool_classes

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not proxy.lower().startswith("socks"):
            manager.pool_classes_by_scheme = self._pool_classes
        return manager

    def send(self, request: PreparedRequest, *args: Any, **kwargs: Any) -> Response:
        is_socks = any(str(url).lower().startswith("socks") for url in (kwargs.get("proxies") or {}).values())
        self._session.was_sent = None if is_socks else False
        return super().send(request, *args, **kwargs)


class _Watched:
    """Mixed into urllib3's connections: notes when the first byte of a request goes out."""

    session: DifySession
    sock: socket.socket | None
    auto_open: int
    _opens_tunnel = False

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        if self.sock is not None:
            self.session._sockets.add(self.sock)

    def _tunnel(self) -> None:
        # What goes to a proxy to open a tunnel is not the request yet.
        self._opens_tunnel = True
        try:
            super()._tunnel()  # type: ignore[misc]
        finally:
            self._opens_tunnel = False

    def send(self, data: Any) -> None:
        if self.sock is None and self.auto_open:
            self.connect()
        if not self._opens_tunnel:
            self.session.was_sent = True
        super().send(data)  # type: ignore[misc]
