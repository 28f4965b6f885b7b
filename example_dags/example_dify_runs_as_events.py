"""
### Start a Dag when a Dify workflow run ends, whoever started it

For Airflow 3. No task waits: a trigger watches the app's log in Dify, and each run that ends updates the asset
`dify_summaries`. The Dag uses the connection `dify_default`.
"""

from __future__ import annotations

import pendulum
from airflow.sdk import Asset, AssetWatcher, dag, task

from airflow_provider_dify.triggers.dify_events import DifyWorkflowRunsTrigger

# From Dify's own schedule and webhooks; `user="nightly-*"` would choose by who started them.
runs = DifyWorkflowRunsTrigger(
    dify_conn_id="dify_default",
    statuses=["succeeded", "partial-succeeded"],
    triggered_from=["schedule", "webhook"],
    poll_interval=30,
)
summaries = Asset("dify_summaries", watchers=[AssetWatcher(name="runs", trigger=runs)])


@dag(
    schedule=[summaries],
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    doc_md=__doc__,
    tags=["example", "dify"],
)
def example_dify_runs_as_events():
    @task
    def list_runs(triggering_asset_events=None) -> list[str]:
        # One Dag run may be for several runs of Dify.
        events = triggering_asset_events[summaries]
        return [event.extra["payload"]["workflow_run_id"] for event in events]

    @task
    def use(workflow_run_id: str) -> dict:
        from airflow_provider_dify.hooks.dify import DifyHook

        with DifyHook() as hook:
            run = hook.get_workflow_run(workflow_run_id)
        print(f"Run {run.id} {run.status} and used {run.total_tokens} tokens: {run.outputs}")
        return {"run": run.id, "total_tokens": run.total_tokens}

    use.expand(workflow_run_id=list_runs())


example_dify_runs_as_events()
