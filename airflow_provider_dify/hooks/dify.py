"""Transport to Dify's Service API: requests go out, whole HTTP answers come back. No policy, no parsing."""

from __future__ import annotations

from collections.abc import Callable
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin

import requests
from airflow.providers.common.compat.sdk import BaseHook
from requests.auth import AuthBase
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from airflow_provider_dify.connection import HEADERS, MAX_RETRY_DELAY, DifyConnection
from airflow_provider_dify.exceptions import DifyAuthenticationError, DifyConnectionError, DifyError
from airflow_provider_dify.get_provider_info import CONNECTION_FIELDS, UI_FIELD_BEHAVIOUR
from airflow_provider_dify.workflow_run import (
    AppInfo,
    HttpAnswer,
    WorkflowRun,
    canonical_workflow_run_id,
    read_app_info,
    read_workflow_run,
    workflow_run_path,
    workflow_run_subject,
)

if TYPE_CHECKING:
    from types import TracebackType

    from requests.models import PreparedRequest, Response

T = TypeVar("T")


class DifyHook(BaseHook):
    """
    Talk to Dify's Service API with one app's API key.

    A hook is also a context manager: ``with DifyHook() as hook: ...`` closes its session.

    :param dify_conn_id: the Airflow connection: ``password`` is the API key, ``host`` the base URL.
    :param timeout: seconds to wait for an answer; the connection's extra ``timeout``, or 30, by default.
    :param retry_limit: how often a request that failed for a passing reason is sent again; 0 for never.
    :param retry_delay: seconds before the first retry; doubled for each further one, with jitter. A server's
        ``Retry-After`` counts where it is longer. No delay is above 60 seconds.
    """

    conn_name_attr = "dify_conn_id"
    default_conn_name = "dify_default"
    conn_type = "dify"
    hook_name = "Dify"

    def __init__(
        self,
        dify_conn_id: str = default_conn_name,
        *,
        timeout: float | None = None,
        retry_limit: int = 3,
        retry_delay: float = 1.0,
    ) -> None:
        super().__init__()
        self.dify_conn_id = dify_conn_id
        self.timeout = timeout
        self.retry_limit = retry_limit
        self.retry_delay = retry_delay
        self._connection: DifyConnection | None = None
        self._session: requests.Session | None = None

    @classmethod
    def get_ui_field_behaviour(cls) -> dict[str, Any]:
        """Give the connection form's labels and hidden fields, for Airflow 2; Airflow 3 has them from the package."""
        return {key.replace("-", "_"): value for key, value in UI_FIELD_BEHAVIOUR.items()}

    @classmethod
    def get_connection_form_widgets(cls) -> dict[str, Any]:
        """Give the connection form's extra fields, for Airflow 2; Airflow 3 has them from the package."""
        from flask_appbuilder.fieldwidgets import BS3TextFieldWidget
        from flask_babel import lazy_gettext
        from wtforms import IntegerField, StringField
        from wtforms.validators import Optional

        return {
            name: (IntegerField if "integer" in form_field["schema"]["type"] else StringField)(
                lazy_gettext(form_field["label"]),
                widget=BS3TextFieldWidget(),
                description=form_field["description"],
                validators=[Optional()],
            )
            for name, form_field in CONNECTION_FIELDS.items()
        }

    @property
    def connection(self) -> DifyConnection:
        """
        The connection's settings, as last read.

        :raises DifyConfigurationError: if the connection cannot be used.
        """
        if self._connection is None:
            self._connection = DifyConnection.from_airflow(self.get_connection(self.dify_conn_id))
        return self._connection

    def get_conn(self) -> requests.Session:
        """
        Give the session that this hook's requests go through.

        It sends the API key to the connection's own scheme, host and port only, has the connection's timeout, TLS and
        proxy settings, and keeps no cookies.

        :return: the session; the same one until :meth:`close`.
        :raises DifyConfigurationError: if the connection cannot be used.
        """
        if self._session is None:
            self._session = _DifySession(self.connection, self.connection.timeouts(self.timeout))
        return self._session

    def close(self) -> None:
        """Close the session and its connections; the next request opens a new one."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> DifyHook:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def get_workflow_run(self, workflow_run_id: str) -> WorkflowRun:
        """
        Look a workflow run up: ``GET /workflows/run/{workflow_run_id}``.

        :param workflow_run_id: the run's UUID, in any spelling that ``uuid.UUID`` takes.
        :return: the run, whatever its status.
        :raises DifyConfigurationError: if the id is no UUID or the connection cannot be used; nothing was sent then.
        :raises DifyWorkflowRunNotFound: if the API key's app has no such run.
        :raises DifyAuthenticationError: if the API key is refused.
        :raises DifyRequestError: if the request is rejected otherwise.
        :raises DifyConnectionError: if Dify can't be reached, fails, or something else answers, retries included.
        """
        run_id = canonical_workflow_run_id(workflow_run_id)
        return self._get(
            workflow_run_path(run_id), lambda answer: read_workflow_run(answer, run_id), workflow_run_subject(run_id)
        )

    def get_app_info(self) -> AppInfo:
        """
        Look up the app that the API key belongs to: ``GET /info``.

        :return: the app's name and mode.
        :raises DifyError: as :meth:`get_workflow_run` does.
        """
        return self._get("/info", read_app_info, "the app of this API key")

    def test_connection(self) -> tuple[bool, str]:
        """
        Say whether the connection works, for Airflow's Test button.

        :return: whether it does, and a sentence that names the app or the trouble.
        """
        hook = type(self)(self.dify_conn_id, timeout=self.timeout, retry_limit=0)
        try:
            with hook:
                app = hook.get_app_info()
        except DifyError as error:
            return False, str(error)
        if not app.has_workflow_runs:
            return False, (
                f"The API key works, but it belongs to the app {app.name!r} of mode {app.mode}, which has no workflow "
                "runs. Use the API key of a workflow or chatflow app."
            )
        mode = f" ({app.mode})" if app.mode else ""
        return True, f"Connected to {hook.connection.base_url} as the app {app.name!r}{mode}."

    def _get(self, path: str, read: Callable[[HttpAnswer], T], subject: str) -> T:
        """Send a GET, with retries, and give what ``read`` makes of the answer."""
        retrying = Retrying(
            retry=retry_if_exception_type(DifyConnectionError),
            stop=stop_after_attempt(self.retry_limit + 1),
            wait=self._retry_wait,
            before_sleep=self._tell_retry,
            reraise=True,
        )
        try:
            return retrying(lambda: read(self._send("GET", path, subject)))
        except DifyAuthenticationError:
            if not self._connection_has_changed():
                raise
            return retrying(lambda: read(self._send("GET", path, subject)))

    def _connection_has_changed(self) -> bool:
        """Read the connection again, after its key was refused: a key that was rotated must not end a long wait."""
        refused = self.connection
        self._connection = None
        if self.connection == refused:
            return False
        self.log.info(
            "The API key of connection %r was refused and has changed since; using the new one.", refused.conn_id
        )
        self.close()
        return True

    def _send(self, method: str, path: str, subject: str) -> HttpAnswer:
        url = f"{self.connection.base_url}{path}"
        try:
            response = self.get_conn().request(method, url)
        except requests.RequestException as error:
            raise self.connection.unreachable(subject, url, error) from error
        return self.connection.answered(url, response.status_code, response.headers, response.content)

    def _retry_wait(self, state: RetryCallState) -> float:
        wait = (wait_exponential(self.retry_delay) + wait_random(0, self.retry_delay))(state)
        error = state.outcome.exception() if state.outcome else None
        retry_after = error.retry_after if isinstance(error, DifyConnectionError) else None
        return min(max(wait, retry_after or 0.0), MAX_RETRY_DELAY)

    def _tell_retry(self, state: RetryCallState) -> None:
        self.log.warning(
            "Attempt %d of %d failed, the next one is in %.1f seconds: %s",
            state.attempt_number,
            self.retry_limit + 1,
            state.upcoming_sleep,
            state.outcome.exception() if state.outcome else None,
        )


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


class _DifySession(requests.Session):
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
