"""
A stand-in for Dify's Service API on this machine. A test double: nothing of it is in the wheel, nothing of it is Dify.

It replays recorded answers of a real server, from ``tests/recorded/``, and moves runs from status to status, one step a
poll. It speaks two dialects: ``1.12`` (as recorded) and ``current`` (``outputs`` an object, an unknown run a 404). It
misbehaves on demand, over a real socket::

    with DifyStandIn() as dify:
        run_id = dify.add_run("running", "succeeded")
        dify.misbehave(reset(), respond(503), times=2)
"""

from tests.dify_stand_in.dialects import DIALECTS
from tests.dify_stand_in.faults import (
    Fault,
    html,
    redirect,
    replay,
    reset,
    respond,
    retry_after_date,
    slow_body,
    stall,
    too_many_requests,
    truncate_body,
)
from tests.dify_stand_in.recordings import RECORDED, Recording
from tests.dify_stand_in.runs import ReceivedRequest, Run, Start, Started
from tests.dify_stand_in.server import API_KEY, DifyStandIn

__all__ = [
    "API_KEY",
    "DIALECTS",
    "RECORDED",
    "DifyStandIn",
    "Fault",
    "ReceivedRequest",
    "Recording",
    "Run",
    "Start",
    "Started",
    "html",
    "redirect",
    "replay",
    "reset",
    "respond",
    "retry_after_date",
    "slow_body",
    "stall",
    "too_many_requests",
    "truncate_body",
]
