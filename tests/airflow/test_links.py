"""The button that leads to Dify's console, as Airflow's UI finds it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER
from tests.airflow.airflow_runs import SENSOR_WAYS, run_dag, run_operator, run_sensor
from tests.combinations import each_or_long, pairs
from tests.dify_stand_in import API_KEY, DIALECTS, DifyStandIn, Start

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection")

APP_ID = "9e3e0c88-818b-46b2-b9d0-294b4efd0c56"  # of the recorded stream
INPUTS = json.dumps({"query": "Who is there?", "sys.app_id": APP_ID})
LINK = "Dify run log"

WAYS = dict(SENSOR_WAYS)
if CAN_START_FROM_TRIGGER:
    # Neither a sensor that looks for its run nor a mapped one begins on the triggerer.
    WAYS["start_from_trigger"] = {"start_from_trigger": True, "end_from_trigger": True}


def console_of(dify: DifyStandIn) -> str:
    return dify.base_url.removesuffix("/v1")


@pytest.mark.parametrize(("dialect", "way"), pairs(DIALECTS, list(WAYS)), indirect=["dialect"])
def test_the_sensors_button_leads_to_the_log_of_the_runs_app(dify: DifyStandIn, dialect: str, way: str) -> None:
    run_id = dify.add_run("running", "running", "succeeded", inputs=INPUTS)
    result = run_sensor(workflow_run_id=run_id, **WAYS[way])
    assert result.state == "success"
    assert result.links == {"wait": {LINK: f"{console_of(dify)}/app/{APP_ID}/logs"}}


def test_the_operators_button_leads_to_the_log_of_the_runs_app(dify: DifyStandIn, start_way: dict[str, Any]) -> None:
    dify.starts.append(Start(statuses=("running", "succeeded"), fields={"inputs": INPUTS}))
    result = run_operator(**start_way)
    assert result.state == "success"
    assert result.links == {"run": {LINK: f"{console_of(dify)}/app/{APP_ID}/logs"}}


def test_the_button_of_a_sensor_that_looks_for_its_run_leads_to_the_log_of_the_runs_app(
    dify: DifyStandIn, sensor_way: dict[str, Any]
) -> None:
    dify.add_run("succeeded", user="nightly", created_at=int(time.time()), inputs=INPUTS)
    result = run_dag(
        f"""
        DifyLatestWorkflowRunSensor(
            task_id="wait", created_after="2026-01-01T00:00:00Z", poke_interval=0.1, timeout=20, **{sensor_way!r}
        )
        """
    )
    assert result.state == "success"
    assert result.links == {"wait": {LINK: f"{console_of(dify)}/app/{APP_ID}/logs"}}


def test_the_button_of_a_batch_leads_to_the_log_of_its_runs_app(dify: DifyStandIn) -> None:
    result = run_dag(
        """
        from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

        DifyRunWorkflowBatchOperator(task_id="run", inputs=[{"n": 1}])
        """
    )
    assert result.state == "success"
    assert result.links == {"run": {LINK: f"{console_of(dify)}/app/{APP_ID}/logs"}}


def test_each_mapped_task_has_the_button_of_its_own_run(dify: DifyStandIn, sensor_way: dict[str, Any]) -> None:
    apps = [APP_ID, "1c9f1a0e-5b7c-4a57-9c0b-3a1f0f6d2e11"]
    run_ids = [dify.add_run("running", "succeeded", inputs=json.dumps({"sys.app_id": app})) for app in apps]
    result = run_dag(
        f"""
        DifyWorkflowRunSensor.partial(task_id="wait", poke_interval=0.1, **{sensor_way!r}).expand(
            workflow_run_id={run_ids!r}
        )
        """
    )
    assert result.state == "success"
    assert result.links == {
        f"wait[{number}]": {LINK: f"{console_of(dify)}/app/{app}/logs"} for number, app in enumerate(apps)
    }


@pytest.mark.parametrize("deferrable", [False, True])
def test_the_button_is_there_for_a_run_that_failed(dify: DifyStandIn, deferrable: bool) -> None:
    result = run_sensor(workflow_run_id=dify.add_run("running", "failed", inputs=INPUTS), deferrable=deferrable)
    assert result.states["wait"] == "failed"
    assert result.links["wait"][LINK] == f"{console_of(dify)}/app/{APP_ID}/logs"


def test_the_button_leads_to_the_console_that_the_connection_names(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = {
        "conn_type": "dify",
        "host": dify.base_url,
        "password": API_KEY,
        "extra": {"console_url": "https://dify.example.com/"},
    }
    monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(connection))
    result = run_sensor(workflow_run_id=dify.add_run("succeeded", inputs=INPUTS))
    assert result.links["wait"][LINK] == f"https://dify.example.com/app/{APP_ID}/logs"


@pytest.mark.parametrize(
    "inputs",
    each_or_long([None, {}, {"sys.app_id": None}, {"sys.app_id": "../../x"}, {"sys.app_id": 5}], short=[None]),
    ids=["no inputs", "empty", "null", "no UUID", "a number"],
)
def test_there_is_no_button_when_the_run_does_not_name_its_app(dify: DifyStandIn, inputs: Any) -> None:
    result = run_sensor(workflow_run_id=dify.add_run("succeeded", inputs=inputs))
    assert result.state == "success"
    assert result.links["wait"] == {LINK: ""}


def test_there_is_no_button_for_a_run_that_was_never_seen(dify: DifyStandIn) -> None:
    result = run_sensor(workflow_run_id="e9d68a02-335c-48ff-bcca-2aa6ff006579")
    assert result.states["wait"] == "failed"
    assert result.links["wait"] == {LINK: ""}


@pytest.mark.parametrize("key", ["dify_run_log", "_link_DifyWorkflowRunLink"])
def test_no_output_of_a_workflow_moves_the_button(dify: DifyStandIn, key: str) -> None:
    outputs = {key: "https://elsewhere.example.com"}
    run_id = dify.add_run("running", "succeeded", inputs=INPUTS, outputs=outputs)
    result = run_sensor(workflow_run_id=run_id)
    assert result.received["outputs"] == outputs
    assert result.links["wait"][LINK] == f"{console_of(dify)}/app/{APP_ID}/logs"
