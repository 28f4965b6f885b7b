"""Which run in Dify's log is the one that a start was to start: the start named no run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Steps
from airflow_provider_dify.exceptions import DifyConnectionError, DifyError, DifyWorkflowRunUncertain
from airflow_provider_dify.input_fingerprint import fits
from airflow_provider_dify.log_pages import LogPage
from airflow_provider_dify.models import (
    LoggedWorkflowRun,
    LogRow,
    RowWithoutRun,
    WorkflowRun,
    WorkflowRunStatus,
    is_deleted,
    is_server_from,
    known_fields,
    runs_of,
)

# How far Dify's clock may be behind ours for a run to count as started after the start was sent.
CLOCK_TOLERANCE = timedelta(seconds=60)
# A row costs the server about 2.5 ms; a user's runs of the last minutes are few as a rule, and hundreds if many tasks
# share a user.
_PAGE_SIZE = 20
_NEXT_PAGE_SIZE = 100
_MAX_ROWS = 1000


@dataclass(frozen=True)
class RunSearch:
    """
    What is known of a run that was not named. It travels in a serialized trigger, so it holds no inputs.

    :param user: the ``user`` of the start.
    :param sent_at: epoch seconds of the start, by this machine's clock.
    :param user_is_unique: whether the user names one try of one task, so that each run of it is ours.
    :param fingerprint: of the start's inputs, from :func:`~airflow_provider_dify.input_fingerprint.fingerprint`.
    :param known_runs: ids of the user's runs from before the start.
    :param skips_failed: whether a run that failed or was stopped is of no interest.
    """

    user: str
    sent_at: float
    user_is_unique: bool
    fingerprint: dict[str, str] = field(default_factory=dict)
    known_runs: tuple[str, ...] = ()
    skips_failed: bool = False

    def serialize(self) -> dict[str, Any]:
        """Return the search as JSON-ready values, for :meth:`deserialize`."""
        return {**asdict(self), "known_runs": list(self.known_runs)}

    @classmethod
    def deserialize(cls, data: Mapping[str, Any]) -> RunSearch:
        """Return the search that :meth:`serialize` described, maybe in another version of this package."""
        known = {"sent_at": 0.0, "user_is_unique": False, **known_fields(cls, data)}
        return cls(**{**known, "known_runs": tuple(data.get("known_runs") or ())})

    @property
    def not_before(self) -> datetime:
        """The earliest time, by Dify's clock, at which the run can have been created."""
        return datetime.fromtimestamp(self.sent_at, timezone.utc) - CLOCK_TOLERANCE

    def is_candidate(self, run: LoggedWorkflowRun) -> bool:
        """
        Return whether a row of the log may be the run.

        Compared here too, because a server may ignore what it was asked to filter by.
        """
        return (
            run.user == self.user
            and run.workflow_run_id not in self.known_runs
            and not (self.skips_failed and run.status in (WorkflowRunStatus.FAILED, WorkflowRunStatus.STOPPED))
            and (run.created_at is None or run.created_at >= self.not_before)
        )


def find_run(search: RunSearch, others: set[str] | None = None, *, patience: float = 0.0) -> Steps[str | None]:
    """
    Look for the run of a start in Dify's log.

    :param search: what is known of it.
    :param others: ids of runs that were started with other inputs; a look adds those that it meets, and the next one
        does not ask for them again.
    :param patience: seconds that the server gets for a page at least: its log may be slow.
    :return: the run's id; ``None`` if no run fits yet: it may be queued.
    :raises DifyWorkflowRunUncertain: if several fit, one can't be compared, or there are more runs than are read.
    :raises DifyError: if the log can't be read.
    """
    others = set() if others is None else others
    candidates, are_all = yield from _candidates(search, patience)
    fitting = []
    for run in candidates:
        if run.workflow_run_id in others:
            continue
        if search.user_is_unique:
            fitting.append(run.workflow_run_id)
            continue
        detail: WorkflowRun = yield calls.run_detail(run.workflow_run_id)
        is_equal = fits(search.fingerprint, detail.inputs or {})
        if is_equal is None:
            raise _uncertain(search, f"{run.workflow_run_id} has no inputs that could be compared")
        if is_equal:
            fitting.append(run.workflow_run_id)
        else:
            others.add(run.workflow_run_id)
    if len(fitting) > 1:
        raise _uncertain(search, f"{', '.join(fitting)} may each be it")
    if not are_all and not (fitting and search.user_is_unique):
        raise _uncertain(search, f"more than {_MAX_ROWS:,} runs have been started since")
    return fitting[0] if fitting else None


def known_runs(user: str) -> Steps[tuple[str, ...]]:
    """
    Return a user's newest runs, before a start: they are none of its own.

    :return: their ids; none where the log can't be read.
    """
    try:
        rows: list[LogRow] = yield calls.logged_runs(user=user, limit=_PAGE_SIZE)
    except DifyError:
        return ()
    return tuple(run.workflow_run_id for run in runs_of(rows) if run.user == user)


def runs_queue(server_version: str | None) -> bool:
    """
    Return whether a server lets runs wait before they have a record: 1.13 and later do, on Celery workers.

    :param server_version: Dify's version; one that isn't known may be new.
    """
    return is_server_from(server_version, (1, 13)) is not False


def _candidates(search: RunSearch, patience: float) -> Steps[tuple[list[LoggedWorkflowRun], bool]]:
    """Return the runs that may be it, and whether these are all that there are."""
    found: list[LoggedWorkflowRun] = []
    number_of_rows = 0
    page: LogPage | None = LogPage(_PAGE_SIZE, next_size=_NEXT_PAGE_SIZE)
    while page is not None and number_of_rows < _MAX_ROWS:
        rows: list[LogRow] = yield page.request(user=search.user, created_after=search.not_before, patience=patience)
        for row in rows:
            is_ours = row.user == search.user
            if is_ours and isinstance(row, RowWithoutRun) and not is_deleted(row, time.time()):
                raise without_record(f"a run of user {search.user!r}")
        found += [run for run in runs_of(rows) if search.is_candidate(run)]
        number_of_rows += len(rows)
        page = page.after(rows, not_before=search.not_before)
    # Two pages may show a row twice.
    return list({run.workflow_run_id: run for run in found}.values()), page is None


def without_record(what: str) -> DifyConnectionError:
    """
    Return the error for a row of the log that may be ours, and whose run can't be known yet.

    :param what: the run, in the middle of a sentence.
    """
    return DifyConnectionError(f"Dify's log has no record yet of {what}: a worker of Dify writes it. This may pass.")


def _uncertain(search: RunSearch, why: str) -> DifyWorkflowRunUncertain:
    return DifyWorkflowRunUncertain(
        f"The start named no run, and Dify's log of user {search.user!r} does not tell which run it started: {why}. "
        "Look at these runs in Dify's console, then clear the task to start a new run.",
        user=search.user,
    )
