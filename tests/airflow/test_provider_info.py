"""What Airflow knows of the provider: the schema it asks for, and what its own commands show."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources, util
from importlib.metadata import entry_points, version
from pathlib import Path

import jsonschema
import pytest

from airflow_provider_dify import DOCUMENTATION, __version__
from airflow_provider_dify.get_provider_info import CONNECTION_FIELDS, get_provider_info

AIRFLOW_2 = version("apache-airflow").startswith("2.")


def test_the_provider_info_is_what_airflow_asks_for() -> None:
    schema = json.loads(resources.files("airflow").joinpath("provider_info.schema.json").read_text())
    jsonschema.validate(get_provider_info(), schema)


def test_the_form_names_what_is_required_and_what_may_be_empty() -> None:
    (connection_type,) = get_provider_info()["connection-types"]
    placeholders = connection_type["ui-field-behaviour"]["placeholders"]
    assert placeholders["host"].startswith("Empty for Dify Cloud")
    assert placeholders["password"].startswith("Required")
    assert placeholders["port"].startswith("443")
    assert "https://cloud.dify.ai for Dify Cloud" in CONNECTION_FIELDS["console_url"]["description"]


def test_the_page_of_providers_has_no_word_that_belongs_to_an_address() -> None:
    assert "://" not in get_provider_info()["description"]


def test_the_guides_are_pages_of_this_version() -> None:
    (integration,) = get_provider_info()["integrations"]
    docs = Path(__file__).parent.parent.parent / "docs"
    assert integration["how-to-guide"]
    for guide in integration["how-to-guide"]:
        folder, _, page = guide.rpartition("/")
        assert folder == DOCUMENTATION
        assert (docs / page).exists()


def test_the_entry_point_leads_to_the_provider_info() -> None:
    found = {e.value: e for e in entry_points(group="apache_airflow_provider")}
    entry_point = found["airflow_provider_dify.get_provider_info:get_provider_info"]
    assert entry_point.load()()["package-name"] == "airflow-provider-dify"
    assert get_provider_info()["versions"] == [__version__] == [version("airflow-provider-dify")]


def test_every_module_it_names_is_there() -> None:
    info = get_provider_info()
    for kind in ("hooks", "operators", "sensors", "triggers"):
        for entry in info[kind]:
            assert entry["integration-name"] in {i["integration-name"] for i in info["integrations"]}
            for module in entry["python-modules"]:
                if AIRFLOW_2 and module.endswith(".dify_events"):
                    with pytest.raises(ImportError, match=r"needs Airflow 3\.0"):
                        __import__(module)
                else:
                    __import__(module)


def test_every_link_it_names_is_an_operators() -> None:
    from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
    from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor

    named = set(get_provider_info()["extra-links"])
    for operator in (DifyRunWorkflowOperator, DifyWorkflowRunSensor):
        assert {f"{type(link).__module__}.{type(link).__name__}" for link in operator.operator_extra_links} == named


# All commands in one process: loading Airflow takes seconds.
COMMANDS = """
import contextlib, io, json, sys
from airflow.cli.cli_parser import get_parser
shown = {}
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        arguments = get_parser().parse_args(["providers", *command])
        arguments.func(arguments)
    shown[command[0]] = output.getvalue()
print(json.dumps(shown))
"""


@pytest.mark.long
@pytest.mark.usefixtures("airflow_db")
def test_airflows_commands_show_the_provider() -> None:
    shown_by = {
        "list": ["airflow-provider-dify", "Dify", __version__],
        "hooks": ["dify", "airflow_provider_dify.hooks.dify.DifyHook", "airflow-provider-dify"],
        "links": ["airflow_provider_dify.links.dify.DifyWorkflowRunLink"],
        "get": ["conn-fields", "wait for them"],
    }
    # Without it these commands know no hook's on Airflow 3.0 and 3.1.
    if not version("apache-airflow").startswith(("3.0.", "3.1.")) or util.find_spec("flask_appbuilder"):
        shown_by |= {"behaviours": ["dify"], "widgets": [f"extra__dify__{name}" for name in CONNECTION_FIELDS]}
    arguments = {"list": ["--output", "plain"], "get": ["airflow-provider-dify", "--full", "--output", "json"]}
    commands = [[name, *arguments.get(name, ["--output", "json"])] for name in shown_by]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)], check=True, capture_output=True, text=True
    )
    shown = json.loads(done.stdout.splitlines()[-1])
    for command, texts in shown_by.items():
        for text in texts:
            assert text in shown[command], (command, shown[command], done.stderr)
    assert "airflow_provider_dify" not in done.stderr, done.stderr


FORM = """
from airflow.api_fastapi.core_api.services.ui.connections import HookMetaService
(dify,) = [hook for hook in HookMetaService.hook_meta_data() if hook.connection_type == "dify"]
print(dify.model_dump_json())
"""


@pytest.mark.skipif(AIRFLOW_2, reason="its form is made by the hook, see below")
@pytest.mark.long
@pytest.mark.usefixtures("airflow_db")
def test_airflow_3_shows_labels_and_extra_fields_in_its_form() -> None:
    if version("apache-airflow").startswith("3.0."):
        pytest.importorskip("flask_appbuilder", reason="without it Airflow 3.0 shows no hook's")
    done = subprocess.run([sys.executable, "-c", FORM], check=True, capture_output=True, text=True)
    form = json.loads(done.stdout.splitlines()[-1])
    fields = form["standard_fields"]
    assert {name: field["title"] for name, field in fields.items() if field and field["title"]} == {
        "host": "Base URL",
        "password": "API Key",
    }
    assert {name for name, field in fields.items() if field and field["hidden"]} == {"url_schema", "login"}
    assert {name: field["schema"]["title"] for name, field in form["extra_fields"].items()} == {
        name: field["label"] for name, field in CONNECTION_FIELDS.items()
    }


def test_the_hook_defines_the_same_form_for_airflow_2() -> None:
    from airflow_provider_dify.hooks.dify import DifyHook

    behaviour = DifyHook.get_ui_field_behaviour()
    assert behaviour["relabeling"] == {"host": "Base URL", "password": "API Key"}
    # Airflow's Test buttons need the port (3.3.2) and the extra (2.11) in the form.
    assert set(behaviour["hidden_fields"]) == {"schema", "login"}
    if AIRFLOW_2:
        widgets = DifyHook.get_connection_form_widgets()
        assert widgets.keys() == CONNECTION_FIELDS.keys()
