"""
The TLS server that every contender polls: one process, answers from memory, the same runs behind four routes.

A wait is a number. The run that it waits on is running until the moment that :meth:`Scenario.finish_of` gives. The
counts are read, and the scenario is set, through a second port without TLS, so that this is not counted itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from aiohttp import web

RECORDED = Path(__file__).resolve().parent.parent / "tests" / "recorded" / "1.12.1" / "detail_succeeded_echo.http"
STREAM = RECORDED.parent.parent / "1.16.1" / "run_streaming_echo.http"
VERSION = {"X-Version": "1.16.1"}
# One answer of ten goes wrong where a scenario asks for it.
FAULTY_ONE_IN = 10
STALL_SECONDS = 3.0
# Multiples of it modulo 1 spread evenly and in no order, so that runs don't finish in the order of their waits' polls.
GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class Scenario:
    """
    What the server is to play.

    :param finish_at: when the first run finishes, on the monotonic clock, which all processes of a machine share.
    :param finish_over: seconds over which the runs finish.
    :param faulty: whether one answer of ten is an HTTP 503, a connection reset or a stall of three seconds.
    :param run_seconds: how long a run takes that a contender starts.
    """

    finish_at: float
    finish_over: float
    faulty: bool = False
    run_seconds: float = 0.5

    def finish_of(self, wait: int) -> float:
        """
        Say when a run finishes.

        :param wait: the number of the wait.
        :return: the moment, on the monotonic clock.
        """
        return self.finish_at + self.finish_over * (wait * GOLDEN_RATIO % 1)


class Server:
    """
    The server's state: what it plays and what it has seen.

    :param scenario: what to play until another one comes.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.connections = 0
        self.polls: defaultdict[int, list[float]] = defaultdict(list)
        self._answers = 0
        self._faults = 0
        # Seeded: every contender meets the same faults at the same places.
        self._random = random.Random(0)  # noqa: S311
        self._faulty_answer = 0
        self._recorded = RecordedStart()
        # The end of each run that a contender started.
        self._ends: dict[str, float] = {}

    async def start(self, request: web.Request) -> web.StreamResponse:
        """Start a run, and send its events: the first at once, the others at its end."""
        await request.read()
        run_id = str(uuid.uuid4())
        beginning, rest = self._recorded.events(run_id)
        self._ends[run_id] = time.monotonic() + self.scenario.run_seconds
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", **VERSION})
        await response.prepare(request)
        await response.write(beginning)
        if self.scenario.run_seconds:
            await asyncio.sleep(self.scenario.run_seconds)
        await response.write(rest)
        return response

    def detail(self, other: Callable[[web.Request], Any]) -> Callable[[web.Request], Any]:
        """
        Make the route's handler for the detail of a run.

        :param other: responds for a run that no contender has started.
        """
        answer = dify_answers()

        async def handler(request: web.Request) -> web.Response:
            run_id = request.match_info["id"]
            end = self._ends.get(run_id)
            return await other(request) if end is None else answer(run_id, time.monotonic() >= end)

        return handler

    def polled(
        self, number: Callable[[str], int], answer: Callable[[str, bool], web.Response]
    ) -> Callable[[web.Request], Any]:
        """
        Make a route's handler.

        :param number: gives the number of the wait for the id in the path.
        :param answer: gives the answer for the id in the path and whether its run is over.
        :return: the handler.
        """

        async def handler(request: web.Request) -> web.Response:
            run_id = request.match_info["id"]
            wait = number(run_id)
            now = time.monotonic()
            self.polls[wait].append(now)
            if self.scenario.faulty and self._is_faulty():
                fault = ("error", "reset", "stall")[self._faults % 3]
                self._faults += 1
                if fault == "error":
                    return web.Response(status=503, text="Service Unavailable")
                if fault == "reset":
                    if request.transport is not None:
                        request.transport.abort()
                    return web.Response()
                await asyncio.sleep(STALL_SECONDS)
            return answer(run_id, now >= self.scenario.finish_of(wait))

        return handler

    def _is_faulty(self) -> bool:
        """Take one answer of each ten, at a random place: a fixed one would hit the same waits every time."""
        place = self._answers % FAULTY_ONE_IN
        self._answers += 1
        if place == 0:
            self._faulty_answer = self._random.randrange(FAULTY_ONE_IN)
        return place == self._faulty_answer

    async def set_scenario(self, request: web.Request) -> web.Response:
        """Play what the request's JSON says, and count from zero."""
        self.scenario = Scenario(**await request.json())
        self.connections = 0
        self.polls.clear()
        self._ends.clear()
        return web.json_response(asdict(self.scenario))

    async def stats(self, request: web.Request) -> web.Response:
        """Return how many connections were accepted, and when each wait polled."""
        return web.json_response({"connections": self.connections, "polls": self.polls})


