"""How a run is stopped: twice at most, within seconds, and what is said of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dify.api.calls import Call, LiveTaskId, Pause
from airflow_provider_dify.api.models import WorkflowRun
from airflow_provider_dify.exceptions import DifyConnectionError, DifyError
from airflow_provider_dify.runs.stopping import STOP_TIMEOUT, StopReport, stop_run
from tests.unit.test_workflow_run import make_run

RUN_ID = "e9d68a02-335c-48ff-bcca-2aa6ff006579"
TASK_ID = "77b720b7-eaf5-4cfd-95ab-a25d6b783f74"
RUNNING = make_run("running", finished_at=None)
# Airflow 3 kills a task's process so many seconds after on_kill.
SECONDS_OF_AIRFLOW = 5.0


def play(task_id: str | None, version: str | None, **responses: Any) -> tuple[StopReport, list[Any], float]:
    """Run a stop with responses to ``stop`` (a list), ``detail`` and ``live``; return the longest it may take, too."""
    stops = list(responses.get("stop", [None]))
    server = SimpleNamespace(server_version=None, response_timeout=STOP_TIMEOUT)
    steps = stop_run(RUN_ID, task_id, "airflow", server)
    taken: list[Any] = []
    longest = 0.0
    try:
        step = next(steps)
        while True:
            taken.append(step)
            # Known from the first response on.
            server.server_version = version
            result: Any = None
            if isinstance(step, Pause):
                longest += step.seconds
            elif isinstance(step, LiveTaskId):
                longest += step.seconds
                result = responses.get("live")
            else:
                assert isinstance(step, Call)
                result = stops.pop(0) if step.method == "POST" else responses.get("detail", RUNNING)
            if isinstance(result, DifyError):
                # One that fails takes its whole time, one that succeeds next to none.
                longest += STOP_TIMEOUT
                step = steps.throw(result)
            else:
                step = steps.send(result)
    except StopIteration as done:
        return done.value, taken, longest


def test_a_run_that_shows_its_stop_is_said_to_be_stopped() -> None:
    report, _, _ = play(TASK_ID, "1.16.1", detail=make_run("stopped"))
    assert report.was_asked
    assert report.message == f"Dify stopped workflow run {RUN_ID} (status stopped)."


@pytest.mark.parametrize(
    ("version", "said"), [("1.14.2", "can stay running for ever"), ("1.16.1", "does not show it yet")]
)
def test_a_record_that_stays_running_is_explained_by_the_servers_version(version: str, said: str) -> None:
    report, _, _ = play(TASK_ID, version)
    assert said in report.message


def test_a_paused_run_cannot_be_stopped_and_that_is_said() -> None:
    report, _, _ = play(TASK_ID, "1.16.1", detail=make_run("paused", finished_at=None))
    assert "does not stop a paused run" in report.message
    assert report.is_warning


def test_the_task_id_of_a_run_that_was_found_in_the_log_comes_from_its_next_event() -> None:
    report, taken, _ = play(None, "1.16.1", live=TASK_ID, detail=make_run("stopped"))
    assert report.was_asked
    assert isinstance(taken[0], LiveTaskId)
    assert TASK_ID in taken[1].path


def test_a_run_without_a_known_task_id_goes_on() -> None:
    report, taken, _ = play(None, "1.13.0")
    assert not report.was_asked
    assert report.is_warning
    assert len(taken) == 1


def test_a_stop_that_fails_is_tried_once_more_a_second_later() -> None:
    report, taken, longest = play(TASK_ID, "1.16.1", stop=[DifyConnectionError("away"), None])
    assert report.was_asked
    assert [type(step) for step in taken[:3]] == [Call, Pause, Call]
    assert longest < SECONDS_OF_AIRFLOW


def test_two_failed_stops_end_before_airflow_kills_the_process() -> None:
    report, taken, longest = play(TASK_ID, "1.16.1", stop=[DifyConnectionError("away"), DifyConnectionError("away")])
    assert not report.was_asked
    assert "could not be stopped and goes on: away" in report.message
    assert sum(isinstance(step, Call) for step in taken) == 2
    assert longest < SECONDS_OF_AIRFLOW


def test_a_look_that_fails_does_not_hide_the_stop() -> None:
    report, _, _ = play(TASK_ID, "1.14.2", detail=DifyConnectionError("away"))
    assert report.was_asked
    assert isinstance(RUNNING, WorkflowRun)
