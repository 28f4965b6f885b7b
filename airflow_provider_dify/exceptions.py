# SPDX-License-Identifier: Apache-2.0
"""
What can go wrong between a task and Dify, separated by what the task should do about it.

::

    DifyError                                   retried, as Airflow's retries say
    ├── DifyConfigurationError                  fails: a connection or an argument that can't work
    ├── DifyConnectionError                     retried: Dify was away, overloaded or broken
    ├── DifyTaskKilled                          retried: Airflow killed the task; its run was stopped, or is looked for
    ├── DifyFilesError                          retried: a file could not be brought to Dify or from it
    │   └── DifyFilesLost                       fails: an output's file can't be had any more, such as by its old URL
    ├── DifyTokenLimitReached                   retried: a batch used more tokens than it may; the next try continues it
    ├── DifyBatchFailed                         fails: more runs of a batch failed than may
    ├── DifyRequestError                        fails: Dify rejected the request
    │   ├── DifyAuthenticationError             fails: Dify refused the API key
    │   └── DifyInputsRejected                  fails: the app doesn't take these inputs
    ├── DifyWorkflowRunUncertain                fails: a run may have been started, and can't be found
    ├── DifyWorkflowRunNotFound                 fails: the API key's app has no such run
    ├── DifyOutputsError                        fails: the run succeeded, but its outputs can't be an XCom
    └── DifyWorkflowRunFailed                   retried by the operator: the next try starts a new run
        ├── DifyWorkflowRunCannotSucceed        fails: the sensor's run can't succeed any more; a person stopped it
        └── DifyWorkflowRunTimeout              fails: the run was not over in time

What *fails* is also an ``AirflowFailException``, which ends the task without using up retries: the next try would get
the same response. Every exception pickles with its attributes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from airflow_provider_dify import DOCUMENTATION
from airflow_provider_dify.api.models import WorkflowRun

try:
    from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException
except ImportError:
    # What is in api/ works without Airflow.
    class AirflowException(Exception):  # type: ignore[no-redef]
        """Stands in for Airflow's."""

    class AirflowFailException(AirflowException):  # type: ignore[no-redef]
        """Stands in for Airflow's."""


if TYPE_CHECKING:
    from airflow.sdk.types import Logger
    from typing_extensions import Self

# Sections of the page Failures.
CONNECTION_SECTION = "the-connection-cant-be-used"
ARGUMENT_SECTION = "an-argument-cant-work"
BATCH_SECTION = "a-batch"
TRIGGERER_SECTION = "the-triggerer"

# Seconds that no retry is delayed beyond, unless the server asks for more.
MAX_RETRY_DELAY = 60.0

_types: dict[str, type[DifyError]] = {}


class DifyError(AirflowException):
    """Base of every error of this provider."""

    # What a trigger's event carries beside the message; each is None where it isn't known.
    attributes: ClassVar[tuple[str, ...]] = ()
    # The section of the page Failures that explains it, if none is named where it is raised.
    section: str = "the-exceptions"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _types[cls.__name__] = cls

    def to_event(self) -> dict[str, Any]:
        """
        Return the error as a trigger's event can carry it: without the workflow run.

        :return: JSON-ready values, for :meth:`from_event`.
        """
        attributes = {name: getattr(self, name, None) for name in self.attributes}
        event = {"type": type(self).__name__, "text": str(self), "attributes": attributes}
        return {**event, "section": self.section} if "section" in vars(self) else event

    def explained_in(self, section: str) -> Self:
        """
        Name the section of the page Failures that explains the error, where its class doesn't say which.

        :param section: the last part of the section's address.
        :return: the same error.
        """
        self.section = section
        return self

    def with_address(self) -> Self:
        """
        Return the error as a task ends with it: its message ends with the address where it is explained.

        :return: the same error.
        """
        address = f"{DOCUMENTATION}/failures.md#{self.section}"
        if not str(self).endswith(address):
            self.args = (f"{self} See {address}", *self.args[1:])
        return self

    @staticmethod
    def from_event(data: object) -> DifyError:
        """
        Return the error that :meth:`to_event` described.

        :param data: what it returned, maybe in another version of this package.
        :return: the error; a plain :class:`DifyError` where the type is not known here.
        """
        data = data if isinstance(data, dict) else {"text": f"The trigger's event has no error, but {data!r:.100}."}
        error_type = _types.get(str(data.get("type")), DifyError)
        error = error_type(str(data.get("text") or ""))
        attributes = data.get("attributes")
        for name in error_type.attributes:
            setattr(error, name, attributes.get(name) if isinstance(attributes, dict) else None)
        section = data.get("section")
        return error.explained_in(section) if isinstance(section, str) else error


class TaskErrors:
    """Lets a DifyError leave a task with its address, and without this package's frames: the debug log has them."""

    def __init__(self, log: Logger) -> None:
        self._log = log

    def __enter__(self) -> None:
        pass

    def __exit__(self, exc_type: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, DifyError):
            self._log.debug("How the task came to its error:", exc_info=error)
            raise error.with_address().with_traceback(None) from None


class DifyConfigurationError(DifyError, AirflowFailException, ValueError):
    """A connection or an argument that can't work, whatever Dify returns. Fails without retry."""

    section = ARGUMENT_SECTION


