"""
What can go wrong between a task and Dify, told apart by what the task should do about it.

An exception that is also an ``AirflowFailException`` fails the task at once: the next try would meet the same
answer. The others leave Airflow its retries. Every exception pickles with its attributes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException

if TYPE_CHECKING:
    from airflow_provider_dify.models import WorkflowRun


class DifyError(AirflowException):
    """Base of every error of this provider."""

    def to_event(self) -> dict[str, Any]:
        """
        Give the error as a trigger's event can carry it: what is in it, but no workflow run.

        :return: JSON-ready values, for :meth:`from_event`.
        """
        attributes = {name: value for name, value in vars(self).items() if name != "run"}
        return {"type": type(self).__name__, "text": str(self), "attributes": attributes}

    @staticmethod
    def from_event(told: dict[str, Any]) -> DifyError:
        """
        Make the error again from what :meth:`to_event` gave.

        :param told: what it gave, maybe in another version of this package.
        :return: the error; a plain :class:`DifyError` where the type is not known here.
        """
        kind = globals().get(told.get("type", ""))
        error = kind(told.get("text", "")) if isinstance(kind, type) and issubclass(kind, DifyError) else None
        if error is None:
            return DifyError(told.get("text", ""))
        vars(error).update(told.get("attributes") or {})
        return error


class DifyConfigurationError(DifyError, AirflowFailException, ValueError):
    """A connection or an argument that cannot work, whatever Dify answers. Fails without retry."""


class DifyConnectionError(DifyError):
    """
    Dify could not be reached, was overloaded or broken, or something that is not Dify answered.

    May pass, so Airflow may retry.

    :param message: what happened, for the reader.
    :param status_code: HTTP status of the answer; ``None`` where there was no answer.
    :param code: Dify's error code, where the answer had one.
    :param dify_message: Dify's own message, where the answer had one; ``.message`` on the exception.
    :param retry_after: seconds that the server asked to wait (``Retry-After``), where it did.
    """

    def __init__(
        self,
        message: str = "",
        *,
        status_code: int | None = None,
        code: str | None = None,
        dify_message: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code  # type: ignore[assignment]  # Airflow types its own as HTTPStatus
        self.code = code
        self.message = dify_message
        self.retry_after = retry_after


class DifyRequestError(DifyError, AirflowFailException):
    """
    Dify understood the request and rejected it. Fails without retry.

    :param message: what happened, for the reader.
    :param status_code: HTTP status of the answer.
    :param code: Dify's error code, such as ``not_workflow_app``.
    :param dify_message: Dify's own message; ``.message`` on the exception.
    """

    def __init__(
        self,
        message: str = "",
        *,
        status_code: int | None = None,
        code: str | None = None,
        dify_message: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code  # type: ignore[assignment]  # Airflow types its own as HTTPStatus
        self.code = code
        self.message = dify_message


class DifyAuthenticationError(DifyRequestError):
    """Dify refused the API key (401) or what it may do (403). Fails without retry."""


class DifyWorkflowRunUncertain(DifyError, AirflowFailException):
    """
    A request that may have started a workflow run broke off before Dify named the run.

    Fails without retry, because the next try would start, and pay for, the run once more.

    :param message: what happened, for the reader.
    :param user: the ``user`` that the run was to be started as, by which Dify's log shows it.
    """

    def __init__(self, message: str = "", *, user: str | None = None) -> None:
        super().__init__(message)
        self.user = user


class DifyWorkflowRunNotFound(DifyError, AirflowFailException):
    """
    The app that the API key belongs to has no such workflow run. Fails without retry.

    :param message: what happened, for the reader.
    :param workflow_run_id: the run that was asked for.
    """

    def __init__(self, message: str = "", *, workflow_run_id: str | None = None) -> None:
        super().__init__(message)
        self.workflow_run_id = workflow_run_id


class DifyWorkflowRunFailed(DifyError, AirflowFailException):
    """
    The workflow run ended without success. Fails without retry: this run can never succeed.

    :param message: what happened, for the reader.
    :param run: the workflow run as Dify last told it, outputs included.
    """

    def __init__(self, message: str = "", *, run: WorkflowRun | None = None) -> None:
        super().__init__(message)
        self.run = run


class DifyWorkflowRunTimeout(DifyWorkflowRunFailed):
    """
    The workflow run was still not over ``run_timeout`` after its creation, or at the end of the operator's ``timeout``.

    Fails without retry. In the second case ``run`` is ``None``.
    """
