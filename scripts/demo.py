"""
Start a Dify workflow run with real Airflow, wait for it and print what the downstream task received.

``make demo`` runs this. Without settings it starts the tests' stand-in for Dify, on this machine, whose run is running
for a few polls and then succeeds, and ends with a batch of 50 rows. The stand-in speaks like the newest Dify that was
recorded; ``make demo DIFY=1.13.0`` chooses another version. With ``DIFY_BASE_URL`` and ``DIFY_API_KEY`` set it names
that real Dify's app, its inputs and a Dag for it, and starts a run there, with the inputs in ``DIFY_INPUTS`` (a JSON
object; ``{}`` by default), and no batch. With ``WORKFLOW_RUN_ID`` set as well it starts none, but waits for that run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
STARTING = "example_dify_start_then_sensor"
WAITING = "example_dify_workflow_run"
BATCH = "example_dify_batch"
BATCH_ROWS = 50
# What each run of the stand-in uses.
TOKENS = 42
SERVER = ("DIFY_BASE_URL", "DIFY_API_KEY")
WHAT = ("DIFY_INPUTS", "WORKFLOW_RUN_ID")


@dataclass(frozen=True)
class Target:
    """A Dify, the example Dag to run on it, and the outputs it is known to give; ``None`` where that is not known."""

    base_url: str
    api_key: str
    dag_id: str
    conf: dict[str, Any]
    outputs: dict[str, Any] | None


@contextlib.contextmanager
def target(dialect: str) -> Iterator[Target]:
    """
    Return the Dify of the environment, or the stand-in.

    :param dialect: the version that the stand-in speaks like.
    """
    base_url, api_key = (os.environ.get(name, "") for name in SERVER)
    inputs, run_id = (os.environ.get(name, "") for name in WHAT)
    if base_url and api_key:
        if run_id:
            yield Target(base_url, api_key, WAITING, {"workflow_run_id": run_id}, outputs=None)
        else:
            yield Target(base_url, api_key, STARTING, {"inputs": json_object(inputs or "{}")}, outputs=None)
        return
    if base_url or api_key or inputs or run_id:
        sys.exit(f"Set both {' and '.join(SERVER)}, and {' or '.join(WHAT)} if you like; or none of them.")
    sys.path.insert(0, str(ROOT))
    from tests.dify_stand_in import API_KEY, DIALECTS, DifyStandIn, Start, form_field

    if dialect not in (*DIALECTS, "current"):
        sys.exit(f"DIFY={dialect}: the stand-in speaks like {', '.join(DIALECTS)}; current is {DIALECTS[-1]}.")
    outputs: dict[str, Any] = {"text": "Hello from a workflow run — héllo 你好 🎉", "score": 0.75}
    asked = {"query": "Hello"}
    with DifyStandIn(dialect) as dify:
        dify.user_input_form = [form_field("query", required=True), form_field("id")]
        fields = {"outputs": outputs, "total_tokens": TOKENS}
        statuses = ("running", "running", "running", "succeeded")
        dify.starts.append(Start(statuses=statuses, fields=fields, duration=0.0))
        dify.starts.extend([Start(fields=fields, duration=0.2)] * BATCH_ROWS)
        print(f"A stand-in for Dify {dify.dialect} (a test double) listens at {dify.base_url}.")
        yield Target(dify.base_url, API_KEY, STARTING, {"inputs": asked}, outputs)
        first, *others = [run.inputs for run in dify.started]
        if first != asked:
            sys.exit(f"The stand-in was not asked for one run with the inputs {asked}, but with {first}.")
        if len(others) != BATCH_ROWS or len({row["id"] for row in others}) != BATCH_ROWS:
            sys.exit(f"The stand-in was not asked for one run for each of {BATCH_ROWS} rows, but for {others}.")


def json_object(text: str) -> dict[str, Any]:
    """Read the inputs."""
    try:
        value = json.loads(text)
    except ValueError as error:
        sys.exit(f"DIFY_INPUTS is no JSON: {error}")
    if not isinstance(value, dict):
        sys.exit("DIFY_INPUTS must be a JSON object, the workflow's inputs by name.")
    return value


# A line of the log as Airflow 3 and Airflow 2 write it: the message, and where it was logged.
LOG_LINES = (
    re.compile(r"^\S+ \[\w+ *\] (?P<message>.*?) +\[(?P<logger>[\w.]+)\](?P<place>.*)$"),
    re.compile(r"^\[[^\]]+\] \{(?P<place>[^}]+)\} \w+ - (?P<message>.*)$"),
)
STARTED_TASK = re.compile(r"\[DAG TEST\] starting task_id=(\S+)")
PRINTED = re.compile(r"^(The workflow answered |\d+ of \d+ rows succeeded )")
ERROR = re.compile(r"^(?:[\w.]+\.)?(?P<message>(?:Dify|Airflow)\w+: .+)$")
FILE = re.compile(r"\b(\w+\.py):\d")
# What the demo on the stand-in shows of the provider's lines; the rest is in the log.
MATTERS = re.compile(r"^Dify workflow run \S+ (?!is running)|^(\d+) of \1 runs are over")


def task_line(line: str) -> str | None:
    """
    Return what the provider or the example says in a line of Airflow's output.

    :param line: the line.
    :return: the message; ``None`` if the line is Airflow's own.
    """
    if PRINTED.match(line):
        return line
    for pattern in LOG_LINES:
        found = pattern.match(line)
        if found:
            file = FILE.search(found["place"])
            by_provider = file[1] in package_files() if file else "airflow_provider_dify" in found["logger"]
            return found["message"] if by_provider else None
    return None


@functools.cache
def package_files() -> set[str]:
    """Return the names of the provider's files."""
    package = importlib.util.find_spec("airflow_provider_dify")
    folders = package.submodule_search_locations if package else None
    return {path.name for folder in folders or () for path in Path(folder).rglob("*.py")}


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Print what happens, a dot for each second that it takes, and how long it took."""
    print(f"{title} ", end="", flush=True)
    over = threading.Event()

    def print_dots() -> None:
        while not over.wait(1):
            print(".", end="", flush=True)

    dots = threading.Thread(target=print_dots, daemon=True)
    start = time.monotonic()
    dots.start()
    try:
        yield
    finally:
        over.set()
        dots.join()
        print(f" {time.monotonic() - start:.0f} s", flush=True)


def airflow(*arguments: str, env: dict[str, str], log: IO[str], show: bool = False, shows_all: bool = False) -> None:
    """
    Run an Airflow command, and exit with the cause if it fails.

    :param arguments: the command.
    :param env: its environment.
    :param log: where its whole output goes.
    :param show: whether to print what the tasks say, as far as it matters.
    :param shows_all: whether to print all of it.
    """
    cause, task_id, last_message = "", "", ""
    with subprocess.Popen(
        [sys.executable, "-m", "airflow", *arguments],
        env={**env, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    ) as command:
        for line in command.stdout or ():
            log.write(line)
            log.flush()
            text = line.rstrip()
            started = STARTED_TASK.search(text)
            task_id = started[1] if started else task_id
            message = task_line(text)
            # Airflow 2 writes each line twice.
            matters = message and (shows_all or PRINTED.match(message) or MATTERS.match(message))
            if show and matters and message != last_message:
                print(f"\n   {task_id:<9} {message}", end=" ", flush=True)
            last_message = message or last_message
            error = ERROR.match(text.strip())
            cause = error["message"] if error else cause
    if command.returncode:
        cause = cause or f"It exited with {command.returncode} and named no cause."
        sys.exit(f"airflow {arguments[0]} {arguments[1]} failed. Its whole output is in {log.name}\n\n{cause}")


# Run in a process of its own, which reads the settings of the temporary Airflow.
READ_XCOMS = """
import json
from airflow.utils.session import create_session
try:
    from airflow.models.xcom import XComModel
    value_of = XComModel.deserialize_value
