"""What differs between the servers that the stand-in speaks like."""

from __future__ import annotations

import json
import time
from typing import Any

from aiohttp import web

from tests.dify_stand_in.recordings import Recording

DIALECTS = ("1.12", "current")

RECORDING_OF_STATUS = {
    "running": "detail_running_t0",
    "scheduled": "detail_running_t0",
    "paused": "detail_paused",
    "succeeded": "detail_succeeded_echo",
    "partial-succeeded": "detail_partial_default",
    "failed": "detail_failed",
    "stopped": "detail_stopped",
}

NOT_FOUND = {"code": "not_found", "message": "Workflow run not found.", "status": 404}


def run_detail(dialect: str, status: str, run_id: str, replaced: dict[str, Any]) -> dict[str, Any]:
    """
    Return the detail of a run as the dialect's server writes it.

    :param dialect: one of :data:`DIALECTS`.
    :param status: the run's status, or the name of a recording, such as ``detail_failed_parallel``.
    :param run_id: the run's id.
    :param replaced: fields to replace, ``outputs`` as an object.
    :return: the fields of the JSON object.
    """
    name = status if status.startswith("detail_") else RECORDING_OF_STATUS.get(status, "detail_running_t0")
    recording = Recording.load(name)
    recorded_id = recording.fields()["id"]
    fields = json.loads(recording.body.replace(recorded_id.encode(), run_id.encode()))
    if name != status:
        fields["status"] = status
    if fields["finished_at"] is None:
        # One that is not over has begun lately, whenever the answer was recorded.
        fields["created_at"] = int(time.time())
    fields.update(replaced)
    outputs = fields["outputs"]
    if dialect == "1.12" and isinstance(outputs, dict) and "outputs" in replaced:
        fields["outputs"] = json.dumps(outputs)
    if dialect == "current" and (outputs is None or isinstance(outputs, str)):
        fields["outputs"] = json.loads(outputs) if outputs else {}
    return fields


def unknown_run(dialect: str) -> web.Response:
    """Return the response to a run id that the server doesn't know."""
    if dialect == "current":
        return web.json_response(NOT_FOUND, status=404)
    return Recording.load("detail_unknown_uuid").response()
