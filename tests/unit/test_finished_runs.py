"""Which runs of an app have ended since the last look."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pendulum
import pytest
from hypothesis import strategies as st

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Call
from airflow_provider_dify.api.models import LoggedWorkflowRun, LogRow, RowWithoutRun, WorkflowRun, WorkflowRunStatus
from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConnectionError,
    DifyError,
    DifyRequestError,
    DifyWorkflowRunNotFound,
)
from airflow_provider_dify.runs.ended import (
    DETAILS_AT_ONCE,
    MAX_DETAIL_INTERVAL,
    OVERLAP,
    PAGE_SIZE,
    FinishedRun,
    Look,
    RunWindow,
    WindowPolicy,
    look_at_runs,
)
from tests.unit.fuzzing import fuzzed

NOW = 1_800_000_000.0
POLICY = WindowPolicy(poll_interval=30.0)


@dataclass
class SimulatedRun:
    """A run of the simulated app: when it is in which status."""

    number: int
    created_at: float
    ends_at: float = float("inf")
    end: WorkflowRunStatus | str = WorkflowRunStatus.SUCCEEDED
    paused_from: float = float("inf")
    paused_until: float = float("inf")
    written_late: float = 0.0
    # Seconds by which its record is written after its row.
    recorded_late: float = 0.0
    user: str = "somebody"
    triggered_from: str = "app-run"

    @property
    def id(self) -> str:
        return f"00000000-0000-4000-8000-{self.number:012}"

    def status(self, now: float) -> WorkflowRunStatus | str:
        if now >= self.ends_at:
            return self.end
        return WorkflowRunStatus.PAUSED if self.paused_from <= now < self.paused_until else WorkflowRunStatus.RUNNING


@dataclass
class SimulatedDify:
    """The log and the details of an app, at a moment that the test sets."""

    runs: list[SimulatedRun] = field(default_factory=list)
    now: float = NOW
    clock_ahead: float = 0.0
    requests: list[str] = field(default_factory=list)
    failing: Callable[[str], DifyError | None] = lambda request: None
    # A new run comes between two requests.
    arrives: list[SimulatedRun] = field(default_factory=list)
    seconds_per_request: float = 0.0
    ignores_filter: bool = False

    async def perform(self, call: Call[Any]) -> Any:
        self.now += self.seconds_per_request
        request = f"{call.path}?page={(call.params or {}).get('page')}"
        self.requests.append(request)
        error = self.failing(request)
        if error is not None:
            raise error
        if call.path == calls.LOGS:
            rows = self._page(call.params or {})
            if self.arrives:
                self.runs.append(self.arrives.pop())
            return rows
        run_id = call.path.rpartition("/")[2]
        for run in self.runs:
            if run.id == run_id:
                return self._detail(run)
        raise DifyWorkflowRunNotFound("unknown", workflow_run_id=run_id)

    def _page(self, params: Any) -> list[LogRow]:
        after = params.get("created_at__after")
        bound = pendulum.parse(after).timestamp() if after else 0.0  # type: ignore[union-attr]
        before = params.get("created_at__before")
        last = pendulum.parse(before).timestamp() if before else float("inf")  # type: ignore[union-attr]
        if self.ignores_filter:
            bound, last = 0.0, float("inf")
        listed = [
            run
            for run in self.runs
            if run.created_at + run.written_late <= self.now and bound <= int(run.created_at + self.clock_ahead) <= last
        ]
        # By whole seconds; runs of the same one stand in another order on each page.
        order = 1 if params["page"] % 2 else -1
        listed.sort(key=lambda run: (int(run.created_at + self.clock_ahead), order * run.number), reverse=True)
        start = (params["page"] - 1) * params["limit"]
        return [self._row(run) for run in listed[start : start + params["limit"]]]

    def _row(self, run: SimulatedRun) -> LogRow:
        detail = self._detail(run)
        if self.now < run.created_at + run.recorded_late:
            return RowWithoutRun(f"row {run.id}", run.user, detail.created_at)
        facts = (run.id, detail.status, run.user, None, 1, 1, detail.created_at, detail.finished_at, 1.0)
        return LoggedWorkflowRun(*facts, triggered_from=run.triggered_from, logged_at=detail.created_at)

    def _detail(self, run: SimulatedRun) -> WorkflowRun:
        finished = self.now >= run.ends_at
        # Whole seconds, as Dify has them.
        created_at = pendulum.from_timestamp(int(run.created_at + self.clock_ahead))
        finished_at = pendulum.from_timestamp(int(run.ends_at + self.clock_ahead)) if finished else None
        return WorkflowRun(run.id, None, run.status(self.now), {}, {}, None, 1, 1, created_at, finished_at, 1.0)

    def look(self, window: RunWindow, policy: WindowPolicy = POLICY) -> Look:
        """Look once, over a window that has been through JSON."""
        read = RunWindow.deserialize(json.loads(json.dumps(window.serialize())))
        # No event loop, which would take longer than the look: nothing is waited for.
        with pytest.raises(StopIteration) as done:
            look_at_runs(self, read, policy, self.now).send(None)
        look: Look = done.value.value
        return look

    def begin(self, seconds: float = 30.0) -> RunWindow:
        """Look for the first time, and let so many seconds pass."""
        window = self.look(RunWindow()).window
        self.now += seconds
        return window

    def look_until(self, end: float, window: RunWindow, policy: WindowPolicy = POLICY) -> tuple[RunWindow, list[str]]:
        """Look every interval, and return the window and the ids of the runs that ended, in the order of the looks."""
        ended: list[str] = []
        while self.now < end:
            look = self.look(window, policy)
            window = look.window
            ended += [run.workflow_run_id for run in look.finished]
            self.now += policy.poll_interval
        return window, ended


def runs_of_a_second(numbers: Iterable[int], apart: float = 1.0) -> list[SimulatedRun]:
    """Return runs that begin so many seconds apart, from now on, and last a second each."""
    return [SimulatedRun(number, NOW + number * apart, NOW + number * apart + 1) for number in numbers]


def ids(*runs: SimulatedRun) -> list[str]:
    return [run.id for run in runs]


def test_what_ended_before_the_first_look_is_no_news_and_what_ends_after_it_is() -> None:
    over = SimulatedRun(1, NOW - 100, NOW - 50)
    going_on = SimulatedRun(2, NOW - 90, NOW + 40)
    later = SimulatedRun(3, NOW + 10, NOW + 20)
    assert SimulatedDify([over, going_on, later]).look_until(NOW + 120, RunWindow())[1] == ids(later, going_on)
    # An app without runs is watched from its first run on.
    assert SimulatedDify([later]).look_until(NOW + 120, RunWindow())[1] == ids(later)


def test_lookback_counts_runs_that_ended_before_the_first_look() -> None:
    runs = runs_of_a_second(range(1, 200), -10)
    dify = SimulatedDify(runs)
    look = dify.look(RunWindow(), WindowPolicy(lookback=600))
    assert sorted(run.workflow_run_id for run in look.finished) == ids(*runs[:60])


@pytest.mark.parametrize("clock_ahead", [-3600, 3600])
def test_a_clock_that_differs_changes_nothing(clock_ahead: float) -> None:
    runs = [SimulatedRun(number, NOW - 50 + 10 * number, NOW - 45 + 10 * number) for number in range(20)]
    dify = SimulatedDify(runs, clock_ahead=clock_ahead)
    assert dify.look_until(NOW + 300, RunWindow())[1] == ids(*runs[5:])


def test_a_run_that_lasts_longer_than_three_pages_of_newer_ones_is_asked_for_by_itself() -> None:
    long = SimulatedRun(0, NOW - 1, NOW + 600)
    newer = runs_of_a_second(range(1, 200))
    dify = SimulatedDify([long, *newer])
    _, ended = dify.look_until(NOW + 900, RunWindow())
    assert ended == ids(*newer, long)
    assert f"{calls.run_path(long.id)}?page=None" in dify.requests


def test_a_run_is_asked_for_ever_less_often_but_at_least_every_few_minutes() -> None:
    dify = SimulatedDify([SimulatedRun(0, NOW - 1)])
    window, _ = dify.look_until(NOW + 40_000, RunWindow())
    hours = []
    for _ in range(3):
        dify.runs += [SimulatedRun(number, dify.now - 5, dify.now - 4) for number in range(1, 3)]
        before = len(dify.requests)
        window, _ = dify.look_until(dify.now + 3600, window)
        hours.append(sum(calls.run_path("")[:-1] in request for request in dify.requests[before:]))
    assert hours[-1] in range(int(3600 / (MAX_DETAIL_INTERVAL + 30)) - 1, int(3600 / MAX_DETAIL_INTERVAL) + 2)


def test_a_paused_run_that_goes_on_is_news_at_its_end_only() -> None:
    run = SimulatedRun(0, NOW + 1, NOW + 5000, paused_from=NOW + 3, paused_until=NOW + 4900)
    dify = SimulatedDify([run])
    window, ended = dify.look_until(NOW + 4800, RunWindow())
    assert ended == []
    assert dify.look_until(NOW + 6000, window)[1] == ids(run)


def test_a_run_that_never_ends_leaves_after_run_timeout_and_does_not_come_back() -> None:
    run = SimulatedRun(0, NOW + 1)
    dify = SimulatedDify([run])
    policy = WindowPolicy(run_timeout=600)
    window, overdue = RunWindow(), []
    while dify.now < NOW + 2000:
        look = dify.look(window, policy)
        window = look.window
        overdue += look.overdue
        dify.now += 30
    assert overdue == ids(run)
    assert not window.open


def test_runs_of_the_same_second_are_each_news_once() -> None:
    dify = SimulatedDify([SimulatedRun(number, NOW + 29.1, NOW + 29.2) for number in range(30)])
    dify.runs += [SimulatedRun(number, NOW + 29.9, NOW + 30.5, written_late=0.5) for number in range(30, 60)]
    _, ended = dify.look_until(NOW + 120, RunWindow())
    assert sorted(ended) == ids(*dify.runs)


def test_a_row_that_is_written_late_is_news() -> None:
    late = SimulatedRun(1, NOW + 27, NOW + 28, written_late=4.5)
    dify = SimulatedDify([SimulatedRun(0, NOW + 29, NOW + 29.5), late])
    assert dify.look_until(NOW + 120, RunWindow())[1] == ids(dify.runs[0], late)


@pytest.mark.parametrize("begins", [-20.0, 10.0])
def test_a_run_whose_record_is_written_after_its_row_is_news(begins: float) -> None:
    late = SimulatedRun(1, NOW + begins, NOW + begins + 30, recorded_late=130)
    others = runs_of_a_second(range(20, 100))
    _, ended = SimulatedDify([late, *others]).look_until(NOW + 400, RunWindow())
    assert sorted(ended) == ids(late, *others)


def test_a_row_whose_record_is_gone_costs_more_only_while_it_is_young() -> None:
    gone = SimulatedRun(1, NOW + 1, recorded_late=float("inf"))
    others = runs_of_a_second(range(2, 2000))
    dify = SimulatedDify([gone, *others])
    window, ended = dify.look_until(NOW + 900, RunWindow())
    before = len(dify.requests)
    _, later = dify.look_until(NOW + 1800, window)
    # A look every 30 seconds, which finds 30 runs.
    assert len(dify.requests) - before <= 2 * 31
    assert [*ended, *later] == ids(*[run for run in others if run.ends_at <= NOW + 1770])


def test_pages_that_shift_while_runs_arrive_miss_none() -> None:
    dify = SimulatedDify([SimulatedRun(0, NOW - 10, NOW - 9)])
    window = dify.begin()
    dify.runs += runs_of_a_second(range(1, 200), 0.1)
    dify.arrives = [SimulatedRun(1000 + number, NOW + 30.1, NOW + 31) for number in range(9)]
    dify.seconds_per_request = 0.2
    window, ended = dify.look_until(NOW + 120, window)
    assert sorted(ended) == sorted(ids(*dify.runs[1:]))


def test_many_young_runs_are_read_by_pages_rather_than_one_at_a_time() -> None:
    # 500 a minute, each lasts a minute.
    runs = [SimulatedRun(number, NOW + number * 0.12, NOW + number * 0.12 + 60) for number in range(3000)]
    dify = SimulatedDify(runs)
    _, ended = dify.look_until(NOW + 600, RunWindow())
    assert sorted(ended) == ids(*runs)
    details = sum("page=None" in request for request in dify.requests)
    pages = len(dify.requests) - details
    assert details < 100
    # 250 new rows a look and as many or twice as many that were not over; twenty looks.
    assert pages < 20 * 45


def test_a_quiet_app_costs_one_request_a_look() -> None:
    dify = SimulatedDify([SimulatedRun(number, NOW - 100 * number, NOW - 99 * number) for number in range(1, 500)])
    dify.look_until(NOW + 3600, RunWindow())
    # The first look reads three pages.
    assert len(dify.requests) == 120 + 2


def test_a_server_that_knows_no_filter_is_not_read_to_the_end() -> None:
    runs = runs_of_a_second(range(1000), -10)
    dify = SimulatedDify(runs, ignores_filter=True)
    dify.look_until(NOW + 300, RunWindow())
    assert len(dify.requests) < 20


def test_a_server_that_shows_the_same_page_for_ever_ends_the_look() -> None:
    dify = SimulatedDify([SimulatedRun(number, NOW + 20, NOW + 21) for number in range(PAGE_SIZE)])
    window = dify.begin()
    real = dify._page
    dify._page = lambda params: real({**params, "page": 1})  # type: ignore[method-assign]
    assert len(dify.look(window).finished) == PAGE_SIZE


def test_a_look_that_fails_changes_nothing_and_the_next_one_brings_it_all() -> None:
    runs = runs_of_a_second(range(100), 0.1)
    dify = SimulatedDify(runs)
    window = dify.begin(60)
    dify.failing = lambda request: DifyConnectionError("down") if len(dify.requests) == 4 else None
    with pytest.raises(DifyConnectionError):
        dify.look(window)
    dify.failing = lambda request: None
    assert [run.workflow_run_id for run in dify.look(window).finished] == ids(*runs)


@pytest.mark.parametrize(
    "error",
    [
        DifyConnectionError("broken"),
        # These stop no look.
        DifyRequestError("rejected"),
        DifyWorkflowRunNotFound("gone", workflow_run_id="x"),
    ],
)
def test_one_run_that_cannot_be_read_does_not_hold_the_others_up(error: DifyError) -> None:
    broken, fine = SimulatedRun(1, NOW - 20, NOW + 10), SimulatedRun(2, NOW - 10, NOW + 10)
    newer = [SimulatedRun(number, NOW + 1 + number, NOW + 2 + number) for number in range(3, 10)]
    dify = SimulatedDify([broken, fine])
    window = dify.begin(0)
    dify.runs += newer
    dify.failing = lambda request: error if broken.id in request else None
    ended: list[str] = []
    errors = 0
    for _ in range(4):
        dify.now += 30
        look = dify.look(window)
        window = look.window
        errors += look.error is not None
        ended += [run.workflow_run_id for run in look.finished]
    assert sorted(ended) == ids(fine, *newer)
    assert bool(errors) == (type(error) is DifyConnectionError)
    if errors:
        dify.failing = lambda request: None
        dify.now += 30
        assert [run.workflow_run_id for run in dify.look(window).finished] == ids(broken)


def test_a_key_that_is_refused_for_a_run_fails_the_look() -> None:
    dify = SimulatedDify([SimulatedRun(1, NOW - 20), SimulatedRun(2, NOW - 10, NOW - 5)])
    window = dify.begin()
    dify.failing = lambda request: DifyAuthenticationError("refused") if "page=None" in request else None
    with pytest.raises(DifyAuthenticationError):
        dify.look(window)


def test_a_run_that_was_deleted_leaves_with_run_timeout() -> None:
    run = SimulatedRun(1, NOW - 20)
    dify = SimulatedDify([run])
    window = dify.begin(0)
    dify.runs = []
    assert dify.look_until(NOW + 300, window)[0].open.keys() == {run.id}
    dify.now += 10_000
    assert dify.look(window, WindowPolicy(run_timeout=600)).overdue == (run.id,)


def test_an_outage_is_caught_up() -> None:
    runs = [SimulatedRun(number, NOW + number, NOW + number + 30) for number in range(2000)]
    dify = SimulatedDify(runs)
    window = dify.begin(3000)
    assert [run.workflow_run_id for run in dify.look(window).finished] == ids(*runs)


def test_a_status_that_this_version_does_not_know_is_an_end_if_dify_says_when() -> None:
    run = SimulatedRun(1, NOW + 1, NOW + 100, end="rejected")
    assert SimulatedDify([run]).look_until(NOW + 200, RunWindow())[1] == ids(run)


def test_an_event_has_the_runs_facts_and_is_json() -> None:
    dify = SimulatedDify([SimulatedRun(1, NOW + 1, NOW + 2, user="us", triggered_from="schedule")])
    window = dify.begin()
    (run,) = dify.look(window).finished
    event = run.as_event()
    facts = ["workflow_run_id", "status", "user", "triggered_from"]
    assert list(event) == [*facts, "total_tokens", "elapsed_time", "created_at", "finished_at"]
    assert (event["status"], event["user"], event["triggered_from"]) == ("succeeded", "us", "schedule")
    assert json.loads(json.dumps(event)) == event
    # And such that every database takes it.
    run = FinishedRun("id", "odd\0status", "a\0b\ud800", None, 10**30, 1.0, None, None)
    event = run.as_event()
    assert (event["status"], event["user"], event["total_tokens"]) == ("odd\\x00status", "a\\x00b\\ud800", None)


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        [],
        "x",
        {"version": 2},
        {"version": 1, "read_until": "x"},
        {"version": 1, "read_until": 1.0},
        {"version": 1, "read_until": 1.0, "seen": {}, "open": {"a": [1.0]}},
    ],
)
def test_a_state_that_cannot_be_read_begins_from_scratch(data: Any) -> None:
    assert RunWindow.deserialize(data) == RunWindow()


def test_a_row_from_a_clock_that_was_days_ahead_hides_no_later_run() -> None:
    ahead = SimulatedRun(1, NOW + 400_000, NOW + 400_001)
    later = runs_of_a_second(range(2, 20), 10)
    dify = SimulatedDify([ahead, *later])
    real = dify._page
    # Its row is in the log all the time.
    dify._page = lambda params: [dify._row(ahead), *real(params)]  # type: ignore[method-assign]
    _, ended = dify.look_until(NOW + 300, RunWindow())
    assert [run_id for run_id in ended if run_id != ahead.id] == ids(*later)
    assert ended.count(ahead.id) <= 1


def test_a_state_that_is_days_ahead_loses_no_run_from_now_on() -> None:
    runs = runs_of_a_second(range(1, 20))
    assert SimulatedDify(runs).look_until(NOW + 60, RunWindow(read_until=NOW + 400_000))[1] == ids(*runs)


# Many small apps, whose runs begin, end, pause and are written late at any moment, watched by a trigger that is
# restarted and by a server that fails.
MOMENTS = st.floats(0, 900, allow_nan=False)
RUNS = st.lists(
    st.builds(
        lambda begin, lasts, late, is_paused: (NOW + begin, lasts, late, is_paused),
        MOMENTS,
        st.one_of(st.floats(0, 5), st.floats(0, 600)),
        st.floats(0, OVERLAP - 1.001),
        st.booleans(),
    ),
    max_size=80,
)


@fuzzed(RUNS, st.lists(st.integers(0, 40), max_size=10), st.sampled_from([5.0, 30.0, 120.0]), short=20, full=100)
def test_each_run_is_news_once_whatever_happens(
    runs: list[tuple[float, float, float, bool]], failures: list[int], interval: float
) -> None:
    simulated = [
        SimulatedRun(
            number,
            begin,
            begin + lasts,
            paused_from=begin + lasts / 3 if is_paused else float("inf"),
            paused_until=begin + lasts / 2,
            written_late=late,
        )
        for number, (begin, lasts, late, is_paused) in enumerate(runs)
    ]
    dify = SimulatedDify(simulated)
    policy = WindowPolicy(poll_interval=interval)
    window = dify.look(RunWindow(), policy).window
    count = 0

    def fail(request: str) -> DifyError | None:
        nonlocal count
        count += 1
        return DifyConnectionError("down") if count in failures else None

    dify.failing = fail
    ended: list[str] = []
    while dify.now < NOW + 3000:
        dify.now += interval
        try:
            look = dify.look(window, policy)
        except DifyConnectionError:
            continue
        window = look.window
        ended += [run.workflow_run_id for run in look.finished]
        newest = window.read_until or 0.0
        assert all(at >= newest - OVERLAP for at in window.seen.values())
    # Those that had ended before the first look were no news.
    expected = [run.id for run in simulated if run.created_at + run.written_late > NOW or run.ends_at > NOW]
    assert sorted(ended) == sorted(expected)
    assert not window.open


def test_a_look_asks_for_so_many_details_and_the_next_one_for_the_others() -> None:
    # Every tenth goes on.
    runs = [SimulatedRun(n, NOW - n * 12, NOW - n * 12 + 1 if n % 10 else float("inf")) for n in range(2500)]
    dify = SimulatedDify(runs)
    policy = WindowPolicy(poll_interval=30, lookback=40_000)
    window = dify.look(RunWindow(), policy).window
    dify.now += 10_000
    asked = []
    for _ in range(4):
        before = len(dify.requests)
        window = dify.look(window, policy).window
        asked.append(sum("page=None" in request for request in dify.requests[before:]))
        dify.now += 30
    # A few of the newest were in the first page.
    assert (asked[:2], asked[3]) == ([DETAILS_AT_ONCE, DETAILS_AT_ONCE], 0)
    assert 45 < asked[2] <= 50


@pytest.mark.long
def test_many_runs_of_all_lengths_are_news_soon() -> None:
    # 500 a minute; most last a minute, some much longer.
    generator = random.Random(1)
    begins = [NOW + number * 0.12 for number in range(5000)]
    runs = [SimulatedRun(n, begin, begin + generator.expovariate(1 / 60)) for n, begin in enumerate(begins)]
    dify = SimulatedDify(runs)
    window, ended = dify.look_until(NOW + 600, RunWindow())
    over = [run.id for run in runs if run.ends_at < NOW + 600 - 60]
    assert len(set(over) - set(ended)) < len(over) / 100
    _, later = dify.look_until(NOW + 1800, window)
    assert sorted(ended + later) == ids(*runs)


@pytest.mark.parametrize(("runs_an_hour", "most"), [(1, 125), (100, 260), (1000, 650)])
def test_what_an_hour_of_looks_costs_dify(runs_an_hour: int, most: int) -> None:
    # docs/reacting-to-runs.md has the figures: a look every 30 seconds, runs of a minute on average.
    generator = random.Random(1)
    begins = [NOW + (number + generator.random()) * 3600 / runs_an_hour for number in range(runs_an_hour)]
    runs = [SimulatedRun(n, begin, begin + generator.expovariate(1 / 60)) for n, begin in enumerate(begins)]
    dify = SimulatedDify(runs)
    dify.look_until(NOW + 3600, RunWindow())
    assert len(dify.requests) <= most