class RecordedStart:
    """The recorded events of a run, for any run."""

    def __init__(self) -> None:
        body = STREAM.read_bytes().partition(b"\r\n\r\n")[2]
        self._beginning, mark, rest = body.partition(b"\n\ndata: ")
        first, end, self._rest = rest.partition(b"\n\n")
        self._beginning += mark + first + end
        self._run_id, self._task_id = (json.loads(first)[name].encode() for name in ("workflow_run_id", "task_id"))

    def events(self, run_id: str) -> tuple[bytes, bytes]:
        """Return the events up to ``workflow_started``, and the others, with the id of a run."""
        task_id = str(uuid.uuid4()).encode()
        return tuple(  # type: ignore[return-value]
            part.replace(self._run_id, run_id.encode()).replace(self._task_id, task_id)
            for part in (self._beginning, self._rest)
        )


def json_answer(body: bytes, status: int = 200) -> web.Response:
    """
    Make an answer out of JSON text.

    :param body: the text.
    :param status: the HTTP status.
    :return: the answer.
    """
    return web.Response(status=status, body=body, content_type="application/json")


def always(body: bytes) -> Callable[[web.Request], Any]:
    """
    Make a route's handler that answers with the same JSON.

    :param body: the text.
    """

    async def handler(request: web.Request) -> web.Response:
        return json_answer(body)

    return handler


def dify_answers() -> Callable[[str, bool], web.Response]:
    """
    Give Dify's answers: a recorded one, and the same one as it might have been before the run was over.

    :return: what makes the answer for an id and whether its run is over.
    """
    fields = json.loads(RECORDED.read_bytes().partition(b"\r\n\r\n")[2])
    recorded_id = fields["id"].encode()
    succeeded = json.dumps(fields).encode()
    running = json.dumps({**fields, "status": "running", "finished_at": None, "elapsed_time": 0.0}).encode()
    return lambda run_id, over: json_answer((succeeded if over else running).replace(recorded_id, run_id.encode()))


def dbt_answer(run_id: str, over: bool) -> web.Response:
    """
    Answer as dbt Cloud's ``GET /api/v2/accounts/{account_id}/runs/{run_id}/`` does; about as long as Dify's answer.

    :param run_id: the run.
    :param over: whether it is over.
    :return: the answer.
    """
    moment = "2026-01-01 00:00:00.000000+00:00"
    data = {
        "id": int(run_id),
        "trigger_id": 1,
        "account_id": 1,
        "environment_id": 1,
        "project_id": 1,
        "job_definition_id": 1,
        "status": 10 if over else 3,
        "status_humanized": "Success" if over else "Running",
        "status_message": None,
        "dbt_version": "1.9.0",
        "git_branch": "main",
        "git_sha": "0123456789abcdef0123456789abcdef01234567",
        "created_at": moment,
        "updated_at": moment,
        "dequeued_at": moment,
        "started_at": moment,
        "finished_at": moment if over else None,
        "last_heartbeat_at": moment,
        "owner_thread_id": None,
        "in_progress": not over,
        "is_complete": over,
        "is_success": over,
        "is_error": False,
        "is_cancelled": False,
        "duration": "00:00:10",
        "queued_duration": "00:00:01",
        "run_duration": "00:00:09",
        "job_id": 1,
        "is_running": not over,
        "run_steps": [],
    }
    status = {"code": 200, "is_success": True, "user_message": "Success!", "developer_message": ""}
    return json_answer(json.dumps({"status": status, "data": data}).encode())


