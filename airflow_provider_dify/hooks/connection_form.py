# SPDX-License-Identifier: Apache-2.0
"""The connection form of Airflows before 3.2, whose hooks define it, and what its Test button says."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from airflow_provider_dify.api.models import one_line
from airflow_provider_dify.exceptions import DifyError
from airflow_provider_dify.get_provider_info import CONNECTION_FIELDS, UI_FIELD_BEHAVIOUR
from airflow_provider_dify.runs.inputs import InputForm, parse_input_form

_NAME_LENGTH = 80


def run_test(hook: Any) -> tuple[bool, str]:
    """Return what the Test button shows: whether the connection can be used, and sentences."""
    form = InputForm()
    try:
        app = hook.get_app_info()
        # One that can't be read says nothing about the connection.
        with suppress(DifyError):
            form = parse_input_form(hook.get_parameters())
    except DifyError as error:
        return False, str(error)
    name = one_line(app.name, _NAME_LENGTH)
    if not app.has_workflow_runs:
        return False, (
            f"The API key works, but it belongs to the app {name!r} of mode {one_line(str(app.mode), _NAME_LENGTH)}, "
            "which has no workflow runs. Use the API key of a workflow or chatflow app."
        )
    mode = f" ({app.mode})" if app.mode else ""
    inputs = f" {form.describe()}" if form.complete else ""
    version = f", Dify {hook.server_version}" if hook.server_version else ""
    return True, f"Connected to {hook.connection.base_url}{version}, as the app {name!r}{mode}.{inputs}"


def ui_field_behaviour() -> dict[str, Any]:
    """Return the form's labels and hidden fields."""
    return {key.replace("-", "_"): value for key, value in UI_FIELD_BEHAVIOUR.items()}


def connection_form_widgets() -> dict[str, Any]:
    """Return the form's extra fields."""
    from flask_appbuilder.fieldwidgets import BS3PasswordFieldWidget, BS3TextFieldWidget
    from flask_babel import lazy_gettext
    from wtforms import IntegerField, PasswordField, StringField
    from wtforms.validators import Optional

    class SecretWidget(BS3PasswordFieldWidget):
        def __call__(self, field: Any, **attributes: Any) -> Any:
            # By this text Airflow 2 knows that a secret was not edited; an empty field would delete it.
            value = "RATHER_LONG_SENSITIVE_FIELD_PLACEHOLDER" if field.data else ""
            return super().__call__(field, value=value, **attributes)

    def field(label: str, description: str, schema: dict[str, Any]) -> Any:
        is_secret = schema.get("format") == "password"
        kind = PasswordField if is_secret else IntegerField if "integer" in schema["type"] else StringField
        widget = SecretWidget(hide_value=False) if is_secret else BS3TextFieldWidget()
        return kind(lazy_gettext(label), widget=widget, description=description, validators=[Optional()])

    return {name: field(**form_field) for name, form_field in CONNECTION_FIELDS.items()}
