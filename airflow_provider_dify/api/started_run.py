"""What is known of a start and its run, whichever client sent it, and what it means if it goes wrong. Pure."""

from __future__ import annotations

from airflow_provider_dify.api.events import STARTED, WorkflowEvent
from airflow_provider_dify.api.http_response import HttpResponse, no_response, reason_of
from airflow_provider_dify.api.responses import error_from_start
from airflow_provider_dify.connection import DifyConnection
from airflow_provider_dify.exceptions import DifyConnectionError, DifyError, DifyWorkflowRunUncertain
from airflow_provider_dify.excerpts import one_line

_SUBJECT = "the start of a workflow run"


class StartedRun:
    """
    What is known of a start and its run, whichever client sent it.

    :param connection: the connection that the start goes to.
    :param url: where it goes.
    :param user: the ``user`` in its body, for messages.
    :ivar workflow_run_id: the run's UUID; empty until Dify names it.
    :ivar task_id: the UUID that :meth:`DifyHook.stop_workflow_task` takes; empty until then.
    :ivar app_id: the UUID of the run's app; ``None`` where the server doesn't say.
    :ivar server_version: Dify's version; ``None`` until it responds.
    """

    def __init__(self, connection: DifyConnection, url: str, user: str) -> None:
        self._connection = connection
        self._url = url
        self._user = user
        self.workflow_run_id = ""
        self.task_id = ""
        self.app_id: str | None = None
        self.server_version: str | None = None
        self._accepted = False

    @property
    def is_named(self) -> bool:
        """Whether Dify has named the run; until then it is queued, or was rejected without a word."""
        return bool(self.workflow_run_id)

    def _note(self, item: WorkflowEvent) -> WorkflowEvent:
        """
        Note what the run's next event says of it.

        :raises DifyWorkflowRunUncertain: if the stream ends before Dify named the run.
        """
        if item.name == STARTED and not self.is_named:
            if not item.workflow_run_id or not item.task_id:
                raise self._uncertain("the event workflow_started names no run")
            self.workflow_run_id = item.workflow_run_id
            self.task_id = item.task_id
            self.app_id = item.app_id
        elif item.is_ending and not self.is_named:
            raise self._uncertain(f"the stream begins with the event {item.name!r}: {one_line(item.data, 300)}")
        return item

    def _error(self, error: Exception, *, may_have_been_sent: bool) -> DifyError:
        if self.is_named:
            return self._broken(reason_of(error, self._connection.secrets))
        if not self._accepted and not may_have_been_sent:
            return no_response(self._connection, _SUBJECT, self._url, error)
        return self._uncertain(reason_of(error, self._connection.secrets))

    def _rejection(self, response: HttpResponse) -> DifyError:
        error = error_from_start(response)
        # Only what a server says before it starts anything is sure to have started nothing.
        is_sure = 300 <= response.status_code < 500
        if isinstance(error, DifyConnectionError) and not is_sure:
            return self._uncertain(str(error))
        return error

    def _broken(self, reason: str) -> DifyConnectionError:
        return DifyConnectionError(
            f"{reason}: the events of workflow run {self.workflow_run_id} broke off at {self._url}. The run goes on.",
            server_version=self.server_version,
        )

    def _unnamed(self, seconds: float) -> DifyWorkflowRunUncertain:
        return DifyWorkflowRunUncertain(
            f"Dify did not name the run of user {self._user!r} within {seconds:g} seconds: it is queued, and "
            "may run later. Look for the user in the app's log in Dify's console.",
            user=self._user,
        )

    def _uncertain(self, reason: str) -> DifyWorkflowRunUncertain:
        return DifyWorkflowRunUncertain(
            f"{reason}: no run id came back from {self._url}, so Dify may or may not have started a workflow run "
            "for user "
            f"{self._user!r}. It was not asked again, so as not to pay twice. Look for the user in the app's log in "
            "Dify's console.",
            user=self._user,
        )
