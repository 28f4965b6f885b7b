"""One contender in a process of its own: rows, each a workflow run that is started and followed to its end."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from server import stay_on, write_to

DAG_FILE = """
import batches
import pendulum
from airflow.sdk import DAG

from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

with DAG("bench", schedule=None, start_date=pendulum.datetime(2026, 1, 1)) as dag:
    DifyRunWorkflowBatchOperator(
        task_id="batch",
        inputs={rows!r},
        output_path={output!r},
        max_active_runs={at_once},
        dify_conn_id="dify_bench",
        pre_execute=batches.Meter.begin,
        post_execute=batches.Meter.end,
    )
"""


@dataclass(frozen=True)
class Batch:
    """
    What a contender is to do.

    :param rows: JSON Lines, an object of inputs a line.
    :param output: where the results go, one JSON object a line.
    :param at_once: how many runs at once.
    """

    rows: Path
    output: Path
    at_once: int


@dataclass(frozen=True)
class BatchCost:
    """
    What a batch cost.

    :param wall: seconds from the first start to the last end.
    :param cpu: seconds of CPU time of the process, user and system.
    :param memory: bytes that the process had at most.
    :param succeeded: runs that succeeded, as the results say.
    :param failure: what went wrong; empty for nothing.
    """

    wall: float
    cpu: float
    memory: int
    succeeded: int
    failure: str = ""


class Meter:
    """Measures the process between two moments; once, because each contender has a process of its own."""

    began = ended = (0.0, 0.0)

    @classmethod
    def begin(cls, *_: Any) -> None:
        """Begin to measure."""
        cls.began = (time.monotonic(), time.process_time())

    @classmethod
    def end(cls, *_: Any) -> None:
        """End it."""
        cls.ended = (time.monotonic(), time.process_time())


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Return the rows of a file, one at a time."""
    with path.open() as file:
        for line in file:
            yield json.loads(line)


def result_of(index: int, data: dict[str, Any]) -> str:
    """Return a line with what the last event of a run said."""
    return json.dumps({"index": index, "status": data["status"], "outputs": data["outputs"]}) + "\n"


def request_of(index: int, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a start."""
    return {"inputs": inputs, "user": f"bench/{index}", "response_mode": "streaming"}


def bare(batch: Batch) -> None:
    """Post and read streams with aiohttp and nothing else: what any batch costs at least. All rows are in memory."""
    import aiohttp

    base_url = json.loads(os.environ["AIRFLOW_CONN_DIFY_BENCH"])["host"]
    results: dict[int, str] = {}

    async def run_all() -> None:
        connector = aiohttp.TCPConnector(ssl=ssl.create_default_context())
        rows = enumerate(rows_of(batch.rows))
        headers = {"Authorization": "Bearer none"}
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

            async def work() -> None:
                for index, inputs in rows:
                    async with session.post(f"{base_url}/workflows/run", json=request_of(index, inputs)) as response:
                        response.raise_for_status()
                        async for line in response.content:
                            if line.startswith(b"data: "):
                                event = json.loads(line[6:])
                                if event["event"] == "workflow_finished":
                                    results[index] = result_of(index, event["data"])

            await asyncio.gather(*(work() for _ in range(batch.at_once)))

    Meter.begin()
    asyncio.run(run_all())
    batch.output.write_text("".join(results[index] for index in sorted(results)))
    Meter.end()


def threads(batch: Batch) -> None:
    """Start a run in each thread of a pool with requests, as it is written by hand. All rows are in memory."""
    import requests

    base_url = json.loads(os.environ["AIRFLOW_CONN_DIFY_BENCH"])["host"]
    own = threading.local()

    def run(row: tuple[int, dict[str, Any]]) -> str:
        if not hasattr(own, "session"):
            own.session = requests.Session()
            own.session.headers["Authorization"] = "Bearer none"
        url = f"{base_url}/workflows/run"
        with own.session.post(url, json=request_of(*row), stream=True, timeout=60) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if event["event"] == "workflow_finished":
                        return result_of(row[0], event["data"])
        raise EOFError("no end")

    Meter.begin()
    with ThreadPoolExecutor(batch.at_once) as pool:
        batch.output.write_text("".join(pool.map(run, enumerate(rows_of(batch.rows)))))
    Meter.end()


def dify(batch: Batch) -> None:
    """Run the operator of this provider in a Dag, and measure its ``execute``."""
    sys.path.insert(0, str(Path(__file__).parent))
    path = Path(os.environ["AIRFLOW_HOME"]) / "dags" / "bench.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(DAG_FILE.format(rows=str(batch.rows), output=str(batch.output), at_once=batch.at_once))
    from airflow.dag_processing.dagbag import DagBag

    # As the others import their clients before they begin to measure.
    import airflow_provider_dify.batch.running  # noqa: F401

    bag = DagBag(path)
    if bag.import_errors:
        raise RuntimeError(str(bag.import_errors))
    dag_run = bag.dags["bench"].test()
    if str(dag_run.state) != "success":
        raise RuntimeError(f"the Dag run is {dag_run.state}")


CONTENDERS: dict[str, Callable[[Batch], None]] = {each.__name__: each for each in (bare, threads, dify)}


def main(name: str, core: int | None, log: Path, batch: Batch, runner: Connection) -> None:
    """
    Run a contender in this process, and tell what it cost.

    :param name: the contender.
    :param core: the core to stay on; ``None`` for any.
    :param log: where to write what would go to the terminal.
    :param batch: what to do.
    :param runner: the other end.
    """
    stay_on(core)
    write_to(log)
    failure = ""
    try:
        CONTENDERS[name](batch)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    succeeded = 0
    if batch.output.exists():
        with batch.output.open() as file:
            succeeded = sum(json.loads(line)["status"] == "succeeded" for line in file)
    wall, cpu = (end - begin for begin, end in zip(Meter.began, Meter.ended, strict=True))
    runner.send(BatchCost(wall, cpu, memory, succeeded, failure))
