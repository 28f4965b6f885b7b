"""How often, and how far apart, a request is sent again that failed for a passing reason."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential, wait_random

from airflow_provider_dify.exceptions import DifyConnectionError
from airflow_provider_dify.waiting import MAX_RETRY_DELAY

if TYPE_CHECKING:
    from airflow.sdk.types import Logger

T = TypeVar("T")


def _never(error: DifyConnectionError) -> bool:
    return False


@dataclass(frozen=True)
class RequestRetries:
    """
    Sends a request again that failed for a passing reason.

    :param limit: how often; 0 for never.
    :param delay: seconds before the first retry; doubled for each further one, with jitter, up to 60 seconds.
    :param deadline: epoch seconds after which nothing is sent again; ``None`` for no limit.
    :param log: where each retry is logged.
    """

    limit: int
    delay: float
    deadline: float | None
    log: Logger

    def call(self, work: Callable[[], T], is_final: Callable[[DifyConnectionError], bool] = _never) -> T:
        """
        Return what a request returns, after retries if need be.

        :param work: sends the request, and parses the response.
        :param is_final: whether an error that usually may pass is not worth another attempt.
        :return: what ``work`` returns.
        """

        def may_pass(error: BaseException) -> bool:
            return (
                isinstance(error, DifyConnectionError)
                and not is_final(error)
                # A server that asks for more time than this is not asked early.
                and (error.retry_after or 0.0) <= MAX_RETRY_DELAY
            )

        return Retrying(
            retry=retry_if_exception(may_pass),
            stop=self._is_last,
            wait=self._wait,
            before_sleep=self._log_retry,
            reraise=True,
        )(work)

    def _is_last(self, state: RetryCallState) -> bool:
        is_late = self.deadline is not None and time.time() + self._shortest_wait(state) >= self.deadline
        return is_late or state.attempt_number > self.limit

    def _wait(self, state: RetryCallState) -> float:
        jitter = wait_random(0, self.delay)(state)
        wait = max(min(self._shortest_wait(state) + jitter, MAX_RETRY_DELAY), _retry_after(state))
        # The shortest wait ends before the deadline, or this is the last attempt.
        return wait if self.deadline is None else min(wait, max(0.0, self.deadline - time.time()))

    def _shortest_wait(self, state: RetryCallState) -> float:
        return max(wait_exponential(self.delay)(state), _retry_after(state))

    def _log_retry(self, state: RetryCallState) -> None:
        self.log.warning(
            "Attempt %d of %d failed, the next one is in %.1f seconds: %s",
            state.attempt_number,
            self.limit + 1,
            state.upcoming_sleep,
            state.outcome.exception() if state.outcome else None,
        )


def _retry_after(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return (error.retry_after or 0.0) if isinstance(error, DifyConnectionError) else 0.0