class _ResponseError(DifyError):
    """
    A response that is an error.

    :param message: what happened, for the reader.
    :param status_code: HTTP status of the response; ``None`` where there was no response.
    :param code: Dify's error code, such as ``not_workflow_app``, where the response had one.
    :param dify_message: Dify's own message, where the response had one; ``.message`` on the exception.
    :param server_version: Dify's version, where the response named it.
    """

    attributes: ClassVar[tuple[str, ...]] = ("status_code", "code", "message", "server_version")

    def __init__(
        self,
        message: str = "",
        *,
        status_code: int | None = None,
        code: str | None = None,
        dify_message: str | None = None,
        server_version: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code  # type: ignore[assignment]  # Airflow types its own as HTTPStatus
        self.code = code
        self.message = dify_message
        self.server_version = server_version


class DifyConnectionError(_ResponseError):
    """
    Dify could not be reached, was overloaded or broken, or something that is not Dify responded.

    May pass, so Airflow may retry.

    :ivar retry_after: seconds that the server asked to wait (``Retry-After``); ``None`` where it didn't.
    :ivar is_overloaded: whether the server turned the request away because it has too many.
    """

    section = "dify-cant-be-reached-or-cant-answer"

    attributes = (*_ResponseError.attributes, "retry_after", "is_overloaded")

    def __init__(
        self, message: str = "", *, retry_after: float | None = None, is_overloaded: bool = False, **response: Any
    ) -> None:
        super().__init__(message, **response)
        self.retry_after = retry_after
        self.is_overloaded = is_overloaded


class DifyTaskKilled(DifyError):
    """
    Airflow killed the task, or its ``execution_timeout`` was over.

    Retried. The run was stopped, or the next try looks for it.
    """

    section = "the-run-ended-without-success"


class DifyRequestError(_ResponseError, AirflowFailException):
    """Dify understood the request and rejected it. Fails without retry."""

    section = "dify-rejects-the-request"


class DifyAuthenticationError(DifyRequestError):
    """Dify refused the API key (401) or what it may do (403). Fails without retry."""


class DifyInputsRejected(DifyRequestError):
    """The app doesn't take these inputs, as its form or Dify itself says. No run was started. Fails without retry."""

    section = "the-start-of-a-run"


class DifyWorkflowRunUncertain(DifyError, AirflowFailException):
    """
    A request that may have started a workflow run broke off, and the run could not be found.

    Fails without retry, because the next try would start, and pay for, the run once more.

    :param message: what happened, for the reader.
    :param user: the ``user`` that the run was to be started as, by which Dify's log shows it.
    """

    section = "the-start-of-a-run"

    attributes = ("user",)

    def __init__(self, message: str = "", *, user: str | None = None) -> None:
        super().__init__(message)
        self.user = user


class DifyWorkflowRunNotFound(DifyError, AirflowFailException):
    """
    The app that the API key belongs to has no such workflow run. Fails without retry.

    :param message: what happened, for the reader.
    :param workflow_run_id: the run that was asked for.
    """

    section = "the-run-is-not-known"

    attributes = ("workflow_run_id",)

    def __init__(self, message: str = "", *, workflow_run_id: str | None = None) -> None:
        super().__init__(message)
        self.workflow_run_id = workflow_run_id


class DifyOutputsError(DifyError, AirflowFailException):
    """The workflow run succeeded, but an output can't be an XCom. Fails without retry."""

    section = "the-run-ended-without-success"


class DifyFilesError(DifyError):
    """
    A file could not be uploaded, or one of a run's outputs could not be saved.

    Retried. Where the run has succeeded, its outputs are XComs, and the next try downloads again without a new run.
    """

    section = "files"


class DifyFilesLost(DifyFilesError, AirflowFailException):
    """
    A file among a run's outputs can't be had: its URL has expired, or leads to where nothing may be fetched.

    Fails without retry. The run has succeeded, and its outputs are XComs.
    """


class DifyBatchFailed(DifyError, AirflowFailException):
    """
    More runs of a batch failed than ``max_failed_runs`` allows. Fails without retry.

    :param message: what happened, for the reader.
    :param summary: the batch's counts, as its XCom ``batch`` has them.
    """

    section = BATCH_SECTION
    attributes = ("summary",)

    def __init__(self, message: str = "", *, summary: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.summary = summary


class DifyTokenLimitReached(DifyError):
    """The runs of a batch have used more tokens than ``max_total_tokens``. A retry with a higher limit continues it."""

    section = BATCH_SECTION


class DifyWorkflowRunFailed(DifyError):
    """
    The workflow run ended without success.

    The operator raises it with Airflow's retries, each of which starts a new run.

    :param message: what happened, for the reader.
    :param run: the workflow run as Dify last described it, outputs included.
    :param failed_node: ``id``, ``title`` and ``type`` of the node that failed, where the run's events named it.
    """

    section = "the-run-ended-without-success"

    def __init__(
        self, message: str = "", *, run: WorkflowRun | None = None, failed_node: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.run = run
        self.failed_node = failed_node


class DifyWorkflowRunCannotSucceed(DifyWorkflowRunFailed, AirflowFailException):
    """
    The workflow run ended without success, and a retry would not change that. Fails without retry.

    The sensor raises it for every run that failed, the operator for one that a person stopped.
    """


class DifyWorkflowRunTimeout(DifyWorkflowRunFailed, AirflowFailException):
    """
    The workflow run was still not over ``run_timeout`` after its creation, or at the end of the operator's ``timeout``.

    Fails without retry. In the second case ``run`` is ``None``.
    """
