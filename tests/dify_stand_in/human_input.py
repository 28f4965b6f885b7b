"""The routes that Dify has since 1.14: a run's events once more, and the forms of paused runs."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tests.dify_stand_in.events import PING, dump, finished, snapshot
from tests.dify_stand_in.recordings import json_response
from tests.dify_stand_in.runs import Run, is_run_id

if TYPE_CHECKING:
    from tests.dify_stand_in.server import DifyStandIn


class HumanInput:
    """
    Responds to requests for events and forms.

    :param stand_in: what has the settings and the runs.
    """

    def __init__(self, stand_in: DifyStandIn) -> None:
        self.stand_in = stand_in

    # --- events

    async def events(self, request: web.Request, run_id: str) -> web.StreamResponse:
        """Respond with the events of a run: what comes from now on, or a snapshot of all and then the rest."""
        dialect = self.stand_in.dialect_rules
        user = request.query.get("user")
        if not dialect.has_human_input_api:
            return dialect.response("events_unknown")
        if not user:
            return dialect.response("events_running_no_user")
        if not is_run_id(run_id):
            return dialect.response("detail_not_a_uuid")
        run = self.stand_in.runs.get(run_id)
        if run is None or run.now is None or run.user != user:
            return dialect.response("events_unknown")
        response = dialect.event_stream()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            await self._send(run, request.query, response)
        return response

    async def _send(self, run: Run, query: Any, response: web.StreamResponse) -> None:
        now = run.now
        assert now is not None
        if run.finished:
            await response.write(dump(finished(run.id, run.id, now, run.user)))
            return
        sent = len(run.events.data)
        await response.write(PING)
        goes_on_after_pause = True
        if query.get("include_state_snapshot") == "true":
            paused = run.status == "paused"
            # The real task id is in that of a paused run only.
            await response.write(snapshot(bytes(run.events.data[:sent]), run.task_id if paused else run.id))
            goes_on_after_pause = query.get("continue_on_pause") == "true"
            if paused and not goes_on_after_pause:
                return
        while True:
            if len(run.events.data) > sent:
                more = bytes(run.events.data[sent:])
                sent += len(more)
                await response.write(more)
                continue
            if run.events.closed and not self._more_may_come(run, goes_on_after_pause):
                return
            if not await run.events.wait(self.stand_in.ping_interval):
                await response.write(PING)

    def _more_may_come(self, run: Run, goes_on_after_pause: bool) -> bool:
        if run.status == "paused":
            return goes_on_after_pause
        # A run that was stopped, or whose events were never there, has only pings while its record says running.
        return not run.finished

    # --- forms

    async def get_form(self, request: web.Request, token: str) -> web.Response:
        """Respond with the form of this token."""
        found = self._find(token)
        if isinstance(found, web.Response):
            return found
        assert found.form is not None
        fields = found.form.fields
        recorded = self.stand_in.dialect_rules.recording("form_get").fields()
        kept = {key: fields[key] for key in recorded.keys() & fields.keys()}
        return json_response(recorded | kept | {"user_actions": fields["actions"]})

    async def submit_form(self, request: web.Request, token: str) -> web.Response:
        """Take what a person entered, and let the run continue."""
        found = self._find(token)
        if isinstance(found, web.Response):
            return found
        body = await request.json()
        if not body.get("user"):
            return self.stand_in.dialect_rules.response("stop_no_user")
        wrong = self.submit(found, body.get("action"), body.get("inputs") or {})
        if wrong is not None:
            return json_response({"code": "invalid_form_data", "message": wrong, "status": 400}, status=400)
        return json_response({})

    def submit(self, run: Run, action: Any, inputs: dict[str, Any]) -> str | None:
        """
        Submit the form of a paused run.

        :param run: the run.
        :param action: the id of one of the form's actions.
        :param inputs: what a person entered, by name.
        :return: what is wrong with it; ``None`` if it was taken, and the run continues.
        """
        assert run.form is not None
        if action not in [known["id"] for known in run.form.fields["actions"]]:
            return f"Invalid action: {action}"
        names = [field["output_variable_name"] for field in run.form.fields["inputs"]]
        missing = [name for name in names if name not in inputs]
        if missing:
            return f"Missing required inputs: {', '.join(missing)}"
        run.form.submitted = True
        self.stand_in.spawn(self.stand_in.execution.resume(run, inputs))
        return None

    def _find(self, token: str) -> Run | web.Response:
        dialect = self.stand_in.dialect_rules
        if not dialect.has_human_input_api:
            return dialect.response("form_get_unknown")
        run = next((run for run in self.stand_in.runs.values() if run.form and run.form.token == token), None)
        if run is None or run.form is None:
            return json_response({"code": "not_found", "message": "Form not found", "status": 404}, status=404)
        if run.form.submitted:
            message = f"This form has already been submitted by another user, form_id={run.form.form_id}"
            body = {"code": "human_input_form_submitted", "message": message, "status": 412}
            return json_response(body, status=412)
        return run
