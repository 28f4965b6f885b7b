"""The workflow runs of the stand-in, and how they are started."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from tests.dify_stand_in.faults import Fault


@dataclass
class Run:
    """
    A workflow run of the stand-in: the responses still to come, one a poll; the last one stays.

    With ``duration`` the first response stays for so many seconds from the first poll, then comes the last one.
    """

    id: str
    responses: deque[dict[str, Any] | None]
    fault_after_first: Fault | None = None
    duration: float | None = None
    polls: list[float] = field(default_factory=list)

    def poll(self) -> dict[str, Any] | None:
        self.polls.append(time.monotonic())
        if self.duration is not None:
            return self.responses[-1 if self.polls[-1] - self.polls[0] >= self.duration else 0]
        return self.responses.popleft() if len(self.responses) > 1 else self.responses[0]


@dataclass(frozen=True)
class Start:
    """
    How the stand-in answers a request to start a run.

    :param recording: the stream to replay, with ids of its own.
    :param statuses: what polls of the run's detail then find, as for :meth:`DifyStandIn.add_run`.
    :param cut: after how many bytes of the stream to stop; at its end by default.
    :param then: what comes at the cut: ``close``, ``reset``, ``stall`` or ``pings``.
    :param piece: how many bytes to send at once.
    :param fields: as for :meth:`DifyStandIn.add_run`.
    """

    recording: str = "run_streaming_echo"
    statuses: tuple[str | None, ...] = ("succeeded",)
    cut: int | None = None
    then: str = "close"
    piece: int = 100_000
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """A run that the stand-in was asked to start."""

    workflow_run_id: str
    task_id: str
    user: str
    inputs: dict[str, Any]
    workflow_id: str | None


@dataclass(frozen=True)
class ReceivedRequest:
    """A request that reached the stand-in."""

    method: str
    path: str
    headers: dict[str, str]
    at: float
    connection: int
