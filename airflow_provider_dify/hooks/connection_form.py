"""The connection form of Airflows before 3.2, whose hooks define it; later ones read the package's description."""

from __future__ import annotations

from typing import Any

from airflow_provider_dify.get_provider_info import CONNECTION_FIELDS, UI_FIELD_BEHAVIOUR


class ConnectionForm:
    """Mixed into the hook: the form's labels, hidden fields and extra fields."""

    @classmethod
    def get_ui_field_behaviour(cls) -> dict[str, Any]:
        """Return the form's labels and hidden fields."""
        return {key.replace("-", "_"): value for key, value in UI_FIELD_BEHAVIOUR.items()}

    @classmethod
    def get_connection_form_widgets(cls) -> dict[str, Any]:
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
