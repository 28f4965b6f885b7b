"""The Dags that README, docs and example_dags show, as far as they are for the Airflow that is installed."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.airflow.airflow_processes import AIRFLOW_2
from tests.airflow.python_blocks import BLOCKS, ROOT

EXAMPLES = ROOT / "example_dags"
# One without params has no form to trigger it with.
BLOCKS_OF_DAGS = {block.dag_id: block for block in BLOCKS if block.dag_id and "params=" in block.code}
NEED_AIRFLOW_3 = {"example_dify_runs_as_events", "waits_without_a_worker"}
DAG_IDS = sorted(
    {*BLOCKS_OF_DAGS, *(path.stem for path in EXAMPLES.glob("*.py"))} - (NEED_AIRFLOW_3 if AIRFLOW_2 else set())
)


def write_dags(folder: Path) -> None:
    """Write all of them, and the files that they read, to Airflow's Dags folder."""
    shutil.copytree(EXAMPLES, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for dag_id, block in BLOCKS_OF_DAGS.items():
        (folder / f"{dag_id}.py").write_text(block.code, encoding="utf-8")
