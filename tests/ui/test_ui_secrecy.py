"""What the UI and Airflow's files have of the API key, after all that the tests before did."""

from __future__ import annotations

from tests.airflow.airflow_processes import AirflowProcesses
from tests.dify_stand_in import API_KEY


def test_the_key_came_back_in_no_answer_and_stands_in_no_file(
    airflow: AirflowProcesses, addresses_with_the_key: list[str]
) -> None:
    assert addresses_with_the_key == []
    for path, content in airflow.everything_written():
        assert API_KEY.encode() not in content, path
