"""
Count the files of this package that a reader comes through with a debugger: those of which a function is called.

``python benchmarks/files_entered.py`` prints how many they are, ``--list`` their names, too. It takes half a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import pkgutil
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import scenarios


def import_everything() -> None:
    """Import all of the package, so that no module's own statements count."""
    package = importlib.import_module(scenarios.PACKAGE)
    for module in pkgutil.walk_packages(package.__path__, f"{scenarios.PACKAGE}."):
        # Some need another Airflow.
        with contextlib.suppress(ImportError):
            importlib.import_module(module.name)


def measure(name: str, run_id: str) -> None:
    """Do a scenario in this process, and print the files that it entered."""
    import_everything()
    folder = scenarios.ROOT / scenarios.PACKAGE
    work = scenarios.work_named(name, run_id)
    entered: set[str] = set()

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name != "<module>" and code.co_filename.startswith(f"{folder}/"):
            entered.add(code.co_filename)

    # For the threads that start from here on, with event loops of their own.
    threading.setprofile(on_event)
    sys.setprofile(on_event)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    print(json.dumps(sorted(str(Path(file).relative_to(folder)) for file in entered)))


def main() -> None:
    """Measure all scenarios, and print a table."""
    parser = argparse.ArgumentParser(description="Count the files of this package that are entered in one go.")
    parser.add_argument("--list", action="store_true", help="print the files, too")
    parser.add_argument("--measure", nargs=2, metavar=("SCENARIO", "RUN_ID"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    print("| scenario | files entered |\n| --- | ---: |")
    with scenarios.stand_in() as dify:
        for title, work in scenarios.SCENARIOS.items():
            files = scenarios.run_in_process(dify, Path(__file__).name, work)
            print(f"| {title} | {len(files)} |", flush=True)
            if arguments.list:
                print("".join(f"|   {file} | |\n" for file in files), end="")


if __name__ == "__main__":
    main()
