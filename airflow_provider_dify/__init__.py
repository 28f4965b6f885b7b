"""Apache Airflow provider for Dify: start Dify workflow runs in Dags, wait for them and use their outputs."""

from __future__ import annotations

__version__ = "0.1.0"

# Where the pages of docs/ are, as they were when this version was released; `pyproject.toml` names the same repository.
DOCUMENTATION = f"https://github.com/airflow-provider-dify/airflow-provider-dify/blob/v{__version__}/docs"
