"""
### Give a file to a Dify workflow

The first task uploads the file, the second starts a run with it. The workflow has a file input named `document` and the
output `text`. The param `path` is the file's path on the worker. The Dag uses the connection `dify_default`.
"""

from __future__ import annotations

import pendulum
from airflow.providers.common.compat.sdk import Param, dag, task  # on Airflow 3 also: from airflow.sdk import ...

from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator

# Dify lets a run use only files that the same user uploaded.
USER = "airflow-reports"


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={
        "path": Param(
            type="string",
            minLength=1,
            title="Path",
            description="The path of a PDF file on the worker",
        ),
    },
    doc_md=__doc__,
    tags=["example", "dify"],
)
def example_dify_file():
    @task
    def upload(params: dict | None = None) -> dict:
        # Imported here, so that the scheduler, which only parses this file, loads no HTTP client.
        from airflow_provider_dify.hooks.dify import DifyHook

        with DifyHook("dify_default") as hook:
            file_id = hook.upload_file((params or {})["path"], user=USER, mime_type="application/pdf")
        return {"document": {"type": "document", "transfer_method": "local_file", "upload_file_id": file_id}}

    run = DifyRunWorkflowOperator(task_id="run", inputs=upload(), user=USER, timeout=3600)

    @task
    def use(text: str) -> str:
        print(f"The workflow answered {text!r}.")
        return text

    use(run.output["text"])


example_dify_file()
