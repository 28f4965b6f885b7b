"""A running Airflow, a stand-in for Dify, and a browser."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from playwright.sync_api import Error, Page, Response, expect, sync_playwright

from tests.airflow.airflow_processes import AIRFLOW_2, AirflowProcesses, airflow_processes, free_port
from tests.dify_stand_in import API_KEY, DifyStandIn, Start
from tests.ui.airflow_2_ui import Airflow2UI
from tests.ui.airflow_3_ui import Airflow3UI
from tests.ui.airflow_ui import AirflowUI
from tests.ui.dags import DAG_IDS, write_dags
from tests.ui.screenshots import Screenshots

# A machine may be busy with Airflow's processes.
PATIENCE = 60_000
expect.set_options(timeout=PATIENCE)

OUTPUTS = {"text": "Hello from a workflow run", "score": 0.75}
ADMIN = "admin"
CHROMIUM_ARGUMENTS = [
    # Chromium's own sandbox doesn't start as root.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", type=Path, help="the folder to write the documentation's screenshots to")


@pytest.fixture(scope="session")
def dify() -> Iterator[DifyStandIn]:
    """A Dify with one workflow."""
    fields = {"outputs": OUTPUTS, "total_tokens": 42}
    with DifyStandIn() as server:
        server.starts.append(Start(statuses=("running", "running", "succeeded"), fields=fields))
        yield server


@pytest.fixture(scope="session")
def dags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the Dags of README, docs and example_dags."""
    folder = tmp_path_factory.mktemp("dags")
    write_dags(folder)
    return folder


@pytest.fixture(scope="session")
def airflow(dags: Path, dify: DifyStandIn) -> Iterator[AirflowProcesses]:
    """An Airflow with these Dags, and no connection in its database. The knowledge base's is in the environment."""
    knowledge = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY}
    environment = {
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        "AIRFLOW_CONN_DIFY_KNOWLEDGE": json.dumps(knowledge),
        "NO_PROXY": "127.0.0.1,localhost",
    }
    if AIRFLOW_2:
        environment |= {
            "AIRFLOW__WEBSERVER__WEB_SERVER_HOST": "127.0.0.1",
            "AIRFLOW__WEBSERVER__WEB_SERVER_PORT": str(free_port()),
            "AIRFLOW__WEBSERVER__WORKERS": "1",
            # It would be in the user's home.
            "GUNICORN_CMD_ARGS": "--no-control-socket",
        }
    with airflow_processes(environment) as airflow:
        if AIRFLOW_2:
            names = ["--username", ADMIN, "--firstname", "Ada", "--lastname", "Admin", "--email", "ada@example.com"]
            airflow.run("users", "create", *names, "--role", "Admin", "--password", ADMIN)
            airflow.start("webserver")
        yield airflow


@pytest.fixture(scope="session")
def page() -> Iterator[Page]:
    """A page of Debian's Chromium."""
    chromium = shutil.which("chromium")
    assert chromium is not None, "Chromium is not installed: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        context = browser.new_context(
            viewport={"width": 1280, "height": 800}, locale="en-US", color_scheme="light", timezone_id="UTC"
        )
        context.set_default_timeout(PATIENCE)
        yield context.new_page()
        browser.close()


@pytest.fixture(scope="session")
def addresses_with_the_key(page: Page) -> list[str]:
    """The addresses whose responses had the API key."""
    addresses: list[str] = []

    def look_at(response: Response) -> None:
        # Some answers, such as redirects, have no body to ask for.
        with contextlib.suppress(Error):
            if API_KEY.encode() in response.body():
                addresses.append(urlsplit(response.url).path)

    page.context.on("response", look_at)
    return addresses


@pytest.fixture(scope="session")
def ui(airflow: AirflowProcesses, page: Page, addresses_with_the_key: list[str]) -> AirflowUI:
    """Airflow's UI, logged in, once it answers and knows the Dags."""
    port = airflow.environment["AIRFLOW__WEBSERVER__WEB_SERVER_PORT" if AIRFLOW_2 else "AIRFLOW__API__PORT"]
    address = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(address, timeout=60).ok
        return False

    def knows_the_dags() -> bool:
        return {dag_id for (dag_id,) in airflow.query("SELECT dag_id FROM serialized_dag")} >= set(DAG_IDS)

    airflow.wait_for(is_up, seconds=180)
    airflow.wait_for(knows_the_dags, seconds=180)
    ui = Airflow2UI(page, address, ADMIN) if AIRFLOW_2 else Airflow3UI(page, address)
    ui.log_in()
    return ui


@pytest.fixture(scope="session")
def screenshots(request: pytest.FixtureRequest, page: Page, dify: DifyStandIn) -> Screenshots:
    """Where the documentation's screenshots are taken, if they are asked for."""
    return Screenshots(page, request.config.getoption("--screenshots"), dify)
