"""
Run the tests in two parts and print one total: ``make test`` runs the short ones, ``make test-long`` the others.

``--long`` chooses those that are marked ``long``; the other arguments go to pytest. Tests that start real Airflow
processes run after the others, because they take the whole machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

PYTEST = (sys.executable, "-m", "pytest")
CORES = os.cpu_count() or 1
# pytest's exit codes: all passed; no test was selected, which may happen to one of the parts.
PASSED, NO_TESTS = 0, 5


@dataclass(frozen=True)
class Part:
    """A part of the tests: what it is, which marker its tests have, and how pytest shares them out to processes."""

    title: str
    marker: str
    arguments: tuple[str, ...]


PARTS = (
    # More processes than cores: many tests wait for a while.
    Part(
        "The package's parts, and Dags with dag.test()",
        "not airflow_processes",
        (f"--numprocesses={min(2 * CORES, 8)}", "--dist=worksteal"),
    ),
    # A file needs an Airflow of its own, or shares one with the other files of its process.
    Part(
        "Dags on real Airflow processes: scheduler, triggerer, API server",
        "airflow_processes",
        (f"--numprocesses={min(CORES + 1, 4)}", "--dist=loadfile"),
    ),
)
# On two idle cores, in minutes.
SHORT_TAKES, LONG_TAKES = 4, 10


@dataclass(frozen=True)
class Counts:
    """How many tests of a part, or of all, passed and did not."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    @classmethod
    def read(cls, report: Path) -> Counts:
        """
        Count the tests in pytest's JUnit report.

        :param report: the file; one that is missing counts as no tests.
        :return: the counts; errors of fixtures and of files count as failures.
        """
        if not report.exists():
            return cls()
        # pytest wrote it a moment ago.
        suites = ElementTree.parse(report).getroot().iter("testsuite")  # noqa: S314
        counts = cls()
        for suite in suites:
            tests, failures, errors, skipped = (
                int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
            )
            counts += cls(max(0, tests - failures - errors - skipped), failures + errors, skipped)
        return counts


def main(arguments: list[str]) -> int:
    """
    Run both parts.

    :param arguments: ``--long`` for the long tests; further arguments for pytest.
    :return: the exit code: 0 if tests ran and all passed.
    """
    is_long = "--long" in arguments
    arguments = [argument for argument in arguments if argument != "--long"]
    python = ".".join(map(str, sys.version_info[:2]))
    print(f"Testing with Airflow {version('apache-airflow')} and Python {python}.")
    if arguments:
        print(f"A selection: {' '.join(arguments)}")
    else:
        takes = LONG_TAKES if is_long else SHORT_TAKES
        print(f"The {'long' if is_long else 'short'} tests, in two parts: about {takes} minutes on two idle cores.")
    began = time.monotonic()
    total, codes = Counts(), []
    with tempfile.TemporaryDirectory(prefix="test-reports-") as folder:
        for number, part in enumerate(PARTS, start=1):
            print(f"\nPart {number} of {len(PARTS)}: {part.title}", flush=True)
            report = Path(folder) / f"{number}.xml"
            marker = f"{part.marker} and {'long' if is_long else 'not long'}"
            chosen = ("-m", marker, f"--junitxml={report}")
            done = subprocess.run([*PYTEST, *part.arguments, *chosen, *arguments], check=False)
            codes.append(done.returncode)
            total += Counts.read(report)
    good = all(code in (PASSED, NO_TESTS) for code in codes) and PASSED in codes
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    skipped = f"{total.skipped} skipped or expected to fail"
    result = "All is well." if good else "FAILED."
    print(f"\nTotal: {total.passed} passed, {total.failed} failed, {skipped} in {minutes} min {seconds} s. {result}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
