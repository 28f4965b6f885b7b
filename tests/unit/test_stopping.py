"""How a run is stopped: twice at most, within seconds, and what is said of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from airflow_provider_dify.api.calls import Call
from airflow_provider_dify.api.models import WorkflowRun
from airflow_provider_dify.exceptions import DifyConnectionError, DifyError
from airflow_provider_dify.runs import stopping
from airflow_provider_dify.runs.stopping import STOP_TIMEOUT, StopReport, stop_run
from tests.unit.scripted_client import ScriptedClient
from tests.unit.test_workflow_run import make_run

RUN_ID = "e9d68a02-335c-48ff-bcca-2aa6ff006579"
TASK_ID = "77b720b7-eaf5-4cfd-95ab-a25d6b783f74"
RUNNING = make_run("running", finished_at=None)
# Airflow 3 kills a task's process so many seconds after on_kill.
SECONDS_OF_AIRFLOW = 5.0


class Stop:
    """
    A stop, with responses to ``stop`` (a list) and ``detail``, and the task's id from the run's events (``live``).

    :ivar longest: the seconds that it may take.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.longest = 0.0
        monkeypatch.setattr("airflow_provider_dify.runs.stopping.asyncio.sleep", self._pause)

    async def _pause(self, seconds: float) -> None:
        self.longest += seconds

    def __call__(self, task_id: str | None, version: str | None, **responses: Any) -> StopReport:
        stops = list(responses.get("stop", [None]))

        def respond(call: Call[Any]) -> Any:
            response = stops.pop(0) if call.method == "POST" else responses.get("detail", RUNNING)
            if isinstance(response, DifyError):
                # One that fails takes its whole time, one that succeeds next to none.
                self.longest += STOP_TIMEOUT
            return response

        self.client = ScriptedClient(respond, version, responses.get("live"))
        client: Any = self.client
        report = asyncio.run(stop_run(client, RUN_ID, task_id, "airflow"))
        if self.client.was_asked_for_task_id:
            self.longest += stopping._SECONDS_FOR_TASK_ID
        return report


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Stop:
    return Stop(monkeypatch)


def test_a_run_that_shows_its_stop_is_said_to_be_stopped(stop: Stop) -> None:
    report = stop(TASK_ID, "1.16.1", detail=make_run("stopped"))
    assert report.was_asked
    assert report.message == f"Dify stopped workflow run {RUN_ID} (status stopped)."
    assert not stop.client.was_asked_for_task_id


@pytest.mark.parametrize(
    ("version", "said"), [("1.14.2", "can stay running for ever"), ("1.16.1", "does not show it yet")]
)
def test_a_record_that_stays_running_is_explained_by_the_servers_version(stop: Stop, version: str, said: str) -> None:
    assert said in stop(TASK_ID, version).message


def test_a_paused_run_cannot_be_stopped_and_that_is_said(stop: Stop) -> None:
    report = stop(TASK_ID, "1.16.1", detail=make_run("paused", finished_at=None))
    assert "does not stop a paused run" in report.message
    assert "some versions of Dify forget the stop" in report.message
    assert report.is_warning


def test_the_task_id_of_a_run_that_was_found_in_the_log_comes_from_its_next_event(stop: Stop) -> None:
    report = stop(None, "1.16.1", live=TASK_ID, detail=make_run("stopped"))
    assert report.was_asked
    assert TASK_ID in stop.client.taken[0].path
    assert stop.longest < SECONDS_OF_AIRFLOW


def test_a_run_without_a_known_task_id_goes_on(stop: Stop) -> None:
    report = stop(None, "1.13.0")
    assert not report.was_asked
    assert report.is_warning
    assert stop.client.taken == []


def test_a_stop_that_fails_is_tried_once_more_a_second_later(stop: Stop) -> None:
    report = stop(TASK_ID, "1.16.1", stop=[DifyConnectionError("away"), None])
    assert report.was_asked
    assert [call.method for call in stop.client.taken] == ["POST", "POST", "GET"]
    assert 1.0 <= stop.longest < SECONDS_OF_AIRFLOW


def test_two_failed_stops_end_before_airflow_kills_the_process(stop: Stop) -> None:
    report = stop(TASK_ID, "1.16.1", stop=[DifyConnectionError("away"), DifyConnectionError("away")])
    assert not report.was_asked
    assert "could not be stopped and keeps running: away" in report.message
    assert [call.method for call in stop.client.taken] == ["POST", "POST"]
    assert stop.longest < SECONDS_OF_AIRFLOW


def test_a_look_that_fails_does_not_hide_the_stop(stop: Stop) -> None:
    report = stop(TASK_ID, "1.14.2", detail=DifyConnectionError("away"))
    assert report.was_asked
    assert isinstance(RUNNING, WorkflowRun)
