"""
Compare waits and batches of this provider with those of others, on this machine. ``make bench`` runs this.

Every row of a table is measured in the same run, against the same local TLS server, each contender in a process of its
own on one core, the server on another. The tables are Markdown. Nothing here fails because something was slow.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import batches
import server
import trustme
import waits
from batches import Batch, BatchCost
from server import Scenario
from waits import Cost, Plan

OURS, BARE, DBT = "dify", "bare", "dbt"
NAMES = {
    BARE: "bare aiohttp loop",
    OURS: "**`DifyWorkflowRunTrigger`**",
    DBT: "dbt Cloud's `DbtCloudRunJobTrigger`",
    "http": "`HttpSensorTrigger`",
    "anthropic": "`AnthropicBatchTrigger` (a thread per poll)",
}
# Waits, and seconds between the polls of each.
LOADS = ((200, 1.0), (1000, 2.0))
SENSORS = {
    OURS: ("`airflow_provider_dify.sensors.dify`", "airflow_provider_dify.sensors.dify"),
    DBT: ("dbt Cloud's sensor", "airflow.providers.dbt.cloud.sensors.dbt"),
    "http": ("HTTP sensor", "airflow.providers.http.sensors.http"),
    "anthropic": ("Anthropic's batch sensor", "airflow.providers.anthropic.sensors.batch"),
}
IMPORTS = 7
# What every Dag file has imported already is not counted, and is imported once: each measurement is a fork of that. The
# first round is for the compiled files and the disk's cache.
IMPORT_PROBE = """
import importlib, os, sys, time
from airflow.sdk import DAG, task

rounds, *names = sys.argv[1:]
for round in range(int(rounds) + 1):
    for name in names:
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        modules, start = len(sys.modules), time.perf_counter()
        importlib.import_module(name)
        took = (time.perf_counter() - start) * 1000
        if round:
            os.write(1, f"import {name} {took} {len(sys.modules) - modules}\\n".encode())
        os._exit(0)
"""
# How long to count CPU time, and then to look at the event loop's lag.
CPU_SECONDS, LAG_SECONDS = 5, 2
# How far from the interval a gap between two polls may be, as a share of it.
ON_TIME = 0.1
# Runs together in the table of faults, where nothing is timed; no two of the heavy ones.
FAULT_GROUPS = ((BARE, OURS, "http"), (DBT, "anthropic"))
FAULT_WAITS, FAULT_INTERVAL, FAULT_FINISH, FAULT_SECONDS = 200, 1.0, 12.0, 34.0
# Our trigger's own; the others are left at their defaults. Shorter than the server stalls.
FAULT_TIMEOUT = 2

# Rows of a batch, runs at once, seconds a run, and how often each contender does it: the median counts.
BATCHES = {
    BARE: "bare aiohttp loop",
    OURS: "**`DifyRunWorkflowBatchOperator`**",
    "threads": "thread pool of `requests`",
}
BATCH_ROWS, BATCH_AT_ONCE, RUN_SECONDS, BATCH_ROUNDS = 1_000, 50, 0.5, 3
# Rows of the two batches whose memory is compared; their runs are over at once.
MEMORY_ROWS = (1_000, 100_000)

SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Bench:
    """
    What all measurements share.

    :param place: a temporary folder, with ``server.pem`` and ``log``.
    :param contender_core: the core of the contenders; ``None`` where the system can't keep a process on one.
    :param server_core: the core of the server.
    """

    place: Path
    contender_core: int | None
    server_core: int | None

    @property
    def log(self) -> Path:
        return self.place / "log"


@dataclass(frozen=True)
class Measured:
    """
    One contender under one load.

    :param cost: what the contender reported.
    :param scenario: what the server played.
    :param plan: what the contender was to do.
    :param connections: connections that the server accepted.
    :param polls: by wait: when the server saw its polls.
    """

    cost: Cost
    scenario: Scenario
    plan: Plan
    connections: int
    polls: dict[int, list[float]]

    @property
    def cpu_per_poll(self) -> float:
        """Milliseconds of CPU time for each poll that the server saw: the median second, for a busy machine's sake."""
        arrivals = sorted(at for polls in self.polls.values() for at in polls)
        seconds = []
        for (begin, cpu_before), (end, cpu_after) in itertools.pairwise(self.cost.cpu):
            count = bisect(arrivals, end) - bisect(arrivals, begin)
            seconds.append((cpu_after - cpu_before) * 1000 / max(1, count))
        return statistics.median(seconds)

    @property
    def on_time(self) -> float:
        """Share of polls, once the waits have settled, that came one interval after the same wait's last one."""
        gaps = [
            later - earlier
            for polls in self.polls.values()
            for earlier, later in itertools.pairwise(polls[1:])
            if earlier >= self.plan.cpu_from and later < self.plan.lag_until
        ]
        interval = self.plan.interval
        return sum(abs(gap - interval) <= ON_TIME * interval for gap in gaps) / max(1, len(gaps))

    @property
    def finish_to_event(self) -> float:
        """Median seconds from the end of a run to the event that tells it; infinite if there was none."""
        return statistics.median(self.delays) if self.delays else float("inf")

    @property
    def delays(self) -> list[float]:
        """Seconds from the end of each run to the event that tells it."""
        ends = self.cost.ends.items()
        return [at - self.scenario.finish_of(wait) for wait, (at, ended_well, _) in ends if ended_well]

    @property
    def survived(self) -> int:
        """Waits that saw their run succeed."""
        return sum(ended_well for _, ended_well, _ in self.cost.ends.values())


