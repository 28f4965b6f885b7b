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
PROBE = """
import json, sys
{before}
before = set(sys.modules)
{statement}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def modules_loaded_by(statement: str, *, before: str = BEFORE) -> set[str]:
    probe = PROBE.format(before=before, statement=statement)
    done = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_sensor_module_loads_no_http_client_and_not_the_hook() -> None:
    loaded = modules_loaded_by("import airflow_provider_dify.sensors.dify")
    assert not {"requests", "aiohttp", "httpx", "airflow_provider_dify.hooks.dify"} & loaded
    ours = {name for name in loaded if name.startswith("airflow_provider_dify")}
    assert "airflow_provider_dify.sensors.dify" in ours
    # Beside the provider's own modules and the compatibility layer, a handful of the standard library's.
    others = {name for name in loaded - ours if not name.startswith("airflow.")}
    assert len(others) < 15, sorted(others)


def test_making_a_sensor_loads_no_http_client_either() -> None:
    loaded = modules_loaded_by(
        "from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor\n"
        "DifyWorkflowRunSensor(task_id='wait', workflow_run_id='{{ params.run }}', run_timeout=5)"
    )
    assert not {"requests", "aiohttp", "airflow_provider_dify.hooks.dify"} & loaded


def test_the_batch_loads_no_http_client_and_none_of_its_rooms() -> None:
    loaded = modules_loaded_by(
        "from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator\n"
        "DifyRunWorkflowBatchOperator(task_id='run', inputs='rows.csv', output_path='results.jsonl')"
    )
    assert not {"requests", "aiohttp", "csv", "fsspec", "airflow_provider_dify.hooks.dify"} & loaded
    # What the exceptions and the XComs are made of, without any client.
    light = {f"airflow_provider_dify.api{name}" for name in ("", ".connection", ".models")}
    rooms = ("airflow_provider_dify.batch", "airflow_provider_dify.api", "airflow_provider_dify.runs.following")
    assert not {name for name in loaded if name.startswith(rooms)} - light


@pytest.mark.parametrize("module", ["airflow_provider_dify", "airflow_provider_dify.get_provider_info"])
def test_the_package_and_its_provider_info_load_no_airflow(module: str) -> None:
    loaded = modules_loaded_by(f"import {module}", before="")
    assert not {name for name in loaded if name.split(".")[0] == "airflow"}


@pytest.mark.skipif(AIRFLOW_2, reason="Airflow 2 has no event triggers")
def test_an_event_trigger_in_a_dag_file_loads_nothing_but_airflows_own() -> None:
    loaded = modules_loaded_by(
        "from airflow_provider_dify.triggers.dify_events import DifyWorkflowRunsTrigger\n"
        "DifyWorkflowRunsTrigger(statuses=['succeeded'])",
        before=f"{BEFORE}; import airflow.triggers.base, airflow.providers.common.compat.sdk",
    )
    assert not {"requests", "aiohttp", "airflow_provider_dify.hooks.dify_async"} & loaded
    others = {name for name in loaded if not name.startswith(("airflow.", "airflow_provider_dify"))}
    assert len(others) < 15, sorted(others)


@pytest.mark.skipif(not AIRFLOW_2, reason="this Airflow has event triggers")
def test_airflow_2_says_what_the_event_trigger_needs() -> None:
    with pytest.raises(ImportError, match=r"needs Airflow 3\.0 or later"):
        import airflow_provider_dify.triggers.dify_events  # noqa: F401
