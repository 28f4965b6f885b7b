"""The button of a task in Airflow's UI that leads to Dify's console."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_dify.connection import DifyConnection
    from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
    from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor

# With a dash, which no output of a workflow can have in its name.
RUN_LOG_KEY = "dify-run-log"


def run_log_xcoms(connection: DifyConnection, app_id: str | None) -> dict[str, str]:
    """
    Give the XCom that the link is read from.

    :param connection: the connection, which knows where Dify's console is.
    :param app_id: the app's UUID; ``None`` where it is not known.
    :return: the URL of the app's log in Dify's console by the XCom's key; nothing where the app is not known.
    """
    return {} if app_id is None else {RUN_LOG_KEY: f"{connection.console}/app/{app_id}/logs"}


def push_run_log(
    operator: DifyRunWorkflowOperator | DifyWorkflowRunSensor, context: Context, app_id: str | None
) -> None:
    """
    Push the XCom that the link is read from, if the task pushes any.

    :param operator: the task.
    :param context: the running task's context.
    :param app_id: the app's UUID; ``None`` where it is not known.
    """
    ti = context.get("ti")
    if ti is None or app_id is None or not operator.do_xcom_push:
        return
    for key, value in run_log_xcoms(operator.hook.connection, app_id).items():
        ti.xcom_push(key=key, value=value)


class DifyWorkflowRunLink(BaseOperatorLink):
    """
    Lead from a task that starts or waits on a workflow run to the log of its app in Dify's console.

    It is there as soon as the task has seen the run, and absent where the run doesn't tell its app.
    """

    name = "Dify run log"

    @property
    def xcom_key(self) -> str:
        """The XCom that Airflow 3 reads the link from; it writes there what :meth:`get_link` gives, too."""
        return RUN_LOG_KEY

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """
        Give the link as the task has pushed it.

        :param operator: not looked at.
        :param ti_key: the task instance.
        :return: the URL; an empty text, for which Airflow shows no button, where there is none.
        """
        from airflow.providers.common.compat.sdk import XCom

        return XCom.get_value(key=RUN_LOG_KEY, ti_key=ti_key) or ""