# --- processes


@contextlib.contextmanager
def process(target: Any, *arguments: Any) -> Iterator[Connection]:
    """
    Run a function in a process of its own, ended with the block.

    :param target: the function; its last argument is the other end of the pipe.
    :param arguments: the ones before.
    :return: this end of the pipe.
    """
    here, there = SPAWN.Pipe()
    child: BaseProcess = SPAWN.Process(target=target, args=(*arguments, there), daemon=True)
    child.start()
    there.close()
    try:
        yield here
    finally:
        child.terminate()
        child.join()


def set_connections(port: int, timeout: float | None) -> None:
    """
    Set the environment variables that contenders started from now on find their connections in.

    :param port: the server's port.
    :param timeout: the timeout of our connection; the default if ``None``.
    """
    origin = f"https://127.0.0.1:{port}"
    connections: dict[str, dict[str, Any]] = {
        "dify": {"host": f"{origin}/v1", "extra": {"timeout": timeout} if timeout else {}},
        "dbt": {"host": f"127.0.0.1:{port}", "login": "1"},
        "http": {"host": origin},
        "anthropic": {"host": origin},
    }
    for kind, fields in connections.items():
        connection = {"conn_type": kind, **fields}
        if kind != "http":
            connection["password"] = "none"  # noqa: S105
        os.environ[f"AIRFLOW_CONN_{kind.upper()}_BENCH"] = json.dumps(connection)


@contextlib.contextmanager
def contender(
    bench: Bench, name: str, *, pinned: bool, timeout: float | None = None
) -> Iterator[tuple[Connection, str]]:
    """
    Start a contender, and a server for it alone.

    :param bench: what is shared.
    :param name: the contender.
    :param pinned: whether both stay on a core of their own.
    :param timeout: the timeout of our connection; the default if ``None``.
    :return: the contender's end of a pipe, loaded and waiting for its plan; the URL to control the server.
    """
    cores = (bench.contender_core, bench.server_core) if pinned else (None, None)
    with process(server.main, cores[1], bench.place / "server.pem", bench.log) as from_server:
        port, control_port = from_server.recv()
        set_connections(port, timeout)
        with process(waits.main, name, cores[0], bench.log) as from_contender:
            from_contender.recv()
            yield from_contender, f"http://127.0.0.1:{control_port}"


def ask(url: str, body: Any = None) -> Any:
    """
    Ask the server's control port.

    :param url: the URL.
    :param body: what to send, as JSON; nothing if ``None``.
    :return: the JSON that it answered.
    """
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(url, data, timeout=30) as answer:  # noqa: S310
        return json.load(answer)


