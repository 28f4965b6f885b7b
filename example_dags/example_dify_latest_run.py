"""
### Wait for a Dify workflow run that nobody has the id of

Dify starts the app's workflow by its own schedule. The param `since` is the moment from which a run counts. The Dag
uses the connection `dify_default`.
"""

from __future__ import annotations

import pendulum
from airflow.providers.common.compat.sdk import Param, dag, task  # on Airflow 3 also: from airflow.sdk import ...

from airflow_provider_dify.sensors.dify_latest import DifyLatestWorkflowRunSensor


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={
        # Without a default: the form asks for it. In a Dag with a schedule: "{{ data_interval_start }}".
        "since": Param(
            type="string", format="date-time", minLength=20, title="Since", description="Runs from here on count"
        )
    },
    doc_md=__doc__,
    tags=["example", "dify"],
)
def example_dify_latest_run():
    wait = DifyLatestWorkflowRunSensor(
        task_id="wait",
        created_after="{{ params.since }}",
        triggered_from="schedule",
        deferrable=True,
        timeout=12 * 3600,
    )

    @task
    def report(outputs: dict, run: dict) -> dict:
        print(f"Run {run['id']} of Dify's schedule returned {sorted(outputs)}.")
        return {"run": run["id"], "outputs": sorted(outputs)}

    report(outputs=wait.output, run=wait.output["workflow_run"])


example_dify_latest_run()
