"""The routes of Dify's Service API."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from aiohttp import web

from tests.dify_stand_in.dialects import Dialect
from tests.dify_stand_in.human_input import HumanInput
from tests.dify_stand_in.input_form import nothing_required
from tests.dify_stand_in.logs import logs
from tests.dify_stand_in.recordings import json_response
from tests.dify_stand_in.runs import is_run_id
from tests.dify_stand_in.starts import Accepted, Starts

if TYPE_CHECKING:
    from tests.dify_stand_in.server import DifyStandIn


class Routes:
    """
    Responds to requests as Dify does.

    :param stand_in: what has the settings and the runs.
    """

    def __init__(self, stand_in: DifyStandIn) -> None:
        self.stand_in = stand_in
        self.starts = Starts(stand_in)
        self.human_input = HumanInput(stand_in)

    @property
    def dialect(self) -> Dialect:
        """The version that the stand-in speaks like."""
        return self.stand_in.dialect_rules

    async def respond(self, request: web.Request) -> web.StreamResponse:
        """Respond to any request, with the ``X-Version`` header that every response of the API has."""
        if request.raw_path.startswith("/app/"):
            return web.Response(text="<title>A page of Dify's console</title>", content_type="text/html")
        if "//" in request.raw_path:
            response = self.dialect.response("detail_double_slash")
            response.headers["Location"] = f"{self.stand_in.origin}{request.raw_path.replace('//', '/')}"
            return self._with_version(response)
        if request.raw_path.startswith("/files/"):
            return await self.stand_in.files.respond(request)
        if not request.raw_path.startswith("/v1/"):
            return self._no_such_route()
        refused = self._refused(request)
        if refused is not None:
            return self._with_version(refused)
        post = self._post if request.method == "POST" else self._get
        return self._with_version(await post(request, request.raw_path.partition("?")[0].split("/")[2:]))

    def _with_version(self, response: web.StreamResponse) -> web.StreamResponse:
        if not response.prepared:
            response.headers["X-Version"] = self.dialect.server_version
        return response

    async def _get(self, request: web.Request, path: list[str]) -> web.StreamResponse:
        match path:
            case ["info"]:
                return self.dialect.response(self.stand_in.app_info)
            case ["parameters"]:
                return self._parameters()
            case ["workflows", "logs"]:
                return logs(self.stand_in, request.query)
            case ["workflows", "run", ""]:
                return self.dialect.response("detail_empty_id")
            case ["workflows", "run", run_id]:
                return self.run_detail(run_id)
            case ["workflow", run_id, "events"]:
                return await self.human_input.events(request, run_id)
            case ["form", "human_input", token]:
                return await self.human_input.get_form(request, token)
        return self._no_such_route()

    async def _post(self, request: web.Request, path: list[str]) -> web.StreamResponse:
        match path:
            case ["workflows", "run"] | ["workflows", _, "run"]:
                return await self.starts.respond(request, self._workflow_id(path))
            case ["workflows", "tasks", task_id, "stop"]:
                return await self._stop(request, task_id)
            case ["files", "upload"]:
                return await self._upload(request)
            case ["form", "human_input", token]:
                return await self.human_input.submit_form(request, token)
        return self._no_such_route()

    def _workflow_id(self, path: list[str]) -> str | None:
        return path[1] if len(path) == 3 else None

    def _no_such_route(self) -> web.StreamResponse:
        return self._with_version(self.dialect.response("detail_no_v1_prefix"))

    def _refused(self, request: web.Request) -> web.Response | None:
        authorization = request.headers.get("Authorization", "")
        if not authorization.startswith("Bearer "):
            return self.dialect.response("auth_none")
        if authorization.removeprefix("Bearer ") not in self.stand_in.api_keys:
            return self.dialect.response("auth_bad_key")
        return None

    async def accept_start(self, request: web.Request) -> web.Response | Accepted:
        """Take a request to start a run, and leave the response to the caller."""
        return await self.starts.accept(request, self._workflow_id(request.raw_path.split("/")[2:]))

    def run_detail(self, run_id: str) -> web.Response:
        """Return the response to ``GET /workflows/run/{run_id}``."""
        if self.stand_in.app_mode not in ("workflow", "advanced-chat"):
            return self.dialect.response("detail_key_of_chat_app")
        if not is_run_id(run_id):
            return self.dialect.response("detail_not_a_uuid")
        run = self.stand_in.runs.get(run_id)
        fields = run.poll() if run else None
        return self.dialect.response("detail_unknown_uuid") if fields is None else json_response(fields)

    def _parameters(self) -> web.Response:
        fields = self.dialect.recording("app_parameters").fields()
        form = self.stand_in.user_input_form
        fields["user_input_form"] = nothing_required(fields["user_input_form"]) if form is None else form
        return json_response(fields)

    async def _stop(self, request: web.Request, task_id: str) -> web.Response:
        body = await request.json()
        if not body.get("user"):
            return self.dialect.response("stop_no_user")
        self.stand_in.stopped.append((task_id, body["user"]))
        self.stand_in.execution.stop(task_id)
        return self.dialect.response("stop")

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        part = form.get("file")
        if not isinstance(part, web.FileField):
            return self.dialect.response("file_upload_no_file")
        if "Content-Type" not in part.headers:
            body = {"code": "unsupported_file_type", "message": "File type not allowed.", "status": 415}
            return json_response(body, status=415)
        content = part.file.read()
        if len(content) > self.stand_in.upload_limit:
            return self.dialect.response("file_upload_too_large")
        file_id = str(uuid.uuid4())
        user = str(form.get("user", "DEFAULT-USER"))
        self.stand_in.uploads[file_id] = (part.filename, content)
        self.stand_in.upload_users[file_id] = user
        self.stand_in.upload_types[file_id] = part.content_type
        fields = self.dialect.recording("file_upload").fields()
        known = {"id": file_id, "name": part.filename, "size": len(content), "mime_type": part.content_type}
        return json_response({**fields, **known}, status=201)
