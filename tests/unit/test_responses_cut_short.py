"""A start whose response breaks off, at whichever byte: its run is found, and it is the only one."""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.combinations import pairs
from tests.dify_stand_in import API_KEY, DifyStandIn, Start
from tests.unit.relays import Change, Relay
from tests.unit.test_run_workflow import RunWorkflow, on_a_worker, on_an_event_loop
from tests.unit.test_start_over_sockets import after_the_start

INPUTS = {"query": "x"}
# The whole response has 3,600 bytes (1.16.1) to 7,700 (1.12.1); the run is named in the first thousand.
LENGTHS = (*range(0, 1200, 60), *range(1200, 7800, 600))
FEW_LENGTHS = (0, 60, 300, 600, 900, 3000)

pytestmark = pytest.mark.usefixtures("quick_retries")


def cut_once_after(length: int) -> Change:
    """Cut after so many bytes, and nothing that comes after that."""
    left = length

    def change(piece: bytes) -> bytes:
        nonlocal left
        if left < 0:
            return piece
        kept = piece[:left]
        left -= len(piece)
        return kept

    return change


@pytest.mark.parametrize(
    ("over_tls", "run_workflow"),
    pairs([pytest.param(False, id="http"), pytest.param(True, id="https")], [on_a_worker, on_an_event_loop]),
)
@pytest.mark.parametrize("lengths", [FEW_LENGTHS, pytest.param(LENGTHS, marks=pytest.mark.long)], ids=["few", "many"])
def test_a_start_whose_response_breaks_off_at_any_byte_is_one_run(
    certificate: tuple[ssl.SSLContext, Path],
    monkeypatch: pytest.MonkeyPatch,
    dialect: str,
    run_workflow: RunWorkflow,
    over_tls: bool,
    lengths: tuple[int, ...],
) -> None:
    for length in lengths:
        with (
            DifyStandIn(dialect, tls=certificate[0] if over_tls else None) as dify,
            Relay(dify.port, after_the_start(dify, cut_once_after(length))) as relay,
        ):
            dify.starts.append(Start(statuses=("running", "succeeded"), fields={"inputs": INPUTS}))
            scheme = "https" if over_tls else "http"
            fields: dict[str, Any] = {
                "conn_type": "dify",
                "host": f"{scheme}://127.0.0.1:{relay.port}/v1",
                "password": API_KEY,
                "extra": {"timeout": 10, "verify": str(certificate[1])},
            }
            monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(fields))
            run = run_workflow(INPUTS, "me", timeout=20)
            assert [started.workflow_run_id for started in dify.started] == [run.id], length
            assert run.status == "succeeded"
