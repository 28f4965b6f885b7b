# SPDX-License-Identifier: Apache-2.0
"""What a task shows in Airflow's UI: its colours, and the button that leads to Dify's console."""

from __future__ import annotations

from typing import Any

from airflow.providers.common.compat.sdk import BaseOperatorLink

# The XCom that the link is read from; with a dash, which few outputs have in their name.
RUN_LOG_KEY = "dify-run-log"
# A task's background and text in Airflow 2's graph. Airflow 2 writes in a light grey where the text's colour is black.
UI_COLOR = "#d5e0ff"
UI_FGCOLOR = "#1c2a5e"


class DifyWorkflowRunLink(BaseOperatorLink):
    """
    Leads from a task that starts or waits on a workflow run to the log of its app in Dify's console.

    It is there as soon as the task has seen the run, and absent where the run doesn't name its app.
    """

    name = "Dify run log"

    @property
    def xcom_key(self) -> str:
        """The XCom that Airflow 3 reads the link from; it writes there what :meth:`get_link` returns, too."""
        return RUN_LOG_KEY

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """
        Return the link as the task has pushed it.

        :param operator: the task; where it runs, it knows the link without asking Airflow.
        :param ti_key: the task instance.
        :return: the URL; an empty text, for which Airflow shows no button, where there is none.
        """
        url = getattr(operator, "run_log_url", None)
        if not url:
            from airflow.providers.common.compat.sdk import XCom

            url = XCom.get_value(key=RUN_LOG_KEY, ti_key=ti_key)
        # An output of this name, pushed by an older version of this package, could hold anything.
        return url if isinstance(url, str) and url.startswith(("http://", "https://")) else ""
