"""What the soak's tasks, their logs and the stand-in for Dify say in the end, brought together."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from airflow_cluster import AirflowCluster  # noqa: TC002
from soak_tasks import DAG_ID, STARTS, task_id_of

from tests.dify_stand_in import DifyStandIn, Started

RUN_ID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")
STOP_ROUTE = re.compile(r"/v1/workflows/tasks/([^/]+)/stop")
UNCERTAIN = "DifyWorkflowRunUncertain"
# What the log says of a run that runs on, because it was queued when its task was killed.
STOPS_NO_QUEUED_RUN = "Dify stops no queued run"
# What the log says of a stop, whether Dify's response came back or not.
SAYS_STOP = re.compile(r"(?:Asked Dify to stop|Dify stopped) workflow run|could not be stopped|Dify does not stop")


@dataclass(frozen=True)
class Task:
    """
    A task when all was over.

    :param state: Airflow's state.
    :param tries: how many it took.
    :param outputs: what it returned, if it did.
    :param logs: the lines of each try's log, by its number.
    """

    state: str
    tries: int
    outputs: Any
    run_id: str | None
    logs: dict[int, list[dict[str, Any]]]

    @property
    def reason(self) -> str:
        """Why it failed, by the exception that its last try ended with; empty where it succeeded."""
        if self.state == "success":
            return ""
        errors = [line["error_detail"][0] for line in self.logs.get(self.tries, []) if line.get("error_detail")]
        return str(errors[-1]["exc_type"]) if errors else "ended by SIGKILL"

    @property
    def messages(self) -> list[str]:
        """All that its tries logged, exceptions included, without the tracebacks."""
        lines = [line for try_number in sorted(self.logs) for line in self.logs[try_number]]
        return [
            " ".join([str(line.get("event")), *(str(error["exc_value"]) for error in line.get("error_detail") or ())])
            for line in lines
        ]

    @property
    def named_runs(self) -> set[str]:
        """The ids in its logs, and the one in its XCom; without requests that failed, which may be for any run."""
        said = [message for message in self.messages if "could not" not in message]
        return {run_id for message in said for run_id in RUN_ID.findall(message)} | {self.run_id or ""}

    @property
    def runs_asked_to_stop(self) -> set[str]:
        """The runs that its logs name in a sentence about a stop."""
        said = [message for message in self.messages if SAYS_STOP.search(message)]
        return {run_id for message in said for run_id in RUN_ID.findall(message)}


@dataclass(frozen=True)
class ServerRun:
    """
    A run at the server when all was over.

    :param number: of the task whose inputs it has.
    :param status: its last one.
    :param started_at: epoch seconds of the start.
    :param began_at: epoch seconds at which it had a slot, in whole seconds.
    :param ended_at: epoch seconds of its end, or of the first request to stop it.
    """

    id: str
    number: int
    status: str
    started_at: float
    began_at: float
    ended_at: float
    was_asked_to_stop: bool

    @property
    def went_on_to_its_end(self) -> bool:
        """Whether nothing ended it early: it is paid for, and could have been used."""
        return self.status == "succeeded" and not self.was_asked_to_stop


class Ledger:
    """
    The sums.

    :param cluster: the cluster, whose tasks are over.
    :param dify: the stand-in, whose runs are over.
    """

    def __init__(self, cluster: AirflowCluster, dify: DifyStandIn) -> None:
        self.dify = dify
        rows = cluster.query("SELECT task_id, state, try_number FROM task_instance WHERE dag_id = %s", DAG_ID)
        xcoms = {
            (task_id, key): json.loads(value)
            for task_id, key, value in cluster.query(
                "SELECT task_id, key, value::text FROM xcom WHERE dag_id = %s", DAG_ID
            )
        }
        by_task = {task_id: (state, tries) for task_id, state, tries in rows}
        self.tasks = {
            number: Task(
                *by_task[task_id],
                xcoms.get((task_id, "return_value")),
                xcoms.get((task_id, "workflow_run_id")),
                _logs(cluster.home, task_id),
            )
            for number in range(STARTS)
            for task_id in [task_id_of(number)]
        }
        self.states = Counter(state for state, _ in by_task.values())

    @cached_property
    def runs(self) -> dict[str, ServerRun]:
        """Every run that was started at the server, by its id."""
        stopped_at: dict[str, float] = {}
        for request in self.dify.requests:
            if stop := STOP_ROUTE.search(request.path):
                stopped_at.setdefault(stop[1], request.at + self.dify.epoch)
        return {started.workflow_run_id: self._run(started, stopped_at) for started in self.dify.started}

    def _run(self, started: Started, stopped_at: dict[str, float]) -> ServerRun:
        detail = self.dify.runs[started.workflow_run_id].now or {}
        stop = stopped_at.get(started.task_id)
        return ServerRun(
            started.workflow_run_id,
            int(started.inputs["number"]),
            str(detail["status"]),
            started.at,
            float(detail["created_at"]),
            float(detail["finished_at"]) if stop is None else stop,
            stop is not None,
        )

    @cached_property
    def runs_of_tasks(self) -> dict[int, list[ServerRun]]:
        """The runs of each task, the oldest first."""
        found: dict[int, list[ServerRun]] = defaultdict(list)
        for run in sorted(self.runs.values(), key=lambda run: run.started_at):
            found[run.number].append(run)
        return found

    def what_became_of(self, run: ServerRun) -> str:
        """Return in a few words what a run was for."""
        task = self.tasks[run.number]
        if task.state == "success" and task.run_id == run.id:
            return "gave its task's result"
        if run.was_asked_to_stop:
            return "stopped by its task"
        if run.status == "failed":
            return "failed"
        if run.id in task.named_runs:
            return f"known to a task that failed: {task.reason}"
        if task.reason == UNCERTAIN:
            return "not found, and its task says so"
        if any(STOPS_NO_QUEUED_RUN in message for message in task.messages):
            return "queued when its task was killed, which the task's log says"
        return "not found: its task was ended by SIGKILL" if task.reason == "ended by SIGKILL" else "lost"

    def started_while_another_could_be_used(self) -> list[tuple[ServerRun, ServerRun]]:
        """Return the pairs of runs of one task where the first neither failed nor was stopped before the second."""
        return [
            (first, second)
            for runs in self.runs_of_tasks.values()
            for first, second in pairwise(runs)
            if first.went_on_to_its_end or first.ended_at > second.started_at
        ]

    def print_table(self, faults: Counter[str], signals: Counter[str]) -> None:
        """Print all sums."""
        runs, tasks = list(self.runs.values()), list(self.tasks.values())
        stops = [request for request in self.dify.requests if STOP_ROUTE.search(request.path)]
        count: dict[str, object] = {
            "tasks": len(tasks),
            **_indented(f"succeeded, tries: {task.tries}" for task in tasks if task.state == "success"),
            **_indented(f"failed, tries: {task.tries}, {task.reason}" for task in tasks if task.state != "success"),
            "tries": sum(task.tries for task in tasks),
            "runs at the server": len(runs),
            **_indented(self.what_became_of(run) for run in runs),
            "seconds that a run was queued, at most": f"{max(run.began_at - run.started_at for run in runs):.0f}",
            "runs that were asked to stop": sum(run.was_asked_to_stop for run in runs),
            "requests to stop": len(stops),
            "runs started while another of the task could be used": len(self.started_while_another_could_be_used()),
            "signals to tasks": sum(signals.values()),
            **_indented(signals.elements()),
            "faults of the proxy": sum(faults.values()),
            **_indented(faults.elements()),
            "requests that reached the server": len(self.dify.requests),
        }
        print("\n| what | count |\n| --- | ---: |")
        print("\n".join(f"| {name} | {number} |" for name, number in count.items()), flush=True)


def _indented(names: Any) -> dict[str, int]:
    return {f"- {name}": number for name, number in sorted(Counter(names).items())}


def _logs(home: Path, task_id: str) -> dict[int, list[dict[str, Any]]]:
    found = {}
    for path in home.glob(f"logs/dag_id={DAG_ID}/*/task_id={task_id}/**/attempt=*.log*"):
        number = int(path.name.removeprefix("attempt=").split(".")[0])
        lines = [_parse(line) for line in path.read_text(errors="replace").splitlines()]
        found[number] = found.get(number, []) + lines
    return found


def _parse(line: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError:
        return {"event": line}
    return parsed if isinstance(parsed, dict) else {"event": line}
