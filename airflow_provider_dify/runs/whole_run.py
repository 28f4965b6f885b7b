"""One run from start to end, in steps: what a hook's ``run_workflow`` does, and a batch for each row. No I/O."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from airflow_provider_dify.api.calls import Steps, parse_workflow_run_id
from airflow_provider_dify.api.models import WorkflowRun
from airflow_provider_dify.api.started_run import StartedRun
from airflow_provider_dify.exceptions import DifyWorkflowRunUncertain
from airflow_provider_dify.runs.fingerprint import fingerprint
from airflow_provider_dify.runs.following import Follower
from airflow_provider_dify.runs.log import RunSearch, known_runs
from airflow_provider_dify.runs.waiting import RunWait, WaitPolicy


def run_workflow(
    follower: Follower, inputs: Mapping[str, Any], user: str, workflow_id: str | None, timeout: float
) -> Steps[WorkflowRun]:
    """
    Start a run and follow it until it is over.

    :param follower: the follower, whose clock ends after ``timeout``.
    :param inputs: the workflow's inputs.
    :param user: who starts it.
    :param workflow_id: UUID of a published version; ``None`` for the current one.
    :param timeout: seconds for all of it, for messages.
    :return: the run, whatever its status.
    :raises DifyError: as :meth:`~airflow_provider_dify.hooks.dify.DifyHook.run_workflow` does.
    """
    before = yield from known_runs(user)
    search = RunSearch(user, time.time(), user_is_unique=False, fingerprint=fingerprint(inputs), known_runs=before)
    try:
        run_id = yield from name_run(follower, follower.send_start(inputs, user, workflow_id), search)
        return (yield from wait_for_run(follower, run_id, timeout))
    finally:
        if follower.stream is not None:
            follower.stream.close()


def wait_for_run(follower: Follower, workflow_run_id: str, timeout: float) -> Steps[WorkflowRun]:
    """
    Follow a run until it is over: by its events, if the follower has started it, and by polls.

    :param follower: the follower, whose clock ends after ``timeout``.
    :param workflow_run_id: the run.
    :param timeout: seconds, for messages.
    :return: the run, whatever its status.
    :raises DifyError: as :meth:`~airflow_provider_dify.hooks.dify.DifyHook.wait_for_workflow_run` does.
    """
    wait = RunWait(
        parse_workflow_run_id(workflow_run_id),
        WaitPolicy(not_found_grace=follower.not_found_grace),
        log=follower.log,
        was_seen=named_stream(follower) is not None,
    )
    run, _ = yield from follower.follow(wait, named_stream(follower), timeout)
    return run


def name_run(
    follower: Follower, start: Steps[StartedRun], search: RunSearch, seconds_in_log: float | None = None
) -> Steps[str]:
    """
    Take the steps of a start, and wait until its run has a name: on its stream, or in Dify's log.

    :param follower: the follower.
    :param start: the steps that send the start.
    :param search: what is known of the run.
    :param seconds_in_log: how long to look for the run of a start that broke off; by default until the deadline, where
        the server has accepted it and may have queued it, and for the follower's grace elsewhere.
    :return: the run's id.
    :raises DifyWorkflowRunUncertain: if it has none in time.
    :raises DifyError: as the start does.
    """
    try:
        stream = yield from start
        run_id = yield from follower.wait_until_named(stream, search, follower.clock.left)
    except DifyWorkflowRunUncertain as error:
        follower.log.warning("%s", error)
        seconds = seconds_in_log
        if seconds is None:
            seconds = follower.clock.left if follower.is_in_queue() else follower.not_found_grace
        run_id = yield from follower.search_run(search, error, seconds)
        if run_id is None:
            raise
    if run_id is None:
        raise still_queued(follower, search.user)
    return run_id


def named_stream(follower: Follower) -> StartedRun | None:
    """Return the events of the run that a follower has started; ``None`` if its stream has not named it."""
    return follower.stream if follower.stream is not None and follower.stream.is_named else None


def still_queued(follower: Follower, user: str) -> DifyWorkflowRunUncertain:
    """
    Return the error for a run that is still queued when the time is over.

    :param follower: the follower.
    :param user: the ``user`` of the start.
    """
    return DifyWorkflowRunUncertain(
        f"The {follower.whose} timeout is over, and the workflow run of user {user!r} is still queued at Dify, which "
        "cannot be asked to drop it: it will run, and be paid for, once. Look for the user in the app's log in Dify's "
        "console.",
        user=user,
    )