except ImportError:  # Airflow 2
    import airflow.providers.fab.auth_manager.models
    from airflow.models.xcom import XCom as XComModel
    value_of = lambda row: row.value
with create_session() as session:
    rows = session.query(XComModel).filter(XComModel.key == "return_value").all()
    print("XCOMS " + json.dumps({row.task_id: value_of(row) for row in rows}))
"""


def xcoms(env: dict[str, str]) -> dict[str, Any]:
    """Return the return value of each task by its id."""
    done = subprocess.run(
        [sys.executable, "-c", READ_XCOMS], env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    line = next(line for line in done.stdout.decode().splitlines() if line.startswith("XCOMS "))
    return dict(json.loads(line.removeprefix("XCOMS ")))


# Run in a process of its own, too: what the Test button says, and the inputs that the app's form requires.
ASK_APP = """
import json
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.runs.inputs import parse_input_form
with DifyHook() as hook:
    works, message = hook.test_connection()
    form = parse_input_form(hook.get_parameters()) if works else None
required = {field.variable: "..." for field in form.fields if field.required} if form else {}
print("APP " + json.dumps([works, message, required]))
"""

DAG_TO_PASTE = """
from airflow.providers.common.compat.sdk import dag

from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator


@dag(schedule=None)
def my_dify_workflow():
    DifyRunWorkflowOperator(task_id="run", inputs={inputs!r})


