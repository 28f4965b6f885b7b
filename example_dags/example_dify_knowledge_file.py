"""
### Add a file to a Dify knowledge base

The first task uploads the file, the second waits until Dify has indexed it. The Dag uses the connection
`dify_knowledge`, of type Dify, with the API key of *Knowledge*, *Service API*: an app's key can't do this.
"""

from __future__ import annotations

import json

import pendulum
from airflow.providers.common.compat.sdk import (  # on Airflow 3 also: from airflow.sdk import ...
    AirflowFailException,
    Param,
    PokeReturnValue,
    dag,
    task,
)


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={
        "dataset_id": Param(
            type="string",
            minLength=32,
            title="Knowledge base",
            description="The UUID in the address of its page",
        ),
        "path": Param(
            type="string",
            minLength=1,
            title="Path",
            description="The file's path on the worker",
        ),
    },
    doc_md=__doc__,
    tags=["example", "dify"],
)
def example_dify_knowledge_file():
    @task
    def upload(params: dict | None = None) -> str:
        # Imported here, so that the scheduler, which only parses this file, loads no HTTP client.
        from airflow_provider_dify.hooks.dify import DifyHook

        settings = {"indexing_technique": "high_quality", "process_rule": {"mode": "automatic"}}
        with DifyHook("dify_knowledge") as hook, open((params or {})["path"], "rb") as file:
            response = hook.get_conn().post(
                f"{hook.connection.base_url}/datasets/{(params or {})['dataset_id']}/document/create-by-file",
                data={"data": json.dumps(settings)},
                files={"file": file},
            )
            response.raise_for_status()
        return response.json()["batch"]

    @task.sensor(poke_interval=60, timeout=3600, mode="reschedule")
    def wait_until_indexed(batch: str, params: dict | None = None) -> PokeReturnValue:
        from airflow_provider_dify.hooks.dify import DifyHook

        with DifyHook("dify_knowledge") as hook:
            response = hook.get_conn().get(
                f"{hook.connection.base_url}/datasets/{(params or {})['dataset_id']}/documents/{batch}/indexing-status"
            )
            response.raise_for_status()
        (document,) = response.json()["data"]
        if document["indexing_status"] == "error":
            raise AirflowFailException(f"Dify did not index the file: {document['error']}")
        return PokeReturnValue(document["indexing_status"] == "completed", xcom_value=document["id"])

    wait_until_indexed(upload())


example_dify_knowledge_file()
