"""
Measure what one task of ``DifyRunWorkflowOperator`` costs a worker, whose run is over at once, and what it imports.

``python benchmarks/single_task.py`` prints the medians of some processes; the server is in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scenarios

REPEATS = 9
STEPS = {
    "parse": "import the operator and make it, as a Dag file does",
    "first": "`execute`, with what it imports",
    "again": "`execute` of another task in the same process",
}


def cost_of(work: Callable[[], object]) -> dict[str, Any]:
    """Do something, and return its milliseconds of time and of CPU time, and the modules that it imported."""
    before = set(sys.modules)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall * 1000, "cpu": cpu * 1000, "modules": sorted(set(sys.modules) - before)}


def measure() -> None:
    """Do the task in this process, and print what its steps cost."""
    # What every Dag file has imported already.
    from airflow.sdk import DAG, task  # noqa: F401

    made: list[scenarios.Work] = []
    parse = cost_of(lambda: made.append(scenarios.operator_work("first")))
    first = cost_of(made.pop())
    again = cost_of(scenarios.operator_work("again"))
    print(json.dumps({"parse": parse, "first": first, "again": again}))


def main() -> None:
    """Measure in some processes, and print tables."""
    parser = argparse.ArgumentParser(description="Measure what one task of the operator costs a worker.")
    parser.add_argument("--list", action="store_true", help="print the modules of this package, too")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
        return
    with scenarios.stand_in() as dify:
        # The first one is for the compiled files and the disk's cache.
        rounds = [
            scenarios.run_in_process(dify, Path(__file__).name, scenarios.start_and_wait) for _ in range(REPEATS + 1)
        ][1:]
    print(
        "| one task | wall time | CPU time | modules imported | of this package |\n| --- | ---: | ---: | ---: | ---: |"
    )
    listed = []
    for step, title in STEPS.items():
        wall, cpu = (statistics.median(each[step][name] for each in rounds) for name in ("wall", "cpu"))
        modules = rounds[0][step]["modules"]
        ours = [name for name in modules if name.split(".")[0] == scenarios.PACKAGE]
        print(f"| {title} | {wall:.1f} ms | {cpu:.1f} ms | {len(modules)} | {len(ours)} |")
        listed += [f"{step}: {name}" for name in ours]
    if arguments.list:
        print("\n" + "\n".join(listed))


if __name__ == "__main__":
    main()
