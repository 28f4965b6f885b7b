"""Transport to Dify's Service API: requests go out, whole HTTP answers come back. No policy, no parsing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Any, TypeVar

import requests
from airflow.providers.common.compat.sdk import BaseHook
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from airflow_provider_dify.api.responses import (
    HttpAnswer,
    answered,
    read_app_info,
    read_logged_workflow_runs,
    read_stop,
    read_uploaded_file_id,
    read_workflow_run,
    unreachable,
)
from airflow_provider_dify.api.routes import (
    MAX_USER_LENGTH,
    canonical_uuid,
    canonical_workflow_run_id,
    stop_path,
    workflow_run_path,
    workflow_run_subject,
)
from airflow_provider_dify.api.run_stream import WorkflowRunStream
from airflow_provider_dify.api.session import DifySession
from airflow_provider_dify.connection import MAX_RETRY_DELAY, DifyConnection
from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConfigurationError,
    DifyConnectionError,
    DifyError,
)
from airflow_provider_dify.get_provider_info import CONNECTION_FIELDS, UI_FIELD_BEHAVIOUR
from airflow_provider_dify.models import AppInfo, LoggedWorkflowRun, WorkflowRun

if TYPE_CHECKING:
    from datetime import datetime
    from types import TracebackType


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
        """Give the form's labels and hidden fields, for Airflows before 3.2; later ones have them from the package."""
        return {key.replace("-", "_"): value for key, value in UI_FIELD_BEHAVIOUR.items()}

    @classmethod
    def get_connection_form_widgets(cls) -> dict[str, Any]:
        """Give the connection form's extra fields, for Airflows before 3.2; later ones have them from the package."""
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
            self._session = DifySession(self.connection, self.connection.timeouts(self.timeout))
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
        return self._get("/info", read_app_info, "the app's name")

    def start_workflow_run(
        self, inputs: Mapping[str, Any], user: str, *, workflow_id: str | None = None
    ) -> WorkflowRunStream:
        """
        Start a run of the app's workflow: ``POST /workflows/run``, in streaming mode.

        Sent again only where nothing can have started: the server was not reached, or it had too many requests.

        :param inputs: the workflow's inputs by name, JSON-ready; ``{}`` for none.
        :param user: who starts it, up to 255 characters; Dify's log shows it and can be searched for it.
        :param workflow_id: UUID of a published version; the current one by default.
        :return: the started run: its ids, and its events. To be closed; the run goes on without its client.
        :raises DifyConfigurationError: if an argument can't be sent.
        :raises DifyRequestError: if Dify rejects the start.
        :raises DifyWorkflowRunUncertain: if a run may have been started and can't be told of.
        :raises DifyConnectionError: if nothing was started, retries included.
        """
        path = (
            "/workflows/run" if workflow_id is None else f"/workflows/{canonical_uuid('workflow_id', workflow_id)}/run"
        )
        _check_user(user)
        try:
            body = json.dumps({"inputs": dict(inputs), "user": user, "response_mode": "streaming"}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DifyConfigurationError(f"inputs must be an object of JSON values: {error}") from error
        return self._with_retries(lambda: self._start(path, body.encode(), user))

    def stop_workflow_task(self, task_id: str, user: str) -> None:
        """
        Ask Dify to stop a running workflow: ``POST /workflows/tasks/{task_id}/stop``.

        Dify answers success to any id whatever, and the run's record may stay ``running`` although it has stopped.

        :param task_id: the task's UUID, which the stream of the start told; not the run's.
        :param user: who started the run.
        :raises DifyError: as :meth:`get_workflow_run` does.
        """
        _check_user(user)
        path = stop_path(task_id)
        subject = f"the stop of task {task_id}"
        self._with_retries(lambda: read_stop(self._send("POST", path, subject, json={"user": user})))

    def list_workflow_runs(
        self,
        *,
        user: str | None = None,
        status: str | None = None,
        created_after: datetime | None = None,
        page: int = 1,
        limit: int = 20,
    ) -> list[LoggedWorkflowRun]:
        """
        List the app's workflow runs: ``GET /workflows/logs``, newest first.

        :param user: only runs that this user started.
        :param status: only ``succeeded``, ``failed`` or ``stopped`` ones.
        :param created_after: only runs created at or after this moment.
        :param page: which page, from 1.
        :param limit: runs a page, up to 100.
        :return: the page's runs, without inputs and outputs.
        :raises DifyError: as :meth:`get_workflow_run` does.
        """
        asked = {
            "created_by_end_user_session_id": user,
            "status": status,
            "created_at__after": created_after.isoformat() if created_after else None,
            "page": page,
            "limit": limit,
        }
        params = {name: value for name, value in asked.items() if value is not None}
        subject = "the app's log of workflow runs"
        return self._with_retries(
            lambda: read_logged_workflow_runs(self._send("GET", "/workflows/logs", subject, params=params))
        )

    def upload_file(
        self,
        file: str | os.PathLike[str] | IO[bytes],
        user: str,
        *,
        file_name: str | None = None,
        mime_type: str | None = None,
    ) -> str:
        """
        Upload a file to be used in a run's inputs: ``POST /files/upload``.

        In ``inputs`` it is ``{"type": "document", "transfer_method": "local_file", "upload_file_id": id}``.

        :param file: a path, or a file that is open for reading bytes.
        :param user: who uploads it: the one who starts the run.
        :param file_name: its name, whose ending tells Dify its type; that of the file by default.
        :param mime_type: its type; guessed from the name by Dify by default.
        :return: the file's id.
        :raises DifyError: as :meth:`get_workflow_run` does.
        """
        _check_user(user)
        with ExitStack() as stack:
            opened = stack.enter_context(open(file, "rb")) if isinstance(file, (str, os.PathLike)) else file
            name = file_name or os.path.basename(str(getattr(opened, "name", "file")))
            start = opened.tell()

            def send() -> str:
                opened.seek(start)
                part = (name, opened, mime_type) if mime_type else (name, opened)
                answer = self._send(
                    "POST", "/files/upload", f"the upload of {name!r}", files={"file": part}, data={"user": user}
                )
                return read_uploaded_file_id(answer)

            return self._with_retries(send)

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
            # Airflow's button tests a copy of the connection under an id of its own, which tells its reader nothing.
            named = f"onnection {self.dify_conn_id!r}"
            return False, str(error).replace(f"C{named}", "The connection").replace(f"c{named}", "the connection")
        if not app.has_workflow_runs:
            return False, (
                f"The API key works, but it belongs to the app {app.name!r} of mode {app.mode}, which has no workflow "
                "runs. Use the API key of a workflow or chatflow app."
            )
        mode = f" ({app.mode})" if app.mode else ""
        return True, f"Connected to {hook.connection.base_url} as the app {app.name!r}{mode}."

    def _get(self, path: str, read: Callable[[HttpAnswer], T], subject: str) -> T:
        """Send a GET, with retries, and give what ``read`` makes of the answer."""
        return self._with_retries(lambda: read(self._send("GET", path, subject)))

    def _with_retries(self, work: Callable[[], T]) -> T:
        """Do what a passing failure may be repeated for, and once more if the key was rotated."""
        retrying = Retrying(
            retry=retry_if_exception_type(DifyConnectionError),
            stop=stop_after_attempt(self.retry_limit + 1),
            wait=self._retry_wait,
            before_sleep=self._tell_retry,
            reraise=True,
        )
        try:
            return retrying(work)
        except DifyAuthenticationError:
            if not self._connection_has_changed():
                raise
            return retrying(work)

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

    def _start(self, path: str, body: bytes, user: str) -> WorkflowRunStream:
        url = f"{self.connection.base_url}{path}"
        # A session of its own: on a kept-alive connection that the server has just closed, nobody could tell whether
        # the request arrived.
        session = DifySession(self.connection, self.connection.timeouts(self.timeout))
        try:
            return WorkflowRunStream(self.connection, session, url, body, user)
        except BaseException:
            session.close()
            raise

    def _send(self, method: str, path: str, subject: str, **request: Any) -> HttpAnswer:
        url = f"{self.connection.base_url}{path}"
        try:
            # A redirect would turn a POST into a GET.
            response = self.get_conn().request(method, url, allow_redirects=method == "GET", **request)
        except requests.RequestException as error:
            raise unreachable(self.connection, subject, url, error) from error
        return answered(self.connection, url, response.status_code, response.headers, response.content)

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


def _check_user(user: object) -> None:
    if not isinstance(user, str) or not user or len(user) > MAX_USER_LENGTH:
        raise DifyConfigurationError(
            f"user must be text of 1 to {MAX_USER_LENGTH} characters, but it is {user!r:.300}."
        )
