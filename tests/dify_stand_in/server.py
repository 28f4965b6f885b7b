"""The server: its settings, its runs, how it misbehaves, and its life."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import ssl
import threading
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

from aiohttp import web

from tests.dify_stand_in.dialects import DIALECT_OF_VERSION, RESUMED_ON_1_16
from tests.dify_stand_in.exchanges import Exchange, exchanges, user_of
from tests.dify_stand_in.execution import Execution
from tests.dify_stand_in.faults import STAND_IN, Fault
from tests.dify_stand_in.files import Files
from tests.dify_stand_in.input_form import Form
from tests.dify_stand_in.routes import Routes
from tests.dify_stand_in.runs import ReceivedRequest, Run, Start, Started

API_KEY = "app-key-of-the-stand-in"


class DifyStandIn:
    """
    The stand-in, in a thread of its own, on a free port of the loopback interface.

    :param dialect: the version that it speaks like, one of :data:`~tests.dify_stand_in.DIALECTS`, or ``current``.
    :param port: port to listen on; a free one by default.
    :param tls: server side TLS settings, for an https stand-in.
    """

    def __init__(self, dialect: str = "1.12.1", *, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.dialect_rules = DIALECT_OF_VERSION[dialect]
        self.dialect = self.dialect_rules.version
        self.port = port
        self.tls = tls
        self.api_keys = {API_KEY}
        self.runs: dict[str, Run] = {}
        #: The recording of ``GET /info``, and with it the app's mode.
        self.app_info = "app_info"
        #: All requests so far.
        self.requests: list[ReceivedRequest] = []
        #: How the next starts go, one after another; then as ``Start()``.
        self.starts: deque[Start] = deque()
        #: The starts that were taken, and the runs of them. A run stands in ``log`` as soon as it has begun.
        self.started: list[Started] = []
        self.accepted: list[Run] = []
        #: Those among them that were not over when a start was last taken or turned away.
        self.active: list[Run] = []
        self.log: list[Run] = []
        #: Task ids that it was asked to stop, and by which user.
        self.stopped: list[tuple[str, str]] = []
        #: Uploaded files by their ids: name and content; user; content type.
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self.upload_users: dict[str, str] = {}
        self.upload_types: dict[str, str] = {}

        #: Seconds that a run runs and holds its slot, unless its :class:`Start` says it. 0: over at once.
        self.run_duration = 0.0
        #: Seconds without a slot, or after a rejected input on 1.13 and 1.14, after which the stream ends. Dify: 300.
        self.silence_limit = 300.0
        #: Seconds between the pings of a run that has begun. Dify: 10.
        self.ping_interval = 10.0
        #: Seconds from the last event to the end of the stream. Dify 1.13.0 and 1.14.2: 1.
        self.close_delay = 0.0
        #: Seconds from a stop until the detail says so, on versions that write it.
        self.stop_delay = 0.2
        #: Seconds that a run takes to its end after its form was sent.
        self.resume_duration = 0.1
        #: What 1.16.1 says of a run that went on after its form: it has two texts for that.
        self.resumed_error = RESUMED_ON_1_16
        #: Whether the detail stays ``running`` after a stop; ``None``: as the version does.
        self.stop_leaves_running: bool | None = None
        #: Starts are turned away while so many runs are queued or running.
        self.active_runs_limit: int | None = None
        #: The form that inputs are checked against. ``None``: ``GET /parameters`` shows the recorded form with nothing
        #: required in it, and nothing is checked.
        self.user_input_form: Form | None = None
        #: Headers that something in front of Dify adds to each response.
        self.added_headers: dict[str, str] = {}
        #: Whether the response to a start names its run in a header, as a branch of Dify does.
        self.announces_runs = False
        #: Bytes of a file that are too many.
        self.upload_limit = 15 * 1024 * 1024
        #: What the URLs of files begin with: ``FILES_URL``, without which they are relative.
        self.files_url = ""
        #: Seconds for which they are good (``FILES_ACCESS_TIMEOUT``), and how old they are when a run ends.
        self.files_lifetime = 300.0
        self.files_age = 0.0
        #: What a started run returns, by its end: a function of the run.
        self.outputs_of: Callable[[Run], dict[str, Any]] | None = None
        #: Whether a run's row appears in the log only at its end, as before about Dify 1.9.
        self.log_row_at_end = False
        #: Whether the log ignores the parameter with the user, as a server that doesn't know it would.
        self.logs_ignore_user = False
        #: Whether the detail of a started run has the inputs of its start, and returns them as its outputs.
        self.echoes_inputs = False

        #: What makes epoch seconds of a request's time.
        self.epoch = time.time() - time.monotonic()
        self.fault_count = 0
        self._faults: list[tuple[Fault, str]] = []
        self._always: tuple[Fault, str] | None = None
        self._sometimes: tuple[float, tuple[Fault, ...]] = (0.0, ())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dify-stand-in", daemon=True)
        self._connections: dict[tuple[str, int], int] = {}
        self._exchanges: dict[int, Exchange] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.execution = Execution(self)
        self.files = Files(self)
        self.routes = Routes(self)

    # --- life

    def __enter__(self) -> DifyStandIn:
        self._thread.start()
        self._do(self._start())
        exchanges.open_ports.add(self.port)
        return self

    def __exit__(self, *_: object) -> None:
        exchanges.open_ports.discard(self.port)
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
        app[STAND_IN] = self
        app.router.add_route("*", "/{path:.*}", self._handle)
        app.on_response_prepare.append(self._add_headers)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, keepalive_timeout=30)
        await self._runner.setup()
        await self._listen()

    async def _listen(self) -> None:
        self._site = web.TCPSite(
            self._runner, "127.0.0.1", self.port, ssl_context=self.tls, reuse_address=True, backlog=2048
        )
        await self._site.start()
        self.port = self._site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside the request that is being handled."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """The base URL of the API."""
        return f"{self.origin}/v1"

    @property
    def app_mode(self) -> str:
        """The mode of the app that the key belongs to."""
        return str(self.dialect_rules.recording(self.app_info).fields()["mode"])

    @property
    def connections_opened(self) -> int:
        """How many connections the requests came through."""
        return len(self._connections)

    # --- runs

    def add_run(
        self,
        *statuses: str | None,
        run_id: str | None = None,
        user: str | None = None,
        fault_after_first: Fault | None = None,
        duration: float | None = None,
        **fields: Any,
    ) -> str:
        """
        Add a workflow run.

        :param statuses: a status a poll, ``None`` for "not written yet"; the last one stays. A status may also be the
            name of a recording, such as ``detail_failed_parallel``.
        :param run_id: its id; a new one by default.
        :param user: who started it; with a user it is in the log, too.
        :param fault_after_first: how to misbehave at each poll of this run but the first.
        :param duration: seconds from the first poll after which it has the last status, until then the first.
        :param fields: fields of the recorded response to replace, ``outputs`` as an object.
        :return: its id.
        """
        run_id = run_id or str(uuid.uuid4())
        responses = deque(
            None if status is None else self.dialect_rules.run_detail(status, run_id, fields) for status in statuses
        )
        known = self.runs.get(run_id)
        if known is not None and known.start is not None:
            # What a started run's polls find from now on.
            known.responses = responses
            return run_id
        run = Run(run_id, responses, fault_after_first, duration, task_id=str(uuid.uuid4()), user=user or "")
        self.runs[run_id] = run
        if user is not None:
            self.log.append(run)
        return run_id

    def add_logged_runs(
        self,
        count: int,
        *,
        user: str | Callable[[int], str] = "somebody",
        status: str = "succeeded",
        ending: float | None = None,
    ) -> list[str]:
        """
        Add many runs to the log.

        :param count: how many.
        :param user: who started them, or what returns that for each, by its number from 0.
        :param status: what they all have.
        :param ending: when the last of them was created, in epoch seconds; one a second before it; now by default.
        :return: their ids, the oldest first.
        """
        detail = self.dialect_rules.run_detail(status, str(uuid.uuid4()), {})
        oldest = int(time.time() if ending is None else ending) - count + 1
        ids = [str(uuid.uuid4()) for _ in range(count)]
        for number, run_id in enumerate(ids):
            created = {"id": run_id, "created_at": oldest + number}
            name = user if isinstance(user, str) else user(number)
            self.runs[run_id] = Run(run_id, deque([{**detail, **created}]), user=name)
            self.log.append(self.runs[run_id])
        return ids

    @property
    def slots(self) -> int | None:
        """How many streaming starts run at once; the others queue. ``None``: all. 0 keeps all of them queued."""
        return self.execution.slots.count

    @slots.setter
    def slots(self, count: int | None) -> None:
        self.execution.slots.count = count
        self._loop.call_soon_threadsafe(self.execution.slots.serve)

    def submit_form(self, run_id: str, action: str = "yes", **inputs: Any) -> str | None:
        """
        Submit the form of a paused run, as a person does in Dify's web app (on 1.13.0 nothing else can).

        :param run_id: the run.
        :param action: the id of the action, ``yes`` or ``no`` in the recorded form.
        :param inputs: what the person entered; ``comment`` in the recorded form.
        :return: what is wrong with it, or ``None``.
        """

        async def submit() -> str | None:
            return self.routes.human_input.submit(self.runs[run_id], action, inputs)

        wrong: str | None = self._do(submit())
        return wrong

    # --- how it misbehaves

    def misbehave(self, *faults: Fault, times: int = 1, only: str = "") -> None:
        """
        Respond to the next requests with these faults, in order.

        :param faults: the faults.
        :param times: how often the whole series.
        :param only: a regular expression for the requests that get them, such as ``POST`` or ``GET .*/logs``.
        """
        self._faults.extend((fault, only) for fault in faults * times)

    def misbehave_always(self, fault: Fault | None, only: str = "") -> None:
        """Respond to every request, or those that ``only`` matches, with this fault, until called with ``None``."""
        self._always = None if fault is None else (fault, only)

    def misbehave_sometimes(self, share: float, *faults: Fault) -> None:
        """Respond to this share of the requests for a run's detail with one of these faults, by chance."""
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

    # --- requests

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        number = self._connections.setdefault(request.transport.get_extra_info("peername"), len(self._connections))
        self.requests.append(
            ReceivedRequest(request.method, request.raw_path, dict(request.headers), time.monotonic(), number)
        )
        path = request.raw_path
        for key in self.api_keys:
            path = path.replace(key, "***")
        exchange = self._exchanges[id(request)] = exchanges.add(Exchange(self.port, request.method, path))
        fault = self._fault(request)
        try:
            response = await self.respond_to(request) if fault is None else await fault(request)
            if request.transport is not None and not request.transport.is_closing():
                exchange.status = response.status
            return response
        finally:
            exchange.user = user_of(request)
            del self._exchanges[id(request)]

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(self.added_headers)
        # A stream's handler still goes on.
        exchange = self._exchanges.get(id(request))
        if exchange is not None:
            exchange.status, exchange.user = response.status, user_of(request)

    def _fault(self, request: web.Request) -> Fault | None:
        line = f"{request.method} {request.raw_path}"
        for number, (fault, only) in enumerate(self._faults):
            if re.search(only, line):
                del self._faults[number]
                return fault
        if self._always is not None and re.search(self._always[1], line):
            return self._always[0]
        run = self.runs.get(request.path.rpartition("/")[2])
        chosen = run.fault_after_first if run and run.polls else None
        share, faults = self._sometimes
        if run and random.random() < share:
            chosen = random.choice(faults)
            self.fault_count += 1
        return chosen

    async def respond_to(self, request: web.Request) -> web.StreamResponse:
        """Respond as Dify does, without faults."""
        return await self.routes.respond(request)
