"""Airflow's hook for Dify's Service API: the package's small Dify client with an Airflow connection's settings."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import SendStart, open_upload
from airflow_provider_dify.api.models import AppInfo, LoggedWorkflowRun, WorkflowRun, runs_of
from airflow_provider_dify.api.responses import parse_uploaded_file_id
from airflow_provider_dify.api.run_stream import WorkflowRunStream
from airflow_provider_dify.api.session import send
from airflow_provider_dify.exceptions import DifyError
from airflow_provider_dify.hooks.connection_form import connection_form_widgets, describe_test, ui_field_behaviour
from airflow_provider_dify.hooks.sending import SendingHook
from airflow_provider_dify.runs.clock import WEEK, TaskClock
from airflow_provider_dify.runs.following import Follower
from airflow_provider_dify.runs.whole_run import run_workflow, wait_for_run

if TYPE_CHECKING:
    from datetime import datetime


class DifyHook(SendingHook):
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

    conn_name_attr = "dify_conn_id"
    conn_type = "dify"
    hook_name = "Dify"
    # Airflow 2 looks for these in the class itself.
    get_ui_field_behaviour = staticmethod(ui_field_behaviour)
    get_connection_form_widgets = staticmethod(connection_form_widgets)

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
        return self.run_steps(calls.look_up_run(calls.parse_workflow_run_id(workflow_run_id)))

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
        self, inputs: Mapping[str, Any], user: str, *, workflow_id: str | None = None, timeout: float = 300.0
    ) -> WorkflowRunStream:
        """
        Start a run of the app's workflow, and wait until Dify names it: ``POST /workflows/run``, in streaming mode.

        Sent again only where nothing can have started: the server was not reached, or it had too many requests.

        :param inputs: the workflow's inputs by name, JSON-ready; ``{}`` for none.
        :param user: who starts it, up to 255 characters; Dify's log shows it and can be searched for it.
        :param workflow_id: UUID of a published version; the current one by default.
        :param timeout: seconds to wait for a run that is queued.
        :return: the started run: its ids, and its events. To be closed; the run goes on without its client.
        :raises DifyConfigurationError: if an argument can't be sent.
        :raises DifyRequestError: if Dify rejects the start.
        :raises DifyWorkflowRunUncertain: if a run may have been started and can't be named.
        :raises DifyConnectionError: if nothing was started, retries included.
        """
        until = time.time() + timeout

        def start() -> WorkflowRunStream:
            stream = self.send_start(inputs, user, workflow_id=workflow_id)
            # An attempt that is made at all has a second, as every other request.
            stream.require_name(max(min(timeout, 1.0), round(until - time.time(), 1)))
            return stream

        with self._until(until):
            return self._with_retries(start)

    def send_start(self, inputs: Mapping[str, Any], user: str, *, workflow_id: str | None = None) -> WorkflowRunStream:
        """
        Send the start of a run once, and return at once.

        :param inputs: as for :meth:`start_workflow_run`; sequences of any kind become lists.
        :return: the start, whose response is still to come.
        :raises DifyConfigurationError: if an argument can't be sent; nothing was sent then.
        """
        return self._send_start(SendStart(inputs, user, workflow_id))

    def run_workflow(
        self,
        inputs: Mapping[str, Any],
        user: str,
        *,
        workflow_id: str | None = None,
        poll_interval: float = 10.0,
        timeout: float = WEEK,
    ) -> WorkflowRun:
        """
        Start a run of the app's workflow, and wait until it is over: for a function of ``@task``.

        It follows the run's events, and polls where they break off. A start that may have arrived is not sent again:
        its run is looked for in Dify's log, by ``user`` and inputs. If the process is killed, the run goes on, and a
        retry of the task starts another one; the operator finds it instead.

        :param inputs: as for :meth:`start_workflow_run`.
        :param user: as there.
        :param workflow_id: as there.
        :param poll_interval: seconds between polls.
        :param timeout: seconds for the start and the run, which goes on after that.
        :return: the run, whatever its status.
        :raises DifyInputsRejected: if Dify rejects the inputs.
        :raises DifyWorkflowRunUncertain: if a run may have been started and could not be found.
        :raises DifyWorkflowRunTimeout: if ``timeout`` is over.
        :raises DifyError: any other, as :meth:`start_workflow_run` and :meth:`wait_for_workflow_run` do.
        """
        follower = self._follower(poll_interval, timeout)
        with self._until(follower.clock.deadline):
            return self.run_steps(run_workflow(follower, inputs, user, workflow_id, timeout))

    def wait_for_workflow_run(
        self, workflow_run_id: str, *, poll_interval: float = 10.0, timeout: float = WEEK
    ) -> WorkflowRun:
        """
        Poll a run until it is over. Up to five polls in a row may fail for a passing reason.

        :param workflow_run_id: the run's UUID.
        :param poll_interval: seconds between polls.
        :param timeout: seconds for the wait; the run goes on after that.
        :return: the run, whatever its status.
        :raises DifyWorkflowRunTimeout: if ``timeout`` is over.
        :raises DifyWorkflowRunNotFound: if the API key's app has no such run, for a minute.
        :raises DifyError: any other, as :meth:`get_workflow_run` does.
        """
        follower = self._follower(poll_interval, timeout)
        with self._until(follower.clock.deadline):
            return self.run_steps(wait_for_run(follower, workflow_run_id, timeout))

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
        with open_upload(file, file_name, mime_type) as part:
            start = part[1].tell()

            def upload() -> str:
                part[1].seek(start)
                response = send(
                    self._get_session(),
                    self.connection,
                    "POST",
                    calls.UPLOAD,
                    f"the upload of {part[0]!r}",
                    time_limit=None,
                    files={"file": part},
                    data={"user": user},
                )
                return parse_uploaded_file_id(response)

            return self._with_retries(upload)

    def _follower(self, poll_interval: float, timeout: float) -> Follower:
        return Follower(self, TaskClock(time.time() + timeout), self.log, poll_interval, "hook's")

    def test_connection(self) -> tuple[bool, str]:
        """
        Test the connection, for Airflow's Test button.

        :return: whether it works, and a sentence that names the app and Dify's version, or what is wrong.
        """
        hook = type(self)(self.dify_conn_id, timeout=self.timeout, retry_limit=0)
        try:
            with hook:
                # Airflow's button tests a copy of the connection, under an id that no reader knows.
                hook._names_connection = False
                app = hook.get_app_info()
        except DifyError as error:
            return False, str(error)
        return describe_test(hook.connection, app, hook.server_version)
