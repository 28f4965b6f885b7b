# SPDX-License-Identifier: Apache-2.0
"""The connection form of Airflows before 3.2, whose hooks define it, and what its Test button says."""

from __future__ import annotations

from typing import Any

from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.models import AppInfo, one_line
from airflow_provider_dify.get_provider_info import CONNECTION_FIELDS, UI_FIELD_BEHAVIOUR

_NAME_LENGTH = 80


def describe_test(connection: DifyConnection, app: AppInfo, server_version: str | None) -> tuple[bool, str]:
    """Return what the Test button shows for an accepted key: whether the connection can be used, and a sentence."""
    name = one_line(app.name, _NAME_LENGTH)
    if not app.has_workflow_runs:
        return False, (
            f"The API key works, but it belongs to the app {name!r} of mode {one_line(str(app.mode), _NAME_LENGTH)}, "
            "which has no workflow runs. Use the API key of a workflow or chatflow app."
        )
    mode = f" ({app.mode})" if app.mode else ""
    version = f", Dify {server_version}" if server_version else ""
    return True, f"Connected to {connection.base_url}{version}, as the app {name!r}{mode}."


def ui_field_behaviour() -> dict[str, Any]:
    """Return the form's labels and hidden fields."""
    return {key.replace("-", "_"): value for key, value in UI_FIELD_BEHAVIOUR.items()}


def connection_form_widgets() -> dict[str, Any]:
    """Return the form's extra fields."""
    from flask_appbuilder.fieldwidgets import BS3TextFieldWidget
    from flask_babel import lazy_gettext
    from wtforms import IntegerField, StringField
    from wtforms.validators import Optional

    return {
        name: (IntegerField if "integer" in form_field["schema"]["type"] else StringField)(
            lazy_gettext(form_field["label"]),
            widget=BS3TextFieldWidget(),
            description=form_field["description"],
            validators=[Optional()],
        )
        for name, form_field in CONNECTION_FIELDS.items()
    }
