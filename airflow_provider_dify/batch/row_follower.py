"""How a row of a batch differs from a single run: its log, and its place among the runs at once. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Pause, Steps
from airflow_provider_dify.api.events import WorkflowEvent
from airflow_provider_dify.api.models import WorkflowRun
from airflow_provider_dify.api.text import one_line
from airflow_provider_dify.exceptions import DifyAuthenticationError, DifyConnectionError, DifyError
from airflow_provider_dify.runs.following import Follower
from airflow_provider_dify.runs.verdict import Verdict
from airflow_provider_dify.runs.waiting import RunWait

if TYPE_CHECKING:
    from airflow.sdk.types import Logger


# Characters of a warning, which may end with what Dify said.
_LOG_LENGTH = 1000


class RowLog:
    """
    The log of one row: the warnings of its run, with the row in front. A line for each node would be too many.

    :param row: the row.
    :param log: the task's log.
    """

    def __init__(self, row: int, log: Logger) -> None:
        self._row = row
        self._log = log

    def info(self, message: str, *args: Any) -> None:
        """Leave out what a batch has too much of."""

    def warning(self, message: str, *args: Any) -> None:
        """Log a warning of the row's run."""
        self._log.warning("%s", one_line(f"Row {self._row}: {message % args}", _LOG_LENGTH))


@dataclass(frozen=True)
class PlaceAgain(Pause):
    """A pause until the batch has a place again, after Dify turned a start away."""

    error: DifyConnectionError


def dify_responds() -> Steps[bool]:
    """Return whether Dify responds at all, so that what fails again and again is of one row."""
    try:
        yield calls.app_info()
    except (DifyConnectionError, DifyAuthenticationError):
        return False
    except DifyError:
        # Dify's own word, whatever it is.
        return True
    return True


class RowFollower(Follower):
    """
    A follower whose starts go by the batch's number of runs at once.

    It reads no detail of a run whose events say that it succeeded. Such a request costs Dify ten queries, and a batch
    has thousands of runs. And it tells a run whose record can't be read from a Dify that is away.
    """

    _succeeded: WorkflowRun | None = None
    # Longer than for a single run, because a server that is restarted must not end a batch.
    start_retries = 7

    def before_next_start(self, error: DifyConnectionError, failures: int) -> Steps[None]:
        """Pause after a start that started nothing; without a place, if Dify has too many runs."""
        if error.is_overloaded:
            yield PlaceAgain(0.0, error)
        else:
            yield from super().before_next_start(error, failures)

    def _on_ending(self, wait: RunWait, event: WorkflowEvent) -> None:
        super()._on_ending(wait, event)
        self._succeeded = event.succeeded_run if event.workflow_run_id == wait.workflow_run_id else None

    def _poll(self, wait: RunWait) -> Steps[tuple[tuple[WorkflowRun, Verdict] | None, float]]:
        run, self._succeeded = self._succeeded, None
        if run is not None:
            return (run, wait.on_poll(run)), 0.0
        try:
            return (yield from super()._poll(wait))
        except DifyConnectionError:
            if not (yield from dify_responds()):
                raise
        try:
            # Once more: Dify may have come back just now.
            return (yield from super()._poll(wait))
        except DifyConnectionError as error:
            raise DifyError(
                f"{error} Only this run's record can't be read: other requests succeed. The batch goes on without its "
                f"result; look at workflow run {wait.workflow_run_id} in Dify's log."
            ) from None
