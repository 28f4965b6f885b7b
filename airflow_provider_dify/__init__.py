# SPDX-License-Identifier: Apache-2.0
"""Apache Airflow provider for Dify: start Dify workflow runs in Dags, wait on them and use their outputs."""

from __future__ import annotations

__version__ = "0.1.0"

# Where the pages of docs/ are published; `pyproject.toml` names the same place.
DOCUMENTATION = "https://github.com/airflow-provider-dify/airflow-provider-dify/blob/main/docs"
