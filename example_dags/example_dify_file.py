"""
### Give a file to a Dify workflow

The task uploads the file and starts a run with it. The workflow has a file input `document` and the output `text`.
The param `path` is the file's path on the worker, or its URL in an object storage, such as
`s3://aws_default@bucket/report.pdf`. The Dag uses the connection `dify_default`.
"""

from __future__ import annotations

import pendulum
from airflow.providers.common.compat.sdk import Param, dag, task  # on Airflow 3 also: from airflow.sdk import ...

from airflow_provider_dify.files import DifyFile
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={
        "path": Param(
            type="string",
            minLength=1,
            title="Path",
            description="The path or URL of a PDF file",
        ),
    },
    doc_md=__doc__,
    tags=["example", "dify"],
)
def example_dify_file():
    run = DifyRunWorkflowOperator(task_id="run", inputs={"document": DifyFile("{{ params.path }}")}, timeout=3600)

    @task
    def use(text: str) -> str:
        print(f"The workflow answered {text!r}.")
        return text

    use(run.output["text"])


example_dify_file()
