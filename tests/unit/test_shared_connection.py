"""One reading of a connection for all triggers of a process."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest

from airflow_provider_dify.exceptions import DifyAuthenticationError, DifyConfigurationError
from airflow_provider_dify.hooks import dify_async
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from tests.dify_stand_in import API_KEY, DifyStandIn
from tests.unit.test_trigger import run as run_on_loop

pytestmark = pytest.mark.usefixtures("dify_connection")


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The connections that Airflow was asked for; each takes a moment, as from a triggerer."""
    asked: list[str] = []
    real = dify_async.get_async_connection

    async def counted(conn_id: str) -> Any:
        asked.append(conn_id)
        await asyncio.sleep(0.1)
        return await real(conn_id)

    monkeypatch.setattr(dify_async, "get_async_connection", counted)
    return asked


async def poll(run_id: str) -> str:
    async with DifyAsyncHook() as hook:
        return str((await hook.get_workflow_run(run_id)).status)


def test_a_thousand_waits_that_start_together_read_their_connection_once(
    dify: DifyStandIn, readings: list[str]
) -> None:
    run_id = dify.add_run("running")

    async def all_of_them() -> list[str]:
        return list(await asyncio.gather(*(poll(run_id) for _ in range(1000))))

    assert set(run_on_loop(all_of_them())) == {"running"}
    assert readings == ["dify_default"]


def test_each_connection_is_read(dify: DifyStandIn, readings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_OTHER", json.dumps({"conn_type": "dify", "host": dify.base_url, "password": "x"}))

    async def both() -> list[Any]:
        return [await dify_async._read_connection(name, None) for name in ("dify_default", "other", "dify_default")]

    first, other, again = run_on_loop(both())
    assert first is again
    assert (other.conn_id, other.api_key) == ("other", "x")
    assert readings == ["dify_default", "other"]


def test_the_one_that_asked_first_may_be_cancelled(dify: DifyStandIn, readings: list[str]) -> None:
    run_id = dify.add_run("running")

    async def cancel_first() -> str:
        first, second = (asyncio.create_task(poll(run_id)) for _ in range(2))
        await asyncio.sleep(0.02)
        first.cancel()
        status = await second
        assert isinstance((await asyncio.gather(first, return_exceptions=True))[0], asyncio.CancelledError)
        return status

    assert run_on_loop(cancel_first()) == "running"
    assert len(readings) == 1


def test_all_may_be_cancelled(dify: DifyStandIn, readings: list[str], caplog: pytest.LogCaptureFixture) -> None:
    async def cancel_all() -> None:
        tasks = [asyncio.create_task(poll(str(uuid.uuid4()))) for _ in range(20)]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # The reading ends by itself.
        await asyncio.sleep(0.2)

    run_on_loop(cancel_all())
    assert len(readings) == 1
    assert "never retrieved" not in caplog.text


def test_a_reading_counts_for_a_while(readings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dify_async, "FRESH_SECONDS", 0.3)

    async def three_times() -> None:
        for pause in (0.0, 0.3, 0.0):
            await dify_async._read_connection("dify_default", None)
            await asyncio.sleep(pause)

    run_on_loop(three_times())
    assert len(readings) == 2


def test_a_reading_that_failed_does_not_count(readings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail_then_work() -> Any:
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps({"conn_type": "dify", "host": "http://x"}))
        failed = await asyncio.gather(
            *(dify_async._read_connection("dify_default", None) for _ in range(5)), return_exceptions=True
        )
        monkeypatch.setenv(
            "AIRFLOW_CONN_DIFY_DEFAULT", json.dumps({"conn_type": "dify", "host": "http://x", "password": API_KEY})
        )
        return failed, await dify_async._read_connection("dify_default", None)

    failed, connection = run_on_loop(fail_then_work())
    assert [type(error) for error in failed] == [DifyConfigurationError] * 5
    assert connection.api_key == API_KEY
    assert len(readings) == 2


def test_a_rotated_key_is_read_once_for_all_who_were_refused(
    dify: DifyStandIn, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = dify.add_run("running")

    async def rotate() -> list[str]:
        hooks = [await DifyAsyncHook().__aenter__() for _ in range(50)]
        assert len(readings) == 1
        dify.api_keys = {"app-the-new-key"}
        connection = {"conn_type": "dify", "host": dify.base_url, "password": "app-the-new-key"}
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(connection))
        runs = await asyncio.gather(*(hook.get_workflow_run(run_id) for hook in hooks))
        for hook in hooks:
            await hook.close()
        return [str(run.status) for run in runs]

    assert set(run_on_loop(rotate())) == {"running"}
    assert 2 <= len(readings) <= 4, len(readings)


def test_a_key_may_be_rotated_while_other_tasks_of_the_client_send(
    dify: DifyStandIn, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = dify.add_run("running")

    async def rotate() -> list[str]:
        async with DifyAsyncHook() as hook:
            await hook.get_workflow_run(run_id)
            dify.api_keys = {"app-the-new-key"}
            connection = {"conn_type": "dify", "host": dify.base_url, "password": "app-the-new-key"}
            monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(connection))
            refused = asyncio.create_task(hook.get_workflow_run(run_id))
            others = []
            # Some of them come while the session is exchanged.
            while not refused.done():
                others.append(asyncio.create_task(hook.get_workflow_run(run_id)))
                await asyncio.sleep(0.0005)
            return [str(run.status) for run in await asyncio.gather(refused, *others)]

    assert set(run_on_loop(rotate())) == {"running"}


def test_a_key_that_is_refused_and_has_not_changed_fails(dify: DifyStandIn, readings: list[str]) -> None:
    run_id = dify.add_run("running")
    dify.api_keys.clear()

    async def refused() -> list[Any]:
        return list(await asyncio.gather(*(poll(run_id) for _ in range(50)), return_exceptions=True))

    assert {type(error) for error in run_on_loop(refused())} == {DifyAuthenticationError}
    assert len(readings) <= 5, len(readings)
