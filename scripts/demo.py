"""
Wait on a Dify workflow run with real Airflow and print what the downstream task received. ``make demo`` runs this.

Without settings it starts the tests' stand-in for Dify, on this machine, with a run that is running for a few polls and
then succeeds. With ``DIFY_BASE_URL``, ``DIFY_API_KEY`` and ``WORKFLOW_RUN_ID`` set it waits on that real run instead.
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
DAG_ID = "example_dify_workflow_run"
REAL = ("DIFY_BASE_URL", "DIFY_API_KEY", "WORKFLOW_RUN_ID")


@dataclass(frozen=True)
class Target:
    """A workflow run to wait on, and the outputs it is known to give; ``None`` where that is not known."""

    base_url: str
    api_key: str
    workflow_run_id: str
    outputs: dict[str, Any] | None


@contextlib.contextmanager
def target() -> Iterator[Target]:
    """Give the run of the environment, or one of the stand-in's."""
    values = [os.environ.get(name) for name in REAL]
    if any(values):
        if not all(values):
            sys.exit(f"Set all of {', '.join(REAL)}, or none of them.")
        yield Target(*[str(value) for value in values], outputs=None)
        return
    sys.path.insert(0, str(ROOT))
    from tests.local_dify import API_KEY, LocalDify

    outputs = {"text": "Hello from a workflow run — héllo 你好 🎉", "score": 0.75}
    with LocalDify() as dify:
        run_id = dify.add_run("running", "running", "running", "succeeded", outputs=outputs, total_tokens=42)
        print(f"A stand-in for Dify (a test double) listens at {dify.base_url}.")
        yield Target(dify.base_url, API_KEY, run_id, outputs)


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
    with tempfile.TemporaryDirectory(prefix="airflow-demo-") as home, target() as run:
        env = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_")}
        env |= {
            "AIRFLOW_HOME": home,
            "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "example_dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__METRICS__TIMER_UNIT_CONSISTENCY": "True",
            "AIRFLOW_CONN_DIFY_DEFAULT": json.dumps(
                {"conn_type": "dify", "host": run.base_url, "password": run.api_key}
            ),
        }
        print("Making Airflow's database...", flush=True)
        airflow("db", "migrate", env=env, quiet=True)
        print(f"Running the Dag {DAG_ID} on workflow run {run.workflow_run_id}:", flush=True)
        airflow("dags", "test", DAG_ID, "--conf", json.dumps({"workflow_run_id": run.workflow_run_id}), env=env)
        returned = xcoms(env)

    if "wait" not in returned or "report" not in returned:
        sys.exit(f"The Dag did not get through: only {sorted(returned)} returned something.")
    print()
    print(f"The sensor's XCom:    {json.dumps(returned['wait'], ensure_ascii=False)}")
    print(f"The next task's XCom: {json.dumps(returned['report'], ensure_ascii=False)}")
    if run.outputs is not None:
        expected = {"answer": run.outputs["text"], "total_tokens": 42}
        if returned["wait"] != run.outputs or returned["report"] != expected:
            sys.exit(f"That is not what the run gave: {json.dumps(run.outputs, ensure_ascii=False)}")
    print("The outputs of the workflow run reached the next task.")


if __name__ == "__main__":
    main()
