"""
A stand-in for Dify's Service API on this machine. A test double: nothing of it is in the wheel, nothing of it is Dify.

It answers out of recorded responses of real servers, in ``tests/recorded/``. It speaks like one of five Dify versions:
what a run's detail looks like, what a rejected start gets, how starts queue, what a stop does, how paused runs go on.
Runs move from status to status, one step a poll, or in real time. It misbehaves on demand, over a real socket::

    with DifyStandIn() as dify:
        run_id = dify.add_run("running", "succeeded")
        dify.misbehave(reset(), respond(503), times=2)
"""

from tests.dify_stand_in.dialects import DIALECTS
from tests.dify_stand_in.events import (
    PING,
    iteration,
    node_finished,
    node_retry,
    said,
    said_error,
    said_finished,
)
from tests.dify_stand_in.faults import (
    Fault,
    close,
    dribble,
    dribble_headers,
    html,
    lose_response,
    pings_only,
    quota_reached,
    redirect,
    rejects,
    replay,
    reset,
    respond,
    retry_after_date,
    slow_body,
    stall,
    too_many_requests,
    truncate_body,
    unchunked,
)
from tests.dify_stand_in.gateways import GATEWAYS, gateway, kong_404, without_version
from tests.dify_stand_in.input_form import form_field
from tests.dify_stand_in.recordings import RECORDED, Recording
from tests.dify_stand_in.runs import ReceivedRequest, Run, Start, Started
from tests.dify_stand_in.server import API_KEY, DifyStandIn

__all__ = [
    "API_KEY",
    "DIALECTS",
    "GATEWAYS",
    "PING",
    "RECORDED",
    "DifyStandIn",
    "Fault",
    "ReceivedRequest",
    "Recording",
    "Run",
    "Start",
    "Started",
    "close",
    "dribble",
    "dribble_headers",
    "form_field",
    "gateway",
    "html",
    "iteration",
    "kong_404",
    "lose_response",
    "node_finished",
    "node_retry",
    "pings_only",
    "quota_reached",
    "redirect",
    "rejects",
    "replay",
    "reset",
    "respond",
    "retry_after_date",
    "said",
    "said_error",
    "said_finished",
    "slow_body",
    "stall",
    "too_many_requests",
    "truncate_body",
    "unchunked",
    "without_version",
]
