"""
Start a Dify workflow run with real Airflow, wait on it and print what the downstream task received.

``make demo`` runs this. Without settings it starts the tests' stand-in for Dify, on this machine, whose run is running
for a few polls and then succeeds. The stand-in speaks like the newest Dify that was recorded; ``make demo DIFY=1.13.0``
chooses another version. With ``DIFY_BASE_URL`` and ``DIFY_API_KEY`` set it starts a run on that real Dify,
with the inputs in ``DIFY_INPUTS`` (a JSON object; ``{}`` by default). With ``WORKFLOW_RUN_ID`` set as well it starts
none, but waits on that run.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STARTING = "example_dify_start_then_sensor"
WAITING = "example_dify_workflow_run"
SERVER = ("DIFY_BASE_URL", "DIFY_API_KEY")
WHAT = ("DIFY_INPUTS", "WORKFLOW_RUN_ID")


@dataclass(frozen=True)
class Target:
    """A Dify, the example Dag to run on it, and the outputs it is known to give; ``None`` where that is not known."""

    base_url: str
    api_key: str
    dag_id: str
    conf: dict[str, Any]
    outputs: dict[str, Any] | None


@contextlib.contextmanager
def target(dialect: str) -> Iterator[Target]:
    """
    Return the Dify of the environment, or the stand-in.

    :param dialect: the version that the stand-in speaks like.
    """
    base_url, api_key = (os.environ.get(name, "") for name in SERVER)
    inputs, run_id = (os.environ.get(name, "") for name in WHAT)
    if base_url and api_key:
        if run_id:
            yield Target(base_url, api_key, WAITING, {"workflow_run_id": run_id}, outputs=None)
        else:
            yield Target(base_url, api_key, STARTING, {"inputs": json_object(inputs or "{}")}, outputs=None)
        return
    if base_url or api_key or inputs or run_id:
        sys.exit(f"Set both {' and '.join(SERVER)}, and {' or '.join(WHAT)} if you like; or none of them.")
    sys.path.insert(0, str(ROOT))
    from tests.dify_stand_in import API_KEY, DIALECTS, DifyStandIn, Start

    if dialect not in (*DIALECTS, "current"):
        sys.exit(f"DIFY={dialect}: the stand-in speaks like {', '.join(DIALECTS)}; current is {DIALECTS[-1]}.")
    outputs = {"text": "Hello from a workflow run — héllo 你好 🎉", "score": 0.75}
    asked = {"query": "Hello"}
    with DifyStandIn(dialect) as dify:
        dify.starts.append(
            Start(
                statuses=("running", "running", "running", "succeeded"),
                fields={"outputs": outputs, "total_tokens": 42},
            )
        )
        print(f"A stand-in for Dify {dify.dialect} (a test double) listens at {dify.base_url}.")
        yield Target(dify.base_url, API_KEY, STARTING, {"inputs": asked}, outputs)
        if [run.inputs for run in dify.started] != [asked]:
            sys.exit(f"The stand-in was not asked for one run with the inputs {asked}, but for {dify.started}.")


def json_object(text: str) -> dict[str, Any]:
    """Read the inputs."""
    try:
        value = json.loads(text)
    except ValueError as error:
        sys.exit(f"DIFY_INPUTS is no JSON: {error}")
    if not isinstance(value, dict):
        sys.exit("DIFY_INPUTS must be a JSON object, the workflow's inputs by name.")
    return value


def airflow(*arguments: str, env: dict[str, str], quiet: bool = False) -> None:
    """Run an Airflow command."""
    done = subprocess.run(
        [sys.executable, "-m", "airflow", *arguments], env=env, capture_output=quiet, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"airflow {arguments[0]} {arguments[1]} failed.\n{done.stdout or ''}{done.stderr or ''}")


# Run in a process of its own, which reads the settings of the temporary Airflow.
READ_XCOMS = """
import json
from airflow.utils.session import create_session
try:
    from airflow.models.xcom import XComModel
    value_of = XComModel.deserialize_value
except ImportError:  # Airflow 2
    import airflow.providers.fab.auth_manager.models
    from airflow.models.xcom import XCom as XComModel
    value_of = lambda row: row.value
with create_session() as session:
    rows = session.query(XComModel).filter(XComModel.key == "return_value").all()
    print("XCOMS " + json.dumps({row.task_id: value_of(row) for row in rows}))
"""


def xcoms(env: dict[str, str]) -> dict[str, Any]:
    """Give the return value of each task."""
    done = subprocess.run(
        [sys.executable, "-c", READ_XCOMS], env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    line = next(line for line in done.stdout.decode().splitlines() if line.startswith("XCOMS "))
    return dict(json.loads(line.removeprefix("XCOMS ")))


def main() -> None:
    """Run the example Dag and check what came out of it."""
    dialect = sys.argv[1] if len(sys.argv) > 1 else "current"
    with tempfile.TemporaryDirectory(prefix="airflow-demo-") as home, target(dialect) as dify:
        env = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_")}
        env |= {
            "AIRFLOW_HOME": home,
            "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "example_dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__METRICS__TIMER_UNIT_CONSISTENCY": "True",
            "AIRFLOW_CONN_DIFY_DEFAULT": json.dumps(
                {"conn_type": "dify", "host": dify.base_url, "password": dify.api_key}
            ),
        }
        print("Making Airflow's database...", flush=True)
        airflow("db", "migrate", env=env, quiet=True)
        print(f"Running the Dag {dify.dag_id} with {json.dumps(dify.conf, ensure_ascii=False)}:", flush=True)
        airflow("dags", "test", dify.dag_id, "--conf", json.dumps(dify.conf), env=env)
        returned = xcoms(env)

    if "wait" not in returned or "report" not in returned:
        sys.exit(f"The Dag did not get through: only {sorted(returned)} returned something.")
    print()
    if "start" in returned:
        print(f"The operator's XCom:  {json.dumps(returned['start'])}")
    print(f"The sensor's XCom:    {json.dumps(returned['wait'], ensure_ascii=False)}")
    print(f"The next task's XCom: {json.dumps(returned['report'], ensure_ascii=False)}")
    if dify.outputs is not None:
        expected = {"answer": dify.outputs["text"], "total_tokens": 42}
        if returned["wait"] != dify.outputs or returned["report"] != expected:
            sys.exit(f"That is not what the run gave: {json.dumps(dify.outputs, ensure_ascii=False)}")
    print("The outputs of the workflow run reached the next task.")


if __name__ == "__main__":
    main()
