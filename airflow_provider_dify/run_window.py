"""What is known of an app's runs between two looks at its log. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from airflow_provider_dify.exceptions import DifyConnectionError
from airflow_provider_dify.models import storable

# Seconds by which a row may be older than one that was seen before it: a row has the time at which Dify began to write
# it. Rows that are so young are read again at the next look, so a longer time costs requests where runs are many.
OVERLAP = 5.0
# A run that goes on is looked at again after this share of its age.
_SHARE_OF_AGE = 0.05
MAX_DETAIL_INTERVAL = 300.0
# Runs that are watched at once, because the state is stored after each look: of 10,000 it takes about a megabyte.
MAX_OPEN = 10_000
# Epoch seconds that are no time of a run's any more: the year 5138.
_NO_TIME = 1e11


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended, as an event describes it: without outputs."""

    workflow_run_id: str
    status: str
    user: str | None
    triggered_from: str | None
    total_tokens: int | None
    elapsed_time: float | None
    created_at: datetime | None
    finished_at: datetime | None

    def as_event(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values; times as ISO 8601 text."""
        event = {
            "workflow_run_id": self.workflow_run_id,
            "status": self.status,
            "user": self.user,
            "triggered_from": self.triggered_from,
            "total_tokens": self.total_tokens,
            "elapsed_time": self.elapsed_time,
            "created_at": self.created_at.isoformat() if self.created_at else None,
            "finished_at": self.finished_at.isoformat() if self.finished_at else None,
        }
        return {name: storable(value) for name, value in event.items()}


@dataclass(frozen=True)
class OpenRun:
    """
    A run that was not over when it was last seen.

    :param logged_at: epoch seconds of its row, by Dify's clock.
    :param created_at: epoch seconds of the run itself, by Dify's clock.
    :param due: epoch seconds at which it is to be looked at again, by this machine's clock.
    :param user: who started it; the run's detail doesn't say.
    :param triggered_from: what started it; the run's detail doesn't say.
    """

    logged_at: float
    created_at: float
    due: float
    user: str | None
    triggered_from: str | None


@dataclass(frozen=True)
class WindowPolicy:
    """
    How a window moves.

    :param poll_interval: seconds between looks.
    :param run_timeout: seconds after a run's creation from which it is no longer watched.
    :param lookback: seconds before the first look from which runs that have ended count, too.
    :param user: the ``user`` whose runs are read; ``None`` for all.
    """

    poll_interval: float = 30.0
    run_timeout: float = 604_800.0
    lookback: float = 0.0
    user: str | None = None

    def next_look(self, run_created_at: float, now: float) -> float:
        """Return when to look again at a run that goes on: the older, the later."""
        age = max(0.0, now - run_created_at)
        delay = min(age * _SHARE_OF_AGE, MAX_DETAIL_INTERVAL)
        # The next look comes about then; a moment too early must not make it miss.
        return now if delay <= self.poll_interval else now + delay


@dataclass(frozen=True)
class RunWindow:
    """
    What is known of an app's runs between two looks. It holds the runs of every user, so that two watchers of an app
    ask the same.

    :param read_until: epoch seconds of the newest row that was seen, by Dify's clock; ``None`` before the first look.
    :param seen: rows that will be read again, by the run's id, and the epoch seconds of each.
    :param open: runs that were not over.
    """

    read_until: float | None = None
    seen: Mapping[str, float] = field(default_factory=dict)
    open: Mapping[str, OpenRun] = field(default_factory=dict)

    @classmethod
    def read_before(cls, moment: float) -> RunWindow:
        """Return the window to which each run is new whose row is of this moment, in epoch seconds, or later."""
        return cls(read_until=int(moment) + OVERLAP)

    def serialize(self) -> dict[str, Any]:
        """Return the window as JSON-ready values, for :meth:`deserialize`."""
        return {
            "version": 1,
            "read_until": self.read_until,
            "seen": dict(self.seen),
            "open": {
                run_id: [run.logged_at, run.created_at, run.due, run.user, run.triggered_from]
                for run_id, run in self.open.items()
            },
        }

    @classmethod
    def deserialize(cls, data: object) -> RunWindow:
        """
        Return the window that :meth:`serialize` described; a new one for anything else.

        :param data: what was stored, maybe by another version of this package.
        """
        if not isinstance(data, dict) or data.get("version") != 1:
            return cls()
        try:
            return cls(
                read_until=None if data["read_until"] is None else _moment(data["read_until"]),
                seen={str(run_id): _moment(at) for run_id, at in data["seen"].items()},
                open={
                    str(run_id): OpenRun(
                        _moment(run[0]), _moment(run[1]), _moment(run[2]), _text(run[3]), _text(run[4])
                    )
                    for run_id, run in data["open"].items()
                },
            )
        except (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError):
            return cls()


@dataclass(frozen=True)
class Look:
    """
    What one look at an app's runs brought.

    :param window: the window after it.
    :param finished: runs that have ended since the last look, the first to end first.
    :param overdue: ids of runs that are no longer watched, because ``run_timeout`` is over.
    :param surplus: ids of runs that are no longer watched, because so many others are.
    :param error: why not every run could be asked for; what the look brought counts all the same.
    """

    window: RunWindow
    finished: tuple[FinishedRun, ...] = ()
    overdue: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()
    error: DifyConnectionError | None = None


def _moment(value: object) -> float:
    number = float(value)  # type: ignore[arg-type]
    if not abs(number) < _NO_TIME:
        raise ValueError("not a time")
    return number


def _text(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError("not a text")
    return value
