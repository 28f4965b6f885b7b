"""Apache Airflow provider for Dify: wait on Dify workflow runs inside Dags and use their outputs."""

from __future__ import annotations

__version__ = "0.1.0"