# --- measurements


def measure_loads(bench: Bench, name: str) -> dict[tuple[str, int], Measured]:
    """
    Measure one contender under each load.

    :param bench: what is shared.
    :param name: the contender.
    :return: what was measured, by contender and number of waits.
    """
    measured = {}
    with contender(bench, name, pinned=True) as (pipe, control):
        for count, interval in LOADS:
            start = time.monotonic() + 0.2
            # One interval in which the waits start, and some time in which they settle.
            settled = start + 1.5 * interval + 0.5
            over = settled + CPU_SECONDS + LAG_SECONDS
            plan = Plan(
                waits=count,
                interval=interval,
                start=start,
                cpu_from=settled,
                lag_from=settled + CPU_SECONDS,
                lag_until=over,
                give_up_at=over + 2 * interval + 10,
            )
            measured[name, count] = run(pipe, control, plan, Scenario(finish_at=over, finish_over=interval))
    return measured


def run(pipe: Connection, control: str, plan: Plan, scenario: Scenario) -> Measured:
    """
    Tell both sides what to do, and wait for what came of it.

    :param pipe: to the contender.
    :param control: the URL to control the server.
    :param plan: for the contender.
    :param scenario: for the server.
    :return: what was measured.
    """
    ask(f"{control}/scenario", asdict(scenario))
    pipe.send(plan)
    cost = pipe.recv()
    stats = ask(f"{control}/stats")
    polls = {int(wait): times for wait, times in stats["polls"].items()}
    return Measured(cost, scenario, plan, stats["connections"], polls)


def measure_faults(bench: Bench) -> dict[str, Measured]:
    """
    Let all contenders wait on runs of a server of which every tenth answer goes wrong.

    :param bench: what is shared.
    :return: what was measured, by contender.
    """
    measured = {}
    for group in FAULT_GROUPS:
        with contextlib.ExitStack() as stack:
            # Not on one core: here the waits are to fail by the faults alone.
            started = {
                name: stack.enter_context(contender(bench, name, pinned=False, timeout=FAULT_TIMEOUT)) for name in group
            }
            start = time.monotonic() + 0.5
            end = start + FAULT_SECONDS
            plan = Plan(FAULT_WAITS, FAULT_INTERVAL, start, cpu_from=end, lag_from=end, lag_until=end, give_up_at=end)
            scenario = Scenario(finish_at=start + FAULT_FINISH, finish_over=FAULT_INTERVAL, faulty=True)
            for pipe, control in started.values():
                ask(f"{control}/scenario", asdict(scenario))
                pipe.send(plan)
            for name, (pipe, control) in started.items():
                measured[name] = Measured(pipe.recv(), scenario, plan, ask(f"{control}/stats")["connections"], {})
    return measured


