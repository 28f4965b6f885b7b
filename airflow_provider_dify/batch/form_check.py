"""The check of a batch's rows against the app's form, which is read once for all of them. No I/O."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Steps
from airflow_provider_dify.exceptions import DifyError
from airflow_provider_dify.runs.inputs import InputForm, check_inputs, parse_input_form

if TYPE_CHECKING:
    from airflow.sdk.types import Logger

# A warning is logged for the first row that it is about; a million rows may have as many.
_MAX_WARNINGS = 20


class FormCheck:
    """
    The check of each row's inputs.

    :param log: the task's log.
    """

    def __init__(self, log: Logger) -> None:
        self._log = log
        self._form: InputForm | None = None
        self._warned: set[str] = set()

    def read_form(self) -> Steps[None]:
        """Read the form; a server that refuses it leaves the check out."""
        with contextlib.suppress(DifyError):
            self._form = parse_input_form((yield calls.parameters()))

    def problem_of(self, inputs: Mapping[str, Any]) -> str | None:
        """
        Return why Dify is sure to reject a row.

        :param inputs: its inputs.
        :return: the message; ``None`` if nothing is known against them.
        """
        if self._form is None:
            return None
        check = check_inputs(self._form, inputs)
        for warning in check.warnings:
            if warning not in self._warned and len(self._warned) < _MAX_WARNINGS:
                self._warned.add(warning)
                self._log.warning("%s", warning)
        rejection = check.rejection()
        return None if rejection is None else str(rejection)
