"""One contender in a process of its own: many waits on one event loop, and what they cost there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from server import dify_run_id, stay_on, write_to

LAG_SAMPLE_SECONDS = 0.01
# Longer than any benchmark takes: no contender is to give up by its own clock.
FAR_AHEAD = 3600.0

# Waits on one run, given the number of the wait and the seconds between polls; gives whether it saw the run succeed,
# and what it said.
Wait = Callable[[int, float], Awaitable[tuple[bool, str]]]


@dataclass(frozen=True)
class Plan:
    """
    What a contender is to do; moments are on the monotonic clock.

    :param waits: how many waits.
    :param interval: seconds between the polls of a wait.
    :param start: when the first wait starts; the others follow evenly within one interval.
    :param cpu_from: when to start to count CPU time.
    :param lag_from: when to stop counting CPU time and start to look at the event loop's lag; not at once, because
        looking costs CPU time itself.
    :param lag_until: when to stop looking.
    :param give_up_at: when to stop waiting for waits that are not over.
    """

    waits: int
    interval: float
    start: float
    cpu_from: float
    lag_from: float
    lag_until: float
    give_up_at: float


@dataclass
class Cost:
    """
    What the waits cost, and how they ended.

    :param cpu: each second: the moment, and the CPU time of the process until then, user and system.
    :param worst_lag: seconds by which the event loop was late, at worst.
    :param ends: by wait: when it ended, whether it saw its run succeed, and what it said.
    """

    cpu: list[tuple[float, float]] = field(default_factory=list)
    worst_lag: float = 0.0
    ends: dict[int, tuple[float, bool, str]] = field(default_factory=dict)


@contextlib.asynccontextmanager
async def bare() -> AsyncIterator[Wait]:
    """Poll with aiohttp and nothing else: what any asynchronous wait costs at least."""
    import aiohttp

    base_url = json.loads(os.environ["AIRFLOW_CONN_DIFY_BENCH"])["host"]
    tls = ssl.create_default_context()
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=tls), headers={"Authorization": "Bearer none"}
    ) as session:

        async def wait(number: int, interval: float) -> tuple[bool, str]:
            url = f"{base_url}/workflows/run/{dify_run_id(number)}"
            while True:
                async with session.get(url) as response:
                    response.raise_for_status()
                    run = json.loads(await response.read())
                if run["status"] == "succeeded":
                    return True, "succeeded"
                await asyncio.sleep(interval)

        yield wait


@contextlib.asynccontextmanager
async def dify() -> AsyncIterator[Wait]:
    """Wait with this provider's trigger."""
    from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger

    async def wait(number: int, interval: float) -> tuple[bool, str]:
        trigger = DifyWorkflowRunTrigger(dify_run_id(number), "dify_bench", poll_interval=interval)
        payload = await event_of(trigger)
        return (payload["end"], payload["status"]) == ("run_is_over", "succeeded"), payload["message"]

    yield wait


@contextlib.asynccontextmanager
async def dbt() -> AsyncIterator[Wait]:
    """Wait with dbt Cloud's trigger."""
    from airflow.providers.dbt.cloud.triggers.dbt import DbtCloudRunJobTrigger

    async def wait(number: int, interval: float) -> tuple[bool, str]:
        trigger = DbtCloudRunJobTrigger(
            conn_id="dbt_bench",
            run_id=number,
            end_time=time.time() + FAR_AHEAD,
            poll_interval=interval,
            account_id=1,
        )
        payload = await event_of(trigger)
        return payload["status"] == "success", payload["message"]

    yield wait


@contextlib.asynccontextmanager
async def http() -> AsyncIterator[Wait]:
    """Wait with the HTTP sensor's trigger."""
    from airflow.providers.http.triggers.http import HttpSensorTrigger

    async def wait(number: int, interval: float) -> tuple[bool, str]:
        trigger = HttpSensorTrigger(endpoint=f"http/{number}", http_conn_id="http_bench", poke_interval=interval)
        payload = await event_of(trigger)
        return payload is True, str(payload)

    yield wait


@contextlib.asynccontextmanager
async def anthropic() -> AsyncIterator[Wait]:
    """Wait with Anthropic's batch trigger, which polls with a blocking client in a thread."""
    from airflow.providers.anthropic.triggers.batch import AnthropicBatchTrigger

    async def wait(number: int, interval: float) -> tuple[bool, str]:
        trigger = AnthropicBatchTrigger(
            conn_id="anthropic_bench",
            batch_id=f"msgbatch_{number}",
            poll_interval=interval,
            end_time=time.time() + FAR_AHEAD,
        )
        payload = await event_of(trigger)
        return payload["status"] == "success", payload["message"]

    yield wait


CONTENDERS = {each.__name__: each for each in (bare, dify, dbt, http, anthropic)}


async def event_of(trigger: Any) -> Any:
    """
    Run a trigger as the triggerer does.

    :param trigger: the trigger.
    :return: the payload of its first event.
    """
    async with contextlib.aclosing(trigger.run()) as events:
        async for event in events:
            return event.payload
    raise RuntimeError("the trigger ended without an event")


async def drive(wait: Wait, plan: Plan) -> Cost:
    """
    Run all waits on this event loop.

    :param wait: waits on one run.
    :param plan: how many, how often, and when to measure.
    :return: what it cost.
    """
    cost = Cost()

    async def one(number: int) -> None:
        # Evenly over one interval, as if the waits had come one by one: all at once is everybody's worst case.
        await sleep_until(plan.start + plan.interval * number / plan.waits)
        try:
            succeeded, said = await wait(number, plan.interval)
        except Exception as error:
            succeeded, said = False, f"{type(error).__name__}: {error}"
        cost.ends[number] = (time.monotonic(), succeeded, said)

    async def look() -> None:
        for second in range(round(plan.lag_from - plan.cpu_from) + 1):
            await sleep_until(plan.cpu_from + second)
            cost.cpu.append((time.monotonic(), time.process_time()))
        while (before := time.monotonic()) < plan.lag_until:
            await asyncio.sleep(LAG_SAMPLE_SECONDS)
            cost.worst_lag = max(cost.worst_lag, time.monotonic() - before - LAG_SAMPLE_SECONDS)

    tasks = [asyncio.create_task(one(number)) for number in range(plan.waits)]
    looking = asyncio.create_task(look())
    _, late = await asyncio.wait(tasks, timeout=plan.give_up_at - time.monotonic())
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    looking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await looking
    return cost


async def sleep_until(moment: float) -> None:
    """
    Sleep.

    :param moment: until when, on the monotonic clock.
    """
    await asyncio.sleep(max(0.0, moment - time.monotonic()))


async def contend(name: str, runner: Connection) -> None:
    """
    Load a contender, say so, and for each plan that comes give back what it cost.

    :param name: the contender.
    :param runner: the other end.
    """
    async with CONTENDERS[name]():
        runner.send("ready")
    while True:
        plan = await asyncio.to_thread(runner.recv)
        # Anew for each plan: no connection is to be kept from the last one.
        async with CONTENDERS[name]() as wait:
            runner.send(await drive(wait, plan))


def main(name: str, core: int | None, log: Path, runner: Connection) -> None:
    """
    Run a contender in this process, until it is terminated.

    :param name: the contender.
    :param core: the core to stay on; ``None`` for any.
    :param log: where to write what would go to the terminal.
    :param runner: the other end.
    """
    stay_on(core)
    write_to(log)
    asyncio.run(contend(name, runner))
