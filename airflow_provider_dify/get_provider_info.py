# SPDX-License-Identifier: Apache-2.0
"""What Airflow knows about this provider before it imports any of its other modules."""

from __future__ import annotations

from typing import Any

from airflow_provider_dify import DOCUMENTATION, __version__

_INTEGRATION = "Dify"
_GUIDES = ("getting-started", "starting-runs", "batch", "waiting", "reacting-to-runs", "recipes")

# The connection form. Airflow 3 reads it from here; the hook turns the same into Airflow 2's form.
CONNECTION_FIELDS: dict[str, dict[str, Any]] = {
    "timeout": {
        "label": "Timeout (seconds)",
        "description": "How long to wait for a response of the API. 30 seconds if empty.",
        "schema": {"type": ["integer", "null"], "minimum": 1},
    },
    "verify": {
        "label": "Verify TLS",
        "description": "true, false, or the path of a CA bundle on the machines that run tasks. true if empty.",
        "schema": {"type": ["string", "null"]},
    },
    "proxies": {
        "label": "Proxies",
        "description": 'Proxy URLs by URL scheme, as JSON: {"https": "http://proxy.example.com:3128"}.',
        "schema": {"type": ["string", "null"]},
    },
    "console_url": {
        "label": "Console URL",
        "description": "Where people open Dify, for links in Airflow's UI. If empty: https://cloud.dify.ai for Dify "
        "Cloud, else the server of the base URL.",
        "schema": {"type": ["string", "null"]},
    },
    "headers": {
        "label": "Headers",
        "description": 'Headers for what stands in front of Dify, as JSON: {"CF-Access-Client-Id": "..."}. Secret.',
        "schema": {"type": ["string", "null"], "format": "password"},
    },
    "files_url": {
        "label": "Files URL",
        "description": "Where the files of a run's outputs are, if Dify doesn't say. The server of the base URL if "
        "empty.",
        "schema": {"type": ["string", "null"]},
    },
}
UI_FIELD_BEHAVIOUR: dict[str, Any] = {
    # Neither the port nor the extra: the Test button of Airflow 3.3.1 and 3.3.2 fails for a connection without a port,
    # and 2.11's in a form without the extra.
    "hidden-fields": ["schema", "login"],
    "relabeling": {"host": "Base URL", "password": "API Key"},
    "placeholders": {
        "host": "Empty for Dify Cloud; else https://dify.example.com",
        "password": "Required: the API key of the Dify app",
        "port": "443 (the Test button of Airflow 3.3.1 and 3.3.2 needs a port)",
    },
}


def get_provider_info() -> dict[str, Any]:
    """Return what the provider consists of, in the form of Airflow's ``provider_info.schema.json``."""
    return {
        "package-name": "airflow-provider-dify",
        "name": "Dify",
        # Without an address: Airflow's page of providers makes the next word a part of it.
        "description": "Start Dify workflow runs in Dags, wait for them and use their outputs.",
        "versions": [__version__],
        "integrations": [
            {
                "integration-name": _INTEGRATION,
                "external-doc-url": "https://docs.dify.ai/",
                "how-to-guide": [f"{DOCUMENTATION}/{page}.md" for page in _GUIDES],
                "tags": ["service", "ai"],
            }
        ],
        "hooks": _modules("hooks", "dify", "dify_async"),
        "operators": _modules("operators", "dify", "dify_batch"),
        "sensors": _modules("sensors", "dify", "dify_latest"),
        "triggers": _modules("triggers", "dify", "dify_events"),
        "extra-links": ["airflow_provider_dify.links.dify.DifyWorkflowRunLink"],
        "connection-types": [
            {
                "connection-type": "dify",
                "hook-class-name": "airflow_provider_dify.hooks.dify.DifyHook",
                "hook-name": "Dify",
                "conn-fields": CONNECTION_FIELDS,
                "ui-field-behaviour": UI_FIELD_BEHAVIOUR,
            }
        ],
    }


def _modules(folder: str, *names: str) -> list[dict[str, Any]]:
    modules = [f"airflow_provider_dify.{folder}.{name}" for name in names]
    return [{"integration-name": _INTEGRATION, "python-modules": modules}]
