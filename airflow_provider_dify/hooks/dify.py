# SPDX-License-Identifier: Apache-2.0
"""Airflow's hook for Dify's Service API: look-ups with ``requests``, and runs on an event loop of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from typing import IO, TYPE_CHECKING, Any, TypeVar

from airflow.providers.common.compat.sdk import BaseHook

from airflow_provider_dify.airflow_versions import mask_secrets
from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Call, parse_uploaded_file_id
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.http_response import HttpResponse
from airflow_provider_dify.api.models import AppInfo, LoggedWorkflowRun, WorkflowRun, runs_of
from airflow_provider_dify.api.run_stream import start_extras
from airflow_provider_dify.api.session import DifySession, RequestRetries, open_upload
from airflow_provider_dify.exceptions import DifyAuthenticationError
from airflow_provider_dify.files import files_in
from airflow_provider_dify.hooks.connection_form import connection_form_widgets, run_test, ui_field_behaviour
from airflow_provider_dify.runs.waiting import NOT_FOUND_GRACE, WEEK_SECONDS, Deadline, RunWait, WaitArguments

if TYPE_CHECKING:
    from datetime import datetime
    from types import TracebackType

    import requests
    from typing_extensions import Self

    from airflow_provider_dify.api.client import DifyClient
    from airflow_provider_dify.hooks.started_run import WorkflowRunStream
    from airflow_provider_dify.tasks.loop import TaskLoop

T = TypeVar("T")


class DifyHook(BaseHook):
    """
    Talk to Dify's Service API with one app's API key.

    A hook is also a context manager: ``with DifyHook() as hook: ...`` closes its session.

    :param dify_conn_id: the Airflow connection: ``password`` is the API key, ``host`` the base URL.
    :param timeout: seconds to wait for a whole response; the connection's extra ``timeout``, or 30, by default.
    :param retry_limit: how often a request that failed for a passing reason is sent again; 0 for never.
    :param retry_delay: seconds before the first retry; doubled for each further one, with jitter, up to 60 seconds. A
        server's ``Retry-After`` counts where it is longer; one above 60 seconds ends the attempts.
    :ivar deadline: epoch seconds after which nothing is sent again; ``None`` for no limit.
    :ivar server_version: Dify's version, as its last response named it; ``None`` until then.
    """

    default_conn_name = "dify_default"
    conn_name_attr = "dify_conn_id"
    conn_type = "dify"
    hook_name = "Dify"
    # Airflow 2 looks for these in the class itself.
    get_ui_field_behaviour = staticmethod(ui_field_behaviour)
    get_connection_form_widgets = staticmethod(connection_form_widgets)

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
        self.deadline: float | None = None
        self.server_version: str | None = None
        self._names_connection = True
        self._connection: DifyConnection | None = None
        self._session: DifySession | None = None

    @property
    def connection(self) -> DifyConnection:
        """
        The connection's settings, as last read.

        :raises DifyConfigurationError: if the connection cannot be used.
        """
        if self._connection is None:
            connection = self.get_connection(self.dify_conn_id)
            settings = DifyConnection.from_airflow(connection, has_name=self._names_connection)
            mask_secrets(settings.secret_headers)
            self._connection = replace(settings, timeout=self.timeout or settings.timeout)
        return self._connection

    def get_conn(self) -> requests.Session:
        """
        Return the session that this hook's requests go through.

        It sends the API key to the connection's own scheme, host and port only, has the connection's timeout, TLS and
        proxy settings, and keeps no cookies.

        :return: the session; the same one until :meth:`close`.
        :raises DifyConfigurationError: if the connection cannot be used.
        """
        return self._get_session()

    def close(self) -> None:
        """Close the session and its connections; the next request opens a new one."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
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
        :raises DifyConnectionError: if Dify can't be reached, fails, or something else responds, retries included.
        """
        return self.perform(calls.run_detail(calls.parse_workflow_run_id(workflow_run_id)))

    def get_app_info(self) -> AppInfo:
        """
        Look up the app that the API key belongs to: ``GET /info``.

        :return: the app's name and mode.
        :raises DifyError: as :meth:`get_workflow_run` does.
        """
        return self.perform(calls.app_info())

    def get_parameters(self) -> dict[str, Any]:
        """
        Look up the published workflow's input form: ``GET /parameters``.

        :return: Dify's object; ``user_input_form`` lists the inputs.
        :raises DifyError: as :meth:`get_workflow_run` does.
        """
        return self.perform(calls.parameters())

    def start_workflow_run(
        self,
        inputs: Mapping[str, Any],
        user: str,
        *,
        workflow_id: str | None = None,
        timeout: float = 300.0,
        trace_id: str | None = None,
        trace_session_id: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> WorkflowRunStream:
        """
        Start a run of the app's workflow, and wait until Dify names it: ``POST /workflows/run``, in streaming mode.

        Sent again only where nothing can have started: the server was not reached, or it had too many requests.

        :param inputs: the workflow's inputs by name, JSON-ready; ``{}`` for none.
        :param user: who starts it, up to 255 characters; Dify's log shows it and can be searched for it.
        :param workflow_id: UUID of a published version; the current one by default.
        :param timeout: seconds to wait for a run that is queued.
        :param trace_id: the run's id in Dify's tracing, as for the operator.
        :param trace_session_id: the session of that trace, as for the operator.
        :param extra_body: further fields of the body.
        :return: the started run: its ids, and its events. To be closed; the run continues without its client.
        :raises DifyConfigurationError: if an argument can't be sent.
        :raises DifyRequestError: if Dify rejects the start. Inputs that Dify 1.15 or later rejects begin a run, whose
            last event says ``failed``.
        :raises DifyWorkflowRunUncertain: if a run may have been started and can't be named.
        :raises DifyConnectionError: if nothing was started, retries included.
        """
        from airflow_provider_dify.hooks.started_run import WorkflowRunStream

        inputs, extras = calls.plain_inputs(inputs), start_extras(trace_id, trace_session_id, extra_body)
        deadline = self._deadline_after(timeout)
        if files_in(inputs):
            from airflow_provider_dify.runs.uploads import upload_inputs

            upload = partial(upload_inputs, inputs=inputs, user=user, workflow_id=workflow_id, deadline=deadline)
            inputs = self.run_on_loop(upload, deadline.at)

        def start() -> WorkflowRunStream:
            # An attempt that is made at all has a second, as every other request.
            seconds = max(min(timeout, 1.0), round(deadline.left, 1))
            stream = WorkflowRunStream(self.connection, seconds, inputs, user, workflow_id, extras)
            self.server_version = stream.server_version or self.server_version
            return stream

        return self._with_retries(start, deadline.at)

    def run_workflow(
        self,
        inputs: Mapping[str, Any],
        user: str,
        *,
        workflow_id: str | None = None,
        poll_interval: float = 10.0,
        timeout: float = WEEK_SECONDS,
        trace_id: str | None = None,
        trace_session_id: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> WorkflowRun:
        """
        Start a run of the app's workflow, and wait until it is over: for a function of ``@task``.

        It follows the run's events, and polls where they break off. A start that may have arrived is not sent again:
        its run is looked for in Dify's log, by ``user`` and inputs. If the process is killed, the run continues, and a
        retry of the task starts another one; the operator finds it instead.

        :param inputs: as for :meth:`start_workflow_run`.
        :param user: as there.
        :param workflow_id: as there.
        :param poll_interval: seconds between polls.
        :param timeout: seconds for the start and the run, which continues after that.
        :param trace_id: as for :meth:`start_workflow_run`.
        :param trace_session_id: as there.
        :param extra_body: as there.
        :return: the run, whatever its status.
        :raises DifyInputsRejected: if Dify rejects the inputs.
        :raises DifyWorkflowRunUncertain: if a run may have been started and could not be found.
        :raises DifyWorkflowRunTimeout: if ``timeout`` is over.
        :raises DifyError: any other, as :meth:`start_workflow_run` and :meth:`wait_for_workflow_run` do.
        """
        inputs, extras = calls.plain_inputs(inputs), start_extras(trace_id, trace_session_id, extra_body)
        deadline = self._deadline_after(timeout)
        arguments = WaitArguments(poll_interval=poll_interval, not_found_grace=NOT_FOUND_GRACE)

        async def work(client: DifyClient) -> WorkflowRun:
            from airflow_provider_dify.runs.starting import Starter

            return await Starter(client, deadline, self.log, arguments).run(inputs, user, workflow_id, extras)

        return self.run_on_loop(work, deadline.at)

    def wait_for_workflow_run(
        self, workflow_run_id: str, *, poll_interval: float = 10.0, timeout: float = WEEK_SECONDS
    ) -> WorkflowRun:
        """
        Poll a run until it is over. Up to five polls in a row may fail for a passing reason.

        :param workflow_run_id: the run's UUID.
        :param poll_interval: seconds between polls.
        :param timeout: seconds for the wait; the run continues after that.
        :return: the run, whatever its status.
        :raises DifyWorkflowRunTimeout: if ``timeout`` is over.
        :raises DifyWorkflowRunNotFound: if the API key's app has no such run, for a minute.
        :raises DifyError: any other, as :meth:`get_workflow_run` does.
        """
        deadline = self._deadline_after(timeout)
        arguments = WaitArguments(poll_interval=poll_interval, not_found_grace=NOT_FOUND_GRACE)
        wait = RunWait(calls.parse_workflow_run_id(workflow_run_id), arguments, log=self.log)

        async def work(client: DifyClient) -> WorkflowRun:
            from airflow_provider_dify.runs.following import Follower

            run, _ = await Follower(client, deadline, self.log, arguments).follow(wait, None)
            return run

        return self.run_on_loop(work, deadline.at)

    def stop_workflow_task(self, task_id: str, user: str) -> None:
        """
        Ask Dify to stop a running workflow: ``POST /workflows/tasks/{task_id}/stop``.

        Dify returns success for any id, and up to 1.15 the run's record stays ``running`` although it has stopped.

        :param task_id: the task's UUID, which the stream of the start named; not the run's.
        :param user: who started the run.
        :raises DifyError: as :meth:`get_workflow_run` does.
        """
        self.perform(calls.stop_task(task_id, user))

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
        :param page: which page, from 1. Dify sorts by whole seconds, and runs of one second in another order on each
            page: the next page may repeat some and leave others out.
        :param limit: runs a page, up to 100.
        :return: the page's runs, without inputs and outputs; those that have no record (yet) are left out.
        :raises DifyError: as :meth:`get_workflow_run` does.
        """
        rows = self.perform(
            calls.logged_runs(user=user, status=status, created_after=created_after, page=page, limit=limit)
        )
        return runs_of(rows)

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
        :param mime_type: its type, which Dify requires; guessed from the name by default.
        :return: the file's id.
        :raises DifyError: as :meth:`get_workflow_run` does.
        """
        calls.check_user(user)
        with open_upload(file, user, file_name, mime_type) as body:

            def upload() -> str:
                response = self._get_session().receive(
                    "POST", calls.UPLOAD, body.subject, time_limit_seconds=None, data=body, headers=body.headers
                )
                return parse_uploaded_file_id(response)

            return self._with_retries(upload)

    def download_file(self, output: Mapping[str, Any] | str, target: str | os.PathLike[str]) -> str:
        """
        Download a file among a run's outputs, to any storage. Dify's URL of it expires 300 seconds after the run's end.

        :param output: the output's object, or its URL.
        :param target: path or URL of the file to write; with a slash at the end, the folder for it.
        :return: the path.
        :raises DifyFilesError: if it can't be downloaded or written; a :class:`DifyFilesLost` if no retry helps.
        """
        from airflow_provider_dify.runs.downloads import download

        return self.run_on_loop(lambda client: download(self.connection, output, str(target), self.log))

    def test_connection(self) -> tuple[bool, str]:
        """
        Test the connection, for Airflow's Test button.

        :return: whether it works, and what names the app, Dify's version and the app's inputs, or what is wrong.
        """
        with type(self)(self.dify_conn_id, timeout=self.timeout, retry_limit=0) as hook:
            # Airflow's button tests a copy of the connection, under an id that no reader knows.
            hook._names_connection = False
            return run_test(hook)

    def perform(self, call: Call[T]) -> T:
        """
        Send a request, again where it failed for a passing reason, and return what its response means.

        :param call: the request.
        :raises DifyError: what the last response means.
        """
        return self._with_retries(lambda: call.parse(self._send(call)))

    def run_on_loop(self, work: Callable[[DifyClient], Coroutine[Any, Any, T]], deadline: float | None = None) -> T:
        """Run what needs an event loop, on one of its own, and return what it returns."""
        from airflow_provider_dify.tasks.loop import TaskLoop

        loop = TaskLoop()

        async def run() -> T:
            async with self.client_on(loop) as client:
                client.deadline = deadline
                try:
                    return await work(client)
                finally:
                    self.server_version = client.server_version or self.server_version

        return loop.run(run())

    def client_on(self, loop: TaskLoop, *, keeps_connections: bool = False) -> DifyClient:
        """Return a client with this hook's connection, which the thread that waits for the loop reads."""
        # Imported when it is needed: a look-up needs no asynchronous HTTP client.
        from airflow_provider_dify.api.client import DifyClient

        async def read_connection(refused: DifyConnection | None) -> DifyConnection:
            return await loop.ask(partial(self._read_again, refused))

        client = DifyClient(read_connection, keeps_connections=keeps_connections)
        client.server_version = self.server_version
        return client

    def _deadline_after(self, seconds: float) -> Deadline:
        """Return the deadline of a wait; it is no later than the hook's own."""
        deadline = Deadline.after(seconds, "hook's")
        return deadline if self.deadline is None else replace(deadline, at=min(deadline.at, self.deadline))

    def _get_session(self) -> DifySession:
        self._session = self._session or DifySession(self.connection)
        return self._session

    def _send(self, call: Call[Any]) -> HttpResponse:
        request: dict[str, Any] = {} if call.body is None else {"json": call.body}
        connect, time_limit = self.connection.timeouts()
        if call.patience_seconds > time_limit:
            time_limit = call.patience_seconds
            request["timeout"] = (connect, time_limit)
        if self.deadline is not None:
            # A second, so that the last look at a run, after its deadline, is one.
            time_limit = min(time_limit, max(1.0, self.deadline - time.time()))
        response = self._get_session().receive(
            call.method, call.path, call.subject, time_limit_seconds=time_limit, params=call.params, **request
        )
        self.server_version = response.server_version or self.server_version
        return response

    def _with_retries(self, work: Callable[[], T], deadline: float | None = None) -> T:
        """Do what a passing failure may be repeated for, and once more if the key was rotated."""
        retries = RequestRetries(self.retry_limit, self.retry_delay, deadline or self.deadline, self.log)
        used = self.connection
        try:
            return retries.call(work)
        except DifyAuthenticationError:
            if self._read_again(used) == used:
                raise
        return retries.call(work)

    def _read_again(self, refused: DifyConnection | None) -> DifyConnection:
        """Read the connection again, after its key was refused: a key that was rotated must not end a long wait."""
        if refused is not None and self._connection == refused:
            self._connection = None
            if self.connection != refused:
                self.log.info(
                    "The API key of connection %r was refused and has changed since; using the new one.",
                    refused.conn_id,
                )
                self.close()
        return self.connection
