"""The server: what it knows, how it misbehaves, how it responds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
import threading
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Iterator
from typing import Any

from aiohttp import web

from tests.dify_stand_in.dialects import DIALECTS, run_detail, unknown_run
from tests.dify_stand_in.faults import Fault
from tests.dify_stand_in.recordings import Recording
from tests.dify_stand_in.runs import ReceivedRequest, Run, Start, Started

API_KEY = "app-key-of-the-stand-in"


class DifyStandIn:
    """
    The stand-in, in a thread of its own, on a free port of the loopback interface.

    :param dialect: ``1.12`` or ``current``.
    :param port: port to listen on; a free one by default.
    :param tls: server side TLS settings, for an https stand-in.
    """

    def __init__(self, dialect: str = "1.12", *, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        assert dialect in DIALECTS
        self.dialect = dialect
        self.port = port
        self.tls = tls
        self.api_keys = {API_KEY}
        self.runs: dict[str, Run] = {}
        self.app_info = "app_info"
        self.requests: list[ReceivedRequest] = []
        self.starts: deque[Start] = deque()
        self.started: list[Started] = []
        # Task ids that it was asked to stop, and by whom; the runs stop, unless they are to be orphaned.
        self.stopped: list[tuple[str, str]] = []
        self.stop_leaves_running = False
        self.log_row_at_end = False
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self._faults: deque[Fault] = deque()
        self._always: Fault | None = None
        self._sometimes: tuple[float, tuple[Fault, ...]] = (0.0, ())
        self.fault_count = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dify-stand-in", daemon=True)
        self._connections: dict[tuple[str, int], int] = {}

    # --- life

    def __enter__(self) -> DifyStandIn:
        self._thread.start()
        self._do(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _stop(self) -> None:
        await self._runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _do(self, work: Awaitable[Any]) -> Any:
        async def await_it() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(await_it(), self._loop).result(30)

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, keepalive_timeout=30)
        await self._runner.setup()
        await self._listen()

    async def _listen(self) -> None:
        self._site = web.TCPSite(
            self._runner, "127.0.0.1", self.port, ssl_context=self.tls, reuse_address=True, backlog=2048
        )
        await self._site.start()
        self.port = self._site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    @property
    def origin(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        return f"{self.origin}/v1"

    # --- what it knows

    def add_run(
        self,
        *statuses: str | None,
        run_id: str | None = None,
        fault_after_first: Fault | None = None,
        duration: float | None = None,
        **fields: Any,
    ) -> str:
        """
        Add a workflow run.

        :param statuses: a status a poll, ``None`` for "not written yet"; the last one stays. A status may also be the
            name of a recording, such as ``detail_failed_parallel``.
        :param run_id: its id; a new one by default.
        :param fault_after_first: how to misbehave at each poll of this run but the first.
        :param duration: seconds from the first poll after which it has the last status, until then the first.
        :param fields: fields of the recorded answer to replace, ``outputs`` as an object.
        :return: its id.
        """
        run_id = run_id or str(uuid.uuid4())
        responses = deque(
            None if status is None else run_detail(self.dialect, status, run_id, fields) for status in statuses
        )
        self.runs[run_id] = Run(run_id, responses, fault_after_first, duration)
        return run_id

    # --- how it misbehaves

    def misbehave(self, *faults: Fault, times: int = 1) -> None:
        """Answer the next requests with these faults, in order, the whole series ``times`` times."""
        self._faults.extend(faults * times)

    def misbehave_always(self, fault: Fault | None) -> None:
        """Answer every request with this fault, until called again with ``None``."""
        self._always = fault

    def misbehave_sometimes(self, share: float, *faults: Fault) -> None:
        """Answer this share of the requests for a run's detail with one of these faults, by chance."""
        self._sometimes = (share, faults)

    @contextlib.contextmanager
    def refusing_connections(self) -> Iterator[None]:
        """Refuse connections for a while, and drop the open ones."""
        self._do(self._stop_listening())
        try:
            yield
        finally:
            self._do(self._listen())

    async def _stop_listening(self) -> None:
        await self._site.stop()
        for handler in self._runner.server.connections:  # type: ignore[union-attr]
            if handler.transport is not None:
                handler.transport.abort()

    # --- answering

    @property
    def connections_opened(self) -> int:
        """How many connections the requests came through."""
        return len(self._connections)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        number = self._connections.setdefault(request.transport.get_extra_info("peername"), len(self._connections))
        self.requests.append(
            ReceivedRequest(request.method, request.raw_path, dict(request.headers), time.monotonic(), number)
        )
        fault = self._faults.popleft() if self._faults else self._always
        if fault is None:
            run = self.runs.get(request.path.rpartition("/")[2])
            fault = run.fault_after_first if run and run.polls else None
            share, faults = self._sometimes
            if run and random.random() < share:
                fault = random.choice(faults)
                self.fault_count += 1
        if fault is not None:
            return await fault(request)
        return await self.respond_to(request)

    async def respond_to(self, request: web.Request) -> web.StreamResponse:
        """Respond as Dify does, without faults."""
        return await self._post(request) if request.method == "POST" else self._dify(request)

    async def _post(self, request: web.Request) -> web.StreamResponse:
        refused = self._refused(request)
        if refused is not None:
            return refused
        path = request.path.removeprefix("/v1")
        if path == "/files/upload":
            return await self._upload(request)
        body = await request.json()
        if path.startswith("/workflows/tasks/"):
            return self._stop_task(path.split("/")[3], body)
        if path == "/workflows/run" or (path.startswith("/workflows/") and path.endswith("/run")):
            return await self._start_run(request, body, None if path == "/workflows/run" else path.split("/")[2])
        return Recording.load("detail_no_v1_prefix").response()

    async def _start_run(
        self, request: web.Request, body: dict[str, Any], workflow_id: str | None
    ) -> web.StreamResponse:
        if not body.get("user"):
            return Recording.load("run_missing_user").response()
        start = self.starts.popleft() if self.starts else Start()
        recording = Recording.load(start.recording)
        if recording.status != 200:
            return recording.response()
        stream = recording.body
        first = json.loads(stream.split(b"\n\n")[0].removeprefix(b"data: "))
        run = Started(str(uuid.uuid4()), str(uuid.uuid4()), body["user"], body["inputs"], workflow_id)
        stream = stream.replace(first["workflow_run_id"].encode(), run.workflow_run_id.encode())
        stream = stream.replace(first["task_id"].encode(), run.task_id.encode())
        self.add_run(*start.statuses, run_id=run.workflow_run_id, **start.fields)
        self.started.append(run)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        sent = stream[: start.cut]
        # A client that hangs up is no trouble of the run.
        with contextlib.suppress(ConnectionError):
            for begin in range(0, len(sent), start.piece):
                await response.write(sent[begin : begin + start.piece])
            await self._at_the_cut(start, request, response)
        return response

    async def _at_the_cut(self, start: Start, request: web.Request, response: web.StreamResponse) -> None:
        assert request.transport is not None
        if start.then == "reset":
            request.transport.abort()
        elif start.then == "stall":
            await asyncio.sleep(30)
        elif start.then == "pings":
            while True:
                await response.write(b"event: ping\n\n")
                await asyncio.sleep(0.1)
        elif start.cut is not None:
            request.transport.close()

    def _stop_task(self, task_id: str, body: dict[str, Any]) -> web.Response:
        if not body.get("user"):
            return Recording.load("stop_no_user").response()
        self.stopped.append((task_id, body["user"]))
        for run in self.started:
            if run.task_id == task_id and not self.stop_leaves_running:
                self.add_run("stopped", run_id=run.workflow_run_id)
        return Recording.load("stop_ok").response()

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        part = form.get("file")
        if not isinstance(part, web.FileField):
            return Recording.load("file_upload_no_file").response()
        file_id = str(uuid.uuid4())
        self.uploads[file_id] = (part.filename, part.file.read())
        return web.json_response({**Recording.load("file_upload").fields(), "id": file_id}, status=201)

    def _logs(self, request: web.Request) -> web.Response:
        asked = request.query
        if int(asked.get("limit", 20)) > 100:
            return Recording.load("logs_bad_limit").response()
        recorded = Recording.load("logs").fields()
        rows = []
        for run in reversed(self.started):
            now = self.runs[run.workflow_run_id].responses[0]
            # Servers since about 1.9 write a run's row when the run starts, older ones when it ends.
            if now is None or (self.log_row_at_end and now["status"] in ("running", "scheduled")):
                continue
            row = json.loads(json.dumps(recorded["data"][0]))
            kept = row["workflow_run"].keys() & now.keys()
            row["workflow_run"].update({key: now[key] for key in kept})
            row["created_by_end_user"]["session_id"] = run.user
            if run.user == asked.get("created_by_end_user_session_id", run.user) and now["status"] == asked.get(
                "status", now["status"]
            ):
                rows.append(row)
        return web.json_response({**recorded, "total": len(rows), "has_more": False, "data": rows})

    def _dify(self, request: web.Request) -> web.Response:
        path = request.raw_path
        if "//" in path:
            target = path.replace("//", "/")
            response = Recording.load("detail_double_slash").response()
            response.headers["Location"] = f"{self.origin}{target}"
            return response
        if path.startswith("/app/"):
            return web.Response(text="<title>A page of Dify's console</title>", content_type="text/html")
        refused = self._refused(request)
        if refused is not None:
            return refused
        if path.startswith("/v1/workflows/logs"):
            return self._logs(request)
        if path == "/v1/info":
            return Recording.load(self.app_info).response()
        if path == "/v1/workflows/run/":
            return Recording.load("detail_empty_id").response()
        if path.startswith("/v1/workflows/run/"):
            return self._run_detail(path.removeprefix("/v1/workflows/run/"))
        return Recording.load("detail_no_v1_prefix").response()

    def _refused(self, request: web.Request) -> web.Response | None:
        if not request.raw_path.startswith("/v1/"):
            return Recording.load("detail_no_v1_prefix").response()
        authorization = request.headers.get("Authorization", "")
        if not authorization.startswith("Bearer "):
            return Recording.load("auth_none").response()
        if authorization.removeprefix("Bearer ") not in self.api_keys:
            return Recording.load("auth_bad_key").response()
        return None

    def _run_detail(self, run_id: str) -> web.Response:
        try:
            if str(uuid.UUID(run_id)) != run_id:
                raise ValueError
        except ValueError:
            return Recording.load("detail_not_a_uuid").response()
        run = self.runs.get(run_id)
        fields = run.poll() if run else None
        if fields is not None:
            return web.json_response(fields)
        return unknown_run(self.dialect)
