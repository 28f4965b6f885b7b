# SPDX-License-Identifier: Apache-2.0
"""Which of an app's runs somebody wants: by a filter, and the latest that has ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from airflow_provider_dify.api.calls import Client
from airflow_provider_dify.api.models import ENDED_STATUSES, known_fields
from airflow_provider_dify.exceptions import DifyConfigurationError
from airflow_provider_dify.runs.ended import FinishedRun, RunWindow, WindowPolicy, look_at_runs

# How a prefix of a user is written: `nightly-*`.
_PREFIX_MARK = "*"


@dataclass(frozen=True)
class RunFilter:
    """Which runs are wanted: any, where a field is empty or ``None``."""

    statuses: tuple[str, ...] = ()  # how they ended
    triggered_from: tuple[str, ...] = ()  # what started them: app-run, webhook, schedule, ...
    user: str | None = None  # the user of the start; one that ends with * is a prefix

    @classmethod
    def parse(cls, *, statuses: Any, triggered_from: Any, user: Any) -> RunFilter:
        """Parse a sensor's or trigger's arguments: each ``None`` or a text, the first two also several texts."""
        wanted = _texts("statuses", statuses)
        known = sorted(str(status) for status in ENDED_STATUSES)
        for status in wanted:
            if status not in known:
                raise DifyConfigurationError(f"statuses must be some of {', '.join(known)}, but one is {status!r:.100}")
        if user is not None and not (isinstance(user, str) and user):
            raise DifyConfigurationError(f"user must be a text that is not empty, or None: {user!r:.100}")
        return cls(wanted, _texts("triggered_from", triggered_from), user)

    @property
    def exact_user(self) -> str | None:
        """The user, if it is one that Dify can filter by."""
        return None if self.user is None or self.user.endswith(_PREFIX_MARK) else self.user

    def fits(self, run: FinishedRun) -> bool:
        """Return whether a run is wanted."""
        if self.statuses and run.status not in self.statuses:
            return False
        if self.triggered_from and run.triggered_from not in self.triggered_from:
            return False
        if self.user is None or self.exact_user is not None:
            return self.user in (None, run.user)
        return run.user is not None and run.user.startswith(self.user.removesuffix(_PREFIX_MARK))

    def serialize(self) -> dict[str, Any]:
        """Return the arguments of :meth:`parse`: JSON-ready, and the same for the same filter."""
        return {
            "statuses": sorted(self.statuses) or None,
            "triggered_from": sorted(self.triggered_from) or None,
            "user": self.user,
        }


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    is_list = isinstance(texts, Iterable) and not isinstance(texts, (dict, bytes))
    found = list(texts) if is_list else []
    if not found or not all(isinstance(text, str) and text for text in found):
        raise DifyConfigurationError(f"{name} must be a list of texts, or None: {value!r:.100}")
    # str() for the members of an enum.
    return tuple(dict.fromkeys(str(text) for text in found))


def _moments(run: FinishedRun) -> tuple[float, float]:
    # Dify has whole seconds only: of runs that were created in the same one, the last to end is the latest.
    created, finished = (at.timestamp() if at else 0.0 for at in (run.created_at, run.finished_at))
    return created, finished


def parse_time(name: str, value: Any) -> float:
    """Return the epoch seconds of an argument: a ``datetime`` or its ISO 8601 text, UTC without a time zone."""
    import pendulum  # not for a Dag file that only names the sensor

    moment = value
    if isinstance(value, str):
        try:
            moment = pendulum.parse(value.strip())
        except (ValueError, OverflowError):
            moment = None
    if not isinstance(moment, datetime):
        raise DifyConfigurationError(f"{name} must be a datetime or the ISO 8601 text of one: {value!r:.100}")
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


@dataclass
class LatestRunSearch:
    """A search for the latest run that has ended. What one look has read, the next one does not read again."""

    created_after: float  # epoch seconds, by Dify's clock
    filter: RunFilter = field(default_factory=RunFilter)
    poll_interval: float = 10.0  # seconds between looks
    # Seconds after its creation from which a run is no longer watched; None for no limit.
    run_timeout: float | None = None

    def __post_init__(self) -> None:
        self._window = RunWindow.read_before(self.created_after)
        run_timeout = math.inf if self.run_timeout is None else self.run_timeout
        self._policy = WindowPolicy(self.poll_interval, run_timeout, user=self.filter.exact_user)

    def serialize(self) -> dict[str, Any]:
        """Return the search as JSON-ready values, for :meth:`deserialize`; without what was read."""
        return {
            "created_after": self.created_after,
            **self.filter.serialize(),
            "poll_interval": self.poll_interval,
            "run_timeout": self.run_timeout,
        }

    @classmethod
    def deserialize(cls, data: Mapping[str, Any]) -> LatestRunSearch:
        """Return the search that :meth:`serialize` described, maybe in another version of this package."""
        wanted = {name: data.get(name) for name in ("statuses", "triggered_from", "user")}
        return cls(**{**known_fields(cls, data), "filter": RunFilter.parse(**wanted)})

    async def look(self, client: Client, now: float) -> str | None:
        """Look once, at ``now`` in epoch seconds; return the id of the latest run that fits and has ended, if any."""
        look = await look_at_runs(client, self._window, self._policy, now)
        self._window = look.window
        fitting = [
            run
            for run in look.finished
            if self.filter.fits(run)
            # Dify before 1.9 writes the row at the run's end.
            and (run.created_at is None or run.created_at.timestamp() >= int(self.created_after))
        ]
        if not fitting:
            if look.error is not None:
                raise look.error
            return None
        return max(fitting, key=_moments).workflow_run_id

    def describe(self) -> str:
        """Return which run is waited for, in the middle of a sentence."""
        wanted = [f"created since {datetime.fromtimestamp(self.created_after, timezone.utc).isoformat()}"]
        if self.filter.user is not None:
            wanted.append(f"of user {self.filter.user!r}")
        if self.filter.triggered_from:
            wanted.append(f"triggered from {' or '.join(self.filter.triggered_from)}")
        ends = f" as {' or '.join(self.filter.statuses)}" if self.filter.statuses else ""
        return f"a run {', '.join(wanted)} that has ended{ends}"