my_dify_workflow()
"""


def introduce_app(env: dict[str, str], given: dict[str, Any]) -> None:
    """
    Print the app of the API key, its inputs, and a Dag that runs it; exit with the cause if the key is refused.

    :param env: the environment of Airflow.
    :param given: the inputs that the user gave; of others that the app requires, the Dag has dots.
    """
    done = subprocess.run(
        [sys.executable, "-c", ASK_APP], env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    line = next(line for line in done.stdout.decode().splitlines() if line.startswith("APP "))
    works, message, inputs = json.loads(line.removeprefix("APP "))
    if not works:
        sys.exit(message)
    print(f"{message}\nA Dag that runs it:\n{DAG_TO_PASTE.format(inputs={**inputs, **given})}")


def main() -> None:
    """Run the example Dag and check its result."""
    dialect = sys.argv[1] if len(sys.argv) > 1 else "current"
    log_path = Path(tempfile.mkstemp(prefix="dify-demo-", suffix=".log")[1])
    with (
        tempfile.TemporaryDirectory(prefix="airflow-demo-") as home,
        log_path.open("w", encoding="utf-8") as log,
        target(dialect) as dify,
    ):
        env = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_")}
        env |= {
            "AIRFLOW_HOME": home,
            "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "example_dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__METRICS__TIMER_UNIT_CONSISTENCY": "True",
            "AIRFLOW_CONN_DIFY_DEFAULT": json.dumps(
                {"conn_type": "dify", "host": dify.base_url, "password": dify.api_key}
            ),
        }
        is_real = dify.outputs is None
        with step(f"Making a database for Airflow, whose whole output goes to {log_path}"):
            airflow("db", "migrate", env=env, log=log)
        if is_real:
            introduce_app(env, dify.conf.get("inputs", {}))
        conf = json.dumps(dify.conf)
        with step(f"Running the Dag {dify.dag_id} with {json.dumps(dify.conf, ensure_ascii=False)}"):
            airflow("dags", "test", dify.dag_id, "--conf", conf, env=env, log=log, show=True, shows_all=is_real)
            returned = xcoms(env)
        check(dify, returned, log_path)
        if not is_real:
            run_batch(Path(home) / "results", env, log)
            print("Both Dags succeeded. docs/getting-started.md shows how to use a Dify of your own.")


def run_batch(results: Path, env: dict[str, str], log: IO[str]) -> None:
    """
    Run the example of a batch, and check its results.

    :param results: the folder for them.
    :param env: the environment of Airflow.
    :param log: where its whole output goes.
    """
    with step(f"Running the Dag {BATCH}: {BATCH_ROWS} rows of a file in one task, 4 runs at once"):
        airflow("dags", "test", BATCH, "--conf", json.dumps({"folder": str(results)}), env=env, log=log, show=True)
    lines = [json.loads(line) for file in results.glob("*.jsonl") for line in file.read_text().splitlines()]
    if [(line["index"], line["status"]) for line in lines] != [(row, "succeeded") for row in range(BATCH_ROWS)]:
        sys.exit(f"These are not the results of {BATCH_ROWS} rows: {lines}. See {log.name}")
    if {line["total_tokens"] for line in lines} != {TOKENS}:
        sys.exit(f"These are not the tokens of the runs: {lines}. See {log.name}")


def check(dify: Target, returned: dict[str, Any], log_path: Path) -> None:
    """
    Check what the tasks returned, and print what a real Dify's workflow gave.

    :param dify: the target.
    :param returned: the return value of each task by its id.
    :param log_path: Airflow's whole output.
    """
    if "wait" not in returned or "report" not in returned:
        sys.exit(f"The Dag did not succeed: only {sorted(returned)} returned something. See {log_path}")
    if dify.outputs is None:
        print(f"The workflow run's outputs: {json.dumps(returned['wait'], ensure_ascii=False)}")
    elif returned["wait"] != dify.outputs or returned["report"] != {
        "answer": dify.outputs["text"],
        "total_tokens": TOKENS,
    }:
        sys.exit(f"{returned} is not what the run returned: {json.dumps(dify.outputs, ensure_ascii=False)}")


if __name__ == "__main__":
    main()
