"""What a Dag file pays for naming the sensor. The scheduler parses Dag files all day."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

AIRFLOW_2 = version("apache-airflow").startswith("2.")

# What every Dag file has imported already.
BEFORE = (
    "from airflow import DAG; from airflow.decorators import task" if AIRFLOW_2 else "from airflow.sdk import DAG, task"
)
# Each runs in a process of its own, forked from one that has imported Airflow.
STATEMENTS = {
    "sensor module": "import airflow_provider_dify.sensors.dify",
    "sensor": "from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor\n"
    "DifyWorkflowRunSensor(task_id='wait', workflow_run_id='{{ params.run }}', run_timeout=5)",
    "trigger": "import airflow.triggers.base; before = set(sys.modules)\nimport airflow_provider_dify.triggers.dify",
    "batch": "from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator\n"
    "DifyRunWorkflowBatchOperator(task_id='run', inputs='rows.csv', output_path='results.jsonl')",
}
if not AIRFLOW_2:
    # It counts what a trigger is made of as there.
    STATEMENTS["event trigger"] = (
        "import airflow.triggers.base, airflow.providers.common.compat.sdk; before = set(sys.modules)\n"
        "from airflow_provider_dify.triggers.dify_events import DifyWorkflowRunsTrigger\n"
        "DifyWorkflowRunsTrigger(statuses=['succeeded'])"
    )
PROBE = """
import json, os, sys

def load(name, statement):
    if os.fork() == 0:
        scope = {"sys": sys, "before": set(sys.modules)}
        exec(statement, scope)
        print(json.dumps([name, sorted(set(sys.modules) - scope["before"])]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name

load("without Airflow", "import airflow_provider_dify, airflow_provider_dify.get_provider_info")
exec(sys.argv[1])
for name, statement in json.loads(sys.argv[2]).items():
    load(name, statement)
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """The modules that each of the statements loads."""
    command = [sys.executable, "-c", PROBE, BEFORE, json.dumps(STATEMENTS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {name: set(modules) for name, modules in lines}


def of_the_standard_library(loaded: set[str]) -> set[str]:
    """Return what is neither the provider's nor Airflow's."""
    return {name for name in loaded if not name.startswith(("airflow.", "airflow_provider_dify"))}


def test_the_sensor_loads_no_http_client_and_not_the_hook(loaded: dict[str, set[str]]) -> None:
    module, made = loaded["sensor module"], loaded["sensor"]
    assert not {"requests", "aiohttp", "httpx", "airflow_provider_dify.hooks.dify"} & module
    assert not {"requests", "aiohttp", "airflow_provider_dify.hooks.dify"} & made
    assert "airflow_provider_dify.sensors.dify" in module
    # A handful.
    assert len(of_the_standard_library(module)) < 15, sorted(module)


def test_the_http_client_is_loaded_off_the_loop_and_not_with_the_trigger(loaded: dict[str, set[str]]) -> None:
    assert "airflow_provider_dify.triggers.dify" in loaded["trigger"]
    assert not {"requests", "aiohttp"} & loaded["trigger"]


def test_the_batch_loads_no_http_client_and_none_of_its_rooms(loaded: dict[str, set[str]]) -> None:
    batch = loaded["batch"]
    assert not {"requests", "aiohttp", "csv", "fsspec", "airflow_provider_dify.hooks.dify"} & batch
    # What the exceptions and the XComs are made of, without any client.
    light = {f"airflow_provider_dify.api{name}" for name in ("", ".connection", ".models")}
    rooms = ("airflow_provider_dify.batch", "airflow_provider_dify.api", "airflow_provider_dify.runs.following")
    assert not {name for name in batch if name.startswith(rooms)} - light


def test_the_package_and_its_provider_info_load_no_airflow(loaded: dict[str, set[str]]) -> None:
    assert "airflow_provider_dify.get_provider_info" in loaded["without Airflow"]
    assert not {name for name in loaded["without Airflow"] if name.split(".")[0] == "airflow"}


@pytest.mark.skipif(AIRFLOW_2, reason="Airflow 2 has no event triggers")
def test_an_event_trigger_in_a_dag_file_loads_nothing_but_airflows_own(loaded: dict[str, set[str]]) -> None:
    trigger = loaded["event trigger"]
    assert not {"requests", "aiohttp", "airflow_provider_dify.hooks.dify_async"} & trigger
    assert len(of_the_standard_library(trigger)) < 15, sorted(trigger)


@pytest.mark.skipif(not AIRFLOW_2, reason="this Airflow has event triggers")
def test_airflow_2_says_what_the_event_trigger_needs() -> None:
    with pytest.raises(ImportError, match=r"needs Airflow 3\.0 or later"):
        import airflow_provider_dify.triggers.dify_events  # noqa: F401
