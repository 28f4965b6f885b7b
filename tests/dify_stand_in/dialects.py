"""What differs between the Dify versions that the stand-in speaks like."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tests.dify_stand_in.recordings import VERSIONS, Recording, nearest

RECORDING_OF_STATUS = {
    "running": "detail_running_t0",
    "scheduled": "detail_running_t0",
    "paused": "detail_paused",
    "succeeded": "detail_succeeded_echo",
    "partial-succeeded": "detail_partial_default",
    "failed": "detail_failed",
    "stopped": "detail_stopped",
}
FINISHED = ("succeeded", "partial-succeeded", "failed", "stopped")
RESUMED_ON_1_16 = "Aborted: Client response stream closed before app execution completed"


@dataclass(frozen=True)
class Dialect:
    """
    How one version of Dify behaves, where the versions differ.

    :param version: the version.
    :param queues_starts: whether a streaming start waits for a free slot, after a first ping.
    :param rejection: what a streaming start with wrong inputs gets: ``error`` (a 400), ``silence`` (a ping, then
        nothing, then the end of the stream) or ``phantom`` (the events of a run that fails and that no route knows).
    :param outputs_as_text: whether a run's detail has its outputs as JSON text.
    :param has_human_input_api: whether it has the routes for events and forms.
    :param stop_is_recorded: whether a run's detail says ``stopped`` after a stop.
    :param resumed_status: how a run ends that a form lets continue (1.13.0 has not been measured).
    :param stop_text: what a stream says of a stop (on 1.17 mostly).
    :param checks_file_owner: whether it rejects a file that another user uploaded.
    """

    version: str
    queues_starts: bool = True
    rejection: str = "phantom"
    outputs_as_text: bool = False
    has_human_input_api: bool = True
    stop_is_recorded: bool = False
    resumed_status: str = "succeeded"
    stop_text: str = "Stopped by user."
    checks_file_owner: bool = True

    @property
    def server_version(self) -> str:
        """The version as the header ``X-Version`` says it. The source of 1.17 still says 1.16.1, its release this."""
        return "1.17.0" if self.version == "1.17" else self.version

    def recording(self, name: str) -> Recording:
        """Load this version's recording, or the nearest version's."""
        return Recording.load(name, self.version)

    def response(self, name: str) -> web.Response:
        """Return the response of a recording."""
        return self.recording(name).response()

    def event_stream(self) -> web.StreamResponse:
        """Return the response for a stream of events, still to be prepared."""
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "X-Version": self.server_version}
        return web.StreamResponse(headers=headers)

    def run_detail(self, status: str, run_id: str, replaced: dict[str, Any]) -> dict[str, Any]:
        """
        Return the detail of a run as this version writes it.

        :param status: the run's status, or the name of a recording, such as ``detail_failed_parallel``.
        :param run_id: the run's id.
        :param replaced: fields to replace, ``outputs`` as an object.
        :return: the fields of the JSON object.
        """
        recording = self._recorded_detail(status)
        recorded_id = recording.fields()["id"]
        fields: dict[str, Any] = json.loads(recording.body.replace(recorded_id.encode(), run_id.encode()))
        if not status.startswith("detail_"):
            fields["status"] = status
        if fields["finished_at"] is None:
            # One that has not finished began a moment ago, whenever the response was recorded.
            fields["created_at"] = int(time.time())
        fields.update(replaced)
        outputs = fields["outputs"]
        if self.outputs_as_text:
            # Where a test replaces the outputs, by text or null, these are what it wants.
            fields["outputs"] = json.dumps(outputs) if isinstance(outputs, dict) else outputs
        elif outputs is None or isinstance(outputs, str):
            fields["outputs"] = json.loads(outputs) if outputs else {}
        return fields

    def _recorded_detail(self, status: str) -> Recording:
        if status.startswith("detail_"):
            return self.recording(status)
        name = RECORDING_OF_STATUS.get(status, "detail_running_t0")
        # The detail of a run that 1.13.0 or 1.14.2 was asked to stop still says running.
        recordings = [Recording.load(name, version) for version in nearest(self.version)]
        return next((found for found in recordings if found.fields()["status"] == status), recordings[0])


_DIALECTS = (
    Dialect(
        "1.12.1",
        queues_starts=False,
        rejection="error",
        outputs_as_text=True,
        has_human_input_api=False,
        checks_file_owner=False,
    ),
    Dialect("1.13.0", rejection="silence", has_human_input_api=False, checks_file_owner=False),
    Dialect("1.14.2", rejection="silence"),
    Dialect("1.15.0"),
    Dialect("1.16.1", stop_is_recorded=True, resumed_status="stopped"),
    Dialect("1.17", stop_is_recorded=True, stop_text="Aborted: User requested stop"),
)
DIALECT_OF_VERSION = {dialect.version: dialect for dialect in _DIALECTS}
assert tuple(DIALECT_OF_VERSION) == VERSIONS
DIALECT_OF_VERSION["current"] = DIALECT_OF_VERSION["1.17"]

DIALECTS = VERSIONS
