"""What the report of a failed test says beside the failure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.dify_stand_in import API_KEY

FAILING = """
import requests
from tests.conftest import *
from tests.dify_stand_in import reset

def test_before(dify):
    requests.get(f"{dify.base_url}/before", timeout=10)

def test_that_fails(dify):
    authorization = {"Authorization": f"Bearer {API_KEY}"}
    body = {"inputs": {}, "user": "anna", "response_mode": "streaming"}
    requests.post(f"{dify.base_url}/workflows/run", json=body, headers=authorization, timeout=10)
    dify.misbehave(reset())
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{dify.base_url}/parameters", timeout=10)
    requests.get(f"{dify.base_url}/info?key={API_KEY}", timeout=10)
    raise AssertionError("It failed.")
"""


def test_a_failed_test_shows_its_requests_but_no_key_and_no_requests_of_another_test(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_failing.py").write_text(FAILING)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", str(tmp_path)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path).stdout

    assert "1 failed, 1 passed" in said
    assert re.search(r"\+0\.\d+ s  port \d+  POST /v1/workflows/run by anna: 200", said)
    assert "GET /v1/parameters: no response" in said
    assert re.search(r"GET /v1/info\?key=\*\*\*: 401", said)
    assert "/before" not in said
    assert API_KEY not in said
