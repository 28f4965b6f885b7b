"""
A user's way through Airflow's UI, a step a test: each goes on where the one before it ended.

The connection leads to a stand-in for Dify, first by way of a wrong key, then of the right one.
"""

from __future__ import annotations

import json
import re
from typing import Any

from playwright.sync_api import expect

from airflow_provider_dify.get_provider_info import CONNECTION_FIELDS
from tests.airflow.airflow_processes import AIRFLOW_2, AirflowProcesses
from tests.dify_stand_in import API_KEY, DifyStandIn
from tests.ui.airflow_ui import AirflowUI
from tests.ui.screenshots import Screenshots

CONN_ID = "dify_default"
DAG_ID = "example_dify_start_then_sensor"
RUN_ID = "hello"
TASKS = ["start", "wait", "report"]
PROXIES = '{"https": "http://proxy.example.com:3128"}'


def stored(airflow: AirflowProcesses) -> dict[str, Any]:
    """What Airflow has stored of the connection."""
    *_, line = airflow.run("connections", "get", CONN_ID, "--output", "json").splitlines()
    (connection,) = json.loads(line)
    return dict(connection)


def test_the_form_has_the_fields_that_a_connection_needs_and_no_others(ui: AirflowUI, screenshots: Screenshots) -> None:
    ui.add_connection(CONN_ID)
    fields = ui.fields()
    assert fields["Base URL"].startswith("Empty for Dify Cloud")
    assert fields["API Key"].startswith("Required")
    # Of a field for numbers a browser may show nothing else.
    assert fields["Port"].startswith("443")
    airflows_own = (
        {"Connection Id", "Connection Type", "Description", "Extra"}
        if AIRFLOW_2
        else {"Connection ID", "Connection Type", "Description"}
    )
    extra_fields = {field["label"] for field in CONNECTION_FIELDS.values()}
    assert fields.keys() - airflows_own == {"Base URL", "API Key", "Port", *extra_fields}
    for field in CONNECTION_FIELDS.values():
        ui.field(field["label"])
        assert field["description"] in ui.form.inner_text()

    ui.fill({"Base URL": "https://dify.example.com", "API Key": API_KEY, "Port": "443"})
    assert ui.field("API Key").get_attribute("type") == "password"
    screenshots.take("connection-form-airflow-2" if AIRFLOW_2 else "connection-form", ui.form, height=1500)
    if not AIRFLOW_2:
        ui.field("Timeout (seconds)")
        screenshots.take("connection-extra-fields", ui.form, height=1500)


def test_pressing_test_with_a_wrong_key_shows_the_error(
    ui: AirflowUI, dify: DifyStandIn, screenshots: Screenshots
) -> None:
    ui.add_connection(CONN_ID)
    ui.fill({"Base URL": "http://localhost", "API Key": "a-wrong-key", "Port": str(dify.port)})
    test = ui.test_and_save(CONN_ID)
    assert not test.works
    assert "Dify refused the API key" in test.shown
    assert "Access token is invalid" in test.shown
    assert "a-wrong-key" not in ui.page.content()
    if not AIRFLOW_2:
        screenshots.take("connection-test-wrong-key", height=560, note=ui.page.get_by_role("status").last)


def test_pressing_test_with_the_right_key_names_the_app(
    ui: AirflowUI, airflow: AirflowProcesses, dify: DifyStandIn, screenshots: Screenshots
) -> None:
    ui.edit_connection(CONN_ID)
    ui.fill(
        {
            "API Key": API_KEY,
            "Timeout (seconds)": "20",
            "Verify TLS": "true",
            "Proxies": PROXIES,
            # Another name of the same server, to distinguish it from the base URL.
            "Console URL": dify.origin,
        }
    )
    test = ui.test_and_save(CONN_ID)
    assert test.works, test.message
    assert "as the app 'echo' (workflow)" in test.shown
    if not AIRFLOW_2:
        screenshots.take("connection-test-success", height=560, note=ui.page.get_by_role("status").last)

    connection = stored(airflow)
    assert (connection["host"], connection["port"]) == ("http://localhost", str(dify.port))
    extra = connection["extra_dejson"]
    # Airflow 3's form saves a number now as such, now as text.
    assert float(extra.pop("timeout")) == 20
    # It saves a field that is empty, too.
    given = {name: value for name, value in extra.items() if value}
    assert given == {"verify": "true", "proxies": PROXIES, "console_url": dify.origin}


def test_the_key_is_not_read_back_and_outlives_an_edit(ui: AirflowUI, airflow: AirflowProcesses) -> None:
    ui.edit_connection(CONN_ID)
    assert ui.field("API Key").input_value() in ("", "***")
    ui.fill({"Description": "The app that greets", "Timeout (seconds)": ""})
    ui.save()
    connection = stored(airflow)
    assert connection["description"] == "The app that greets"
    assert connection["password"] == API_KEY
    assert not connection["extra_dejson"].get("timeout")


def test_the_example_dag_succeeds_with_the_connection(
    ui: AirflowUI, airflow: AirflowProcesses, dify: DifyStandIn, screenshots: Screenshots
) -> None:
    ui.trigger(DAG_ID, RUN_ID)
    over = "SELECT count(*) FROM dag_run WHERE run_id = ? AND state IN ('success', 'failed')"
    airflow.wait_for(lambda: airflow.query(over, RUN_ID) == [(1,)], seconds=300)
    screenshots.set_times(airflow, RUN_ID, TASKS)
    ui.open_run(DAG_ID, RUN_ID)
    assert ui.task_states() == dict.fromkeys(TASKS, "success")
    assert [run.inputs for run in dify.started] == [{"query": "Hello"}]


def test_the_xcom_tab_shows_the_outputs(ui: AirflowUI, screenshots: Screenshots) -> None:
    ui.open_task("wait")
    xcoms = ui.open_xcoms()
    assert xcoms["text"] == "Hello from a workflow run"
    assert xcoms["score"] == "0.75"
    assert "Hello from a workflow run" in xcoms["return_value"]
    assert "total_tokens" in xcoms["workflow_run"]
    if not AIRFLOW_2:
        screenshots.take("xcoms", height=900)


def test_the_link_leads_to_the_apps_log_in_difys_console(
    ui: AirflowUI, dify: DifyStandIn, screenshots: Screenshots
) -> None:
    for task_id in ("wait", "start"):
        ui.open_run(DAG_ID, RUN_ID)
        ui.open_task(task_id)
        link = ui.link("Dify run log")
        expect(link).to_be_visible()
        if task_id == "wait" and not AIRFLOW_2:
            screenshots.take("run-log-link", height=360)
        with ui.page.context.expect_page() as opened:
            link.click()
        expect(opened.value).to_have_title("A page of Dify's console")
        assert re.fullmatch(f"{dify.origin}/app/[0-9a-f-]{{36}}/logs", opened.value.url)
        assert "Authorization" not in dify.requests[-1].headers
        opened.value.close()