def measure_batches(bench: Bench) -> dict[str, BatchCost]:
    """
    Let each contender start and follow the same rows.

    :param bench: what is shared.
    :return: what it cost, by contender: the round with the median wall time.
    """
    rounds: dict[str, list[BatchCost]] = {}
    for _ in range(BATCH_ROUNDS):
        for name in BATCHES:
            rounds.setdefault(name, []).append(run_batch(bench, name, BATCH_ROWS, RUN_SECONDS))
    return {name: sorted(costs, key=lambda cost: cost.wall)[len(costs) // 2] for name, costs in rounds.items()}


def measure_memory(bench: Bench) -> dict[int, BatchCost]:
    """
    Let the operator do a small file of rows and a large one.

    :param bench: what is shared.
    :return: what it cost, by the number of rows.
    """
    return {rows: run_batch(bench, OURS, rows, 0.0) for rows in MEMORY_ROWS}


def run_batch(bench: Bench, name: str, count: int, run_seconds: float) -> BatchCost:
    """
    Let one contender start and follow rows, in a process of its own and with a server of its own.

    :param bench: what is shared.
    :param name: the contender.
    :param count: how many rows.
    :param run_seconds: how long a run takes.
    :return: what it cost.
    """
    rows = bench.place / f"rows-{count}.jsonl"
    if not rows.exists():
        with rows.open("w") as file:
            file.writelines(json.dumps({"query": f"What is row {row} about?"}) + "\n" for row in range(count))
    output = bench.place / "results.jsonl"
    output.unlink(missing_ok=True)
    with process(server.main, bench.server_core, bench.place / "server.pem", bench.log) as from_server:
        port, control_port = from_server.recv()
        set_connections(port, None)
        scenario = Scenario(finish_at=0.0, finish_over=0.0, run_seconds=run_seconds)
        ask(f"http://127.0.0.1:{control_port}/scenario", asdict(scenario))
        batch = Batch(rows, output, BATCH_AT_ONCE)
        with process(batches.main, name, bench.contender_core, bench.log, batch) as from_contender:
            cost: BatchCost = from_contender.recv()
    if cost.failure:
        print(f"{name} with {count:,} rows: {cost.failure}", flush=True)
    return cost


def migrate(bench: Bench) -> None:
    """Make the database of the Airflow that the batches run in."""
    with bench.log.open("a") as log:
        subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True, stdout=log, stderr=log)


def measure_imports() -> dict[str, tuple[float, int]]:
    """
    Import each sensor's module in processes that have not imported it.

    :return: median milliseconds and number of modules, by sensor.
    """
    modules = [module for _, module in SENSORS.values()]
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", IMPORT_PROBE, str(IMPORTS), *modules], check=True, stdout=subprocess.PIPE, text=True
    )
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("import ")]
    measured = {}
    for name, (_, module) in SENSORS.items():
        own = [(float(took), int(count)) for of, took, count in lines if of == module]
        measured[name] = (statistics.median(took for took, _ in own), own[0][1])
    return measured


# --- tables


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """
    Print a Markdown table; all columns but the first are numbers.

    :param head: the names of the columns.
    :param rows: their cells.
    """
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for row in cells:
        aligned = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        print(f"| {' | '.join(aligned)} |", flush=True)


def print_loads(measured: dict[tuple[str, int], Measured]) -> None:
    """
    Print what waiting costs.

    :param measured: what was measured, by contender and number of waits.
    """
    print("\n### What waiting costs\n")
    rows = []
    for count, interval in LOADS:
        for name in NAMES:
            row = measured[name, count]
            cpu = row.cpu_per_poll
            rows.append(
                [
                    NAMES[name],
                    f"{count:,} every {interval:g} s",
                    f"{cpu:.2f} ms",
                    f"{cpu / measured[BARE, count].cpu_per_poll:.2f}",
                    f"{cpu / measured[DBT, count].cpu_per_poll:.2f}",
                    f"{row.connections:,}",
                    f"{row.cost.worst_lag * 1000:.0f} ms",
                    f"{row.on_time:.1%}",
                    f"{row.finish_to_event:.2f} s",
                    f"{row.survived:,}",
                ]
            )
    head = ["waiting with", "waits", "CPU per poll", "to bare", "to dbt Cloud's", "connections", "worst loop lag"]
    print_table([*head, "polls on time", "finish to event", "waits that succeeded"], rows)


def print_imports(imports: dict[str, tuple[float, int]]) -> None:
    """
    Print what naming a sensor costs a Dag file.

    :param imports: what :func:`measure_imports` gave.
    """
    print("\n### What importing the sensor costs a Dag file\n")
    print_table(
        ["importing", "time", "to dbt Cloud's", "modules loaded"],
        [
            [SENSORS[name][0], f"{took:.0f} ms", f"{took / imports[DBT][0]:.3f}", f"{modules:,}"]
            for name, (took, modules) in imports.items()
        ],
    )


