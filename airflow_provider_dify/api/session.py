"""How requests travel on a worker: one connection's settings, and the API key to its own origin only."""

from __future__ import annotations

from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import requests
from requests.auth import AuthBase

from airflow_provider_dify.connection import HEADERS, DifyConnection

if TYPE_CHECKING:
    from requests.models import PreparedRequest, Response


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


class DifySession(requests.Session):
    """A session with one connection's settings, which leaves its server for no redirect."""

    def __init__(self, connection: DifyConnection, timeouts: tuple[float, float]) -> None:
        super().__init__()
        self._connection = connection
        self.auth = _BearerAuth(connection)
        self.headers.update(HEADERS)
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._settings: dict[str, Any] = {"timeout": timeouts, "proxies": connection.proxies}
        # True leaves the choice of the CA bundle to the environment, as requests does.
        if connection.verify is not True:
            self._settings["verify"] = connection.verify

    def request(self, method: str | bytes, url: str | bytes, *args: Any, **kwargs: Any) -> Response:
        # Per request, because requests lets the environment override what the session says.
        return super().request(method, url, *args, **{**self._settings, **kwargs})

    def get_redirect_target(self, resp: Response) -> str | None:
        """Follow a redirect within the connection's server; give any other to the caller as the answer."""
        target = super().get_redirect_target(resp)
        return target if target and self._connection.owns(urljoin(resp.request.url or "", target)) else None

    def rebuild_auth(self, prepared_request: PreparedRequest, response: Response) -> None:
        """Keep the key on a redirect, which never leaves the origin; ``requests`` would look into ``.netrc``."""