def http_answer(run_id: str, over: bool) -> web.Response:
    """
    Answer as the HTTP sensor's trigger understands it, which waits as long as it gets a 404.

    :param run_id: the run.
    :param over: whether it is over.
    :return: the answer.
    """
    return json_answer(json.dumps({"id": run_id, "over": over}).encode(), 200 if over else 404)


def anthropic_answer(run_id: str, over: bool) -> web.Response:
    """
    Answer as Anthropic's ``GET /v1/messages/batches/{batch_id}`` does.

    :param run_id: the batch.
    :param over: whether it is over.
    :return: the answer.
    """
    batch = {
        "id": run_id,
        "type": "message_batch",
        "processing_status": "ended" if over else "in_progress",
        "request_counts": {
            "processing": 0 if over else 100,
            "succeeded": 100 if over else 0,
            "errored": 0,
            "canceled": 0,
            "expired": 0,
        },
        "ended_at": "2026-01-01T01:00:00Z" if over else None,
        "created_at": "2026-01-01T00:00:00Z",
        "expires_at": "2026-01-02T00:00:00Z",
        "archived_at": None,
        "cancel_initiated_at": None,
        "results_url": None,
    }
    return json_answer(json.dumps(batch).encode())


def dify_run_id(wait: int) -> str:
    """
    Give the run that a wait waits on.

    :param wait: the number of the wait.
    :return: a UUID that holds it.
    """
    return str(uuid.UUID(int=wait))


async def serve(certificate: Path, ports: Connection) -> None:
    """
    Serve on free ports of the loopback interface until cancelled.

    :param certificate: PEM file with private key and certificates.
    :param ports: where to send the two ports: the one with TLS and the one without.
    """
    server = Server(Scenario(finish_at=float("inf"), finish_over=0.0))
    app = web.Application()
    waits = server.polled(lambda run_id: uuid.UUID(run_id).int, dify_answers())
    app.router.add_get("/v1/workflows/run/{id}", server.detail(waits))
    app.router.add_post("/v1/workflows/run", server.start)
    for path, body in (
        ("parameters", b'{"user_input_form": []}'),
        ("info", b'{"name": "bench", "mode": "workflow"}'),
        ("workflows/logs", b'{"page": 1, "limit": 100, "total": 0, "has_more": false, "data": []}'),
    ):
        app.router.add_get(f"/v1/{path}", always(body))
    app.router.add_get("/api/v2/accounts/{account}/runs/{id}/", server.polled(int, dbt_answer))
    app.router.add_get("/http/{id}", server.polled(int, http_answer))
    app.router.add_get(
        "/v1/messages/batches/{id}",
        server.polled(lambda run_id: int(run_id.removeprefix("msgbatch_")), anthropic_answer),
    )
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=75)
    await runner.setup()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)

    def accepted() -> asyncio.Protocol:
        server.connections += 1
        assert runner.server is not None  # noqa: S101
        return runner.server()

    loop = asyncio.get_running_loop()
    listening = await loop.create_server(accepted, "127.0.0.1", 0, ssl=tls, backlog=2048)

    control = web.Application()
    control.router.add_post("/scenario", server.set_scenario)
    control.router.add_get("/stats", server.stats)
    control_runner = web.AppRunner(control, access_log=None)
    await control_runner.setup()
    control_listening = await loop.create_server(control_runner.server, "127.0.0.1", 0)

    ports.send([each.sockets[0].getsockname()[1] for each in (listening, control_listening)])
    await asyncio.Event().wait()


def main(core: int | None, certificate: Path, log: Path, ports: Connection) -> None:
    """
    Run the server in this process.

    :param core: the core to stay on; ``None`` for any.
    :param certificate: PEM file with private key and certificates.
    :param log: where to write what would go to the terminal.
    :param ports: where to send the two ports.
    """
    stay_on(core)
    write_to(log)
    asyncio.run(serve(certificate, ports))


def stay_on(core: int | None) -> None:
    """
    Keep this process on one core.

    :param core: the core; ``None`` for any.
    """
    if core is not None:
        os.sched_setaffinity(0, {core})


def write_to(log: Path) -> None:
    """
    Send what this process would write on the terminal to a file.

    :param log: the file.
    """
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for terminal in (1, 2):
        os.dup2(file, terminal)