def print_faults(faults: dict[str, Measured]) -> None:
    """
    Print who survives a bad server.

    :param faults: what :func:`measure_faults` gave.
    """
    print("\n### Waits that survive when every tenth answer is a 503, a connection reset or a stall of 3 s\n")
    rows = []
    for name in NAMES:
        ends = faults[name].cost.ends
        lost = Counter(
            said.partition(":")[0].partition(",")[0][:40] for _, ended_well, said in ends.values() if not ended_well
        )
        why = f"{lost.most_common(1)[0][0]}" if lost else ""
        survived = f"{faults[name].survived} of {FAULT_WAITS}"
        slowest = f"{max(faults[name].delays, default=0.0):.1f} s"
        rows.append([NAMES[name], survived, f"{lost.total()}", f"{FAULT_WAITS - len(ends)}", why, slowest])
    head = ["waiting with", "survived", "lost", f"not over after {FAULT_SECONDS:g} s", "mostly lost to"]
    print_table([*head, "slowest finish to event"], rows)


def print_batches(costs: dict[str, BatchCost]) -> None:
    """
    Print what a batch costs.

    :param costs: what :func:`measure_batches` gave.
    """
    print(f"\n### What {BATCH_ROWS:,} rows cost, {BATCH_AT_ONCE} runs of {RUN_SECONDS:g} s at once\n")
    bare = costs[BARE]
    print_table(
        ["rows with", "wall time", "to bare", "CPU a run", "to bare", "memory", "runs that succeeded"],
        [
            [
                BATCHES[name],
                f"{cost.wall:.1f} s",
                f"{cost.wall / bare.wall:.2f}",
                f"{cost.cpu * 1000 / BATCH_ROWS:.2f} ms",
                f"{cost.cpu / bare.cpu:.2f}",
                f"{cost.memory / 1e6:.0f} MB",
                f"{cost.succeeded:,}",
            ]
            for name, cost in costs.items()
        ],
    )


def print_memory(costs: dict[int, BatchCost]) -> None:
    """
    Print what memory a batch takes.

    :param costs: what :func:`measure_memory` gave.
    """
    print("\n### What memory rows of a file take\n")
    print_table(
        ["rows", "wall time", "CPU a run", "memory", "runs that succeeded"],
        [
            [
                f"{rows:,}",
                f"{cost.wall:.1f} s",
                f"{cost.cpu * 1000 / rows:.2f} ms",
                f"{cost.memory / 1e6:.0f} MB",
                f"{cost.succeeded:,}",
            ]
            for rows, cost in costs.items()
        ],
    )


