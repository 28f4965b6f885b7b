"""
Measure 1,000 files of 100 KB through a workflow and back, 20 at once: the batch, and a loop of aiohttp by hand.

Both talk to the stand-in for Dify, in a process of its own, and each runs in a process of its own, in turn::

    .venv/airflow-3.3*/bin/python benchmarks/files_through.py [FILES] [BYTES] [ROUNDS]
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

AT_ONCE = 20


def serve(connection: Any) -> None:
    """Run the stand-in until the other side ends."""
    from tests.dify_stand_in import API_KEY, DifyStandIn

    with DifyStandIn("1.16.1") as dify:
        dify.outputs_of = lambda run: {"file": dify.files.uploaded(run.inputs["report"]["upload_file_id"])}
        connection.send((dify.base_url, API_KEY))
        connection.recv()


def by_batch(base_url: str, key: str, inbox: Path, outbox: Path) -> None:
    """Use the batch, as a task does."""
    from airflow_provider_dify.batch.row import BatchSettings
    from airflow_provider_dify.batch.running import BatchTask
    from airflow_provider_dify.files import DifyFile
    from airflow_provider_dify.hooks.dify import DifyHook
    from airflow_provider_dify.runs.waiting import WaitArguments

    os.environ["AIRFLOW_CONN_DIFY_DEFAULT"] = json.dumps({"conn_type": "dify", "host": base_url, "password": key})
    ti: Any = SimpleNamespace(dag_id="d", task_id="t", run_id="r", map_index=-1, try_number=1, max_tries=0)
    rows = DifyFile.each(inbox, field="report")
    output = str(outbox / "results.jsonl")
    wait = WaitArguments(not_found_grace=60.0)
    settings = BatchSettings(rows, wait, AT_ONCE, timeout=3600.0, output_path=output, output_files=str(outbox))
    context: Any = {"ti": ti}
    BatchTask(settings, context, DifyHook(), logging.getLogger("b"), lambda summary: None).run(lambda app_id: None)


def by_hand(base_url: str, key: str, inbox: Path, outbox: Path) -> None:
    """Upload, start, read the stream, download: no check, no retry, no memory of what was done."""
    import aiohttp

    places = asyncio.Semaphore(AT_ONCE)

    async def one(session: aiohttp.ClientSession, number: int, path: Path) -> None:
        async with places:
            user = f"bench/{number}"
            form = aiohttp.FormData({"user": user})
            # What aiofiles does: each call in a thread.
            content = await asyncio.to_thread(path.read_bytes)
            form.add_field("file", content, filename=path.name, content_type="text/plain")
            async with session.post(f"{base_url}/files/upload", data=form) as response:
                file_id = (await response.json())["id"]
            file = {"type": "document", "transfer_method": "local_file", "upload_file_id": file_id}
            body = {"inputs": {"report": file}, "user": user, "response_mode": "streaming"}
            output: dict[str, Any] = {}
            async with session.post(f"{base_url}/workflows/run", json=body) as response:
                async for line in response.content:
                    if line.startswith(b"data: ") and b"workflow_finished" in line:
                        output = json.loads(line[6:])["data"]["outputs"]["file"]
            async with session.get(base_url.removesuffix("/v1") + output["url"]) as response:
                content = await response.read()
            folder = outbox / str(number)
            await asyncio.to_thread(folder.mkdir)
            await asyncio.to_thread((folder / output["filename"]).write_bytes, content)

    async def run() -> None:
        headers = {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(headers=headers, read_bufsize=1 << 20) as session:
            await asyncio.gather(*(one(session, *item) for item in enumerate(paths)))

    paths = sorted(inbox.iterdir())
    asyncio.run(run())


def measure(way: Any, connection: Any, *arguments: Any) -> None:
    """Send seconds, seconds of CPU, and MB that the process had at most, beside those it had before."""
    import airflow_provider_dify.batch.running
    import airflow_provider_dify.runs.downloads
    import airflow_provider_dify.runs.uploads  # noqa: F401  # before the clock starts

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.monotonic(), time.process_time()
    way(*arguments)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    connection.send((time.monotonic() - wall, time.process_time() - cpu, memory))


def main(files: int = 1000, size: int = 100_000, rounds: int = 3) -> None:
    """Measure both in turn, some times, and print a table of medians."""
    os.environ |= {"AIRFLOW_HOME": tempfile.mkdtemp(), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    processes = multiprocessing.get_context("spawn")
    found: dict[str, list[tuple[float, float, float]]] = {"by hand": [], "batch": []}
    with tempfile.TemporaryDirectory() as folder:
        inbox = Path(folder, "inbox")
        inbox.mkdir()
        for number in range(files):
            (inbox / f"{number:06}.txt").write_bytes(os.urandom(size))
        for turn in range(rounds):
            for name, way in (("by hand", by_hand), ("batch", by_batch)):
                ours, theirs = processes.Pipe()
                server = processes.Process(target=serve, args=(theirs,))
                server.start()
                outbox = Path(folder, f"{name}-{turn}")
                outbox.mkdir()
                mine, others = processes.Pipe()
                worker = processes.Process(target=measure, args=(way, others, *ours.recv(), inbox, outbox))
                worker.start()
                found[name].append(mine.recv())
                worker.join()
                ours.send(None)
                server.join()
                assert len(list(outbox.glob("*/*.txt"))) == files  # noqa: S101
    print("| way | wall (s) | CPU (s) | memory (MB) |\n| --- | ---: | ---: | ---: |")
    for name, rows in found.items():
        wall, cpu, memory = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | {memory:.0f} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
