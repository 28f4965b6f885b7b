"""Which errors leave a task its retries, and that they survive a process boundary."""

from __future__ import annotations

import logging
import pickle
import re
from importlib.metadata import metadata
from pathlib import Path

import pytest
from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException

import airflow_provider_dify
from airflow_provider_dify import DOCUMENTATION, __version__, exceptions
from airflow_provider_dify.api.models import WorkflowRun
from tests.unit.test_workflow_run import read, recorded

ALL = [e for e in vars(exceptions).values() if isinstance(e, type) and issubclass(e, exceptions.DifyError)]


def test_only_what_may_pass_leaves_retries() -> None:
    assert {e.__name__ for e in ALL if not issubclass(e, AirflowFailException)} == {
        "DifyError",
        "_ResponseError",
        "DifyConnectionError",
        "DifyTaskKilled",
        "DifyFilesError",
        "DifyTokenLimitReached",
        # The operator's next try starts a new run.
        "DifyWorkflowRunFailed",
    }
    assert all(issubclass(e, AirflowException) for e in ALL)


def test_a_configuration_error_is_a_value_error() -> None:
    assert issubclass(exceptions.DifyConfigurationError, ValueError)
    assert issubclass(exceptions.DifyAuthenticationError, exceptions.DifyRequestError)
    assert issubclass(exceptions.DifyWorkflowRunTimeout, exceptions.DifyWorkflowRunFailed)


@pytest.mark.parametrize(
    "error",
    [
        exceptions.DifyError("message"),
        exceptions.DifyConfigurationError("message"),
        exceptions.DifyConnectionError("message", status_code=503, code="c", dify_message="m", retry_after=7.0),
        exceptions.DifyRequestError("message", status_code=400, code="c", dify_message="m"),
        exceptions.DifyAuthenticationError("message", status_code=401, code="c", dify_message="m"),
        exceptions.DifyWorkflowRunNotFound("message", workflow_run_id="r"),
        exceptions.DifyWorkflowRunFailed("message", run=read(recorded("detail_failed"))),
        exceptions.DifyWorkflowRunTimeout("message", run=read(recorded("detail_running_t0"))),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_pickle_with_all_that_they_hold(error: exceptions.DifyError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) == "message"
    assert vars(copy) == vars(error)
    if "run" in vars(error):
        assert isinstance(copy.run, WorkflowRun)


def headings(page: str) -> set[str]:
    """Return the addresses of a page's headings, as GitHub makes them."""
    lines = (Path(airflow_provider_dify.__file__).parents[1] / "docs" / page).read_text(encoding="utf-8").splitlines()
    titles = [line.lstrip("# ") for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", sorted(exceptions._types))
def test_a_failure_ends_with_the_address_of_the_section_that_explains_it(name: str) -> None:
    error = exceptions._types[name]("Connection refused.").with_address()
    page, _, section = str(error).removeprefix(f"Connection refused. See {DOCUMENTATION}/").partition("#")
    assert page == "failures.md"
    assert section in headings(page)
    # A task may end with an error that another process has ended with.
    assert str(error.with_address()).count("https://") == 1


def test_the_debug_log_has_the_frames_that_a_task_s_error_has_not(caplog: pytest.LogCaptureFixture) -> None:
    def inner_work() -> None:
        try:
            raise OSError("the socket's own words")
        except OSError as error:
            raise exceptions.DifyConnectionError("Connection refused.") from error

    caplog.set_level(logging.DEBUG)
    with (
        pytest.raises(exceptions.DifyConnectionError) as failure,
        exceptions.TaskErrors(logging.getLogger("task")),  # type: ignore[arg-type]
    ):
        inner_work()
    assert "inner_work" not in {frame.name for frame in failure.traceback}
    assert "inner_work" in caplog.text
    assert "the socket's own words" in caplog.text


def test_the_documentation_is_that_of_this_version_in_the_packages_repository() -> None:
    urls = dict(url.split(", ", 1) for url in metadata("airflow-provider-dify").get_all("Project-URL") or [])
    assert f"{urls['Source']}/blob/v{__version__}/docs" == DOCUMENTATION
    assert urls["Documentation"] == f"{urls['Source']}/blob/main/docs/index.md"