def print_targets(
    measured: dict[tuple[str, int], Measured],
    imports: dict[str, tuple[float, int]],
    faults: dict[str, Measured],
    batch: dict[str, BatchCost],
    memory: dict[int, BatchCost],
) -> None:
    """
    Print what was aimed at and whether it was met; what was not measured is left out.

    :param measured: what was measured, by contender and number of waits.
    :param imports: what :func:`measure_imports` gave.
    :param faults: what :func:`measure_faults` gave.
    :param batch: what :func:`measure_batches` gave.
    :param memory: what :func:`measure_memory` gave.
    """
    rows = []

    def target(what: str, aim: str, got: str, met: bool) -> None:
        rows.append([what, aim, got, "met" if met else "**not met**"])

    for count, interval in LOADS if measured else ():
        load = f"{count:,} waits every {interval:g} s"
        ours = measured[OURS, count]
        for other, most in ((BARE, 1.3), (DBT, 0.35)):
            ratio = ours.cpu_per_poll / measured[other, count].cpu_per_poll
            of = "the bare loop" if other == BARE else "dbt Cloud's"
            target(f"{load}: CPU per poll, to {of}", f"at most {most:g}", f"{ratio:.2f}", ratio <= most)
        target(f"{load}: connections", f"at most {count // 10}", f"{ours.connections}", ours.connections <= count // 10)
        if count == LOADS[-1][0]:
            lag = ours.cost.worst_lag * 1000
            target(f"{load}: polls on time", "at least 95 %", f"{ours.on_time:.1%}", ours.on_time >= 0.95)
            target(f"{load}: worst loop lag", "under 100 ms", f"{lag:.0f} ms", lag < 100)
        target(f"{load}: waits lost", "none", f"{count - ours.survived}", ours.survived == count)
    if imports:
        ratio = imports[OURS][0] / imports[DBT][0]
        target("import of the sensor, to dbt Cloud's", "at most 0.1", f"{ratio:.3f}", ratio <= 0.1)
    if faults:
        survived, ended = faults[OURS].survived, len(faults[OURS].cost.ends)
        got = f"{ended - survived}, and {FAULT_WAITS - ended} not over"
        target("bad server: waits lost", "none", got, survived == FAULT_WAITS)
    if batch:
        ours, bare = batch[OURS], batch[BARE]
        for what, ratio, most in (
            ("wall time", ours.wall / bare.wall, 1.1),
            ("CPU a run", ours.cpu / bare.cpu, 1.5),
        ):
            target(f"batch: {what}, to the bare loop", f"at most {most:g}", f"{ratio:.2f}", ratio <= most)
        target("batch: rows lost", "none", f"{BATCH_ROWS - ours.succeeded}", ours.succeeded == BATCH_ROWS)
    if memory:
        few, many = MEMORY_ROWS
        more = (memory[many].memory - memory[few].memory) / 1e6
        what = f"batch: memory for {many:,} rows beyond that for {few:,}"
        target(what, "at most 50 MB", f"{more:.0f} MB", more <= 50 and memory[many].succeeded == many)
    print("\n### Targets of this provider\n")
    print_table(["target", "aim", "measured", ""], rows)


def prepare(place: Path) -> Bench:
    """
    Make certificates, and the environment that all contenders find.

    :param place: a temporary folder.
    :return: what all measurements share.
    """
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(place / "ca.pem"))
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(place / "server.pem"))
    for name in [*os.environ]:
        if name.lower().endswith("_proxy") or name.startswith(("AIRFLOW_", "ANTHROPIC_")):
            del os.environ[name]
    os.environ.update(
        {
            "AIRFLOW_HOME": str(place / "airflow"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            # What the clients, in their different ways, take their certificates from.
            "SSL_CERT_FILE": str(place / "ca.pem"),
            "REQUESTS_CA_BUNDLE": str(place / "ca.pem"),
        }
    )
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return Bench(place, cores[0], cores[1]) if len(cores) > 1 else Bench(place, None, None)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description="Compare waits and batches of this provider with those of others.")
    parts = ("loads", "imports", "faults", "batch", "memory")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"what to measure: {', '.join(parts)}; all by default")
    wanted = set(parser.parse_args().parts) or set(parts)
    if wanted - set(parts):
        parser.error(f"no such part: {', '.join(wanted - set(parts))}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = prepare(Path(folder))
        packages = (
            "apache-airflow",
            "aiohttp",
            *(f"apache-airflow-providers-{each}" for each in ("dbt-cloud", "http", "anthropic")),
        )
        print(
            f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, "
            f"{', '.join(f'{each} {version(each)}' for each in packages)}. "
            + (
                "Each contender on one core, the server on another."
                if bench.server_core is not None
                else "Processes share all cores."
            ),
            flush=True,
        )
        try:
            measured: dict[tuple[str, int], Measured] = {}
            if "loads" in wanted:
                for name in NAMES:
                    measured |= measure_loads(bench, name)
                print_loads(measured)
            imports = measure_imports() if "imports" in wanted else {}
            if imports:
                print_imports(imports)
            faults = measure_faults(bench) if "faults" in wanted else {}
            if faults:
                print_faults(faults)
            if wanted & {"batch", "memory"}:
                migrate(bench)
            batch = measure_batches(bench) if "batch" in wanted else {}
            if batch:
                print_batches(batch)
            memory = measure_memory(bench) if "memory" in wanted else {}
            if memory:
                print_memory(memory)
        except EOFError:
            sys.exit(f"A process ended early. It wrote:\n{bench.log.read_text()}")
        print_targets(measured, imports, faults, batch, memory)
    print(f"\nTook {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    main()
