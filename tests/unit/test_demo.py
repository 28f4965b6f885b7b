"""What the demo shows of Airflow's output."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "demo.py"
RUNNING = "Dify workflow run 1 is running."


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            f"2026-11-24T14:32:04.8Z [info     ] {RUNNING} "
            "[airflow.task.operators.airflow_provider_dify.sensors.dify.DifyWorkflowRunSensor] loc=waiting.py:107",
            RUNNING,
        ),
        (f"[2026-11-24T14:34:37.615+0000] {{waiting.py:107}} INFO - {RUNNING}", RUNNING),
        ("The workflow answered 'hello' and used 42 tokens.", "The workflow answered 'hello' and used 42 tokens."),
        (
            "2026-11-24T14:32:10.8Z [info     ] Success criteria met. Exiting. "
            "[airflow.task.operators.airflow_provider_dify.sensors.dify.DifyWorkflowRunSensor] loc=sensor.py:250",
            None,
        ),
        ("2026-11-24T14:32:10.8Z [info     ] ::endgroup::                   [task] loc=task_runner.py:2379", None),
        ("[2026-11-24T14:34:37.615+0000] {taskinstance.py:100} INFO - Marking task as SUCCESS.", None),
        ("You might need to install the graphviz package and necessary system packages.", None),
    ],
)
def test_the_demo_shows_what_the_provider_and_the_example_say(demo: ModuleType, line: str, shown: str | None) -> None:
    assert demo.task_line(line) == shown


@pytest.mark.parametrize(
    ("message", "matters"),
    [
        ("Dify workflow run 1 succeeded after 0.4 seconds and 2 steps.", True),
        ("50 of 50 runs are over, 0 active, 2.1 k tokens, 18.7 runs/s, about 0 s left", True),
        (RUNNING, False),
        ("12 of 50 runs are over, 4 active", False),
        ("Dify 1.16.1 at http://127.0.0.1:36069/v1.", False),
        ("Dify started workflow run 1 for user 'airflow/1/a/b/c/1'.", False),
    ],
)
def test_the_demo_leaves_out_what_a_newcomer_need_not_read(demo: ModuleType, message: str, matters: bool) -> None:
    assert bool(demo.MATTERS.match(message)) == matters


def test_a_failed_command_ends_with_its_cause(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    airflow = tmp_path / "python"
    airflow.write_text(
        "#!/bin/sh\n"
        "echo 'airflow_provider_dify.exceptions.DifyAuthenticationError: Dify refused the API key'\n"
        "echo 'and twenty more lines'\n"
        "exit 1\n"
    )
    airflow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(airflow))
    log = tmp_path / "demo.log"
    with log.open("w", encoding="utf-8") as file, pytest.raises(SystemExit) as stopped:
        demo.airflow("dags", "test", env={}, log=file)
    first, *_, last = str(stopped.value).splitlines()
    assert str(log) in first
    assert last == "DifyAuthenticationError: Dify refused the API key"
    assert "and twenty more lines" in log.read_text(encoding="utf-8")
