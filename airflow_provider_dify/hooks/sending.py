"""How a hook sends requests on a worker: as its Airflow connection says, and again where a failure may pass."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from airflow.providers.common.compat.sdk import BaseHook
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential, wait_random

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Call, LiveTaskId, Pause, SendStart, Step, Steps, encode_start, run_steps
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.http_response import HttpResponse
from airflow_provider_dify.api.live_task_id import read_live_task_id
from airflow_provider_dify.api.run_stream import WorkflowRunStream
from airflow_provider_dify.api.session import Closing, DifySession, send
from airflow_provider_dify.api.started_run import NextEvent
from airflow_provider_dify.exceptions import DifyAuthenticationError, DifyConnectionError
from airflow_provider_dify.runs.waiting import MAX_RETRY_DELAY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import requests
    from airflow.sdk.types import Logger


T = TypeVar("T")


def _never(error: DifyConnectionError) -> bool:
    return False


@dataclass(frozen=True)
class RequestRetries:
    """
    Sends a request again that failed for a passing reason.

    :param limit: how often; 0 for never.
    :param delay: seconds before the first retry; doubled for each further one, with jitter, up to 60 seconds.
    :param deadline: epoch seconds after which nothing is sent again; ``None`` for no limit.
    :param log: where each retry is logged.
    """

    limit: int
    delay: float
    deadline: float | None
    log: Logger

    def call(self, work: Callable[[], T], is_final: Callable[[DifyConnectionError], bool] = _never) -> T:
        """
        Return what a request returns, after retries if need be.

        :param work: sends the request, and parses the response.
        :param is_final: whether an error that usually may pass is not worth another attempt.
        :return: what ``work`` returns.
        """

        def may_pass(error: BaseException) -> bool:
            return (
                isinstance(error, DifyConnectionError)
                and not is_final(error)
                # A server that asks for more time than this is not asked early.
                and (error.retry_after or 0.0) <= MAX_RETRY_DELAY
            )

        return Retrying(
            retry=retry_if_exception(may_pass),
            stop=self._is_last,
            wait=self._wait,
            before_sleep=self._log_retry,
            reraise=True,
        )(work)

    def _is_last(self, state: RetryCallState) -> bool:
        is_late = self.deadline is not None and time.time() + self._shortest_wait(state) >= self.deadline
        return is_late or state.attempt_number > self.limit

    def _wait(self, state: RetryCallState) -> float:
        jitter = wait_random(0, self.delay)(state)
        wait = max(min(self._shortest_wait(state) + jitter, MAX_RETRY_DELAY), _retry_after(state))
        # The shortest wait ends before the deadline, or this is the last attempt.
        return wait if self.deadline is None else min(wait, max(0.0, self.deadline - time.time()))

    def _shortest_wait(self, state: RetryCallState) -> float:
        return max(wait_exponential(self.delay)(state), _retry_after(state))

    def _log_retry(self, state: RetryCallState) -> None:
        self.log.warning(
            "Attempt %d of %d failed, the next one is in %.1f seconds: %s",
            state.attempt_number,
            self.limit + 1,
            state.upcoming_sleep,
            state.outcome.exception() if state.outcome else None,
        )


def _retry_after(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return (error.retry_after or 0.0) if isinstance(error, DifyConnectionError) else 0.0


class SendingHook(Closing, BaseHook):
    """
    Send requests with an Airflow connection's settings; the arguments are those of ``DifyHook``.

    It is a context manager, which closes its session.
    """

    default_conn_name = "dify_default"

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
            self._connection = replace(settings, timeout=self.timeout or settings.timeout)
        return self._connection

    @property
    def response_timeout(self) -> float:
        """Seconds for a whole response."""
        return self.connection.timeouts()[1]

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

    @contextlib.contextmanager
    def _until(self, deadline: float) -> Iterator[None]:
        """Send nothing again after a deadline, in epoch seconds, nor after one that is set already."""
        before = self.deadline
        self.deadline = deadline if before is None else min(before, deadline)
        try:
            yield
        finally:
            self.deadline = before

    def perform(self, call: Call[T]) -> T:
        """
        Send a request, again where it failed for a passing reason, and return what its response means.

        :param call: the request.
        :raises DifyError: what the last response means.
        """
        return self._with_retries(lambda: call.parse(self._send(call)), call.is_final)

    def run_steps(self, steps: Steps[T]) -> T:
        """
        Run requests that depend on each other.

        :param steps: yields each request, and is sent what its response meant.
        :return: what the steps return.
        """
        return run_steps(steps, self._take_step)

    def _take_step(self, step: Step) -> Any:
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        if isinstance(step, LiveTaskId):
            return read_live_task_id(self._get_session(), self.connection, step)
        if isinstance(step, NextEvent):
            return step.stream.next_event(step.seconds)
        if isinstance(step, SendStart):
            return self._send_start(step)
        return self.perform(step)

    def _send_start(self, start: SendStart) -> WorkflowRunStream:
        """Send a start once, and return at once."""
        path = calls.start_path(start.workflow_id)
        body = encode_start(start.inputs, start.user)
        connection = self.connection
        connection.check_key()
        # A session of its own: on a kept-alive connection that the server has just closed, nobody could tell whether
        # the request arrived.
        session = DifySession(connection, connection.timeouts())
        return WorkflowRunStream(connection, session, f"{connection.base_url}{path}", body, start.user)

    def _get_session(self) -> DifySession:
        if self._session is None:
            self._session = DifySession(self.connection, self.connection.timeouts())
        return self._session

    def _send(self, call: Call[Any]) -> HttpResponse:
        request: dict[str, Any] = {} if call.body is None else {"json": call.body}
        connect, time_limit = self.connection.timeouts()
        if call.patience > time_limit:
            time_limit = call.patience
            request["timeout"] = (connect, time_limit)
        if self.deadline is not None:
            # A second, so that the last look at a run, after its deadline, is one.
            time_limit = min(time_limit, max(1.0, self.deadline - time.time()))
        response = send(
            self._get_session(),
            self.connection,
            call.method,
            call.path,
            call.subject,
            time_limit=time_limit,
            params=call.params,
            **request,
        )
        self.server_version = response.server_version or self.server_version
        return response

    def _with_retries(self, work: Callable[[], T], *is_final: Callable[[DifyConnectionError], bool]) -> T:
        """Do what a passing failure may be repeated for, and once more if the key was rotated."""
        retries = RequestRetries(self.retry_limit, self.retry_delay, self.deadline, self.log)
        try:
            return retries.call(work, *is_final)
        except DifyAuthenticationError:
            if not self._connection_has_changed():
                raise
            return retries.call(work, *is_final)

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
